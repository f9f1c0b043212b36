"""Proof that an encoder makes the vectors a real vector store holds, and its fingerprint."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.vectors import VectorStatistics
from unembed.errors import EncoderError
from unembed.tokenizer import TextTokenizer

PROBES = (
    "The patient was admitted on Monday with chest pain, and the court heard her on Friday.",
    "Cats.",
    "Am 3. Mai 2021 überwies die Bank 1.250,75 € an Frau Müller.",
    "日本語の文章です。短いですが、句読点があります。",
    "هذه جملة عربية قصيرة، تُكتب من اليمين إلى اليسار.",
    "The password of the server is not written anywhere 😀, and nobody asked for it.",
)
# bfloat16 against float32 leaves cosines above 0.999; another prompt or adapter falls far below.
LEAST_COSINE = 0.995
_UNIT_TOLERANCE = 1e-3
_LENGTHS = 0.02  # off 1 at most, also in half precision; NaN is for the comparison to refuse
_DECIMALS = 2
_REPEATS = 10  # of one text, for the noise of an API


@dataclass(frozen=True)
class Fingerprint:
    """The vectors of the probe texts, by which an encoder is known again.

    Attributes:
        sha256: Over the vectors rounded to two decimals: equal when two machines compute alike.
        vectors: Float16 [P, D], for a comparison that allows for number formats.
        statistics: Of the encoder's vectors of many texts; None in files of earlier versions.
    """

    sha256: str
    vectors: NDArray[np.float16]
    statistics: VectorStatistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the vectors as base64 of little-endian float16."""
        data = base64.b64encode(self.vectors.astype("<f2").tobytes()).decode("ascii")
        plain = {"sha256": self.sha256, "shape": list(self.vectors.shape), "float16": data}
        return plain | ({"statistics": self.statistics.to_dict()} if self.statistics else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fingerprint:
        """The fingerprint that ``to_dict`` wrote.

        Raises:
            EncoderError: It is damaged.
        """
        try:
            flat = np.frombuffer(base64.b64decode(data["float16"]), dtype="<f2")
            vectors, more = flat.reshape(data["shape"]).astype(np.float16), data.get("statistics")
            statistics = None if more is None else VectorStatistics.from_dict(more)
            return cls(str(data["sha256"]), vectors, statistics)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise EncoderError(
                "a fingerprint of an encoder", f"{error}", "Prepare the pairs again"
            ) from error

    def require_same(self, encoder: Encoder, what: str) -> None:
        """Refuse an encoder that embeds the probe texts elsewhere.

        Raises:
            EncoderError: A probe's vector has a cosine below 0.995 to the one kept here.
        """
        vectors = probe_vectors(encoder)
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if np.abs(lengths - 1).max() > _LENGTHS:
            actual = f"lengths from {lengths.min():.3g} to {lengths.max():.3g}"
            raise EncoderError("an encoder of unit vectors", actual, "Scale what it gives")
        worst = least_cosine(self.vectors, vectors)
        if not worst >= LEAST_COSINE:
            raise EncoderError(
                f"{what} of an encoder with the fingerprint {self.sha256[:12]}",
                f"{encoder.identity.describe()}, whose probe vectors have a cosine of only "
                f"{worst:.4f} to it",
                "Use the same model, prompt, adapter and library versions; "
                "`unembed preflight` shows what an encoder does",
            )


def require_encoder(
    encoder: Encoder, identity: EncoderIdentity, fingerprint: Fingerprint | None, what: str
) -> None:
    """Refuse an encoder that is not the one recorded.

    Args:
        encoder: The one at hand.
        identity: The one recorded.
        fingerprint: Its vectors of the probe texts, where they were kept.
        what: What was made with it, for the message.

    Raises:
        EncoderError: Its weights, prompt, pooling or truncation differ, or it embeds the probe
            texts elsewhere; or it is none.
    """
    mine = isinstance(getattr(encoder, "identity", None), EncoderIdentity)
    if not mine or not hasattr(encoder, "encode"):
        actual = f"{type(encoder).__name__} {encoder!r:.80}"
        raise EncoderError("an encoder", actual, "Load it with unembed.load_encoder")
    identity.require_same(encoder.identity, what, has_vectors=fingerprint is not None)
    if fingerprint is not None:
        fingerprint.require_same(encoder, what)


@dataclass(frozen=True)
class Check:
    """Check of something that must hold of an encoder.

    Attributes:
        name: What is checked.
        passed: Whether it holds; None where it cannot be checked.
        found: The figure or value found.
    """

    name: str
    passed: bool | None
    found: str


@dataclass(frozen=True)
class Preflight:
    """Report of a preflight; ``passed`` when no check failed."""

    encoder: dict[str, Any]
    checks: list[Check]
    fingerprint: dict[str, Any]

    @property
    def passed(self) -> bool:
        """True when no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"passed": self.passed, **asdict(self)}


def preflight(
    encoder: Encoder, texts: Sequence[str] = PROBES, expected: Fingerprint | None = None
) -> Preflight:
    """Check an encoder on known texts.

    Args:
        encoder: The embedding model.
        texts: At least two texts of different lengths.
        expected: A fingerprint the encoder should have.

    Returns:
        The checks, each passed or not, and the encoder's fingerprint.

    Raises:
        EncoderError: The encoder fails to embed the texts at all.
    """
    identity = encoder.identity
    anew = getattr(encoder, "encode_anew", None)  # of an API, past the cache of its answers
    encode = encoder.encode if anew is None else anew
    vectors = encode(texts)
    again = encode(texts)
    alone = np.concatenate([encode([text]) for text in texts])
    finite = bool(np.isfinite(vectors).all())
    off = float(np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max())
    shape = (len(texts), identity.dimension)
    together = least_cosine(vectors, alone)
    distinct = _distinct(None if anew else encoder.tokenizer, texts, vectors)
    fingerprint = _fingerprint(encode(PROBES))
    checks = [
        Check("dimension", vectors.shape == shape, f"{vectors.shape[1]}"),
        Check("finite values", finite, "all finite" if finite else "NaN or infinity"),
        Check("unit length", off <= _UNIT_TOLERANCE, f"off by at most {off:.1e}"),
        Check(
            "distinct texts, distinct vectors",
            distinct,
            f"{len(texts)} texts",
        ),
        _noise(encode, texts[0])
        if anew
        else Check(
            "deterministic", bool(np.array_equal(vectors, again)), _difference(vectors, again)
        ),
        Check("batch invariant", together >= LEAST_COSINE, f"least cosine {together:.5f}"),
        Check("prompt", None, repr(identity.prompt)),
        *(Check(name, None, text) for name, text in getattr(encoder, "pipeline", ())),
        _official_check(encoder, texts, vectors),
    ]
    if expected is not None:
        cosine = least_cosine(expected.vectors, fingerprint.vectors)
        figure = f"least cosine {cosine:.5f} to {expected.sha256[:12]}"
        checks.append(Check("fingerprint", cosine >= LEAST_COSINE, figure))
    return Preflight(identity.to_dict(), checks, fingerprint.to_dict())


def make_fingerprint(encoder: Encoder) -> Fingerprint:
    """The encoder's vectors of the probe texts and their digest."""
    return _fingerprint(probe_vectors(encoder))


def _fingerprint(vectors: NDArray[np.float32]) -> Fingerprint:
    rounded = np.round(vectors, _DECIMALS) + np.float32(0)  # no negative zeros
    digest = hashlib.sha256(np.ascontiguousarray(rounded, dtype="<f4").tobytes()).hexdigest()
    return Fingerprint(digest, vectors.astype(np.float16))


def probe_vectors(encoder: Encoder) -> NDArray[np.float32]:
    """Vectors of the probe texts, [P, D].

    Raises:
        EncoderError: The encoder is one of the user's own and gives something else.
    """
    vectors: Any = encoder.encode(PROBES)
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2:  # noqa: PLR2004 - [P, D]
        kind = f"shape {list(np.shape(vectors))}, {type(vectors).__name__}"
        raise EncoderError(
            "an encoder whose encode gives unit vectors as a NumPy array [N, D]",
            kind,
            "Convert what it gives, and scale it to length 1",
        )
    return vectors


def _official_check(encoder: Encoder, texts: Sequence[str], vectors: NDArray[np.float32]) -> Check:
    """Compare with the library's own pipeline, loaded apart and in float32, where there is one."""
    name = "agrees with SentenceTransformer.encode"
    official = getattr(encoder, "official", None)
    if official is None:
        return Check(name, None, "not a sentence-transformers model")
    cosine = least_cosine(official(texts), vectors)
    return Check(name, cosine >= LEAST_COSINE, f"least cosine {cosine:.5f}")


def least_cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The lowest cosine between rows; -1 for arrays of different shapes or values not finite."""
    if one.shape != other.shape:
        return -1.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())
    return cosine if np.isfinite(cosine) else -1.0


def _noise(encode: Callable[[Sequence[str]], NDArray[np.float32]], text: str) -> Check:
    """Ask for one text ten times: the answers of an API need not be the same to the bit."""
    rows = np.concatenate([encode([text]) for _ in range(_REPEATS)])
    cosine = least_cosine(rows[1:], np.repeat(rows[:1], _REPEATS - 1, axis=0))
    different = len(np.unique(rows, axis=0))
    evidence = (
        f"one text {_REPEATS} times: {different} different answer{'s' * (different != 1)}, least "
        f"cosine {cosine:.6f}, values differ by up to {np.ptp(rows, axis=0).max():.1e}"
    )
    return Check("noise", cosine >= LEAST_COSINE, evidence)


def _distinct(
    tokenizer: TextTokenizer | None, texts: Sequence[str], vectors: NDArray[np.float32]
) -> bool:
    """Tell whether no two texts point the same way, as those of a broken pooling do.

    Texts of the same tokens may: a vocabulary of one language has one token for all others.
    """
    words = (
        [frozenset(ids) for ids in tokenizer.encode(texts)] if tokenizer else [*range(len(texts))]
    )
    same = np.array([[one == other for other in words] for one in words])
    cosines = np.where(same, -1, vectors @ vectors.T)
    return bool(cosines.max() < 1 - 1e-5)


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> str:
    gap = float(np.abs(one - other).max())
    return "same bytes twice" if gap == 0 else f"two runs differ by up to {gap:.1e}"
