from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unembed.encoders import load_encoder
from unembed.encoders.base import Encoder, EncoderIdentity, FakeEncoder, check_texts, is_blank
from unembed.errors import ConfigError, DataError, EmbeddingError, EncoderError
from unembed.evaluation.samples import paired

TEXTS = ["the cat sleeps.", "a red dog runs at the river", "password leaks!", "xyzzy", "?"]
IDENTITY = EncoderIdentity("some-model", "abc", 8, "0123456789abcdef" * 4, "passage: ")


def test_the_fake_encoder_is_an_encoder(encoder):
    assert isinstance(encoder, Encoder)


def test_the_same_text_has_the_same_vector_in_every_instance(encoder):
    again = FakeEncoder()
    assert again.identity == encoder.identity
    assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_encode_vectors_are_unit_float32_of_the_stated_dimension():
    vectors = FakeEncoder(dimension=7).encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 7)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_another_dimension_is_another_encoder(encoder):
    assert FakeEncoder(dimension=7).identity.weights_digest != encoder.identity.weights_digest


def test_encode_word_order_matters_less_than_words(encoder):
    one, turned, other = encoder.encode(["dog finds cat", "cat finds dog", "rain hides sun"])
    assert one @ other < one @ turned < 0.9999


def test_encode_a_vector_does_not_depend_on_its_batch(encoder):
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    assert np.array_equal(together, alone)
    assert np.array_equal(encoder.encode(TEXTS[::-1]), together[::-1])


def test_encode_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, encoder.identity.dimension)


@given(st.text(max_size=30))
def test_encode_any_visible_text_has_a_unit_vector(text):
    encoder = FakeEncoder(dimension=8)
    if text.strip():
        assert np.linalg.norm(encoder.encode([text])[0]) == pytest.approx(1.0, abs=1e-5)
    else:
        with pytest.raises(EmbeddingError):
            encoder.encode([text])


@pytest.mark.parametrize("empty", ["", "  ", "\n\t", "\u3000"])
def test_check_texts_an_empty_text_is_refused_with_its_position(encoder, empty):
    with pytest.raises(EmbeddingError, match="at position 1"):
        encoder.encode(["cat", empty])
    with pytest.raises(EmbeddingError, match="visible character"):
        check_texts([empty])


@pytest.mark.parametrize("text", ["half a pair \ud800", "a stray byte \udcff"])
def test_check_texts_a_text_that_no_tokenizer_reads_is_refused(text):
    with pytest.raises(EmbeddingError, match=r"UTF-8 can write; found .* at position 1"):
        check_texts(["fine", text])


def test_encode_progress_counts_every_text(encoder):
    seen = []
    encoder.encode(TEXTS, seen.append)
    assert sum(seen) == len(TEXTS)


def test_word_embeddings_have_a_row_per_token(encoder):
    shape = (encoder.tokenizer.size, encoder.identity.dimension)
    assert encoder.word_embeddings().shape == shape


def test_encoder_identity_an_identity_survives_plain_data():
    assert EncoderIdentity.from_dict(IDENTITY.to_dict()) == IDENTITY


@pytest.mark.parametrize("change", [{"name": "elsewhere/some-model"}, {"revision": None}])
def test_require_same_the_same_weights_under_another_name_are_accepted(change):
    IDENTITY.require_same(replace(IDENTITY, **change), "vectors")


@pytest.mark.parametrize("change", [{"weights_digest": "f" * 64}, {"prompt": "query: "}])
def test_require_same_other_weights_or_another_prompt_are_refused(change):
    other = replace(IDENTITY, **change)
    with pytest.raises(EncoderError) as caught:
        IDENTITY.require_same(other, "training pairs")
    message = str(caught.value)
    assert f"expected training pairs of the encoder {IDENTITY.describe()}" in message
    assert f"found {other.describe()}" in message


def test_a_description_names_model_size_weights_and_prompt():
    expected = "some-model (8 dimensions, weights 0123456789ab, prompt 'passage: ')"
    assert IDENTITY.describe() == expected
    assert "prompt" not in replace(IDENTITY, prompt="").describe()


def test_check_texts_returns_a_list_of_any_iterable():
    assert check_texts(iter(["a dog", "a cat"])) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a dog", "a list of texts; found the lone string 'a dog'"),
        (None, "a list of texts; found NoneType None"),
        (3, "a list of texts; found int 3"),
        (["a", None], "None at position 1"),
    ],
)
def test_check_texts_refuses_a_lone_string_and_what_is_no_text(texts, message):
    with pytest.raises(EmbeddingError, match=message):
        check_texts(texts)


@pytest.mark.parametrize(("text", "blank"), [("", True), ("\u200b \n\x07", True), (".", False)])
def test_is_blank_of_what_shows_nothing(text, blank):
    assert is_blank(text) is blank


def test_load_encoder_takes_a_path_and_a_device_as_text():
    encoder = load_encoder(Path("all-MiniLM-L6-v2"), compute="cpu")
    assert encoder.identity.name == "all-MiniLM-L6-v2"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {}, "the name of an encoder; found None"),
        (3, {}, "the name of an encoder; found 3"),
        ("x", {"device": "cuda"}, "options among .*; found device. Pass compute='cuda'"),
        ("x", {"speed": 1}, "options among .*; found speed. Leave it out"),
        ("x", {"trust_remote_code": "no"}, "trust_remote_code as True or False; found 'no'"),
        ("x", {"prompt": 3}, "prompt as text; found 3"),
        ("x", {"truncate_dim": "a"}, "truncate_dim of at least 1; found 'a'"),
        ("openai:x", {"batch_size": True}, "batch_size of at least 1; found True"),
        ("x", {"batch_size": 0}, "batch_size of at least 1; found 0"),
    ],
)
def test_load_encoder_refuses_arguments_of_another_kind(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_encoder(name, **options)


@pytest.mark.parametrize("texts", [{"a": "a text"}, pytest.param("table", id="table")])
def test_encode_refuses_tables_whose_names_it_would_embed(encoder, texts):
    if texts == "table":
        texts = pytest.importorskip("pandas").DataFrame({"text": ["a text"]})
    with pytest.raises(EmbeddingError, match="Pass the column or the values"):
        encoder.encode(texts)
    with pytest.raises(DataError, match="Pass the column with the texts"):
        paired(texts, [], 32)
