"""Secret rotations and permutations: rankings stay exact, and whoever has the key inverts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unembed.defences.cut import principal_directions
from unembed.defences.defence import Defence, Vectors, require_share, unit


@dataclass
class Rotation(Defence):
    """Secret random rotation, of all dimensions or of the first principal directions.

    Attributes:
        keep: Share of the dimensions that stay, 0 to 1. Below 1 rankings are no longer exact, and
            whoever finds the key gets no more than the cut has left.
    """

    secret: ClassVar[bool] = True
    fitted: ClassVar[tuple[str, ...]] = ("matrix",)
    secrets: ClassVar[tuple[str, ...]] = ("matrix",)
    keep: float = 1.0

    def __post_init__(self) -> None:
        require_share("keep", self.keep)

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Draw the rotation, uniform over all of them (Mezzadri, 2007); float32 [D, D']."""
        dimension = vectors.shape[1]
        count = max(1, round(self.keep * dimension))
        q, r = np.linalg.qr(random.standard_normal((count, count)))
        rotation = (q * np.sign(np.diag(r))).astype(np.float32)
        cut = count < dimension
        self.matrix = principal_directions(vectors, count) @ rotation if cut else rotation

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Rotated vectors."""
        return unit(vectors @ self.matrix)


@dataclass
class Permutation(Defence):
    """Secret order of the numbers, the same in every vector."""

    secret: ClassVar[bool] = True
    fitted: ClassVar[tuple[str, ...]] = ("order",)
    secrets: ClassVar[tuple[str, ...]] = ("order",)

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Draw the order [D]."""
        self.order = random.permutation(vectors.shape[1])

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Vectors with their numbers in the secret order."""
        return np.ascontiguousarray(vectors[:, self.order])
