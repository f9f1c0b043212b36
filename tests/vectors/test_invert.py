import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.decoding.strategy import Inversion
from unembed.encoders.base import FakeEncoder
from unembed.encoders.vectors import VectorStatistics
from unembed.errors import ConfigError, EmbeddingError, EncoderError
from unembed.vectors.invert import invert_file, invert_stream, invert_text, invert_to_file
from unembed.vectors.output import PartFile, named_columns
from unembed.vectors.read import VectorFile


def answering(encoder, text):
    """An inverter that always gives the same answer."""
    ids = encoder.tokenizer.encode([text])[0]
    given = []

    def invert(vectors, **options):
        given.append((vectors, options))
        return [Inversion(text, ids, [0.5] * len(ids), passes=3, encoder_calls=0)]

    def require_encoder(other):
        encoder.identity.require_same(other.identity, "vectors")

    return SimpleNamespace(
        require_encoder=require_encoder,
        tokenizer=encoder.tokenizer,
        invert=invert,
        given=given,
        alignment=None,
        dimension=encoder.identity.dimension,
    )


def test_invert_text_a_perfect_recovery(encoder):
    inverter = answering(encoder, "the cat sleeps.")
    trip = invert_text(inverter, encoder, "The cat sleeps.", steps=4, seed=1)
    assert trip.original == "The cat sleeps."
    assert trip.inversion.text == "the cat sleeps."
    assert trip.exact is True
    assert trip.token_recall == 1.0
    assert trip.cosine == pytest.approx(1.0, abs=1e-6)
    assert trip.seconds >= 0.0
    vectors, options = inverter.given[0]
    assert np.array_equal(vectors, encoder.encode(["The cat sleeps."]))
    assert options == {"encoder": encoder, "steps": 4, "seed": 1}


def test_invert_text_a_partial_recovery(encoder):
    trip = invert_text(answering(encoder, "cat the dog"), encoder, "the cat the river.")
    assert trip.exact is False
    assert trip.token_recall == pytest.approx(2 / 4)  # the, cat of the, cat, river, .
    one, other = encoder.encode(["the cat the river.", "cat the dog"])
    assert trip.cosine == pytest.approx(float(one @ other), abs=1e-6)
    assert trip.cosine < 0.99


def test_invert_text_an_empty_recovery_has_no_cosine(encoder):
    trip = invert_text(answering(encoder, ""), encoder, "the cat sleeps.")
    assert trip.cosine is None
    assert trip.token_recall == 0.0
    assert trip.exact is False


def test_invert_text_an_encoder_the_inverter_does_not_know_is_refused(encoder):
    inverter = answering(encoder, "cat")
    with pytest.raises(EncoderError, match="expected vectors of the encoder fake"):
        invert_text(inverter, FakeEncoder(dimension=8), "the cat sleeps.")
    assert inverter.given == []


def test_invert_text_an_empty_text_is_refused(encoder):
    with pytest.raises(EmbeddingError, match="visible character"):
        invert_text(answering(encoder, "cat"), encoder, " \n")


def test_invert_text_the_tiny_inverter_recovers_words(inverter, encoder):
    trip = invert_text(inverter, encoder, "dog dog dog", steps=2)
    assert set(trip.inversion.text.split()) == {"dog"}
    assert trip.token_recall == 1.0
    assert trip.cosine > 0.9


@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 32)])
def test_vectors_of_a_file_are_inverted_in_order(inverter, encoder, tmp_path, shape):
    vectors = encoder.encode(["dog dog", "cat cat", "river river"])[: 1 if len(shape) == 1 else 3]
    vectors = vectors[: shape[0]] if len(shape) == 2 else vectors[0]
    np.save(tmp_path / "vectors.npy", vectors)
    found = invert_file(inverter, tmp_path / "vectors.npy", steps=2)
    assert [item.text for item in found] == [
        item.text for item in inverter.invert(vectors, steps=2)
    ]
    assert len(found) == (1 if len(shape) == 1 else shape[0])


def archive(broken=False):
    buffer = io.BytesIO()
    np.savez(buffer, vectors=np.ones((1, 32)))
    return buffer.getvalue()[: 40 if broken else None]


def pickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def saved():
    buffer = io.BytesIO()
    np.save(buffer, np.ones(32))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [None, b"", b"text, not numbers", saved()[:100], saved()[:-8], pickled(), archive(True)],
    ids=["missing", "empty", "text", "half a header", "truncated", "pickled", "broken archive"],
)
def test_a_file_that_is_no_array_is_refused(inverter, tmp_path, content):
    path = tmp_path / "vectors.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EmbeddingError) as caught:
        invert_file(inverter, path)
    assert f"expected a NumPy array at {path}" in str(caught.value)
    assert "numpy.save" in str(caught.value)


@pytest.fixture
def three(encoder):
    return encoder.encode(["dog dog", "cat cat", "the river"])


def texts_of(path):
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_invert_to_file_texts_are_streamed_to_a_file(
    inverter, three, tmp_path, suffix, monkeypatch
):
    monkeypatch.setattr("unembed.vectors.invert.BATCH", 4)
    monkeypatch.setattr("unembed.vectors.output._GROUP", 8)
    monkeypatch.setattr("unembed.vectors.read.CHUNK", 6)
    vectors = np.concatenate([three] * 7)
    np.save(tmp_path / "v.npy", vectors)
    out, seen = tmp_path / f"out{suffix}", []
    count = invert_to_file(
        *(inverter, VectorFile(tmp_path / "v.npy"), out),
        progress=lambda *step: seen.append(step),
        steps=2,
    )
    expected = inverter.invert(vectors, steps=2)
    rows = texts_of(out)
    assert count == len(rows) == 21
    assert [row["row"] for row in rows] == list(range(21))
    assert [row["text"] for row in rows] == [item.text for item in expected]
    assert [row["token_ids"] for row in rows] == [item.token_ids for item in expected]
    assert rows[0]["confidences"] == pytest.approx(expected[0].confidences, abs=1e-6)
    assert (rows[0]["passes"], rows[0]["encoder_calls"]) == (2, 0)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("inverting", 21, 21)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{suffix}", "v.npy"]


def test_invert_to_file_bad_vectors_are_counted_and_skipped(inverter, three, tmp_path):
    vectors = np.concatenate([three, three])
    vectors[1], vectors[4] = np.nan, 0.0
    np.save(tmp_path / "v.npy", vectors)
    source = VectorFile(tmp_path / "v.npy", skip_bad=True)
    assert invert_to_file(inverter, source, tmp_path / "out.jsonl", steps=2) == 4
    rows = texts_of(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == [0, 2, 3, 5]
    assert source.left_out == {"NaN or infinity": 1, "only zeros": 1}
    alone = [inverter.invert(three[row % 3], steps=2)[0].text for row in (0, 2, 3, 5)]
    assert [row["text"] for row in rows] == alone


def test_invert_file_each_vector_draws_from_its_row_whatever_is_left_out(encoder, three, tmp_path):
    inverter = answering(encoder, "cat")
    inverter.encoder = encoder.identity
    inverter.invert = lambda v, **o: (
        inverter.given.append((len(v), o["first_index"]))
        or [Inversion("cat", [1], [0.5], 1, 0)] * len(v)
    )
    vectors = np.concatenate([three, three])
    vectors[2] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    invert_file(inverter, VectorFile(tmp_path / "v.npy", skip_bad=True))
    assert inverter.given == [(2, 0), (3, 3)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_invert_to_file_a_bad_vector_leaves_the_old_file_as_it_was(
    inverter, three, tmp_path, suffix, monkeypatch
):
    monkeypatch.setattr("unembed.vectors.read.CHUNK", 3)
    vectors = np.concatenate([three, three])
    vectors[4, 7] = np.inf
    np.save(tmp_path / "v.npy", vectors)
    out = tmp_path / f"out{suffix}"
    out.write_text("old", encoding="utf-8")
    with pytest.raises(EmbeddingError, match=r"NaN or infinity in vector 4 of .*--skip-bad"):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), out, steps=2)
    assert out.read_text(encoding="utf-8") == "old"
    source = VectorFile(tmp_path / "v.npy", skip_bad=True)  # the first three are not lost
    assert invert_to_file(inverter, source, out, steps=2) == 5
    assert [row["row"] for row in texts_of(out)] == [0, 1, 2, 3, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "v.npy"]


