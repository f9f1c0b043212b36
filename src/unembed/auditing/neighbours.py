"""What leaks without a word recovered: near-duplicates across groups, membership, outliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.auditing.attacks import Corpus
from unembed.encoders.vectors import as_unit_vectors

DUPLICATE = 0.98  # cosine from which two vectors are taken for one text
MEMBER = 0.99
_MOST = 20  # pairs, or outliers, in a report
_BLOCK = 512  # rows compared with all others at a time
_FAR = 5.0  # deviations, by the median
_MAD = 1.4826  # median absolute deviation → standard deviation of a normal distribution


@dataclass(frozen=True)
class Neighbours:
    """What the places of the vectors give away.

    Attributes:
        duplicates: Pairs of different records with a cosine of .98 or more.
        across: Of these, pairs whose records belong to different groups; None without groups.
        examples: Ids of some pairs, those across groups first, with their cosine.
        outliers: Ids whose nearest neighbour is unusually far, or whose length is unusual.
        members: Texts of the auditor's corpus that are in the sample; None without a corpus.
    """

    duplicates: int
    across: int | None
    examples: list[tuple[str, str, float]]
    outliers: list[str]
    members: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def find_neighbours(
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    groups: Sequence[Any] | None,
    corpus: Corpus | None,
) -> Neighbours:
    """Compare all vectors of a sample with each other and with a corpus, N² products.

    Args:
        ids: Of the records.
        vectors: [N, D].
        groups: The field of each that was grouped by.
        corpus: Texts of the auditor's, of the same encoder.
    """
    unit = as_unit_vectors(vectors, vectors.shape[1])
    labels = np.array([str(group) for group in groups or [""] * len(ids)])
    nearest = np.empty(len(ids))
    pairs: list[tuple[bool, float, int, int]] = []  # in one group, minus the cosine, two rows
    duplicates = across = 0
    for start in range(0, len(ids), _BLOCK):
        similarity = unit[start : start + _BLOCK] @ unit.T
        np.fill_diagonal(similarity[:, start:], -1.0)  # a vector with itself
        nearest[start : start + _BLOCK] = similarity.max(axis=1)
        one, other = np.nonzero(np.triu(similarity >= DUPLICATE, k=start))
        same, cosines = labels[start + one] == labels[other], similarity[one, other]
        duplicates += len(one)
        across += int((~same).sum())
        first = np.lexsort((-cosines, same))[:_MOST]
        columns = (same[first], -cosines[first], start + one[first], other[first])
        pairs = sorted([*pairs, *zip(*(c.tolist() for c in columns), strict=True)])[:_MOST]
    far = _deviations(-nearest) > _FAR if len(ids) > 1 else np.zeros(len(ids), dtype=bool)
    lengths = _deviations(np.linalg.norm(vectors, axis=1))
    strange = far | (np.abs(lengths) > _FAR)
    members = None
    if corpus is not None and corpus.vectors.shape[1] == unit.shape[1]:
        parts = np.array_split(corpus.vectors, max(1, len(corpus.vectors) // _BLOCK))
        members = sum(int(((part @ unit.T).max(axis=1) >= MEMBER).sum()) for part in parts)
    return Neighbours(
        duplicates=duplicates,
        across=None if groups is None else across,
        examples=[(ids[a], ids[b], round(-cosine, 4)) for _, cosine, a, b in pairs],
        outliers=[ids[row] for row in np.flatnonzero(strange).tolist()][:_MOST],
        members=members,
    )


def _deviations(values: NDArray[Any]) -> NDArray[np.float64]:
    """Distance from the median in robust standard deviations; 0 where the values hardly vary."""
    centred = values.astype(np.float64) - np.median(values)
    scale = float(np.median(np.abs(centred))) * _MAD
    result: NDArray[np.float64] = centred / scale if scale > 1e-6 else np.zeros_like(centred)  # noqa: PLR2004 - rounding
    return result
