"""A quick look at every masked position, and an exact one where it leaves the order in doubt.

Half of greedy decoding on a CPU is logits [M, V], of which a pass settles a position or a few.
Where the processor multiplies a coarser format faster, every position is looked at in that format
and its few likeliest tokens get float32 logits: only the sum over the other tokens stays rough. A
position whose place in the order could hang on that is then worked out whole. Tokens and order are
those of float32; a confidence that was not in doubt is right to about a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unembed.decoding.state import (
    DOUBTED,
    RUN,
    State,
    mask_surest,
    most_probable,
    run_maxima,
    said_before,
    spread,
)
from unembed.diffusion import DenoiserFn

# What is taken to be off by at most how much, in nats: a coarse logit; the logarithm of a sum of
# their exponentials; any logarithm in float32. With bfloat16 0.12, 0.01 and 2e-5 were the most seen
# at logits of up to `_SCALE`, from where the first two grow with them.
_LOGIT, _SUM, _FLOAT, _SCALE = 0.25, 0.05, 3e-5, 16.0
_LIKELIEST = 8
_POSITIONS, _ROWS = 4096, 256  # worked on together: in the network; in the vocabulary product


@dataclass(frozen=True)
class Glance:
    """What is seen of M positions at once.

    Attributes:
        coarse: Rows [R] of them → their coarse logits, in float32 [R, V], the caller's to spend.
        exactly: Rows [R] and K tokens of each [R, K] → float32 logits [R, K]; without tokens all,
            [R, V].
    """

    coarse: Callable[[Tensor], Tensor]
    exactly: Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class TwoSpeeds:
    """A denoiser, for every strategy, that can also be glanced at, for those that make use of it.

    Attributes:
        exact: The denoiser.
        glance: The same arguments → a `Glance`.
    """

    exact: DenoiserFn
    glance: Callable[[Tensor, Tensor, Tensor, Tensor], Glance]

    def __call__(self, tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
        """Logits [M, V]."""
        return self.exact(tokens, embedding, t, where)


def survey(state: State, denoiser: TwoSpeeds, where: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """One pass: the probability and id of the likeliest token of each position in question.

    Args:
        state: The sequences.
        denoiser: Glanced at.
        where: Masked positions in question, boolean [B, L].
        count: How many of them are to be settled, the surest first [B].

    Returns:
        As `most_probable`, [M] and [M].
    """
    found = []
    for rows, given in state.asked(where, together=_POSITIONS):
        glance = denoiser.glance(*given)
        found.append(_settle_doubts(glance, given[3], count[rows], state.forbidden))
    return _joined(found)


def _settle_doubts(
    glance: Glance, where: Tensor, count: Tensor, forbidden: Sequence[int]
) -> tuple[Tensor, ...]:
    every = torch.arange(int(where.sum()))
    looks = [_look(glance, rows, forbidden) for rows in torch.split(every, _ROWS)]
    probabilities, tokens, margins, doubtful = _joined(looks)
    sure, margin, token = (spread(x, where, 0) for x in (probabilities.log(), margins, tokens))
    doubtful |= _undecided(sure, margin, token, where, count)[where]
    again = doubtful.nonzero()[:, 0]
    for start in range(0, len(again), _ROWS):
        rows = again[start : start + _ROWS]
        logits = glance.exactly(rows, None)
        logits[:, forbidden] = -torch.inf
        probabilities[rows], tokens[rows] = most_probable(logits)
    return probabilities, tokens


def _look(glance: Glance, rows: Tensor, forbidden: Sequence[int]) -> tuple[Tensor, ...]:
    """Of each row: probability, token, margin of its logarithm, whether the token is in doubt."""
    logits = glance.coarse(rows)
    logits[:, forbidden] = -torch.inf
    rough, candidates = likeliest(logits, min(_LIKELIEST, logits.shape[1] - len(forbidden)))
    exact = glance.exactly(rows, candidates)  # [R, K]
    shares = torch.softmax(logits, dim=-1, out=logits).gather(1, candidates)
    corrected = shares * (exact - rough).exp()
    rest = (1 - shares.sum(dim=1)).clamp_min(0.0)
    best, at = exact.max(dim=1, keepdim=True)
    total = corrected.sum(dim=1) + rest
    probabilities = corrected.gather(1, at)[:, 0] / total
    tokens = candidates.gather(1, at)[:, 0]
    scale = (best[:, 0].abs() / _SCALE).clamp_min(1.0)
    doubtful = best[:, 0] - rough[:, -1] < _LOGIT * scale  # a better one may have been missed
    doubtful |= (exact > best - _FLOAT).sum(dim=1) > 1  # or two are the same
    return probabilities, tokens, _FLOAT + _SUM * scale * rest / total, doubtful


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(figures) for figures in zip(*parts, strict=True))


def _undecided(
    log_p: Tensor, margin: Tensor, tokens: Tensor, where: Tensor, count: Tensor
) -> Tensor:
    """Positions that a rough figure may have put on the wrong side of the choice [B, L].

    Args:
        log_p: Rough log probability of the likeliest token [B, L].
        margin: What it may be off by [B, L].
        tokens: That token [B, L].
        where: Positions in question, boolean [B, L].
        count: How many of them are chosen [B].
    """
    order = log_p.masked_fill(said_before(tokens, log_p, where), DOUBTED)
    chosen = mask_surest(order, where, count)
    lead = log_p[:, :, None] - log_p[:, None]  # [B, L, L]
    both = margin[:, :, None] + margin[:, None]
    # Of two places for one token the surer gets it: for certain only with a clear lead
    twins = (tokens[:, :, None] == tokens[:, None]) & where[:, :, None] & where[:, None]
    twins &= ~torch.eye(where.shape[1], dtype=torch.bool)
    least = log_p.masked_fill((twins & (lead > both)).any(dim=1), DOUBTED)
    near = (order[:, :, None] - least[:, None] <= both) & (where & ~chosen)[:, None]
    pairs = chosen[:, :, None] & (near | (twins & (lead.abs() <= both)))
    return pairs.any(dim=2) | pairs.any(dim=1)


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` logits of each row and where they are: [M, V] → [M, K], [M, K].

    What `torch.topk` gives, by the maxima of runs of columns first: three times as fast.
    """
    columns = logits.shape[1] // RUN * RUN
    if columns < 2 * count * RUN:
        values, places = logits.topk(count, dim=1)
        return values, places
    runs = run_maxima(logits).topk(count, dim=1).indices  # no other can hold one of them
    places = (runs[:, :, None] * RUN + torch.arange(RUN)).flatten(1)
    rest = torch.arange(columns, logits.shape[1]).expand(len(logits), -1)
    places = torch.cat([places, rest], dim=1)
    values, best = logits.gather(1, places).topk(count, dim=1)
    return values, places.gather(1, best)
