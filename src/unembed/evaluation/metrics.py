"""Metrics of recovered text, each a number per text, and their means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def token_accuracy(original: Sequence[int], recovered: Sequence[int]) -> float:
    """Share of the original's tokens that stand at the same position in the recovery, 0 to 1."""
    hits = sum(a == b for a, b in zip(original, recovered, strict=False))
    return hits / len(original)


def exact_match(original: Sequence[int], recovered: Sequence[int]) -> float:
    """1 when the token sequences are the same, else 0."""
    return float(list(original) == list(recovered))


def token_set_f1(original: Sequence[int], recovered: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over the sets of tokens, order ignored, 0 to 1."""
    wanted, got = set(original), set(recovered)
    return 2.0 * len(wanted & got) / (len(wanted) + len(got))


@dataclass(frozen=True)
class Figure:
    """A mean over texts.

    Attributes:
        mean: The mean.
        low: Lower end of the 95% bootstrap interval.
        high: Upper end.
        n: Texts it could be computed for.
    """

    mean: float
    low: float
    high: float
    n: int


def summarise(
    values: Sequence[float | None], seed: int = 0, resamples: int = 2000
) -> Figure | None:
    """Mean and percentile bootstrap interval; a value of None is left out.

    Returns:
        None when no value could be computed: a missing metric is never 0.
    """
    known: NDArray[np.float64] = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(known):
        return None
    generator = np.random.default_rng(seed)
    means = [
        known[generator.integers(len(known), size=len(known))].mean() for _ in range(resamples)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Figure(float(known.mean()), float(low), float(high), len(known))
