"""The word probe on held-out texts: average precision, recall and calibration, beside floors.

    python -m benchmarks.words dev.parquet --train train.parquet --nearest 5000

Every text of at least 24 words (cut after 190) is embedded, and the words of the probe's vocabulary
are ranked for it. A text's other words count as never found. The floors rank by how frequent words
are (the same list for every text), and by the text of the nearest of some training texts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import print_table
from unembed.data.readers import read_texts
from unembed.device import choose_compute
from unembed.encoders.sentence import load_encoder
from unembed.vectors.words import (
    COMMON,
    LONGEST,
    SHORTEST,
    WordProbe,
    chunks_of,
    occurrences,
    words_of,
)

BUCKETS = ((24, 47), (48, 95), (96, 190))  # words
NEAREST = 10  # texts, weighted by their cosine


def average_precision(ranking: NDArray[np.int64], there: NDArray[np.bool_], total: int) -> float:
    """Mean precision at the rank of each of a text's words; of those never ranked it is 0."""
    hits = there[ranking]
    precisions = hits.cumsum()[hits] / (np.flatnonzero(hits) + 1)
    return float(precisions.sum() / total)


def scores_of(
    scores: NDArray[np.float32], there: NDArray[np.bool_], totals: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Average precision, recall at 10 and 50, precision at 10 of each text: [N, 4].

    Args:
        scores: Of each word [N, W], the higher the earlier.
        there: Whether the text has it [N, W].
        totals: Distinct words of each text, known or not [N].
    """
    rows = []
    for row, known, total in zip(scores, there, totals.tolist(), strict=True):
        ranking = np.argsort(-row, kind="stable")
        ten, fifty = known[ranking[:10]].sum(), known[ranking[:50]].sum()
        rows.append(
            [average_precision(ranking, known, total), ten / total, fifty / total, ten / 10]
        )
    return np.array(rows, dtype=np.float64)


def figure(values: NDArray[np.float64]) -> str:
    """Mean and 95% bootstrap interval over texts."""
    draws = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def calibration(p: NDArray[np.float32], there: NDArray[np.bool_]) -> tuple[float, list[list[str]]]:
    """Expected calibration error over all words and texts, and what each bin holds."""
    edges = [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.000001]
    error, rows = 0.0, []
    for low, high in itertools.pairwise(edges):
        inside = (p >= low) & (p < high)
        count = int(inside.sum())
        if count:
            mean, share = float(p[inside].mean()), float(there[inside].mean())
            error += count * abs(mean - share) / p.size
            rows.append([f"{low:g} to {min(high, 1):g}", str(count), f"{mean:.4f}", f"{share:.4f}"])
    return error, rows


def nearest_scores(
    vectors: NDArray[np.float32],
    known: NDArray[np.float32],
    texts: Sequence[str],
    probe: WordProbe,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Words of the nearest text, then by frequency; words of the ten nearest by their cosines."""
    index = {word: place for place, word in enumerate(probe.words)}
    one = np.tile(1e-3 * probe.base_rates, (len(vectors), 1))
    ten = one.copy()
    for row, cosines in enumerate(vectors @ known.T):
        order = np.argsort(-cosines)[:NEAREST]
        for rank, place in enumerate(order.tolist()):
            words = [index[word] for word in words_of(texts[place]) if word in index]
            ten[row, words] += cosines[place]
            if rank == 0:
                one[row, words] += 1.0
    return one, ten


def main() -> None:
    """Parse, embed, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("texts", type=Path, help="held-out texts")
    parser.add_argument("--probe", default="minilm")
    parser.add_argument("--train", type=Path, help="training texts, for the nearest of them")
    parser.add_argument("--nearest", type=int, default=5000, help="training texts to search")
    parser.add_argument("--limit", type=int, default=600, help="held-out texts")
    options = parser.parse_args()
    probe = WordProbe.from_pretrained(options.probe)
    encoder = load_encoder(probe.encoder.name, compute=choose_compute("cpu"))

    # Texts and which words they have
    texts = chunks_of(list(read_texts(options.texts, "text")), options.limit, seed=1)
    vectors, words = encoder.encode(texts), [words_of(text) for text in texts]
    there = occurrences(texts, probe.words)
    totals = np.array([len(own) for own in words])
    p = probe.probabilities(vectors)
    rankings = {"word probe": p, "floor: word frequency": np.tile(probe.base_rates, (len(p), 1))}
    if options.train is not None:
        others = chunks_of(list(read_texts(options.train, "text")), options.nearest, seed=2)
        one, ten = nearest_scores(vectors, encoder.encode(others), others, probe)
        rankings["floor: nearest training text"] = one
        rankings[f"floor: {NEAREST} nearest, by cosine"] = ten

    # Tables
    sizes = np.array([len(text.split()) for text in texts])
    rare = probe.base_rates < COMMON
    common = {word for word, base in zip(probe.words, rare, strict=True) if not base}
    rare_totals = np.array([len(own - common) for own in words])
    rows = []
    for low, high in ((SHORTEST, LONGEST), *BUCKETS):
        inside = (sizes >= low) & (sizes <= high)
        label = f"{low} to {high} words, n = {inside.sum()}"
        for name, scores in rankings.items():
            every = scores_of(scores[inside], there[inside], totals[inside])
            some = scores_of(scores[inside][:, rare], there[inside][:, rare], rare_totals[inside])
            figures = [figure(column) for column in (*every.T[:3], *some.T)]
            rows.append([label, name, *figures])
    metrics = ("average precision", "recall at 10", "recall at 50", "precision at 10")
    heads = [*(f"{m}, all" for m in metrics[:3]), *(f"{m}, without common" for m in metrics)]
    print_table(["texts", "ranking", *heads], rows)
    error, bins = calibration(p, there)
    print(f"\ncalibration error {error:.5f} over {p.size} probabilities\n")
    print_table(["probability", "how many", "mean", "share that occurs"], bins)
    share = sum(len(own & set(probe.words)) for own in words) / totals.sum()
    print(f"\n{len(probe.words)} words, which are {share:.3f} of the texts' distinct words")


if __name__ == "__main__":
    main()
