"""How long a text is: its median length fixed at the first pass, or several lengths tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unembed.decoding.state import DenoisingState, Reader, scatter_masked
from unembed.decoding.strategy import Decoded, OnStep, SequenceSpec
from unembed.diffusion import DenoiserFn
from unembed.errors import ConfigError

MOST_LENGTHS = 64
StepFn = Callable[[DenoisingState, DenoiserFn, int], None]


def fixes_length(state: DenoisingState, steps: int) -> bool:
    """Tell whether greedy decoding begins with the length.

    Of the two events that a position holds a certain word and that the text is over, the second is
    the more probable one long before it is more probable than not; unmasked by confidence, the end
    comes too early. So the length is fixed first, but where a text has no end or its length is
    given, and where there is a pass for every position: that is the published sampler, which
    unmasks the end like any other token.

    Args:
        state: At the start.
        steps: Denoiser passes allowed.
    """
    return state.spec.has_end and not state.end_given and steps < state.spec.length


def predict_with_length(
    state: DenoisingState, denoiser: DenoiserFn, reader: Reader
) -> tuple[Tensor, ...]:
    """Make the first pass, and put the end at the median length of each sequence.

    The text goes on at position l with the probability that it has more than l tokens, so the
    median length is the number of positions where that is at least one half. A denoiser is trained
    on these very probabilities; those that ship are right to half a token in the mean
    (docs/decoding.md), so nothing is calibrated afterwards.

    Args:
        state: Fully masked; has the end and the padding afterwards.
        denoiser: See `Strategy`.
        reader: Whose first figure is the probability of the most probable token.

    Returns:
        Its figures for all positions, of logits without end and padding.
    """
    spec, masked = state.spec, state.masked
    over = [token for token in (spec.end_id, spec.pad_id) if token is not None]

    def read(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        special = logits[:, over]  # [M, 2], a copy
        logits[:, over] = -torch.inf
        highest = logits.amax(dim=1)
        probabilities, *figures = reader(logits, part)
        content = highest - probabilities.log()  # the logarithm of what softmax divides by
        total = torch.logaddexp(content, special.logsumexp(dim=1))
        goes_on, ends = (content - total).exp(), (special[:, 0] - total).exp()
        return goes_on, ends, probabilities, *figures

    goes_on, ends, *figures = state.predict(denoiser, masked, read)
    content = (scatter_masked(goes_on, masked, 0.0) >= 0.5).sum(dim=1)  # noqa: PLR2004 - median
    content = content.clamp(1, max(spec.length - 1, 1))
    state.fix_length(content, scatter_masked(ends, masked, 0.0))
    return tuple(figures)


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
    if not spec.has_end or steps < 2:  # noqa: PLR2004 - look, then fill
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
    vectors = embedding.repeat_interleave(count, dim=0)
    blank = spec.masked(len(vectors), embedding.device)
    tokens = spec.with_end(blank, places[:, :count].reshape(-1))
    state = DenoisingState(vectors, spec, tokens, end_given=True)
    assert spec.end_id is not None
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


def _likeliest(
    state: DenoisingState, at_end: Tensor, count: int, on_step: OnStep | None, index: int
) -> Decoded:
    """Of each ``count`` hypotheses in a row take the one with the best mean log-probability."""
    content = at_end.flip(1).cumsum(dim=1).flip(1) > 0  # up to the end, included
    score = (state.confidences.clamp_min(1e-30).log() * content).sum(dim=1) / content.sum(dim=1)
    best = score.view(-1, count).argmax(dim=1)
    rows = (torch.arange(len(best), device=best.device) * count + best).repeat_interleave(count)
    state.tokens, state.confidences = state.tokens[rows], state.confidences[rows]
    state.show(on_step, index, index, every=count)
    # The first pass was made once for all of a text's hypotheses
    passes = (state.passes - 1).view(-1, count).sum(dim=1) + 1
    return Decoded(
        state.tokens[::count], state.confidences[::count], state.order[rows][::count], passes
    )
