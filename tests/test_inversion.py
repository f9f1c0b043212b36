import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from unembed.encoders.base import FakeEncoder
from unembed.errors import EmbeddingError, EncoderError
from unembed.inversion import invert_file, invert_text
from unembed.inverter import Inversion


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
        require_encoder=require_encoder, tokenizer=encoder.tokenizer, invert=invert, given=given
    )


def test_a_perfect_recovery(encoder):
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
    assert options == {"steps": 4, "seed": 1}


def test_a_partial_recovery(encoder):
    trip = invert_text(answering(encoder, "cat the dog"), encoder, "the cat the river.")
    assert trip.exact is False
    assert trip.token_recall == pytest.approx(2 / 4)  # the, cat of the, cat, river, .
    one, other = encoder.encode(["the cat the river.", "cat the dog"])
    assert trip.cosine == pytest.approx(float(one @ other), abs=1e-6)
    assert trip.cosine < 0.99


def test_an_empty_recovery_has_no_cosine(encoder):
    trip = invert_text(answering(encoder, ""), encoder, "the cat sleeps.")
    assert trip.cosine is None
    assert trip.token_recall == 0.0
    assert trip.exact is False


def test_an_encoder_the_inverter_does_not_know_is_refused(encoder):
    inverter = answering(encoder, "cat")
    with pytest.raises(EncoderError, match="expected vectors of the encoder fake"):
        invert_text(inverter, FakeEncoder(dimension=8), "the cat sleeps.")
    assert inverter.given == []


def test_an_empty_text_is_refused(encoder):
    with pytest.raises(EmbeddingError, match="visible character"):
        invert_text(answering(encoder, "cat"), encoder, " \n")


def test_the_tiny_inverter_recovers_words(inverter, encoder):
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


def test_an_archive_of_arrays_is_refused(inverter, tmp_path):
    path = tmp_path / "vectors.npz"
    path.write_bytes(archive())
    assert zipfile.is_zipfile(path)
    with pytest.raises(EmbeddingError):
        invert_file(inverter, path)


def test_a_folder_is_refused(inverter, tmp_path):
    with pytest.raises(EmbeddingError, match="NumPy array"):
        invert_file(inverter, tmp_path)
