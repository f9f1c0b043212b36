"""Spans of a hypothesis masked again and refilled by the denoiser, many copies at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from unembed.decoding.guided_search.edits import Tokens
from unembed.decoding.guided_search.proposals import row_of
from unembed.decoding.logits import sample
from unembed.decoding.state import DenoisingState, scatter_masked, tokens_per_step, topk_mask
from unembed.decoding.strategy import SequenceSpec
from unembed.diffusion import DenoiserFn

PASSES = 2
_LONGEST_SPAN = 6
_SCATTERED, _WHOLE = 0.3, 0.1  # how often single places, or everything, are masked instead


@dataclass(frozen=True)
class Hole:
    """A hypothesis with some places to fill.

    Attributes:
        row: Of the vector it is for.
        tokens: Its tokens, the mask token where it is to be filled.
        lost: Log-likelihood of the tokens that were there, in nats.
    """

    row: int
    tokens: Tokens
    lost: float


def make_hole(
    row: int,
    tokens: Tokens,
    own: NDArray[np.float64],
    doubt: NDArray[np.float64],
    spec: SequenceSpec,
    rng: np.random.Generator,
) -> Hole:
    """Mask a span, some single places, or everything; a span may come back longer or shorter.

    Args:
        row: Of the vector.
        tokens: A hypothesis of n tokens, from 1.
        own: Log-probability of each of them [n].
        doubt: How much each place is in question [n], from 0.
        spec: Length and special tokens.
        rng: Draws the places.
    """
    n, kind = len(tokens), rng.random()
    shares = (doubt + 1e-3) / (doubt + 1e-3).sum()
    if kind < _WHOLE:
        chosen = np.ones(n, dtype=bool)
    elif kind < _WHOLE + _SCATTERED:
        count = int(rng.integers(1, max(n // 2, 1) + 1))
        chosen = np.isin(np.arange(n), rng.choice(n, size=count, replace=False, p=shares))
    else:
        span = int(rng.integers(min(2, n), min(_LONGEST_SPAN, n) + 1))
        start = int(np.clip(rng.choice(n, p=shares) - rng.integers(span), 0, n - span))
        chosen = (np.arange(n) >= start) & (np.arange(n) < start + span)
    changed = [spec.mask_id if gone else t for t, gone in zip(tokens, chosen, strict=True)]
    place = int(chosen.argmax())
    change = int(rng.integers(-1, 2)) if spec.end_id is not None else 0
    if change > 0 and n + 1 < spec.length:
        changed.insert(place, spec.mask_id)
    elif change < 0 and chosen.sum() > 1:
        del changed[place]
    return Hole(row, tuple(changed), float(own[chosen].sum()))


def fill_holes(
    denoiser: DenoiserFn,
    embedding: torch.Tensor,
    spec: SequenceSpec,
    holes: Sequence[Hole],
    favoured: Mapping[int, Mapping[int, float]],
    rngs: Mapping[int, np.random.Generator],
) -> tuple[list[tuple[Tokens, float]], list[int]]:
    """Fill all holes in `PASSES` sampled passes, the surest half of each first.

    Args:
        denoiser: See `Strategy`.
        embedding: Unit vectors [B, D].
        spec: Length and special tokens.
        holes: What to fill.
        favoured: For each vector with a hole, tokens and the nats that raise their logits in the
            draw.
        rngs: For each of these, the source of the draws.

    Returns:
        For each hole the tokens, and how much likelier the denoiser finds them than what was
        there, in nats; and the passes that each took.
    """
    device = embedding.device
    rows = [hole.row for hole in holes]
    start = torch.tensor([row_of(hole.tokens, spec) for hole in holes], device=device)
    state = DenoisingState(embedding[rows], spec, start, content_only=True)
    u = torch.tensor(np.stack([rngs[row].random((PASSES, spec.length)) for row in rows]))
    width = max(len(favoured[row]) for row in rows)
    padded = [list(favoured[row].items()) for row in rows]
    ids = torch.tensor([[t for t, _ in p] + [0] * (width - len(p)) for p in padded]).long()
    nats = torch.tensor([[b for _, b in p] + [0.0] * (width - len(p)) for p in padded]).float()
    ids, nats = ids.to(device), nats.to(device)
    for index in range(PASSES):
        masked = state.masked
        which = masked.nonzero()[:, 0]  # [M]
        draw = partial(_draw, ids[which], nats[which], u[:, index].to(device)[masked])
        drawn, sure = state.predict(denoiser, masked, draw)
        sureness = scatter_masked(sure, masked, 0.0)
        chosen = topk_mask(sureness, masked, tokens_per_step(masked, PASSES - index))
        state.unmask(chosen, scatter_masked(drawn, masked, 0), sureness)
    filled = (start == spec.mask_id) & (state.confidences > 0)
    gained = (state.confidences.clamp_min(1e-9).log() * filled).sum(dim=1).tolist()
    texts = [
        tuple(row[: len(hole.tokens)])
        for row, hole in zip(state.tokens.tolist(), holes, strict=True)
    ]
    gains = [gain - hole.lost for gain, hole in zip(gained, holes, strict=True)]
    return list(zip(texts, gains, strict=True)), state.passes.tolist()


def _draw(
    raised: torch.Tensor, nats: torch.Tensor, u: torch.Tensor, logits: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens from logits [R, V] with some of them raised, and how sure the plain ones are of each.

    Args:
        raised: Ids for each of the M positions [M, W].
        nats: By how much [M, W].
        u: Uniform numbers [M].
        logits: Of a part of the positions.
        part: Which.
    """
    drawn, _ = sample(logits.scatter_add(1, raised[part], nats[part]), u[part])
    sure = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return drawn, sure.exp()
