"""Edits of a hypothesis, many at once: which tokens guided search replaces, and by what.

A text of n tokens is a grid of 2n + 1 slots, the gap before each token, the token, and the gap at
the end. An edit writes into a few slots: a substitution puts a token into a token's slot, an
insertion into a gap's, a deletion puts nothing into a token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[int, ...]
Rows = NDArray[np.int64]  # hypotheses [M, L], padded with NOTHING

NOTHING = -1

# Log-likelihoods given to edits the denoiser was not asked about
_WORD, _DELETION = -4.0, -3.0
_SUBSTITUTION = 0.0
_INSERTION = 1.0  # what an inserted token may cost is what a longer text costs in any case
_WORDS_TRIED = 2  # words of the text tried at each place


class Edits(NamedTuple):
    """E edits of one hypothesis, each of K writes.

    Attributes:
        slots: Where each writes [E, K], 2 j for the gap before token j and 2 j + 1 for the token.
        tokens: What it writes [E, K], `NOTHING` to empty the slot.
        gains: About how much likelier the denoiser finds the result, in nats [E].
    """

    slots: NDArray[np.int64]
    tokens: NDArray[np.int64]
    gains: NDArray[np.float64]


@dataclass(frozen=True)
class MaskedScores:
    """What the denoiser puts where tokens of a hypothesis of n tokens are masked.

    Attributes:
        own: Log-probability of each of its tokens [n].
        fillers: Most probable tokens of each position [n, T].
        filler_scores: Their log-probabilities [n, T].
        gaps: Some gaps, each before a position or at n [G].
        inserts: Most probable tokens in them [G, T].
        insert_scores: Their log-probabilities [G, T].
    """

    own: NDArray[np.float64]
    fillers: NDArray[np.int64]
    filler_scores: NDArray[np.float64]
    gaps: NDArray[np.int64]
    inserts: NDArray[np.int64]
    insert_scores: NDArray[np.float64]


def apply_edits(tokens: Sequence[int], edits: Edits, length: int) -> Rows:
    """Results of the edits, each made alone: [E, length], nothing in one that is longer."""
    count, n = len(edits.gains), len(tokens)
    grid = np.full((count, 2 * n + 1), NOTHING)
    grid[:, 1::2] = tokens
    np.put_along_axis(grid, edits.slots, edits.tokens, axis=1)
    return pack(grid, length)


def pack(grid: NDArray[np.int64], length: int) -> Rows:
    """Tokens of each row moved to its start: [M, W] → [M, length], nothing where they are more."""
    filled = grid != NOTHING
    filled &= (filled.sum(axis=1) <= length)[:, None]
    rows = np.full((len(grid), length), NOTHING)
    row, _ = filled.nonzero()
    rows[row, (filled.cumsum(axis=1) - 1)[filled]] = grid[filled]
    return rows


def single_edits(
    tokens: Tokens,
    scores: MaskedScores,
    words: tuple[NDArray[np.int64], NDArray[np.float64]],
    rng: np.random.Generator,
) -> Edits:
    """List substitutions, insertions and deletions of one hypothesis.

    Args:
        tokens: The hypothesis, n tokens, from 1.
        scores: Of the denoiser.
        words: Tokens that are likely somewhere in the text, and how often each is tried.
        rng: Draws the words.
    """
    n = len(tokens)
    places, gaps = np.arange(n), scores.gaps
    parts = [
        _writes(
            2 * places + 1,
            scores.fillers,
            scores.filler_scores - scores.own[:, None] + _SUBSTITUTION,
        ),
        _writes(2 * gaps, scores.inserts, scores.insert_scores + _INSERTION),
        _writes(2 * places + 1, np.full((n, 1), NOTHING), _DELETION - scores.own[:, None]),
    ]
    for slots, cost in ((2 * places + 1, scores.own), (2 * gaps, np.zeros(len(gaps)))):
        drawn = rng.choice(words[0], size=(len(slots), _WORDS_TRIED), p=words[1])
        parts.append(_writes(slots, drawn, _WORD - np.repeat(cost[:, None], _WORDS_TRIED, axis=1)))
    slots, written, gains = (np.concatenate(column) for column in zip(*parts, strict=True))
    possible = gains > -np.inf  # of a small vocabulary the special tokens are among the fillers
    return Edits(slots[possible], written[possible], gains[possible])


def _writes(
    slots: NDArray[np.int64], tokens: NDArray[np.int64], gains: NDArray[np.float64]
) -> Edits:
    """Edits that write one of T tokens [S, T] into one of S slots."""
    where, what = np.repeat(slots, tokens.shape[1]), tokens.ravel()
    return Edits(where[:, None], what[:, None], gains.ravel())


def crossover(parents: Sequence[Tokens], count: int, length: int, rng: np.random.Generator) -> Rows:
    """Join the start of one hypothesis and the end of another, cut at about the same place."""
    rows: list[Tokens] = []
    for _ in range(count if len(parents) > 1 else 0):
        a, b = rng.choice(len(parents), size=2, replace=False)
        first, second = parents[a], parents[b]
        cut = int(rng.integers(1, max(2, min(len(first), len(second)))))
        other = max(cut + int(rng.integers(-1, 2)), 0)
        rows.append(first[:cut] + second[other:])
    return to_rows([row for row in rows if len(row) <= length], length)


def to_rows(texts: Sequence[Sequence[int]], length: int) -> Rows:
    """Texts of at most so many tokens as rows [M, length]."""
    rows = np.full((len(texts), length), NOTHING)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows
