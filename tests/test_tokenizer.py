from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from unembed.errors import CheckpointError, EncoderError
from unembed.tokenizer import TextTokenizer, from_transformers, word_tokenizer

WORDS = ["cat", "dog", "sees", "a", "."]
TOKENIZER = word_tokenizer(WORDS)


def backend(vocabulary, unknown="[UNK]"):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


@given(st.lists(st.sampled_from(WORDS[:4]), max_size=7))
def test_a_packed_text_decodes_to_itself(words):
    text = " ".join(words)
    rows = TOKENIZER.pack(TOKENIZER.encode([text]), 8)
    assert TOKENIZER.decode(rows) == [text]
    assert TOKENIZER.content_positions(rows[0].tolist()) == list(range(len(words)))


def test_pack_a_row_is_content_one_end_token_and_padding():
    rows = TOKENIZER.pack([[1, 2, 3], [], [1, 2, 3, 4]], 5)
    end, pad = TOKENIZER.end_id, TOKENIZER.pad_id
    assert rows.dtype == np.uint32
    assert rows.tolist() == [[1, 2, 3, end, pad], [end, pad, pad, pad, pad], [1, 2, 3, 4, end]]


def test_pack_content_that_leaves_no_room_for_the_end_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="room for the end token"):
        TOKENIZER.pack([[1, 2, 3]], 3)


def test_content_positions_what_stands_after_the_end_is_no_content():
    end, pad, mask = TOKENIZER.end_id, TOKENIZER.pad_id, TOKENIZER.mask_id
    assert TOKENIZER.content_positions([1, 2, end, 3, pad]) == [0, 1]
    assert TOKENIZER.content_positions([1, mask, 2, pad]) == [0, 2]
    assert TOKENIZER.content_positions([end, 1]) == []
    assert TOKENIZER.decode([[1, mask, 2, end, 3], [end, 1, 1, 1, 1]]) == ["cat dog", ""]


def test_special_ids_the_vocabulary_lacks_are_added_after_it():
    assert (TOKENIZER.mask_id, TOKENIZER.pad_id, TOKENIZER.end_id) == (6, 7, 8)
    assert TOKENIZER.size == 9
    assert TOKENIZER.special_ids == {6, 7, 8}


def test_special_ids_the_vocabulary_has_are_kept():
    tokenizer = TextTokenizer.from_backend(backend({"[UNK]": 0, "m": 1, "p": 2, "e": 3}), 1, 2, 3)
    assert tokenizer.ids_to_dict() == {"size": 4, "mask_id": 1, "pad_id": 2, "end_id": 3}


def test_text_tokenizer_only_the_missing_ids_are_added():
    tokenizer = TextTokenizer.from_backend(backend({"[UNK]": 0, "e": 1, "x": 2}), None, None, 1)
    assert tokenizer.ids_to_dict() == {"size": 5, "mask_id": 3, "pad_id": 4, "end_id": 1}


def test_text_tokenizer_a_model_that_pads_with_its_end_token_gets_a_padding_of_its_own():
    tokenizer = TextTokenizer.from_backend(backend({"[UNK]": 0, "e": 1, "x": 2}), None, 1, 1)
    assert len(tokenizer.special_ids) == 3
    assert tokenizer.end_id == 1
    assert tokenizer.pad_id == tokenizer.size - 1 == 4
    assert tokenizer.decode(tokenizer.pack([[2, 2]], 5)) == ["x x"]


def test_text_tokenizer_a_vocabulary_with_gaps_loses_no_token():
    tokenizer = TextTokenizer.from_backend(backend({"[UNK]": 0, "low": 1, "high": 9}), 10, 11, 12)
    rows = tokenizer.pack(tokenizer.encode(["low high"]), 4)
    assert tokenizer.decode(rows) == ["low high"]
    assert tokenizer.decode([[1, 5, 9, 12]]) == ["low high"], "an id without a token is nothing"


def test_text_tokenizer_the_models_own_limits_and_templates_do_not_touch_content():
    cramped = backend({"[UNK]": 0, "a": 1, "[CLS]": 2})
    cramped.enable_truncation(2)
    cramped.enable_padding(length=9)
    cramped.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer = TextTokenizer.from_backend(cramped, None, None, None)
    assert tokenizer.encode(["a a a a"]) == [[1, 1, 1, 1]]
    assert len(cramped.encode("a a a a").ids) == 9, "the caller's tokenizer is left as it was"


def test_encodings_offsets_point_into_the_text():
    encoding = TOKENIZER.encodings(["Cat  sees."])[0]
    assert encoding.offsets == [(0, 3), (5, 9), (9, 10)]


def test_token_strings_displays_spell_every_id():
    ids = [1, TOKENIZER.mask_id, TOKENIZER.pad_id, TOKENIZER.end_id, 99]
    assert TOKENIZER.token_strings(ids) == ["cat", "[MASK]", "[PAD]", "[END]", "�"]


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = TextTokenizer.load(path, TOKENIZER.ids_to_dict())
    assert loaded.ids_to_dict() == TOKENIZER.ids_to_dict()
    assert loaded.digest == TOKENIZER.digest
    assert loaded.encode(["A cat sees a dog."]) == TOKENIZER.encode(["A cat sees a dog."])


def test_the_digest_speaks_of_words_and_ids():
    digests = {
        TOKENIZER.digest,
        word_tokenizer(WORDS[::-1]).digest,
        replace(TOKENIZER, end_id=TOKENIZER.pad_id).digest,
        replace(TOKENIZER, size=TOKENIZER.size + 1).digest,
    }
    assert len(digests) == 4
    assert word_tokenizer(WORDS).digest == TOKENIZER.digest


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}', "[]"])
def test_text_tokenizer_a_missing_or_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        TextTokenizer.load(path, TOKENIZER.ids_to_dict())
    assert f"expected a tokenizer in {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_tokenizer_ids_that_do_not_belong_to_a_tokenizer_are_refused(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError):
        TextTokenizer.load(tmp_path / "tokenizer.json", {"size": 9})


@pytest.mark.parametrize("value", [-1, 10**9, "x", None])
@pytest.mark.parametrize("name", ["mask_id", "pad_id", "end_id"])
def test_text_tokenizer_ids_outside_the_vocabulary_are_refused(tmp_path, name, value):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=f"{name} {value!r} in "):
        TextTokenizer.load(tmp_path / "tokenizer.json", {**TOKENIZER.ids_to_dict(), name: value})


def fast(**ids):
    given = {"mask_token_id": None, "pad_token_id": None, "sep_token_id": None}
    return SimpleNamespace(
        backend_tokenizer=backend({"[UNK]": 0, "a": 1, "b": 2}), **{**given, **ids}
    )


def test_from_transformers_a_text_ends_with_the_separator_or_else_the_end_of_sequence():
    assert from_transformers(fast(sep_token_id=1, eos_token_id=2)).end_id == 1
    assert from_transformers(fast(eos_token_id=2)).end_id == 2
    assert from_transformers(fast(sep_token_id=0, eos_token_id=2)).end_id == 0


def test_from_transformers_a_slow_tokenizer_is_refused():
    with pytest.raises(EncoderError, match="fast tokenizer"):
        from_transformers(SimpleNamespace(mask_token_id=1))


def test_from_transformers_is_still_found_in_its_former_place():
    from unembed.encoders import tokenizer as former

    assert former.from_transformers is from_transformers
