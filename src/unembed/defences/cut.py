"""Dimension cut: a part of the numbers, or of the principal directions, is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unembed.defences.defence import Defence, Vectors, require_share, unit
from unembed.errors import ConfigError

METHODS = ("pca", "matryoshka")


def principal_directions(vectors: Vectors, count: int) -> Vectors:
    """Principal directions of vectors [N, D] without their mean taken off, float32 [D, count]."""
    rows = vectors.astype(np.float64)
    _, directions = np.linalg.eigh(rows.T @ rows)  # ascending
    return np.ascontiguousarray(directions[:, ::-1][:, :count]).astype(np.float32)


@dataclass
class Cut(Defence):
    """Fewer dimensions: the principal directions, or the leading numbers of a Matryoshka model.

    The directions lie beside the index, which has to apply them to queries.

    Attributes:
        keep: Share of the dimensions that stay, 0 to 1.
        method: ``pca``, or ``matryoshka`` for an encoder trained to be cut; others lose much.
    """

    fitted: ClassVar[tuple[str, ...]] = ("directions",)
    keep: float = 0.5
    method: str = "pca"

    def __post_init__(self) -> None:
        require_share("keep", self.keep)
        if self.method not in METHODS:
            raise ConfigError(
                f"method of cut: {' or '.join(METHODS)}", repr(self.method), "Correct it"
            )

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Find the directions, float32 [D, D']."""
        count = max(1, round(self.keep * vectors.shape[1]))
        if self.method == "pca":
            self.directions = principal_directions(vectors, count)
        else:
            self.directions = np.eye(vectors.shape[1], count, dtype=np.float32)

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Coordinates along the directions, scaled to unit length."""
        return unit(vectors @ self.directions)

    def invert(self, rows: Vectors) -> Vectors:
        """The nearest vectors that have these coordinates."""
        return rows @ self.directions.T
