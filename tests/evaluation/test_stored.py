"""Stored vectors with their texts: measured as they are, from every format."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.encoders.vectors import as_unit_vectors
from unembed.errors import ConfigError, DataError, EmbeddingError, EncoderError
from unembed.evaluation.bootstrap import duration
from unembed.evaluation.evaluate import evaluate
from unembed.evaluation.samples import Passage, PassageFile, StoredPassages, paired
from unembed.vectors.read import VectorFile

from .test_resuming import without_time

D = 32


@pytest.fixture
def texts(pieces):
    return [piece.text for piece in pieces[:40]]


@pytest.fixture
def vectors(encoder, texts):
    """What a store would hold, of another length than 1."""
    return encoder.encode(texts) * 3


@pytest.fixture
def stored(lookup_of, texts, vectors):
    """An inverter that knows the texts by these vectors, as they are scaled to unit length."""
    inverter = lookup_of(texts)
    units = as_unit_vectors(vectors, D)
    inverter.known = {v.tobytes(): text for v, text in zip(units, texts, strict=True)}
    return inverter


def save_table(folder, name, texts, vectors, **columns):
    path = folder / name
    rows = [
        {"vector": vector.tolist(), "body": text} | {k: v[i] for k, v in columns.items()}
        for i, (text, vector) in enumerate(zip(texts, vectors, strict=True))
    ]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        head = ["vector", "body", *columns]
        lines = [f'"{row["vector"]}"' + "".join(f",{row[k]}" for k in head[1:]) for row in rows]
        path.write_text("\n".join([",".join(head), *lines]), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_evaluate_measures_stored_vectors_whole(stored, encoder, texts, vectors):
    report = evaluate(stored, encoder, texts, vectors=vectors)
    row = report.rows["inverter"]
    assert row["exact match"].mean == 1.0
    assert row["cosine"].mean == pytest.approx(1.0)
    assert row["exact match"].n == len(texts), "each vector is one text, however it would be cut"
    assert report.settings["vectors"] == "stored"
    assert report.rows["shuffled embedding"]["exact match"].mean < 1.0
    assert not any("stored vectors are not" in note for note in report.notes)


def test_evaluate_does_not_embed_the_texts_again(stored, encoder, texts, vectors):
    """Vectors that belong to other texts are measured as what they are: wrong for their own."""
    report = evaluate(stored, encoder, texts, vectors=np.roll(vectors, 7, axis=0))
    assert report.rows["inverter"]["exact match"].mean == 0.0
    (note,) = [note for note in report.notes if "stored vectors are not those" in note]
    assert "40 of 40 have a cosine below 0.99" in note
    assert report.verdict.startswith("The stored vectors are not the encoder's of these texts")
    assert "prompt, pooling, truncation" in note


def test_evaluate_of_stored_vectors_needs_no_encoder(stored, texts, vectors):
    report = evaluate(stored, None, texts, vectors=vectors)
    assert report.rows["inverter"]["token-set F1"].mean == 1.0
    assert report.rows["inverter"]["cosine"] is None
    assert any(note.startswith("cosine: not measured") for note in report.notes)
    with pytest.raises(EncoderError, match="stored vector with each text"):
        evaluate(stored, None, texts)
    with pytest.raises(ConfigError, match="encoder"):
        evaluate(stored, None, texts, vectors=vectors, strategy="best-of:encoder_calls=2")


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.json", "t.csv"])
def test_stored_passages_read_tables(stored, encoder, texts, vectors, tmp_path, name):
    langs = ["en" if i % 2 else "de" for i in range(len(texts))]
    path = save_table(tmp_path, name, texts, vectors, lang=langs)
    passages = StoredPassages(VectorFile(path, "vector"), D, "body")
    again = list(passages)
    assert [p.text for p in again] == [p.text for p in passages] == texts
    assert [p.labels for p in again] == [{"lang": lang} for lang in langs]
    report = evaluate(stored, encoder, passages, limit=20)
    assert report.rows["inverter"]["token-set F1"].mean == pytest.approx(1.0, abs=0.1)
    assert set(report.breakdowns["lang"]) == {"de", "en"}


@pytest.mark.parametrize("name", ["v.npy", "v.npz"])
def test_stored_passages_take_texts_from_a_file_of_their_own(texts, vectors, tmp_path, name):
    (np.save if name == "v.npy" else np.savez)(tmp_path / name, vectors)
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    lines = PassageFile(tmp_path / "t.txt")
    passages = list(StoredPassages(VectorFile(tmp_path / name), D, texts=lines))
    assert [p.text for p in passages] == texts
    assert np.allclose(passages[3].vector, as_unit_vectors(vectors, D)[3])


@pytest.mark.parametrize(("count", "said"), [(39, "fewer texts"), (41, "more texts")])
def test_stored_passages_refuse_another_number_of_texts(texts, vectors, tmp_path, count, said):
    np.save(tmp_path / "v.npy", vectors)
    lines = (texts * 2)[:count]
    (tmp_path / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    source = VectorFile(tmp_path / "v.npy")
    with pytest.raises(DataError, match=said):
        list(StoredPassages(source, D, texts=PassageFile(tmp_path / "t.txt")))


def test_stored_passages_keep_texts_beside_their_vectors_when_some_are_left_out(
    texts, vectors, tmp_path
):
    vectors[5] = np.nan
    np.save(tmp_path / "v.npy", vectors)
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    source = VectorFile(tmp_path / "v.npy", skip_bad=True)
    passages = StoredPassages(source, D, texts=PassageFile(tmp_path / "t.txt"))
    for _ in range(2):
        assert [p.text for p in passages] == texts[:5] + texts[6:]
    assert source.describe_left_out() == ["1 × NaN or infinity (row 5)"], "counted once"


def test_stored_passages_refuse_a_column_that_is_no_text(texts, vectors, tmp_path):
    path = save_table(tmp_path, "t.jsonl", range(len(texts)), vectors)
    with pytest.raises(DataError, match="int beside vector 0"):
        list(StoredPassages(VectorFile(path, "vector"), D, "body"))
    with pytest.raises(EmbeddingError, match="nothing"):
        list(StoredPassages(VectorFile(path, "vector"), D, "nothing"))


def test_texts_without_words_are_passed_over(stored, encoder, texts, vectors):
    holes = [None if i == 3 else "  " if i == 4 else text for i, text in enumerate(texts)]
    passages = [Passage(text or "") for text in holes]
    report = evaluate(stored, encoder, passages, vectors=vectors)
    assert report.settings["texts"] == len(texts) - 2


def test_paired_refuses_another_number_of_vectors(texts, vectors):
    with pytest.raises(DataError, match="39 vectors and 40 texts"):
        paired(texts, vectors[:39], D)
    with pytest.raises(DataError, match="lone string"):
        paired("a text", vectors[:1], D)
    with pytest.raises(EmbeddingError, match="32 dimensions"):
        paired(texts, vectors[:, :16], D)


def test_samples_with_and_without_a_vector_do_not_mix(stored, encoder, texts, vectors):
    mixed = [*paired(texts[:5], vectors[:5], D), *texts[5:]]
    with pytest.raises(DataError, match="5 with"):
        evaluate(stored, encoder, mixed)


def test_a_text_longer_than_the_inverter_writes_counts_whole(stored, encoder, texts, vectors):
    long = " ".join([*texts] * 3)
    report = evaluate(stored, encoder, [long, *texts[1:]], vectors=vectors)
    assert any(note.startswith("1 of 40 texts have more than the") for note in report.notes)
    assert report.rows["inverter"]["token-set recall"].mean < 1.0


def test_vectors_that_cannot_be_the_encoders_are_told_before_all(stored, encoder, texts, vectors):
    doubt = "40 of 40 vectors do not look like fake's: by these numbers"
    stored.fingerprint = SimpleNamespace(
        statistics=SimpleNamespace(doubt=lambda vectors, name: doubt)
    )
    report = evaluate(stored, None, texts, vectors=vectors)
    assert report.notes[0] == doubt
    assert report.verdict.startswith("The vectors do not look like the encoder's, so these figures")


def test_a_stopped_evaluation_of_stored_vectors_goes_on(stored, encoder, texts, vectors, tmp_path):
    whole = evaluate(stored, encoder, texts, vectors=vectors)
    made = len(stored.calls)
    stored.stop_after = made + 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(stored, encoder, texts, vectors=vectors, folder=tmp_path)
    stored.stop_after = None
    again = evaluate(stored, encoder, texts, vectors=vectors, folder=tmp_path)
    assert without_time(again) == without_time(whole)
    assert len(stored.calls) == 2 * made, "the first batch was not decoded again"
    evaluate(stored, encoder, texts, vectors=np.roll(vectors, 1, axis=0), folder=tmp_path)
    assert len(stored.calls) == 3 * made, "other vectors are decoded anew"


def test_announce_tells_before_anything_is_kept_how_long_it_takes(stored, encoder, texts, vectors):
    lines = []
    evaluate(stored, encoder, texts, vectors=vectors, announce=lines.append)
    (line,) = lines
    assert line.startswith("40 texts, each decoded up to 3 times: a")


def test_evaluation_has_a_repr_and_rows(stored, encoder, texts, vectors):
    report = evaluate(stored, encoder, texts, vectors=vectors)
    assert repr(report).startswith("Evaluation(40 texts, fake, rows: inverter, shuffled embedding")
    assert report.to_dict()["verdict"] == report.verdict
    rows = report.to_rows()
    assert {"row", "metric", "mean", "low", "high", "n"} == set(rows[0])
    assert next(row["mean"] for row in rows if row["row"] == "inverter") == 1.0
    assert replace(report, notes=[]).verdict == report.verdict


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "a second"),
        (12.4, "about 12 seconds"),
        (50, "about a minute"),
        (85, "about a minute"),
        (600, "about 10 minutes"),
        (5000, "about 83 minutes"),
        (9000, "about 2 hours"),
    ],
)
def test_duration_is_in_the_unit_of_its_size(seconds, words):
    assert duration(seconds) == words
