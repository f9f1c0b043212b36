"""Means with bootstrap intervals from sums within blocks of texts, and what they say in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from unembed.evaluation.rows import NEAREST, SHUFFLED

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
        """Compute every metric, None where no text has it.

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
    """Draw how often each block is in each bootstrap resample, [R, blocks].

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


_FRACTIONS = (
    (0.04, "hardly any"), (0.085, "about one in fifteen"), (0.115, "about a tenth"),
    (0.17, "about one in seven"), (0.225, "about a fifth"), (0.285, "about a quarter"),
    (0.37, "about a third"), (0.45, "about two fifths"), (0.55, "about half"),
    (0.635, "about three fifths"), (0.71, "about two thirds"), (0.78, "about three quarters"),
    (0.87, "about four fifths"), (0.97, "nearly all"),
)  # fmt: skip
OTHER_VECTORS = "stored vectors are not those of their texts"  # how a note begins
_TELLING = ("numbers", "e-mail addresses", "URLs", "names")


def put_in_words(
    rows: Mapping[str, Mapping[str, Figure | None]], attacks: Sequence[str], notes: Sequence[str]
) -> str:
    """Say what figures come to: how much came back, beside what guessing and search give.

    Args:
        rows: Row → metric → figure.
        attacks: The rows that are attacks; of several the one of the highest recall is described.
        notes: Of the evaluation; that of vectors of another encoder goes before all.
    """
    recalls = {name: rows[name]["token-set recall"] for name in attacks}
    best = max(attacks, key=lambda name: -1.0 if (f := recalls[name]) is None else f.mean)
    recall, figures = recalls[best], rows[best]
    if recall is None:
        return "Nothing could be measured."
    parts = [f"{_fraction(recall.mean)} of the words come back{_by(best, attacks)}"]
    parts[0] += f" ({recall.mean:.0%}, n = {recall.n}), {_whole_texts(figures['exact match'])}"
    spans = [(kind, figures.get(kind)) for kind in _TELLING]
    shares = [f"{figure.mean:.0%} of the {kind}" for kind, figure in spans if figure is not None]
    if shares:
        parts.append(f"of what stands in the texts, {', '.join(shares)}")
    guess = rows.get(SHUFFLED, {}).get("token-set recall")
    if guess is not None:
        beyond = recall.low > guess.high
        parts.append(
            f"the vector of another text gives {guess.mean:.0%}"
            + ("" if beyond else ", so this attack shows no leak beyond guessing")
        )
    search = rows.get(NEAREST, {}).get("token-set recall")
    if search is not None:
        parts.append(f"the nearest training text has {search.mean:.0%}")
    text = "; ".join(parts)
    if any(note.startswith(OTHER_VECTORS) for note in notes):
        text = f"the stored vectors are not the encoder's of these texts (see the note); {text}"
    doubt = "The vectors do not look like the encoder's, so these figures mean nothing: "
    strange = any("do not look like" in note for note in notes)
    end = ". A stronger attack may recover more." if not strange else "."
    return (doubt + text if strange else text[0].upper() + text[1:]) + end


def _fraction(share: float) -> str:
    return next((words for most, words in _FRACTIONS if share < most), "all")


def _by(best: str, attacks: Sequence[str]) -> str:
    return "" if len(attacks) == 1 else f" with {best}"


def _whole_texts(exact: Figure | None) -> str:
    """How many texts came back word for word."""
    if exact is None or exact.mean == 0.0:
        return "no text whole"
    if exact.mean == 1.0:
        return "every text whole"
    if exact.mean > 0.5:  # noqa: PLR2004 - more than every other
        return f"{exact.mean:.0%} of the texts whole"
    return f"one text in {round(1 / exact.mean)} whole"


def duration(seconds: float) -> str:
    """About how long, for readers: ``about 20 minutes``."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}"
    if seconds > 45.0:  # noqa: PLR2004
        return "about a minute"
    return f"about {round(seconds)} seconds" if seconds >= 1.5 else "a second"  # noqa: PLR2004
