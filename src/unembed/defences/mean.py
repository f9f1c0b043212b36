"""Mean removal: the direction that all vectors of an encoder share is taken off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unembed.defences.defence import Defence, Vectors, unit


@dataclass
class MeanRemoval(Defence):
    """The store's mean vector taken off, then unit length; often done for better rankings."""

    fitted: ClassVar[tuple[str, ...]] = ("mean",)

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Take the mean [D]."""
        self.mean = vectors.mean(axis=0)

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Vectors without the mean."""
        return unit(vectors - self.mean)

    def invert(self, rows: Vectors) -> Vectors:
        """The vectors, exactly: x = s y + mean has length 1 for one positive s."""
        along = rows @ self.mean
        rest = np.maximum(along**2 + 1.0 - float(self.mean @ self.mean), 0.0)
        inverse: Vectors = (np.sqrt(rest) - along)[:, None] * rows + self.mean
        return inverse
