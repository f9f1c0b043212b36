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

# Nats added to the gain of each kind of edit
_SUBSTITUTION = 0.0
_INSERTION = 1.0  # what an inserted token may cost is what a longer text costs in any case
_DELETION = -3.0  # the denoiser is not asked about a text without the token
_MOVE = -6.0  # for its three seams
_LONGEST_MOVE, _MOST_MOVES = 4, 300  # tokens of a span; spans moved of a hypothesis


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
    content = grid != NOTHING
    content &= (content.sum(axis=1) <= length)[:, None]
    rows = np.full((len(grid), length), NOTHING)
    row, _ = content.nonzero()
    rows[row, (content.cumsum(axis=1) - 1)[content]] = grid[content]
    return rows


def single_edits(scores: MaskedScores) -> Edits:
    """List the substitutions, insertions and deletions of one hypothesis that was scored."""
    n = len(scores.own)
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
    slots, tokens, gains = (np.concatenate(column) for column in zip(*parts, strict=True))
    possible = gains > -np.inf  # of a small vocabulary the special tokens are among the fillers
    return Edits(slots[possible], tokens[possible], gains[possible])


def _writes(
    slots: NDArray[np.int64], tokens: NDArray[np.int64], gains: NDArray[np.float64]
) -> Edits:
    """Edits that write one of T tokens [S, T] into one of S slots."""
    where, what = np.repeat(slots, tokens.shape[1]), tokens.ravel()
    return Edits(where[:, None], what[:, None], gains.ravel())


def moves(
    tokens: Tokens, scores: MaskedScores, length: int, rng: np.random.Generator
) -> tuple[Rows, NDArray[np.float64]]:
    """Exchange two neighbouring spans of one hypothesis, one of them short: a span moves elsewhere.

    Returns:
        The texts [M, length], and their gains [M]: how unlikely the tokens behind the seams are.
    """
    n = len(tokens)
    places = np.arange(n + 1)
    low, mid, high = (x.ravel() for x in np.meshgrid(places, places, places, indexing="ij"))
    fit = (low < mid) & (mid < high) & (np.minimum(mid - low, high - mid) <= _LONGEST_MOVE)
    low, mid, high = low[fit], mid[fit], high[fit]
    if len(low) > _MOST_MOVES:
        some = np.sort(rng.permutation(len(low))[:_MOST_MOVES])
        low, mid, high = low[some], mid[some], high[some]
    # What stands at each place then [M, n]
    start, width = low[:, None], (high - low)[:, None]
    rotation = start + (places[:n] - start + (mid - low)[:, None]) % width
    within = (places[:n] >= start) & (places[:n] < high[:, None])
    rows = np.full((len(low), length), NOTHING)
    rows[:, :n] = np.array(tokens, dtype=np.int64)[np.where(within, rotation, places[:n])]
    own = np.append(scores.own, 0.0)  # nothing stands behind the end
    return rows, _MOVE - own[low] - own[mid] - own[high]


def to_rows(texts: Sequence[Sequence[int]], length: int) -> Rows:
    """Texts of at most so many tokens as rows [M, length]."""
    rows = np.full((len(texts), length), NOTHING)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return rows
