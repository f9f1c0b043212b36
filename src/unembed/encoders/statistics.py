"""Statistics of an encoder's vectors, by which vectors that are not its own are noticed."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EncoderError

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


@dataclass(frozen=True)
class VectorStatistics:
    """Where an encoder's unit vectors lie, and how much of each lies there.

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
            share, lowest, cosine = (float(data[name]) for name in ("share", "lowest", "cosine"))
            return cls(coded.reshape(data["shape"]), share, lowest, cosine)
        except (KeyError, ValueError, TypeError) as error:
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
        return min(self.lowest, (random + self.lowest) / 2)

    def doubt(self, vectors: NDArray[Any], name: str) -> str | None:
        """Say with numbers why some vectors cannot be this encoder's; None when they can.

        Args:
            vectors: Float [N, D], finite and not zero, of any length.
            name: The encoder's.
        """
        count, dimension = self.directions.shape
        if not len(vectors) or vectors.shape[1] != dimension:
            return None
        rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
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
