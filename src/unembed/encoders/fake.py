"""A tiny deterministic encoder for tests and dry runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.base import EncoderIdentity, Progress, check_texts
from unembed.tokenizer import word_tokenizer


class FakeEncoder:
    """A hashing encoder: no weights, no download, the same vector for the same text for ever.

    Each word has a pseudo-random direction and each position a gain, so that the vector depends
    on the words and, more weakly, on their order, as a real one does.

    Args:
        dimension: Embedding size D.
    """

    def __init__(self, dimension: int = 32) -> None:
        self.tokenizer = word_tokenizer(_FAKE_WORDS)
        generator = np.random.default_rng(20_260_211)
        table = generator.standard_normal((self.tokenizer.size, dimension))
        self._table = table.astype(np.float32)
        digest = hashlib.sha256(self._table.tobytes()).hexdigest()
        self.identity = EncoderIdentity("fake", None, dimension, digest, "")

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed texts; see `Encoder.encode`."""
        texts = check_texts(texts)
        vectors = np.zeros((len(texts), self.identity.dimension), dtype=np.float32)
        for row, ids in enumerate(self.tokenizer.encode(texts)):
            gains = 1.0 + 0.5 / (1.0 + np.arange(len(ids), dtype=np.float32))
            vectors[row] = gains @ self._table[ids]
        if progress is not None:
            progress(len(texts))
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = vectors / np.maximum(norms, np.float32(1e-12))
        return unit

    def word_embeddings(self) -> NDArray[np.float32]:
        """The direction of each word, [V, D]."""
        return self._table


_FAKE_WORDS = (
    "the a of to and in is it was for on with as at by this that from or an be are we you he she "
    "they my your his her our cat dog bird fish house river city road tree sun moon star rain snow "
    "bank loan price law court judge doctor nurse patient drug dose test code server network key "
    "password user email phone number name address red blue green small large old new good bad "
    "runs walks eats sleeps reads writes opens closes sends finds leaks hides costs pays asks "
    "answers one two three four five six seven eight nine ten . , ? !"
).split()
