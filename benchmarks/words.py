"""The word probe on held-out texts: average precision, recall and calibration, beside floors.

    python -m benchmarks.words dev.parquet --train train.parquet --nearest 20000
    python -m benchmarks.words dev.parquet --against another-probe

Every text of at least 24 words (cut after 190) is embedded, and the words of the probe's vocabulary
are ranked for it. A text's other words count as never found. The floors rank by how frequent words
are (the same list for every text), and by the text of the nearest training texts: with as many as
the probe learned from, the very same. With another probe, text by text what the first gains on it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import print_table
from unembed.data.pieces import LONGEST, SHORTEST, chunks_of
from unembed.data.readers import read_texts
from unembed.device import choose_compute
from unembed.encoders.sentence import load_encoder
from unembed.vectors.words import COMMON, TEXTS_PER_PAIR, WordProbe, occurrences, words_of

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
    for row, mask, total in zip(scores, there, totals.tolist(), strict=True):
        ranking = np.argsort(-row, kind="stable")
        ten, fifty = mask[ranking[:10]].sum(), mask[ranking[:50]].sum()
        rows.append([average_precision(ranking, mask, total), ten / total, fifty / total, ten / 10])
    return np.array(rows, dtype=np.float64)


def figure(values: NDArray[np.float64], sign: str = "") -> str:
    """Mean and 95% bootstrap interval over texts; of differences with their sign ("+")."""
    draws = np.random.default_rng(0).integers(len(values), size=(1000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return f"{values.mean():{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


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
    text_vectors: NDArray[np.float32],
    texts: Sequence[str],
    probe: WordProbe,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Words of the nearest text, then by frequency; words of the ten nearest by their cosines."""
    index = {word: place for place, word in enumerate(probe.words)}
    one = np.tile(1e-3 * probe.base_rates, (len(vectors), 1))
    ten = one.copy()
    for row, cosines in enumerate(vectors @ text_vectors.T):
        order = np.argsort(-cosines)[:NEAREST]
        for rank, place in enumerate(order.tolist()):
            words = [index[word] for word in words_of(texts[place]) if word in index]
            ten[row, words] += cosines[place]
            if rank == 0:
                one[row, words] += 1.0
    return one, ten


METRICS = ("average precision", "recall at 10", "recall at 50", "precision at 10")


def every_score(
    scores: NDArray[np.float32],
    texts: Sequence[str],
    probe: WordProbe,
    common: frozenset[str],
) -> NDArray[np.float64]:
    """Three metrics with all words counted, and all four without the common ones: [N, 7].

    Args:
        scores: Of each of the probe's words [N, W].
        texts: Whose words are to be found.
        probe: Its words.
        common: Words that are left out of the last four.
    """
    own = [words_of(text) for text in texts]
    there = occurrences(texts, probe.words)
    rare = np.array([word not in common for word in probe.words])
    totals = np.array([len(words) for words in own])
    rare_totals = np.array([len(words - common) for words in own])
    every = scores_of(scores, there, totals)
    some = scores_of(scores[:, rare], there[:, rare], rare_totals)
    return np.concatenate([every[:, :3], some], axis=1)


def print_scores(scores: dict[str, NDArray[np.float64]], texts: Sequence[str]) -> None:
    """Print the mean of each column of scores [N, 7], over all texts and by their length."""
    sizes = np.array([len(text.split()) for text in texts])
    rows = []
    for low, high in ((SHORTEST, LONGEST), *BUCKETS):
        inside = (sizes >= low) & (sizes <= high)
        label = f"{low} to {high} words, n = {inside.sum()}"
        for name, values in scores.items():
            sign = "+" if name.startswith("gain") else ""
            rows.append([label, name, *(figure(column, sign) for column in values[inside].T)])
    heads = [*(f"{m}, all" for m in METRICS[:3]), *(f"{m}, without common" for m in METRICS)]
    print_table(["texts", "ranking", *heads], rows)


def main() -> None:
    """Parse, embed, rank, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("texts", type=Path, help="held-out texts")
    parser.add_argument("--probe", default="minilm")
    parser.add_argument("--train", type=Path, help="training texts, for the nearest of them")
    parser.add_argument("--nearest", type=int, default=5000, help="training texts to search")
    parser.add_argument("--limit", type=int, default=600, help="held-out texts")
    parser.add_argument("--against", help="another probe of the same encoder")
    options = parser.parse_args()
    probe = WordProbe.from_pretrained(options.probe)
    encoder = load_encoder(probe.encoder.name, compute=choose_compute("cpu"))

    # Rankings of the words of each text
    texts = chunks_of(list(read_texts(options.texts, "text")), options.limit, seed=1)
    vectors = encoder.encode(texts)
    p = probe.probabilities(vectors)
    rankings = {"word probe": p, "floor: word frequency": np.tile(probe.base_rates, (len(p), 1))}
    if options.train is not None:  # the draw of `unembed words --fit`
        count = options.nearest
        pool = chunks_of(list(read_texts(options.train, "text")), TEXTS_PER_PAIR * count, seed=0)
        others = pool[:count]
        one, ten = nearest_scores(vectors, encoder.encode(others), others, probe)
        rankings["floor: nearest training text"] = one
        rankings[f"floor: {NEAREST} nearest, by cosine"] = ten

    # Tables
    rates = zip(probe.words, probe.base_rates, strict=True)
    common = frozenset(word for word, rate in rates if rate >= COMMON)
    scores = {name: every_score(p, texts, probe, common) for name, p in rankings.items()}
    if options.against is not None:
        other = WordProbe.from_pretrained(options.against)
        theirs = every_score(other.probabilities(vectors), texts, other, common)
        scores[f"gain on {options.against}"] = scores["word probe"] - theirs
    print_scores(scores, texts)
    there = occurrences(texts, probe.words)
    error, bins = calibration(p, there)
    print(f"\ncalibration error {error:.5f} over {p.size} probabilities\n")
    print_table(["probability", "how many", "mean", "share that occurs"], bins)
    own = [words_of(text) for text in texts]
    share = sum(len(words & set(probe.words)) for words in own) / sum(map(len, own))
    print(
        f"\n{len(probe.words)} words, {len(common)} of them common; {share:.3f} of the texts' own"
    )


if __name__ == "__main__":
    main()
