import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from unembed.config import Config
from unembed.data.pairs import (
    MANIFEST,
    TOKENIZER,
    Pairs,
    difference,
    read_manifest,
    shard_names,
    source_digest,
)
from unembed.data.pieces import cut_pieces
from unembed.data.prepare import PrepareProgress, prepare_pairs
from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import PROBES, make_fingerprint
from unembed.errors import DataError, EncoderError


class FailingEncoder(FakeEncoder):
    """Stops like a killed process at the n-th call, the probe texts aside."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def encode(self, texts, progress=None):
        self.calls -= tuple(texts) != PROBES
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().encode(texts, progress)


def contents(folder):
    """Every file of a folder but the lock, name → bytes."""
    paths = sorted(path for path in folder.iterdir() if path.name != ".lock")
    return {path.name: path.read_bytes() for path in paths}


def changed(config, section, **values):
    data = config.model_dump()
    return Config.model_validate({**data, section: {**data[section], **values}})


@pytest.fixture(scope="module")
def pieces(passages, tiny_config, encoder):
    return cut_pieces(passages, encoder.tokenizer, tiny_config.data)


def test_the_arrays_are_the_pieces_of_the_source_and_their_vectors(
    pairs_folder, pieces, encoder, tiny_config
):
    manifest = read_manifest(pairs_folder)
    shards = [
        [np.load(pairs_folder / name) for name in shard_names(n)]
        for n in range(len(manifest["shards"]))
    ]
    assert len(shards) == 6
    for tokens, vectors in shards:
        assert tokens.dtype == np.uint32
        assert vectors.dtype == np.float16
        assert tokens.shape[1] == tiny_config.data.length
        assert vectors.shape == (len(tokens), encoder.identity.dimension)
    tokens = np.concatenate([tokens for tokens, _ in shards])
    vectors = np.concatenate([vectors for _, vectors in shards])
    expected = encoder.tokenizer.pack((p.token_ids for p in pieces), tiny_config.data.length)
    assert np.array_equal(tokens, expected)
    assert np.abs(vectors - encoder.encode([piece.text for piece in pieces])).max() < 1e-3
    decoded = encoder.tokenizer.decode(tokens)
    assert encoder.tokenizer.encode(decoded) == [piece.token_ids for piece in pieces]
    assert any(piece.text.count(".") > 1 for piece in pieces), "some pieces are packed"


def test_prepare_pairs_the_manifest_says_where_the_pairs_come_from(
    pairs_folder, pieces, encoder, tiny_config, text_file
):
    manifest = read_manifest(pairs_folder)
    assert manifest["encoder"] == encoder.identity.to_dict()
    assert manifest["tokenizer"]["digest"] == encoder.tokenizer.digest
    assert manifest["pieces"] == tiny_config.data.model_dump()
    assert manifest["complete"] is True
    assert manifest["source"] == {
        "name": text_file.name,
        "bytes": text_file.stat().st_size,
        "column": "text",
        "digest": source_digest(text_file),
    }
    assert str(text_file.parent) not in json.dumps(manifest), "no absolute paths"
    assert sum(shard["pairs"] for shard in manifest["shards"]) == len(pieces)
    assert [shard["passages"] for shard in manifest["shards"]] == [8, 8, 8, 8, 8, 2]
    for shard in manifest["shards"]:
        for name, digest in shard["sha256"].items():
            assert hashlib.sha256((pairs_folder / name).read_bytes()).hexdigest() == digest


def test_prepare_pairs_nothing_temporary_is_left(pairs_folder):
    expected = {MANIFEST, TOKENIZER, *(name for n in range(6) for name in shard_names(n))}
    assert set(contents(pairs_folder)) == expected


@pytest.mark.parametrize("calls", range(6))
def test_prepare_pairs_an_interrupted_preparation_resumes_to_the_same_bytes(
    tmp_path, text_file, tiny_config, pairs_folder, calls
):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_pairs(text_file, out, tiny_config, FailingEncoder(calls))
    assert not list(out.glob("*.tmp"))
    partial = read_manifest(out)
    assert len(partial["shards"]) == calls
    assert partial["complete"] is False
    if calls:
        assert len(Pairs.open(out)) == sum(shard["pairs"] for shard in partial["shards"])
    prepare_pairs(text_file, out, tiny_config, FakeEncoder())
    assert contents(out) == contents(pairs_folder)


def test_prepare_pairs_what_a_kill_in_the_middle_of_a_write_left_is_replaced(
    tmp_path, text_file, tiny_config, pairs_folder
):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_pairs(text_file, out, tiny_config, FailingEncoder(2))
    tokens, embeddings = shard_names(2)
    (out / tokens).write_bytes(b"a shard the manifest does not know")
    (out / f"{embeddings}.tmp").write_bytes(b"half a file")
    (out / f"{MANIFEST}.tmp").write_text('{"format"', encoding="utf-8")
    prepare_pairs(text_file, out, tiny_config, FakeEncoder())
    assert contents(out) == contents(pairs_folder)


def test_prepare_pairs_a_finished_preparation_is_not_done_again(
    pairs_folder, text_file, tiny_config
):
    before = contents(pairs_folder)
    manifest = prepare_pairs(text_file, pairs_folder, tiny_config, FailingEncoder(0))
    assert manifest == read_manifest(pairs_folder)
    assert contents(pairs_folder) == before


def test_prepare_pairs_the_limit_stops_at_a_shard_and_a_later_run_goes_on(
    tmp_path, text_file, tiny_config, encoder, pairs_folder
):
    out = tmp_path / "out"
    manifest = prepare_pairs(text_file, out, tiny_config, encoder, limit=30)
    counts = [shard["pairs"] for shard in manifest["shards"]]
    assert sum(counts[:-1]) < 30 <= sum(counts)
    assert manifest["complete"] is False
    prepare_pairs(text_file, out, tiny_config, encoder)
    assert contents(out) == contents(pairs_folder)


def test_prepare_pairs_progress_counts_up_to_the_pairs_there_are(
    tmp_path, text_file, tiny_config, encoder
):
    seen = []
    manifest = prepare_pairs(
        text_file, tmp_path / "out", tiny_config, encoder, progress=seen.append
    )
    assert all(isinstance(step, PrepareProgress) for step in seen)
    assert [step.pairs for step in seen] == sorted(step.pairs for step in seen)
    assert seen[-1].pairs == sum(shard["pairs"] for shard in manifest["shards"])
    assert [step.passages for step in seen] == sorted(step.passages for step in seen)
    assert seen[-1].passages == 42


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [("data", {"length": 16}, "pieces"), ("data", {"seed": 1}, "pieces")],
)
def test_prepare_pairs_other_settings_are_refused(
    pairs_folder, text_file, tiny_config, section, values, named
):
    before = contents(pairs_folder)
    config = changed(tiny_config, section, **values)
    with pytest.raises(DataError, match=f"pairs with {named}") as caught:
        prepare_pairs(text_file, pairs_folder, config, FakeEncoder())
    assert "Choose another --out folder" in str(caught.value)
    assert contents(pairs_folder) == before


def test_prepare_pairs_settings_that_do_not_concern_the_pieces_may_change(
    pairs_folder, text_file, tiny_config
):
    config = changed(tiny_config, "training", lr=0.1)
    assert prepare_pairs(text_file, pairs_folder, config, FakeEncoder())["complete"]


def test_prepare_pairs_another_source_is_refused(
    pairs_folder, text_file, tiny_config, tmp_path, encoder
):
    renamed = tmp_path / "other.txt"
    renamed.write_bytes(text_file.read_bytes())
    grown = tmp_path / text_file.name
    grown.write_text(text_file.read_text(encoding="utf-8") + "more\n", encoding="utf-8")
    other = tmp_path / "same size" / text_file.name
    other.parent.mkdir()
    other.write_text(text_file.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    assert other.stat().st_size == text_file.stat().st_size
    for source in (renamed, grown, other):
        with pytest.raises(DataError, match="pairs with source"):
            prepare_pairs(source, pairs_folder, tiny_config, encoder)


def test_prepare_pairs_an_encoder_that_was_moved_is_the_same_one(
    pairs_folder, text_file, tiny_config, tmp_path
):
    moved = FakeEncoder()
    moved.identity = replace(moved.identity, name="elsewhere", revision="abc")
    prepare_pairs(text_file, tmp_path / "pairs", tiny_config, FakeEncoder(), limit=20)
    prepare_pairs(text_file, tmp_path / "pairs", tiny_config, moved)
    assert contents(tmp_path / "pairs") == contents(pairs_folder)


def test_prepare_pairs_another_encoder_is_refused(pairs_folder, text_file, tiny_config):
    with pytest.raises(DataError, match="pairs with encoder"):
        prepare_pairs(text_file, pairs_folder, tiny_config, FakeEncoder(dimension=16))


def test_prepare_pairs_a_second_process_is_refused(pairs_folder, text_file, tiny_config, encoder):
    holder = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(pairs_folder / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another process writing to it"):
            prepare_pairs(text_file, pairs_folder, tiny_config, encoder)
        process.stdin.close()
    assert prepare_pairs(text_file, pairs_folder, tiny_config, encoder)["complete"]


def test_prepare_pairs_an_empty_source_is_refused_before_anything_is_written(
    tmp_path, tiny_config, encoder
):
    source = tmp_path / "empty.txt"
    source.touch()
    with pytest.raises(DataError, match="an empty file"):
        prepare_pairs(source, tmp_path / "out", tiny_config, encoder)
    assert not (tmp_path / "out").exists()


def test_prepare_pairs_a_wrong_column_is_refused_before_anything_is_written(
    tmp_path, tiny_config, encoder
):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"body": "the cat sleeps."}\n', encoding="utf-8")
    with pytest.raises(DataError, match="a column 'text'"):
        prepare_pairs(source, tmp_path / "out", tiny_config, encoder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json"])
def test_prepare_pairs_refuses_a_source_that_it_would_write_over(
    tmp_path, tiny_config, encoder, name
):
    source = tmp_path / name
    source.write_text('{"text": "the cat sleeps by the river."}\n', encoding="utf-8")
    with pytest.raises(DataError, match="an --out outside of"):
        prepare_pairs(source, tmp_path, tiny_config, encoder)
    assert source.read_text().startswith('{"text"')


@pytest.mark.parametrize("inside", [".", "pairs", "deep/pairs"])
def test_prepare_pairs_pairs_are_not_written_among_their_texts(
    tmp_path, tiny_config, encoder, inside
):
    source = tmp_path / "texts"
    source.mkdir()
    (source / "a.txt").write_text("the cat sleeps by the river.\n", encoding="utf-8")
    with pytest.raises(DataError, match="an --out outside of"):
        prepare_pairs(source, source / inside, tiny_config, encoder)
    assert [path.name for path in source.iterdir()] == ["a.txt"]


def test_prepare_pairs_a_file_in_the_place_of_the_folder_is_refused(
    text_file, tmp_path, tiny_config, encoder
):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "pairs"):
        with pytest.raises(DataError, match=r"a folder at .*another --out"):
            prepare_pairs(text_file, out, tiny_config, encoder)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_prepare_pairs_other_settings_are_refused_by_what_differs(
    pairs_folder, text_file, tiny_config, encoder
):
    shorter = changed(tiny_config, "data", pack=0.25)
    with pytest.raises(DataError, match=r"with pieces pack 0\.25; found pack [\d.]+\."):
        prepare_pairs(text_file, pairs_folder, shorter, encoder)


def test_prepare_pairs_a_source_without_a_long_enough_piece_is_refused(
    tmp_path, tiny_config, encoder
):
    source = tmp_path / "short.txt"
    source.write_text("dog.\n" * 20, encoding="utf-8")
    with pytest.raises(DataError, match="pieces of 3 tokens or more"):
        prepare_pairs(source, tmp_path / "out", tiny_config, encoder)
    shorter = changed(tiny_config, "data", min_tokens=1)  # what the message advises
    assert prepare_pairs(source, tmp_path / "out", shorter, encoder)["complete"]


def test_prepare_pairs_stretches_of_the_source_may_yield_nothing(tmp_path, tiny_config, encoder):
    source = tmp_path / "gaps.txt"
    lines = ["the cat sleeps."] * 8 + [""] * 16 + ["a dog runs."] * 8  # 4 whole shards
    source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    seen = []
    manifest = prepare_pairs(source, tmp_path / "out", tiny_config, encoder, progress=seen.append)
    assert [shard["pairs"] for shard in manifest["shards"]] == [8, 0, 0, 8, 0]
    assert (seen[-1].passages, seen[-1].pairs) == (32, 16)
    pairs = Pairs.open(tmp_path / "out")
    tokens, _ = pairs.rows(np.arange(16))
    assert pairs.tokenizer.decode(tokens) == ["the cat sleeps."] * 8 + ["a dog runs."] * 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no manifest.json"),
        ("{", "expected JSON in"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "nested more than"),
        ("[]", "found list"),
        ("{}", "found None"),
        ('{"format": 99}', "found 99"),
        ('{"format": 1, "kind": "texts"}', "unembed prepare --stage 2 --source"),
    ],
)
def test_prepare_pairs_a_manifest_that_cannot_be_read_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# The encoder's fingerprint


class OtherEncoder(FakeEncoder):
    """Claims to be the fake encoder and embeds elsewhere."""

    def encode(self, texts, progress=None):
        return super().encode(texts, progress)[:, ::-1]


def test_prepare_pairs_the_fingerprint_of_the_encoder_is_kept(pairs_folder, encoder):
    kept = read_manifest(pairs_folder)["fingerprint"]
    assert kept == make_fingerprint(encoder).to_dict()
    Pairs.open(pairs_folder).require_encoder(encoder)


def test_prepare_pairs_an_encoder_with_the_same_digest_that_embeds_elsewhere_is_refused(
    tmp_path, text_file, tiny_config, pairs_folder, encoder
):
    out = tmp_path / "out"
    prepare_pairs(text_file, out, tiny_config, encoder, limit=10)
    before = contents(out)
    with pytest.raises(EncoderError, match="cosine of only"):
        prepare_pairs(text_file, out, tiny_config, OtherEncoder())
    assert contents(out) == before
    with pytest.raises(EncoderError, match="cosine of only"):
        Pairs.open(pairs_folder).require_encoder(OtherEncoder())


def as_before_fingerprints(folder):
    """The folder as the first version of format 1 wrote it."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest["fingerprint"], manifest["round_trip"], manifest["source"]["digest"]
    for name in ("windows", "vocabulary", "segmenter", "language"):
        del manifest["pieces"][name]
    for shard in manifest["shards"]:
        del shard["dropped"]
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return manifest


