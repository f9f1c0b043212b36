"""Several likely lengths tried, the results ranked by the denoiser's own likelihood."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unembed.decoding.state import State
from unembed.decoding.strategy import Canvas, Decoded, OnStep
from unembed.diffusion import DenoiserFn
from unembed.errors import ConfigError

FillFn = Callable[[State, DenoiserFn, int], bool]


def decode_lengths(
    fill: FillFn,
    denoiser: DenoiserFn,
    embedding: Tensor,
    canvas: Canvas,
    count: int,
    steps: int,
    on_step: OnStep | None,
) -> Decoded:
    """Fix the end token at each of its likeliest places, fill what is before, keep the likeliest.

    The first pass, over the fully masked sequence, says how likely the end token is at each
    position. Each of the ``count`` likeliest (none at the first position, so that there is a text)
    is one hypothesis; they are ranked by the mean log-probability of their content tokens when
    settled, the end's included.

    Args:
        fill: One pass over a state with so many passes left; returns whether it is complete.
        denoiser: See `Strategy`.
        embedding: Unit vectors [B, D].
        canvas: Length, special tokens and schedule.
        count: Lengths to try.
        steps: Denoiser passes at most for each length, the first pass counted in; from 2.
        on_step: See `Strategy`.

    Raises:
        ConfigError: The canvas has no end token, or there is one pass only.
    """
    if canvas.end_id is None or canvas.pad_id is None or steps < 2:  # noqa: PLR2004 - look, then fill
        raise ConfigError(
            "at least 2 passes and an end token to try several lengths",
            f"{steps} passes",
            "Raise --steps, or leave the option lengths out",
        )
    count = max(min(count, canvas.length - 1), 1)
    first = State(embedding, canvas)
    (ends,) = first.read(
        denoiser, first.masked, lambda x, _: (x.log_softmax(dim=-1)[:, canvas.end_id],)
    )
    ends = ends.view(len(embedding), -1)  # [B, L]
    ends, order = ends.sort(dim=1, descending=True, stable=True)
    if canvas.length > 1:
        useful = order > 0
        ends, order = (x[useful].view(len(embedding), -1) for x in (ends, order))
    state = State(
        embedding.repeat_interleave(count, dim=0),
        canvas,
        _with_ends(canvas, order[:, :count].reshape(-1, 1), embedding.device),
        content_only=True,
    )
    at_end = state.tokens == canvas.end_id
    state.confidences = torch.where(at_end, ends[:, :count].reshape(-1, 1).exp(), state.confidences)
    state.order = torch.ones_like(state.order) * (state.confidences > 0)
    state.passes += 1
    first.show(on_step, 1, steps + 1)
    passes = min(steps - 1, canvas.length)
    for index in range(passes):
        done = not bool(state.masked.any()) or fill(state, denoiser, passes - index)
        state.show(on_step, index + 2, steps + 1, every=count)
        if done:
            break
    return _likeliest(state, at_end, count, on_step, index + 3)


def _with_ends(canvas: Canvas, end: Tensor, device: torch.device) -> Tensor:
    """Masks, the end token at each row's place [N, 1], padding: [N, L]."""
    positions = torch.arange(canvas.length, device=device).expand(len(end), -1)
    tokens = canvas.blank(len(end), device)
    tokens = tokens.masked_fill(positions == end, canvas.end_id or 0)
    return tokens.masked_fill(positions > end, canvas.pad_id or 0)


def _likeliest(
    state: State, at_end: Tensor, count: int, on_step: OnStep | None, index: int
) -> Decoded:
    """Of each ``count`` hypotheses in a row the one with the best mean log-probability."""
    read = at_end.flip(1).cumsum(dim=1).flip(1) > 0  # up to the end, included
    score = (state.confidences.clamp_min(1e-30).log() * read).sum(dim=1) / read.sum(dim=1)
    best = score.view(-1, count).argmax(dim=1)
    rows = (torch.arange(len(best), device=best.device) * count + best).repeat_interleave(count)
    state.tokens, state.confidences = state.tokens[rows], state.confidences[rows]
    state.show(on_step, index, index, every=count)
    # The first pass was made once for all of a text's hypotheses.
    passes = (state.passes - 1).view(-1, count).sum(dim=1) + 1
    return Decoded(
        state.tokens[::count], state.confidences[::count], state.order[rows][::count], passes
    )