@pytest.mark.parametrize("name", ["out.csv", "none/out.jsonl"])
def test_invert_to_file_a_place_that_cannot_be_written_is_refused(inverter, three, tmp_path, name):
    np.save(tmp_path / "v.npy", three)
    with pytest.raises(EmbeddingError, match="--out"):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_invert_to_file_the_vectors_are_not_written_over(inverter, three, tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in three.tolist()), encoding="utf-8")
    else:
        pq.write_table(pa.table({"embedding": three.tolist()}), path)
    before = path.read_bytes()
    (tmp_path / "folder").mkdir()
    out = tmp_path / "folder" / ".." / path.name
    with pytest.raises(EmbeddingError, match="the vectors themselves, which would be lost"):
        invert_to_file(inverter, VectorFile(path), out, steps=2)
    assert path.read_bytes() == before


def test_invert_to_file_nothing_recovered_is_an_error_and_no_file(inverter, three, tmp_path):
    np.save(tmp_path / "v.npy", np.zeros_like(three))
    source = VectorFile(tmp_path / "v.npy", skip_bad=True)
    with pytest.raises(EmbeddingError, match=r"3 left out: 3 × only zeros \(row 0, 1, 2\)"):
        invert_to_file(inverter, source, tmp_path / "out.jsonl", steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]


def test_invert_to_file_a_folder_in_the_place_of_the_texts_is_refused_at_once(
    encoder, three, tmp_path
):
    np.save(tmp_path / "v.npy", three)
    (tmp_path / "out.jsonl").mkdir()
    inverter = answering(encoder, "cat")
    with pytest.raises(EmbeddingError, match="found a folder"):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), tmp_path / "out.jsonl")
    assert inverter.given == []


def test_invert_file_a_folder_is_refused(inverter, tmp_path):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(EmbeddingError, match=r"NumPy array at .*found a folder"):
        invert_file(inverter, tmp_path / "folder.npy")


def test_invert_to_file_goes_on_after_a_kill(inverter, three, tmp_path, monkeypatch):
    monkeypatch.setattr("unembed.vectors.read.CHUNK", 3)
    np.save(tmp_path / "v.npy", np.concatenate([three] * 3))
    out, calls = tmp_path / "out.jsonl", []
    invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), out, steps=2)
    whole = out.read_bytes()
    out.unlink()

    def stop(stage, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), out, progress=stop, steps=2)
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(part.read_bytes()[:-7])  # the last line was cut off
    decode = inverter.invert
    monkeypatch.setattr(
        inverter, "invert", lambda v, **o: calls.append(o["first_index"]) or decode(v, **o)
    )
    with pytest.raises(EmbeddingError, match="one of other vectors, settings or weights"):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), out, steps=3)
    invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), out, steps=2)
    assert calls == [3, 6]
    assert out.read_bytes() == whole
    assert not part.exists()


def test_part_file_is_written_by_one_process_at_a_time(tmp_path):
    first = PartFile(tmp_path / "o.jsonl", {})
    first.write([{"row": 0}])
    with pytest.raises(EmbeddingError, match=r"o.jsonl.part to be free; found another process"):
        PartFile(tmp_path / "o.jsonl", {})
    first.close()
    assert PartFile(tmp_path / "o.jsonl", {}).count == 1


def test_plain_writes_numbers_that_json_lacks_as_null():
    columns = {"a": float("nan"), "b": [float("inf"), 1.5], "text": "x"}
    assert named_columns(columns) == {"a": None, "b": [None, 1.5], "source_text": "x"}


@pytest.mark.parametrize("size", [0, "a", 1.5])
def test_invert_stream_refuses_a_batch_size_that_is_none(inverter, three, tmp_path, size):
    np.save(tmp_path / "v.npy", three)
    with pytest.raises(ConfigError, match="batch_size as a whole number of at least 1"):
        invert_file(inverter, tmp_path / "v.npy", batch_size=size)


def test_invert_to_file_takes_paths_as_text(inverter, three, tmp_path):
    np.save(tmp_path / "v.npy", three)
    out = tmp_path / "o.jsonl"
    assert invert_to_file(inverter, str(tmp_path / "v.npy"), str(out), steps=1) == 3
    assert len(texts_of(out)) == len(invert_file(inverter, str(tmp_path / "v.npy"), steps=1)) == 3


