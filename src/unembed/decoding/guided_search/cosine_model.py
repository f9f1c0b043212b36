"""A guess of what the encoder would say, learned from what it said about the same text so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unembed.decoding.guided_search.edits import Tokens

# Share of words, of pairs of neighbours, and of words at about their place in the likeness of texts
_WORDS, _PAIRS, _PLACES = 1.0, 0.5, 0.2
_NOISE = 0.03
_FIRST, _LATEST, _BEST = 80, 120, 280  # texts learned from; the matrix solved has this size
_START = 2**30  # stands before the first token


def predict_cosines(
    known: Sequence[Tokens],
    vectors: Sequence[NDArray[np.float32]],
    cosines: Sequence[float],
    candidates: Sequence[Tokens],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predict embeddings by a Gaussian process over texts, and from them the cosines.

    The equations are 2.25 and 2.26 of Rasmussen and Williams (2006), every component of the
    embedding a function of the text with the same kernel: the cosine of the counts of words, pairs
    of neighbours and words at their place. An embedding that is a mean over tokens is nearly
    additive in these. So what a word was worth in one hypothesis, or by itself, tells what it is
    worth in another, changes that helped apart are predicted to help together, and a word that
    says what is said already is not predicted to help again.

    Args:
        known: Texts embedded so far, N of them, from 1.
        vectors: Their embeddings, of unit length, each [D]; zeros for an invisible text.
        cosines: Of their embeddings with the target, N.
        candidates: Texts to judge, M of them.

    Returns:
        Predicted cosines [M] and standard deviations [M], the latter those of a component in units
        of its spread for a text unlike all known ones.
    """
    kept = _worth_keeping(np.asarray(cosines))
    n = len(kept)
    embeddings = np.stack([vectors[k] for k in kept]).astype(np.float64)  # [N, D]
    gram = embeddings @ embeddings.T
    dots = np.asarray(cosines)[kept] * (gram.diagonal() > 0)  # with the target [N]
    features = _features([*[known[k] for k in kept], *candidates], n)
    k_known = (features[:n] @ features[:n].T).astype(np.float64)  # [N, N]
    k_new = (features[n:] @ features[:n].T).astype(np.float64)  # [M, N]
    k_known[np.diag_indices(n)] += _NOISE
    weights = np.linalg.solve(k_known, k_new.T).T  # [M, N]
    variance = 1.0 - (weights * k_new).sum(axis=1)
    # The predicted embedding is a weighted sum of the known ones: its cosine needs no more than
    # their products with each other and with the target.
    squares = ((weights @ gram) * weights).sum(axis=1)
    mean = (weights @ dots) / np.sqrt(np.maximum(squares, 1e-12))
    return mean, np.sqrt(np.maximum(variance, 0.0))


def _worth_keeping(cosines: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the texts to learn from: the first, the latest and the best."""
    n = len(cosines)
    if n <= _FIRST + _LATEST + _BEST:
        return np.arange(n)
    best = np.argsort(-cosines, kind="stable")[:_BEST]
    return np.unique(np.concatenate([np.arange(_FIRST), best, np.arange(n - _LATEST, n)]))


def _features(texts: Sequence[Tokens], known: int) -> NDArray[np.float32]:
    """What texts contain of what the first ``known`` of them contain: [texts, features].

    Counts, divided by the length of the vector of all of a text's counts.
    """
    width = max(len(text) for text in texts)
    ids = np.full((len(texts), width + 1), -1, dtype=np.int64)
    ids[:, 0] = _START
    for row, text in enumerate(texts):
        ids[row, 1 : len(text) + 1] = text
    there = ids[:, 1:] >= 0
    words = np.where(there, ids[:, 1:], -1)
    pairs = np.where(there, ids[:, :-1] * 2**31 + ids[:, 1:], -1)
    places = np.where(there, ids[:, 1:] * 2**31 + np.arange(width) // 2, -1)
    parts: list[NDArray[np.float32]] = []
    squares: NDArray[np.float32] = np.zeros(len(texts), dtype=np.float32)
    for part, share in ((words, _WORDS), (pairs, _PAIRS), (places, _PLACES)):
        counts = _counts(part) * np.float32(share**0.5)
        squares += (counts * counts).sum(axis=1)
        parts.append(counts[:, counts[:known].any(axis=0)])
    norms = np.sqrt(np.maximum(squares, 1e-12))
    shared: NDArray[np.float32] = np.concatenate(parts, axis=1)
    return (shared / norms[:, None]).astype(np.float32)


def _counts(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """How often each distinct id, -1 left out, occurs in each row: [N, width] → [N, distinct]."""
    distinct, column = np.unique(ids, return_inverse=True)
    cells = np.arange(len(ids))[:, None] * len(distinct) + column.reshape(ids.shape)
    counts = np.bincount(cells.ravel(), minlength=len(ids) * len(distinct))
    return counts.reshape(len(ids), -1)[:, distinct >= 0].astype(np.float32)
