"""Vectors as an encoder makes them: numbers of a kind that can be one, scaled to unit length."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError, EncoderError

_MATRIX = 2
_CLUSTERING = 8  # rounds


def as_unit_vectors(
    embeddings: Any, dimension: int, encoder: str | None = None
) -> NDArray[np.float32]:
    """Convert whatever a user calls an embedding to unit vectors float32 [N, D].

    Args:
        embeddings: One vector [D] or many [N, D]: NumPy, torch, nested lists, or a pandas Series
            of vectors. Where an array is masked there is no number.
        dimension: Their size D.
        encoder: Name of the encoder that should have made them, for messages.

    Raises:
        EmbeddingError: Not numbers, numbers of a kind no encoder writes (truth values, unsigned,
            complex), not [D] or [N, D], or a vector is zero or not finite.
    """
    vectors = _as_floats(embeddings, dimension)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != _MATRIX or vectors.shape[1] != dimension:
        raise EmbeddingError(
            f"embeddings of {dimension} dimensions, [{dimension}] or [N, {dimension}]",
            f"shape {list(np.shape(embeddings))}",
            f"Use vectors of {encoder or 'the encoder the inverter was trained for'}",
        )
    peaks = row_peaks(vectors)
    for bad, what in ((~np.isfinite(peaks), "NaN or infinity"), (peaks == 0, "only zeros")):
        if bad.any():
            raise EmbeddingError(
                "finite, non-zero vectors", f"{what} in vector {int(bad.argmax())}", "Leave it out"
            )
    return to_unit_length(vectors, peaks)


def row_peaks(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest magnitude in each row of [N, D]; NaN or infinity where it holds one."""
    peaks: NDArray[np.float64] = np.abs(vectors).max(axis=1, initial=0.0)
    return peaks


