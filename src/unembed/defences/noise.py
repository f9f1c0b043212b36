"""Noise added to vectors, set by the cosine that it leaves and never by its scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors, require_share, unit


@dataclass
class Gaussian(Defence):
    """Gaussian noise on the stored vectors, which are then scaled to unit length.

    A unit vector with noise of standard deviation σ in each of D numbers has a cosine of about
    1 / √(1 + σ²D) with itself, so σ = √((1 / cosine² - 1) / D). The same σ leaves another cosine at
    another dimension, which is why it is no setting. Queries have none.

    Attributes:
        cosine: Mean cosine between a vector and its stored one, 0 to 1.
    """

    cosine: float = 0.96

    def __post_init__(self) -> None:
        require_share("cosine", self.cosine)

    def sigma(self, dimension: int) -> float:
        """Standard deviation of the noise in each of D numbers."""
        return float(np.sqrt((1.0 / self.cosine**2 - 1.0) / dimension))

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Vectors with noise, of unit length."""
        return unit(vectors + self.sigma(vectors.shape[1]) * self._draw(vectors.shape, random))

    def query(self, vectors: Vectors) -> Vectors:
        """The same vectors: queries need not be protected from the store."""
        return vectors

    def invert(self, rows: Vectors) -> Vectors:
        """The stored vectors: all there is without knowing the noise."""
        return rows

    def _draw(self, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float64]:
        return random.standard_normal(shape)


@dataclass
class Laplace(Gaussian):
    """Laplace noise of independent numbers, with the standard deviation of `Gaussian`."""

    def _draw(self, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float64]:
        return random.laplace(scale=1.0 / np.sqrt(2.0), size=shape)