def test_named_columns_never_share_a_name():
    columns = {"text": "a", "source_text": "b", "source_source_text": "c", "id": 1}
    assert named_columns(columns) == {
        "source_source_source_text": "a", "source_text": "b", "source_source_text": "c", "id": 1,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_invert_to_file_keeps_half_a_surrogate_pair(inverter, three, tmp_path, suffix):
    row = {"id": "a\ud83d", "tags": [{"b\ud83d": "c\ud83d"}], "embedding": three[0].tolist()}
    (tmp_path / "v.jsonl").write_text(json.dumps(row))
    source = VectorFile(tmp_path / "v.jsonl", keep=["id", "tags"])
    invert_to_file(inverter, source, tmp_path / f"out{suffix}", steps=2)
    (out,) = texts_of(tmp_path / f"out{suffix}")
    assert out["id"] == r"a\ud83d"
    tags = out["tags"] if suffix == ".jsonl" else json.loads(out["tags"])
    assert tags == [{r"b\ud83d": r"c\ud83d"}]
    assert sorted(tmp_path.glob("out*")) == [tmp_path / f"out{suffix}"]


def test_invert_to_file_writes_through_no_link(inverter, three, tmp_path):
    np.save(tmp_path / "v.npy", three)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "out.jsonl.part").symlink_to(tmp_path / "precious")
    with pytest.raises(EmbeddingError, match="a place to write"):
        invert_to_file(inverter, VectorFile(tmp_path / "v.npy"), tmp_path / "out.jsonl", steps=2)
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_invert_to_file_keeps_columns_and_checks(inverter, encoder, three, tmp_path, suffix):
    table = {"id": [7, 8, 9], "text": ["a", "b", None], "embedding": three.tolist()}
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    source = VectorFile(tmp_path / "v.parquet", keep=["id", "text"])
    invert_to_file(inverter, source, tmp_path / f"out{suffix}", check=encoder, steps=2)
    rows = texts_of(tmp_path / f"out{suffix}")
    assert [row["id"] for row in rows] == [7, 8, 9]
    assert [row["source_text"] for row in rows] == ["a", "b", None]
    for row, vector in zip(rows, three, strict=True):
        if row["text"].strip():
            expected = float(encoder.encode([row["text"]])[0] @ vector)
            assert row["cosine"] == pytest.approx(expected, abs=1e-5)
        else:
            assert row["cosine"] is None


def test_invert_file_notes_vectors_of_another_encoder(inverter, three, tmp_path):
    draws = np.random.default_rng(0).normal(size=(600, 32)) / np.arange(1, 33)
    own = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    fingerprint = SimpleNamespace(statistics=VectorStatistics.measure(own))
    known = SimpleNamespace(
        encoder=inverter.encoder,
        alignment=None,
        dimension=inverter.encoder.dimension,
        fingerprint=fingerprint,
        invert=lambda v, **o: [Inversion("cat", [1], [0.5], 1, 0)] * len(v),
    )
    for vectors, notes in ((own[:9], 0), (own[:9, ::-1], 1)):
        np.save(tmp_path / "v.npy", vectors)
        source = VectorFile(tmp_path / "v.npy")
        invert_file(known, source)
        assert len(source.notes) == notes


def test_invert_stream_and_its_callers_refuse_what_is_no_inverter(inverter, three, tmp_path):
    np.save(tmp_path / "v.npy", three)
    calls = (
        lambda inverter: invert_text(inverter, FakeEncoder(), "a text"),
        lambda inverter: invert_file(inverter, tmp_path / "v.npy"),
        lambda inverter: invert_to_file(inverter, tmp_path / "v.npy", tmp_path / "o.jsonl"),
        lambda inverter: list(invert_stream(inverter, tmp_path / "v.npy")),
    )
    for call in calls:
        for other in (None, 3, FakeEncoder(), type(inverter)):
            with pytest.raises(ConfigError, match="an inverter; found"):
                call(other)
    assert len(list(invert_stream(inverter, str(tmp_path / "v.npy")))) == 1
    with pytest.raises(ConfigError, match="after as a whole number"):
        list(invert_stream(inverter, tmp_path / "v.npy", after="a"))
    with pytest.raises(ConfigError, match="progress as a function"):
        invert_to_file(inverter, tmp_path / "v.npy", tmp_path / "o.jsonl", progress=3)
    assert invert_to_file(inverter, tmp_path / "v.npy", tmp_path / "o.jsonl", progress=None) == 3
