"""Edits of a hypothesis: which spans guided search replaces, and by what.

Every edit is a splice, the tokens of a span replaced by others: a substitution replaces one by one,
an insertion nothing by one, a deletion one by nothing, a move a longer span by the same tokens in
another order. Splices that do not touch can be made together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = tuple[int, ...]

# Log-likelihoods given to edits the denoiser was not asked about.
_WORD_OF_TEXT, _DELETION, _NEIGHBOURS, _MOVE, _CROSSING = -4.0, -3.0, -1.0, -2.0, -2.0
_INSERTION = 1.0  # what an inserted token may cost is what a longer text costs in any case
_LONGEST_MOVE = 5
_SPREAD = 2.0  # temperature at which edits are drawn to be combined


class Edit(NamedTuple):
    """Replace the tokens start..stop by others.

    Attributes:
        start: First position replaced.
        stop: Position after the last one replaced.
        tokens: What comes there.
        gain: About how much likelier the denoiser finds the result, in nats.
    """

    start: int
    stop: int
    tokens: Tokens
    gain: float


@dataclass(frozen=True)
class Outlook:
    """What the denoiser says about a hypothesis of n tokens.

    Attributes:
        own: Log-probability of each of its tokens, itself and some others masked [n].
        fillers: For each position, the likeliest tokens and their log-probabilities.
        insertions: For some gaps (before a position, or n), the likeliest tokens to insert.
        words: Tokens that are likely somewhere in the text, whatever the hypothesis.
        weights: How often each of them is tried; sums to 1.
    """

    own: NDArray[np.float64]
    fillers: dict[int, tuple[list[int], list[float]]]
    insertions: dict[int, tuple[list[int], list[float]]]
    words: NDArray[np.int64]
    weights: NDArray[np.float64]


def apply_edits(tokens: Tokens, edits: Sequence[Edit]) -> Tokens | None:
    """The result of edits made together; None where two of them touch the same position."""
    limit = len(tokens) + 1
    for edit in sorted(edits, reverse=True):  # from the right, so that positions keep their meaning
        if max(edit.stop, edit.start + 1) > limit:
            return None
        tokens = tokens[: edit.start] + edit.tokens + tokens[edit.stop :]
        limit = edit.start
    return tokens


def single_edits(tokens: Tokens, outlook: Outlook, rng: np.random.Generator) -> list[Edit]:
    """Substitutions, insertions and deletions, exchanges and moves of one hypothesis."""
    edits = _substitutions(tokens, outlook, rng) + _insertions(outlook, rng)
    n = len(tokens)
    edits += [Edit(j, j + 1, (), _DELETION - float(outlook.own[j])) for j in range(n)]
    edits += [_exchange(tokens, j, j + 1, _NEIGHBOURS) for j in range(n - 1)]
    for _ in range(10 if n > 2 else 0):  # noqa: PLR2004 - two can only be exchanged
        span = int(rng.integers(1, min(_LONGEST_MOVE, n - 1) + 1))
        source, target = (int(rng.integers(n - span + 1)) for _ in range(2))
        edits.append(_move(tokens, source, span, target))
        first, last = sorted(rng.integers(n, size=2).tolist())
        edits.append(_exchange(tokens, first, last, _MOVE))
        source, target = rng.integers(n, size=2).tolist()
        edits.append(_displace(tokens, source, target))
    return [edit for edit in edits if tokens[edit.start : edit.stop] != edit.tokens]


def _substitutions(tokens: Tokens, outlook: Outlook, rng: np.random.Generator) -> list[Edit]:
    edits = []
    for j, (ids, sure) in outlook.fillers.items():
        own = float(outlook.own[j])
        edits += [Edit(j, j + 1, (t,), p - own) for t, p in zip(ids, sure, strict=True)]
        for t in _draw_words(outlook, 4, rng):
            edits.append(Edit(j, j + 1, (t,), _WORD_OF_TEXT - own))
    return edits


def _insertions(outlook: Outlook, rng: np.random.Generator) -> list[Edit]:
    edits = []
    for j, (ids, sure) in outlook.insertions.items():
        best = list(zip(ids, sure, strict=True))[:6]
        edits += [Edit(j, j, (t,), p + _INSERTION) for t, p in best]
        for t in _draw_words(outlook, 2, rng):
            edits.append(Edit(j, j, (t,), _WORD_OF_TEXT))
    return edits


def _draw_words(outlook: Outlook, count: int, rng: np.random.Generator) -> list[int]:
    drawn = rng.choice(outlook.words, size=count, p=outlook.weights)
    return [int(t) for t in drawn]


def _exchange(tokens: Tokens, i: int, j: int, gain: float) -> Edit:
    """The tokens at i and at j > i change places."""
    if i == j:
        return Edit(i, i, (), gain)
    return Edit(i, j + 1, (tokens[j], *tokens[i + 1 : j], tokens[i]), gain)


def _move(tokens: Tokens, source: int, span: int, target: int) -> Edit:
    """The span at ``source`` goes to where it starts at ``target``."""
    rest = tokens[:source] + tokens[source + span :]
    moved = rest[:target] + tokens[source : source + span] + rest[target:]
    start, stop = min(source, target), max(source, target) + span
    return Edit(start, stop, moved[start:stop], _MOVE)


def _displace(tokens: Tokens, source: int, target: int) -> Edit:
    """The token at ``source`` takes the place of the one at ``target``, which is dropped."""
    changed = list(tokens)
    changed[target] = changed[source]
    del changed[source]
    start, stop = min(source, target), max(source, target) + 1
    return Edit(start, stop, tuple(changed[start : stop - 1]), _MOVE)


def combined_edits(
    edits: Sequence[Edit], count: int, rng: np.random.Generator
) -> list[tuple[Edit, ...]]:
    """Pairs and triples of edits, drawn with their likelihood: three pairs for a triple."""
    logits = np.array([edit.gain for edit in edits]) / _SPREAD
    cumulative = np.exp(np.clip(logits - logits.max(), -30.0, 0.0)).cumsum()
    drawn = np.searchsorted(cumulative, rng.random((count, 3)) * cumulative[-1])
    return [
        tuple(edits[k] for k in row[: 3 if index % 4 == 0 else 2])
        for index, row in enumerate(drawn.tolist())
    ]


def crossings(
    parents: Sequence[Tokens], count: int, rng: np.random.Generator
) -> list[tuple[Tokens, float]]:
    """The start of one hypothesis and the end of another, cut at about the same place."""
    found: list[tuple[Tokens, float]] = []
    for _ in range(count if len(parents) > 1 else 0):
        a, b = rng.choice(len(parents), size=2, replace=False)
        first, second = parents[a], parents[b]
        cut = int(rng.integers(1, max(2, min(len(first), len(second)))))
        other = max(cut + int(rng.integers(-1, 2)), 0)
        found.append((first[:cut] + second[other:], _CROSSING))
    return found
