"""Several likely lengths tried, the results ranked by the denoiser's own likelihood."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unembed.decoding.state import DenoisingState
from unembed.decoding.strategy import Decoded, OnStep, SequenceSpec
from unembed.diffusion import DenoiserFn
from unembed.errors import ConfigError

MOST_LENGTHS = 64
StepFn = Callable[[DenoisingState, DenoiserFn, int], None]


def search_lengths(
    step: StepFn,
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    count: int,
    steps: int,
    on_step: OnStep | None,
) -> Decoded:
    """Fix the end token at each of its likeliest places, fill what is before, keep the likeliest.

    The first pass, over the fully masked sequence, says how likely the end token is at each
    position. Each of the ``count`` likeliest (none at the first position, so that there is a text)
    is one hypothesis; they are ranked by the mean log-probability of their content tokens when
    unmasked, the end's included.

    Args:
        step: One pass over a state with so many passes left.
        denoiser: See `Strategy`.
        embedding: Unit vectors [B, D].
        spec: Length, special tokens and schedule.
        count: Lengths to try.
        steps: Denoiser passes at most for each length, the first pass counted in; from 2.
        on_step: See `Strategy`.

    Raises:
        ConfigError: The sequence has no end token, or there is one pass only.
    """
    if spec.end_id is None or spec.pad_id is None or steps < 2:  # noqa: PLR2004 - look, then fill
        raise ConfigError(
            "at least 2 passes and an end token to try several lengths",
            f"{steps} passes",
            "Raise the steps, or leave the option lengths out",
        )
    count = max(min(count, spec.length - 1), 1)

    # The likeliest places of the end token
    first = DenoisingState(embedding, spec)
    (ends,) = first.predict(
        denoiser, first.masked, lambda x, _: (x.log_softmax(dim=-1)[:, spec.end_id],)
    )
    ends = ends.view(len(embedding), -1)  # [B, L]
    ends, places = ends.sort(dim=1, descending=True, stable=True)
    if spec.length > 1:
        useful = places > 0
        ends, places = (x[useful].view(len(embedding), -1) for x in (ends, places))

    # One hypothesis for each
    tokens = _with_ends(spec, places[:, :count].reshape(-1, 1), embedding.device)
    state = DenoisingState(
        embedding.repeat_interleave(count, dim=0), spec, tokens, content_only=True
    )
    at_end = state.tokens == spec.end_id
    state.confidences = torch.where(at_end, ends[:, :count].reshape(-1, 1).exp(), state.confidences)
    state.order = torch.ones_like(state.order) * (state.confidences > 0)
    state.passes += 1
    first.show(on_step, 1, steps + 1)

    # Fill them all
    passes = min(steps - 1, spec.length)
    for index in range(passes):
        if bool(state.masked.any()):
            step(state, denoiser, passes - index)
        state.show(on_step, index + 2, steps + 1, every=count)
        if not bool(state.masked.any()):
            break
    return _likeliest(state, at_end, count, on_step, index + 3)


def _with_ends(spec: SequenceSpec, end: Tensor, device: torch.device) -> Tensor:
    """Masks, the end token at each row's place [N, 1], padding: [N, L]."""
    positions = torch.arange(spec.length, device=device).expand(len(end), -1)
    tokens = spec.masked(len(end), device)
    tokens = tokens.masked_fill(positions == end, spec.end_id or 0)
    return tokens.masked_fill(positions > end, spec.pad_id or 0)


def _likeliest(
    state: DenoisingState, at_end: Tensor, count: int, on_step: OnStep | None, index: int
) -> Decoded:
    """Of each ``count`` hypotheses in a row take the one with the best mean log-probability."""
    read = at_end.flip(1).cumsum(dim=1).flip(1) > 0  # up to the end, included
    score = (state.confidences.clamp_min(1e-30).log() * read).sum(dim=1) / read.sum(dim=1)
    best = score.view(-1, count).argmax(dim=1)
    rows = (torch.arange(len(best), device=best.device) * count + best).repeat_interleave(count)
    state.tokens, state.confidences = state.tokens[rows], state.confidences[rows]
    state.show(on_step, index, index, every=count)
    # The first pass was made once for all of a text's hypotheses
    passes = (state.passes - 1).view(-1, count).sum(dim=1) + 1
    return Decoded(
        state.tokens[::count], state.confidences[::count], state.order[rows][::count], passes
    )
