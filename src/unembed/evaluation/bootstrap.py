"""Means with bootstrap intervals, from sums within blocks of texts: flat memory for any number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unembed.evaluation.metrics import (
    BLEU_PARTS,
    CALIBRATION,
    CALIBRATION_PARTS,
    COLUMNS,
    CORPUS_BLEU,
    MEANS,
    METRICS,
    calibration_error,
    corpus_bleu,
)

RESAMPLES = 1000
_MOST_BLOCKS = 1000
_LEVELS = (0.025, 0.975)


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


class Tally:
    """Sums of the columns of `unembed.evaluation.metrics` within blocks of neighbouring texts.

    Up to 1,000 texts are a block each, and resampling blocks is resampling texts; more share
    blocks, which costs the interval little and keeps memory flat.

    Args:
        texts: How many there will be in all, N.
    """

    def __init__(self, texts: int) -> None:
        self.texts = texts
        self.sums = np.zeros((block_count(texts), len(COLUMNS)))
        self.counts = np.zeros((block_count(texts), len(COLUMNS)))

    def add(self, index: int, values: NDArray[np.float64]) -> None:
        """Add the numbers of text ``index`` (0 to N-1); not-a-number is not known."""
        block = index * len(self.sums) // self.texts
        missing = np.isnan(values)
        self.sums[block] += np.where(missing, 0.0, values)
        self.counts[block] += ~missing

    def figures(self, weights: NDArray[np.float64]) -> dict[str, Figure | None]:
        """Every metric, None where no text has it.

        Args:
            weights: How often each block is drawn in each resample [R, blocks], of `draw_blocks`.
        """
        figures: dict[str, Figure | None] = {}
        sums, counts = self.sums.sum(axis=0), self.counts.sum(axis=0)
        resampled_sums, resampled_counts = (
            weights @ self.sums,
            weights @ self.counts,
        )  # [R, columns]
        for name in MEANS:
            at = COLUMNS.index(name)
            with np.errstate(invalid="ignore", divide="ignore"):
                means = resampled_sums[:, at] / resampled_counts[:, at]
                figures[name] = _figure(sums[at] / counts[at], means, int(counts[at]))
        parts = [COLUMNS.index(name) for name in BLEU_PARTS]
        figures[CORPUS_BLEU] = None
        if counts[parts[0]]:
            bleu = np.array([corpus_bleu(row) for row in resampled_sums[:, parts].tolist()])
            mean = corpus_bleu(sums[parts].tolist())
            figures[CORPUS_BLEU] = _figure(mean, bleu, int(counts[parts[0]]))
        parts = [COLUMNS.index(name) for name in CALIBRATION_PARTS]
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = calibration_error(resampled_sums[:, parts])
            mean = float(calibration_error(sums[parts]))
        figures[CALIBRATION] = _figure(mean, errors, int(counts[parts[0]]))
        return {name: figures[name] for name in METRICS}


def block_count(texts: int) -> int:
    """Blocks that N texts are summed in."""
    return min(texts, _MOST_BLOCKS)


def draw_blocks(blocks: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.float64]:
    """How often each block is drawn in each bootstrap resample, [R, blocks].

    One draw serves every row and metric of a table, so that their differences are paired.
    """
    draws = np.random.default_rng(seed).integers(blocks, size=(resamples, blocks))
    flat = draws + blocks * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=resamples * blocks)
    return counts.reshape(resamples, blocks).astype(np.float64)


def summarise(
    values: Sequence[float | None], seed: int = 0, resamples: int = RESAMPLES
) -> Figure | None:
    """Mean and percentile bootstrap interval; a value of None is left out.

    Returns:
        None when no value could be computed: a missing metric is never 0.
    """
    numbers: NDArray[np.float64] = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(numbers):
        return None
    means = draw_blocks(len(numbers), seed, resamples) @ numbers / len(numbers)
    return _figure(numbers.mean(), means, len(numbers))


def _figure(mean: float, resampled: NDArray[np.float64], n: int) -> Figure | None:
    finite = resampled[np.isfinite(resampled)]  # a resample may hold none of the texts that count
    if n == 0 or not len(finite):
        return None
    low, high = np.quantile(finite, _LEVELS)
    return Figure(float(mean), float(low), float(high), n)