def test_prepare_pairs_a_folder_without_the_younger_keys_is_read_and_gone_on_with(
    tmp_path, text_file, tiny_config, pairs_folder, encoder
):
    before = contents(pairs_folder)
    as_before_fingerprints(pairs_folder)
    pairs = Pairs.open(pairs_folder)
    assert pairs.fingerprint is None
    pairs.require_encoder(encoder)
    assert prepare_pairs(text_file, pairs_folder, tiny_config, FailingEncoder(0))["complete"]

    out = tmp_path / "out"
    prepare_pairs(text_file, out, tiny_config, encoder, limit=10)
    as_before_fingerprints(out)
    assert prepare_pairs(text_file, out, tiny_config, encoder)["complete"]
    after = contents(out)
    assert {**after, MANIFEST: b""} == {**before, MANIFEST: b""}
    Pairs.open(out).require_encoder(encoder)


def test_difference_is_told_in_words_and_without_digests():
    mine = {"name": "mine.txt", "bytes": 9, "column": "text", "digest": "a" * 64}
    other = {**mine, "name": "other.txt", "digest": "b" * 64}
    assert difference(mine, other) == ("name mine.txt", "name other.txt")
    assert difference(mine, {**mine, "digest": "b"})[1] == "digest b"
    assert difference("a", None) == ("a", "None")
