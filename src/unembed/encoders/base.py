"""What an encoder is: text in, unit vectors out, under an identity that can be checked."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError, EncoderError
from unembed.tokenizer import TextTokenizer, word_tokenizer

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EncoderIdentity:
    """Identity of the embedding model that made a vector.

    Attributes:
        name: Catalogue name, folder or Hub repository; of an absolute path its last part.
        revision: Commit on the Hub, or ``None`` for local weights.
        dimension: Embedding size D.
        weights_digest: SHA-256 of the weights, in hexadecimal; empty of an encoder behind an API,
            which is known by its name and its fingerprint.
        prompt: Text put before every document.
        pooling: How token vectors become one, where the model's files did not say it.
        truncate_dim: Dimensions kept of a Matryoshka model, where it was shortened.
        backend: What runs it, where that is not PyTorch.
    """

    name: str
    revision: str | None
    dimension: int
    weights_digest: str
    prompt: str
    pooling: str | None = None
    truncate_dim: int | None = None
    backend: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Key that makes it the same encoder wherever it was loaded from."""
        further = {"pooling": self.pooling, "truncate_dim": self.truncate_dim}
        stated = (f"{name} {value}" for name, value in further.items() if value is not None)
        return self.weights_digest or self.name, self.prompt, *stated

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        for name in ("pooling", "truncate_dim", "backend"):  # unknown to older versions
            if data[name] is None:
                del data[name]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EncoderIdentity:
        """The identity that ``to_dict`` wrote."""
        return cls(**data)

    def require_same(self, other: EncoderIdentity, what: str, *, has_vectors: bool = False) -> None:
        """Refuse vectors of another model: an inverter is only good for the encoder it learned.

        Args:
            other: The one at hand.
            what: What was made with this one, for the message.
            has_vectors: Whether the caller compares vectors of the probe texts as well. These
                decide alone where the weights of one model are unknown, behind an API: what is
                one model may have two names, and a prompt that the server puts.

        Raises:
            EncoderError: The weights, prompt, pooling, truncation or number of dimensions differ.
        """
        unknown = has_vectors and not (self.weights_digest and other.weights_digest)
        if self.dimension != other.dimension or not (unknown or self.key == other.key):
            raise EncoderError(
                f"{what} of the encoder {self.describe()}",
                other.describe(),
                "Use the encoder the inverter was trained for, or train one for this encoder",
            )

    def describe(self) -> str:
        """Describe it in one line for messages and tables."""
        further = f", prompt {self.prompt!r}" if self.prompt else ""
        further += f", pooling {self.pooling}" if self.pooling else ""
        further += ", truncated" if self.truncate_dim else ""
        further += f", with {self.backend}" if self.backend else ""
        weights = f"weights {self.weights_digest[:12]}" if self.weights_digest else "behind an API"
        return f"{self.name} ({self.dimension} dimensions, {weights}{further})"


@runtime_checkable
class Encoder(Protocol):
    """Text → unit vectors. Everything else in the package sees an encoder through this."""

    @property
    def identity(self) -> EncoderIdentity:
        """Identity of the model."""
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


def recorded_name(name: str) -> str:
    """Name a model for the record: of an absolute path, which is nobody's business, the end."""
    return Path(name).name if Path(name).is_absolute() else name


def check_texts(texts: Iterable[str]) -> list[str]:
    """Return the texts of any iterable as a list, or refuse what cannot be embedded meaningfully.

    Raises:
        EmbeddingError: A lone string, or a text that is none, is empty or only white space.
    """
    value: Any = texts  # from Python anything may come
    lone = isinstance(value, (str, bytes))  # a string is a sequence of its letters
    if lone or not isinstance(value, Iterable):
        kind = "the lone string" if lone else type(value).__name__
        raise EmbeddingError("a list of texts", f"{kind} {texts!r:.80}", "Put it into a list")
    if isinstance(value, Mapping) or hasattr(value, "columns"):  # their names would be embedded
        fix = "Pass the column or the values that hold the texts"
        raise EmbeddingError("a list of texts", f"{type(value).__name__} {texts!r:.80}", fix)
    checked = list(texts)
    for index, text in enumerate(checked):
        if not isinstance(text, str):
            raise EmbeddingError(
                "a text", f"{text!r:.80} at position {index}", "Leave it out, or make it a string"
            )
        if not text.strip():
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
    return checked


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: no character, or only spaces, controls and joiners."""
    return all(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp", "Zs") for sign in text)


def is_unicode(text: str) -> bool:
    """Tell whether a tokenizer can read a text: no half of a surrogate pair, as JSON may spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# For tests and dry runs


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