def to_unit_length(vectors: NDArray[np.float64], peaks: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scale finite, non-zero rows [N, D] to length 1, of 1e-320 and 1e308 as well."""
    scaled = vectors / peaks[:, None]  # a square neither overflows nor vanishes
    unit: NDArray[np.float32] = (scaled / np.linalg.norm(scaled, axis=1, keepdims=True)).astype(
        np.float32
    )
    return unit


def _as_floats(embeddings: Any, dimension: int) -> NDArray[np.float64]:
    expected = f"numbers of {dimension} dimensions, [{dimension}] or [N, {dimension}]"
    if embeddings is None or isinstance(embeddings, (str, bytes)):
        raise EmbeddingError(expected, repr(embeddings)[:80], "Encode texts first")
    try:
        if hasattr(embeddings, "detach") and hasattr(embeddings, "dtype"):  # NumPy lacks bfloat16
            tensor = embeddings.detach().cpu()
            embeddings = tensor.float() if "bfloat16" in str(tensor.dtype) else tensor.numpy()
        array = np.asarray(embeddings)
        if array.dtype == object and not array.ndim:  # a generator, a set, an answer of a service
            raise TypeError(f"{type(embeddings).__name__}, which is no array")
        if array.dtype == object:  # a Series of arrays, whole numbers above 2^64
            array = np.asarray([np.asarray(row, dtype=np.float64) for row in array])
        if array.dtype.name != "bfloat16" and array.dtype.kind not in "fi":
            raise EmbeddingError(
                f"{expected}, as floats",
                f"{array.dtype}, which is no kind of number an encoder writes",
                "Undo the quantisation first: floats, or whole numbers with a sign",
            )
        vectors: NDArray[np.float64] = array.astype(np.float64)
        parts = embeddings if isinstance(embeddings, (list, tuple)) else [embeddings]
        if any(isinstance(part, np.ma.MaskedArray) for part in parts):
            vectors[np.ma.getmaskarray(np.ma.array(embeddings))] = np.nan
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # torch raises the last
        raise EmbeddingError(expected, str(error), "Correct the embeddings") from error
    return vectors


def read_answer(
    body: bytes, count: int, dimension: int | None = None
) -> tuple[NDArray[np.float32], int | None]:
    """Read the answer of an embedding service, ``{"data": [{"embedding": ...}, ...]}``.

    Args:
        body: JSON; each embedding base64 of float32, or a list of numbers.
        count: Texts that were sent.
        dimension: Size of the vectors, where it is known.

    Returns:
        Vectors [B, D] in the order of the texts, and the tokens that the service counted, if any.

    Raises:
        EncoderError: It is not JSON, or not of this number of finite vectors of one size.
    """
    try:
        answer = json.loads(body)
        rows = answer["data"]
        order = [int(row.get("index", place)) for place, row in enumerate(rows)]
        vectors = [_decode(row["embedding"]) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        actual = (
            "HTML" if body.lstrip().startswith(b"<") else "something else" if body else "nothing"
        )
        raise _strange("JSON with embeddings", actual) from None
    if sorted(order) != list(range(count)):
        raise _strange(f"{count} vectors, one for each text,", f"{len(rows)}")
    sizes = {len(vector) for vector in vectors}
    if len(sizes) > 1 or dimension not in (None, *sizes) or sizes == {0}:
        actual = " and ".join(map(str, sorted(sizes)))
        raise _strange(f"vectors of {dimension or 'one number of'} dimensions", actual)
    matrix = np.empty((count, *sizes), dtype=np.float32)
    matrix[order] = vectors
    if not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
        raise _strange("finite, non-zero vectors", "NaN, infinity or only zeros in one")
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return matrix, tokens if isinstance(tokens, int) and 0 <= tokens < 1 << 53 else None


def _decode(embedding: Any) -> NDArray[np.float32]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float32)
    vector = np.asarray(embedding, dtype=np.float64)
    if not isinstance(embedding, list) or vector.ndim != 1:
        raise TypeError("no list of numbers")
    with np.errstate(over="ignore"):  # infinity is refused
        return vector.astype(np.float32)


def _strange(expected: str, actual: str) -> EncoderError:
    return EncoderError(
        f"{expected} in the answer of the API", actual, "Check --api-base and encoder.name"
    )


LEAST_ROWS = 256  # vectors from which statistics are made; of fewer none are
_DIRECTIONS = 64
_LOWEST = 0.001  # the quantile of single texts' shares that is kept
_NULL_DEVIATIONS = 2.5
_MIXED, _MIXED_ROWS = (
    0.1,
    5,
)  # share and number of strange rows in a batch that is right in the mean
_LENIENCE = 0.15  # taken off the threshold of a single vector: texts of a kind nobody measured
_ROWS_COMPARED = 256


def typical_rows(vectors: NDArray[np.float32], count: int, seed: int = 0) -> NDArray[np.intp]:
    """Choose rows nearest to the centres of clusters: typical ones, each unlike the others.

    Args:
        vectors: Unit vectors [N, D].
        count: How many, at most N; spherical k-means makes as many clusters.
        seed: Of the first centres.

    Returns:
        Indices [count], ascending; where two centres have the same nearest row, another at random.
    """
    random = np.random.default_rng(seed)
    centres = vectors[random.choice(len(vectors), count, replace=False)]
    for _ in range(_CLUSTERING):
        nearest, sums = (vectors @ centres.T).argmax(axis=1), np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), centres)
    rows = np.unique((vectors @ centres.T).argmax(axis=0))
    others = random.permutation(np.setdiff1d(np.arange(len(vectors)), rows))
    return np.sort(np.concatenate([rows, others[: count - len(rows)]]))


@dataclass(frozen=True)
class VectorStatistics:
    """Subspace in which an encoder's unit vectors lie, and how much of each lies there.

    An encoder's vectors fill its space unevenly: their first principal directions hold a good
    share of every vector's squared length. In vectors of anything else these directions are
    like any others and hold k/D of it.

    Attributes:
        directions: Principal directions as int8 [k, D], each of length 127.
        share: Mean share of a vector's squared length in them, 0 to 1.
        lowest: The share that 1 of 1,000 vectors falls below.
        cosine: Mean cosine between two vectors.
    """

    directions: NDArray[np.int8]
    share: float
    lowest: float
    cosine: float

    @classmethod
    def measure(cls, vectors: NDArray[Any]) -> VectorStatistics | None:
        """Statistics of unit vectors [N, D] of many texts; None of fewer than 256.

        The directions come from one half of the rows, the shares from the other.
        """
        if len(vectors) < LEAST_ROWS:
            return None
        rows = np.asarray(vectors, dtype=np.float64)
        count = max(1, min(_DIRECTIONS, rows.shape[1] // 6))
        half = rows[::2]
        main = np.linalg.svd(half, full_matrices=False)[2][:count]
        coded = np.round(127 * main).astype(np.int8)
        shares = _shares(coded, rows[1::2])
        return cls(
            coded, float(shares.mean()), float(np.quantile(shares, _LOWEST)), _mean_cosine(rows)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the directions as base64."""
        return {
            "share": self.share,
            "lowest": self.lowest,
            "cosine": self.cosine,
            "shape": list(self.directions.shape),
            "int8": base64.b64encode(self.directions.tobytes()).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VectorStatistics:
        """The statistics that ``to_dict`` wrote.

        Raises:
            EncoderError: They are damaged.
        """
        try:
            coded = np.frombuffer(base64.b64decode(data["int8"]), dtype=np.int8)
            coded = coded.reshape(data["shape"])
            share, lowest, cosine = (float(data[name]) for name in ("share", "lowest", "cosine"))
            if coded.ndim != 2 or not coded.any(axis=1).all() or not coded.size:  # noqa: PLR2004
                raise ValueError(f"directions of shape {list(coded.shape)}, or of no length")
            if not np.isfinite([share, lowest, cosine]).all():
                raise ValueError("shares that are not finite")
            return cls(coded, share, lowest, cosine)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise EncoderError(
                "statistics of an encoder's vectors", f"{error}", "Prepare the pairs again"
            ) from error

    @property
    def threshold(self) -> float:
        """The share below which a vector is taken for another's.

        Halfway between what random directions reach (2.5 standard deviations above their mean)
        and the lowest of the encoder's own; the latter where it is lower.
        """
        count, dimension = self.directions.shape
        mean = count / dimension
        variance = 2 * mean * (1 - mean) / (dimension + 2)
        random = mean + _NULL_DEVIATIONS * float(np.sqrt(variance))
        return float(min(self.lowest, (random + self.lowest) / 2))

    def doubt(self, vectors: NDArray[Any], name: str) -> str | None:
        """Say with numbers why some vectors cannot be this encoder's; None when they can.

        Args:
            vectors: Float [N, D], finite and not zero, of any length.
            name: The encoder's.
        """
        count, dimension = self.directions.shape
        if not len(vectors) or vectors.shape[1] != dimension:
            return None
        floats = np.asarray(vectors, dtype=np.float64)
        rows = to_unit_length(floats, row_peaks(floats)).astype(np.float64)
        shares = _shares(self.directions, rows)
        strange = shares < self.threshold
        whole = shares.mean() < self.threshold * (1 - _LENIENCE / np.sqrt(len(rows)))
        if not whole and (strange.sum() < _MIXED_ROWS or strange.mean() < _MIXED):
            return None
        share, cosine = float(shares[strange].mean()), ""
        if len(rows) > 1:
            cosine = (
                f"; mean cosine between rows {_mean_cosine(rows):.2f}, {name} {self.cosine:.2f}"
            )
        return (
            f"{strange.sum()} of {len(rows)} vectors do not look like {name}'s: "
            f"{share:.0%} of their energy lies in its {count} main directions "
            f"({name} {self.share:.0%}, 1 text of 1,000 below {self.lowest:.0%}; random vectors "
            f"{count / dimension:.0%}){cosine}. Texts recovered from them mean nothing"
        )


def _shares(coded: NDArray[np.int8], rows: NDArray[Any]) -> NDArray[np.float64]:
    main = coded.astype(np.float64)
    main /= np.linalg.norm(main, axis=1, keepdims=True)
    shares: NDArray[np.float64] = ((rows @ main.T) ** 2).sum(axis=1)
    return shares


def _mean_cosine(rows: NDArray[Any]) -> float:
    """Between different rows of the first 256 and all of them, over all pairs."""
    some = rows[:_ROWS_COMPARED]
    total = float((some.sum(axis=0) ** 2).sum()) - len(some)
    return float(total / (len(some) * (len(some) - 1)))
