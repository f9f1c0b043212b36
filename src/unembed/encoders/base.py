"""What an encoder is, and a tiny deterministic one for tests and dry runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.tokenizer import TextTokenizer, word_tokenizer
from unembed.errors import EmbeddingError, EncoderError

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EncoderIdentity:
    """Which embedding model made a vector.

    Attributes:
        name: Catalogue name, folder or Hub repository; of an absolute path its last part.
        revision: Commit on the Hub, or ``None`` for local weights.
        dimension: Embedding size D.
        weights_digest: SHA-256 of the weights, in hexadecimal.
        prompt: Text put before every document.
    """

    name: str
    revision: str | None
    dimension: int
    weights_digest: str
    prompt: str

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same encoder wherever it was loaded from: weights and prompt."""
        return self.weights_digest, self.prompt

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EncoderIdentity:
        """The identity that ``to_dict`` wrote."""
        return cls(**data)

    def require_same(self, other: EncoderIdentity, what: str) -> None:
        """Refuse vectors of another model: an inverter is only good for the encoder it learned.

        Raises:
            EncoderError: The weights or the prompt differ.
        """
        if self.key != other.key:
            raise EncoderError(
                f"{what} of the encoder {self.describe()}",
                other.describe(),
                "Use the encoder the inverter was trained for, or train one for this encoder",
            )

    def describe(self) -> str:
        """One line for messages and tables."""
        prompt = f", prompt {self.prompt!r}" if self.prompt else ""
        return (
            f"{self.name} ({self.dimension} dimensions, weights {self.weights_digest[:12]}{prompt})"
        )


@runtime_checkable
class Encoder(Protocol):
    """Text → unit vectors. Everything else in the package sees an encoder through this."""

    @property
    def identity(self) -> EncoderIdentity:
        """Which model this is."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's own tokenizer."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed texts; returns unit vectors [B, D] in the order given.

        Args:
            texts: Non-empty texts.
            progress: Called with the number of texts finished since the last call.
        """
        ...

    def word_embeddings(self) -> NDArray[np.float32] | None:
        """The model's token table [V, H'], if it has one."""
        ...


def known_as(name: str) -> str:
    """What a model is recorded as: of an absolute path, which is nobody's business, the end."""
    return Path(name).name if Path(name).is_absolute() else name


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what no encoder can embed meaningfully.

    Raises:
        EmbeddingError: A text is empty or only white space.
    """
    for index, text in enumerate(texts):
        if not str(text).strip():
            raise EmbeddingError(
                "a text with at least one visible character",
                f"{text!r} at position {index}",
                "Leave empty texts out",
            )
        if not is_unicode(text):
            raise EmbeddingError(
                "a text that UTF-8 can write",
                f"{text[:80]!r} at position {index}, with half a surrogate pair or a stray byte",
                "Correct its encoding",
            )


def is_unicode(text: str) -> bool:
    """Whether a tokenizer can read a text, not so with half a surrogate pair, as JSON may spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
        check_texts(texts)
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
