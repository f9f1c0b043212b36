import json
import shutil

import numpy as np
import pytest

from unembed.data.pairs import MANIFEST, TOKENIZER, Pairs, shard_names
from unembed.errors import CheckpointError, DataError


@pytest.fixture
def pairs(pairs_folder):
    return Pairs.open(pairs_folder)


def test_the_length_is_that_of_all_shards(pairs):
    counts = [shard["pairs"] for shard in pairs.manifest["shards"]]
    assert len(pairs) == sum(counts)
    assert pairs.starts.tolist() == [0, *np.cumsum(counts).tolist()]


def test_the_encoder_and_the_tokenizer_are_those_of_the_preparation(pairs, encoder):
    assert pairs.encoder == encoder.identity
    assert pairs.tokenizer.digest == encoder.tokenizer.digest


def test_rows_come_from_any_shard_in_the_order_asked_for(pairs):
    tokens = np.concatenate(pairs.tokens).astype(np.int64)
    embeddings = np.concatenate(pairs.embeddings).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(pairs))
    edges = np.concatenate([pairs.starts[:-1], pairs.starts[1:] - 1, [3, 3, 0]])
    for indices in (order, edges, np.arange(len(pairs))):
        found_tokens, found_embeddings = pairs.rows(indices)
        assert np.array_equal(found_tokens, tokens[indices])
        assert np.array_equal(found_embeddings, embeddings[indices])
        assert found_tokens.dtype == np.int64
        assert found_embeddings.dtype == np.float32


def test_tokens_are_counted_over_all_shards_and_once(pairs):
    counts = pairs.token_counts
    tokens = np.concatenate(pairs.tokens)
    assert [int((tokens == token).sum()) for token in range(len(counts))] == counts.tolist()
    assert len(counts) == pairs.tokenizer.size and pairs.token_counts is counts


def test_no_rows_are_no_rows(pairs):
    tokens, embeddings = pairs.rows(np.array([], dtype=np.int64))
    assert tokens.shape == (0, 12)
    assert embeddings.shape == (0, 32)


def test_pairs_embeddings_are_of_unit_length_again(pairs):
    stored = np.linalg.norm(np.concatenate(pairs.embeddings).astype(np.float64), axis=1)
    assert np.abs(stored - 1).max() > 1e-5, "float16 leaves the norm off"
    _, embeddings = pairs.rows(np.arange(len(pairs)))
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_pairs_the_arrays_are_mapped_not_loaded(pairs):
    assert all(isinstance(array, np.memmap) for array in [*pairs.tokens, *pairs.embeddings])
    assert not any(array.flags.writeable for array in pairs.tokens)


def refusal(folder, kind=DataError):
    with pytest.raises(kind) as caught:
        Pairs.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("which", [0, 1], ids=["tokens", "embeddings"])
def test_a_missing_shard_is_refused(pairs_folder, which):
    path = pairs_folder / shard_names(3)[which]
    path.unlink()
    assert str(path) in refusal(pairs_folder)


@pytest.mark.parametrize("which", [0, 1], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_truncated_shard_is_refused(pairs_folder, which, left):
    path = pairs_folder / shard_names(5)[which]
    path.write_bytes(path.read_bytes()[:left])
    assert str(path) in refusal(pairs_folder)


def test_a_shard_of_another_place_is_refused(pairs_folder):
    first, second = (pairs_folder / shard_names(n)[0] for n in (0, 5))
    shutil.copy(first, second)
    message = refusal(pairs_folder)
    assert "expected uint32 (" in message
    assert str(second) in message


def test_a_shard_of_another_type_is_refused(pairs_folder):
    path = pairs_folder / shard_names(0)[1]
    np.save(path, np.load(path).astype(np.float32))
    assert "found float32 (" in refusal(pairs_folder)


def test_pairs_a_pickled_array_is_refused(pairs_folder):
    path = pairs_folder / shard_names(0)[0]
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert str(path) in refusal(pairs_folder)


def test_pairs_a_folder_that_was_never_prepared_is_refused(tmp_path):
    assert "unembed prepare" in refusal(tmp_path)
    assert "unembed prepare" in refusal(tmp_path / "none")


def test_a_folder_without_a_finished_shard_is_refused(pairs_folder):
    manifest = json.loads((pairs_folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["shards"] = []
    (pairs_folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert "no finished shard" in refusal(pairs_folder)


def test_a_missing_tokenizer_is_refused(pairs_folder):
    (pairs_folder / TOKENIZER).unlink()
    assert TOKENIZER in refusal(pairs_folder, CheckpointError)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("encoder", {}, "encoder.name: field required"),
        ("encoder", "fake", "encoder: "),
        ("pieces", 5, "pieces: "),
        ("pieces", {}, "pieces.length: field required"),
        ("shards", 5, "shards: "),
        ("shards", [{"pairs": 3, "passages": 1}], "shards.0.sha256: field required"),
        ("tokenizer", {}, "tokenizer.digest: field required"),
        ("fingerprint", "x", "fingerprint: "),
        ("fingerprint", None, "fingerprint: "),
        ("vocabulary", 5, "vocabulary: "),
        (
            "shards",
            [{"pairs": 3, "passages": 1, "sha256": {}, "dropped": 5}],
            "shards.0.dropped: ",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(pairs_folder, key, value, said):
    manifest = json.loads((pairs_folder / MANIFEST).read_text(encoding="utf-8"))
    manifest[key] = value
    (pairs_folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match=rf"a whole manifest of pairs in .*found {said}"):
        Pairs.open(pairs_folder)


def test_pairs_a_file_in_the_place_of_the_folder_is_refused(pairs_folder):
    with pytest.raises(DataError, match=r"prepared pairs in .*no manifest\.json"):
        Pairs.open(pairs_folder / MANIFEST)


@pytest.mark.parametrize("key", ["pieces", "encoder", "shards", "tokenizer", "complete"])
def test_a_manifest_that_lacks_something_is_refused(pairs_folder, key):
    manifest = json.loads((pairs_folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest[key]
    (pairs_folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert MANIFEST in refusal(pairs_folder)
