"""Product quantisation: each part of a vector is the nearest of 256 centroids, a byte a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors
from unembed.errors import ConfigError, require_whole
from unembed.files import require_extra

_BITS = 8  # of a code


@dataclass
class ProductQuantisation(Defence):
    """A byte for each of some parts of a vector, the code of its nearest centroid (Jégou, 2011).

    The centroids stand in the index beside the codes, so whoever has one has the other.

    Attributes:
        parts: Of a vector; they must divide D.
    """

    fitted: ClassVar[tuple[str, ...]] = ("centroids",)

    parts: int = 48

    def __post_init__(self) -> None:
        (self.parts,) = require_whole(parts=(self.parts, 1))

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:
        """Learn the centroids, float32 [parts, C, D / parts]; C is 256 where N allows."""
        require_extra("faiss", "product quantisation", "leave pq out of --defences")
        import faiss

        dimension = vectors.shape[1]
        if dimension % self.parts:
            raise ConfigError(
                f"parts of pq that divide {dimension}", str(self.parts), "Correct --defences"
            )
        bits = int(np.clip(np.log2(max(len(vectors), 2)), 1, _BITS))
        index = faiss.ProductQuantizer(dimension, self.parts, bits)
        index.cp.seed = int(random.integers(1 << 31))
        index.cp.min_points_per_centroid = 1
        index.train(np.ascontiguousarray(vectors))
        shape = (self.parts, 1 << bits, dimension // self.parts)
        self.centroids = faiss.vector_to_array(index.centroids).reshape(shape).copy()

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Each part replaced by its centroid."""
        codes = self.codes(vectors)
        parts = [table[codes[:, m]] for m, table in enumerate(self.centroids)]
        return np.concatenate(parts, axis=1)

    def query(self, vectors: Vectors) -> Vectors:
        """The same vectors: queries are compared with centroids (asymmetric distance)."""
        return vectors

    def invert(self, rows: Vectors) -> Vectors:
        """The centroids."""
        return rows

    def codes(self, rows: Vectors) -> NDArray[Any]:
        """Codes uint8 [n, parts]."""
        split = np.split(rows, self.parts, axis=1)
        return np.stack(
            [
                ((table**2).sum(axis=1) - 2.0 * part @ table.T).argmin(axis=1)
                for part, table in zip(split, self.centroids, strict=True)
            ],
            axis=1,
        ).astype(np.uint8)
