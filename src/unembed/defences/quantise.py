"""Scalar quantisation: 8 bits or 1 bit a number; kept for its price, which some take for safety."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors
from unembed.errors import require_whole

_STEPS = 254  # codes -127 to 127


@dataclass
class Int8(Defence):
    """8 bits a number, from the least to the largest value of each dimension."""

    fitted: ClassVar[tuple[str, ...]] = ("scale", "middle")

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Take each dimension's range."""
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        self.middle = ((low + high) / 2).astype(np.float32)
        self.scale = np.maximum((high - low) / _STEPS, 1e-12).astype(np.float32)

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Vectors rounded to the codes' values."""
        rounded: Vectors = self.codes(vectors).astype(np.float32) * self.scale + self.middle
        return rounded

    def query(self, vectors: Vectors) -> Vectors:
        """The same vectors: only the store is rounded."""
        return vectors

    def invert(self, rows: Vectors) -> Vectors:
        """The values of the codes."""
        return rows

    def codes(self, rows: Vectors) -> NDArray[Any]:
        """Codes int8 [n, D]."""
        steps = np.round((rows - self.middle) / self.scale)
        codes: NDArray[np.int8] = np.clip(steps, -_STEPS // 2, _STEPS // 2).astype(np.int8)
        return codes


@dataclass
class Binary(Defence):
    """The signs alone, a bit a number, compared by Hamming distance.

    Attributes:
        rerank: Nearest codes that are ranked again by float vectors, which must then lie where
            whoever reads the codes cannot; 0: none.
    """

    rerank: int = 0

    def __post_init__(self) -> None:
        (self.rerank,) = require_whole(rerank=(self.rerank, 0))

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Signs, scaled to unit length; their products rank as Hamming distances do."""
        signs: Vectors = np.where(vectors > 0, 1.0, -1.0).astype(np.float32)
        return signs / np.float32(np.sqrt(vectors.shape[1]))

    def invert(self, rows: Vectors) -> Vectors:
        """The signs."""
        return rows

    def codes(self, rows: Vectors) -> NDArray[Any]:
        """Bits packed in bytes, uint8 [n, D / 8]."""
        return np.packbits(rows > 0, axis=1)
