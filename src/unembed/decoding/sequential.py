"""Sequential decoding: unmask the most confident positions, predict again, repeat.

How many a pass is fixed beforehand (`Sequential`) or bounded by entropy (`EntropyBounded`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from unembed.decoding.length_search import (
    MOST_LENGTHS,
    fixes_length,
    predict_with_length,
    search_lengths,
)
from unembed.decoding.logits import entropies, margins, most_probable
from unembed.decoding.state import (
    DEMOTION,
    DenoisingState,
    Reader,
    duplicates_last,
    scatter_masked,
    tokens_per_step,
    topk_mask,
)
from unembed.decoding.strategy import Decoded, OnStep, Oracle, SequenceSpec, check_options, option
from unembed.diffusion import DenoiserFn

ORDERS = ("confidence", "margin", "left-to-right")


class _Step(Protocol):
    """One pass over a state with so many passes left."""

    def __call__(
        self, state: DenoisingState, denoiser: DenoiserFn, passes: int, fixes: bool = False
    ) -> None: ...


@dataclass(frozen=True)
class Sequential:
    """Unmasks the most confident positions in each pass with their most probable tokens.

    Nothing is drawn. What is masked is spread evenly over the passes left: one position a pass when
    ``steps`` is L or more. Positions that would get the same token as a more confident one in the
    same pass come last. The order by confidence is that of MaskGIT (Chang et al., 2022, arXiv
    2202.04200) and LLaDA (Nie et al., 2025, arXiv 2502.09992), the one by margin that of Kim et al.
    (2025, arXiv 2502.06768).

    Attributes:
        order: See below.
        lengths: See below.
    """

    order: str = option(
        "confidence",
        "Which positions come first: by the probability of the most probable token (confidence), "
        "its lead over the second (margin), or left-to-right.",
        choices=ORDERS,
    )
    lengths: int = option(
        1,
        "How many likely lengths are tried and ranked; 1 fixes the median one at the first pass, "
        "0 none.",
        low=0,
        high=MOST_LENGTHS,
    )
    needs_encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        *,
        steps: int,
        generators: Sequence[torch.Generator] = (),
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`."""
        return _decode(self.step, self.lengths, denoiser, embedding, spec, steps, on_step)

    def step(
        self, state: DenoisingState, denoiser: DenoiserFn, passes: int, fixes: bool = False
    ) -> None:
        """Make one pass, of so many that are left; one that ``fixes`` the length does so first."""
        masked = state.masked
        probabilities, guesses, *leads = _predict(state, denoiser, self._read, fixes)  # [M] each
        confidences = scatter_masked(probabilities, masked, 0.0)  # [B, L]
        tokens = scatter_masked(guesses, masked, 0)
        state.guess(tokens, confidences)
        scores = confidences
        if self.order == "margin":
            scores = scatter_masked(leads[0], masked, 0.0)
        elif self.order == "left-to-right":
            places = torch.arange(0.0, -masked.shape[1], -1.0, device=confidences.device)
            scores = places.expand_as(confidences)
        masked = state.masked
        scores = duplicates_last(tokens, scores, masked)
        positions = topk_mask(scores, masked, tokens_per_step(masked, passes))
        state.unmask(positions, tokens, confidences)

    def _read(self, logits: Tensor, _: slice) -> tuple[Tensor, ...]:
        leads = (margins(logits),) if self.order == "margin" else ()
        return (*most_probable(logits), *leads)


@dataclass(frozen=True)
class EntropyBounded:
    """Unmasks the positions of least entropy while what they may share stays below a bound.

    Positions unmasked in the same pass are drawn from a product of marginals, which is wrong by at
    most the sum of their entropies less the largest one. Each pass takes the longest run U of the
    masked positions in rising entropy H with sum_U H - max_U H <= gamma (Ben-Hamu et al., 2025,
    arXiv 2505.24857), at least one, and at least what the passes left require. Positions that would
    get the same token as a more confident one wait for another pass. A sequence
    is done when it is done: passes are spent where they are needed. Most probable tokens, no
    randomness.

    Attributes:
        gamma: See below.
        lengths: See below.
    """

    gamma: float = option(
        0.1,
        "The bound in nats; 0 is one position a pass, but for certain ones.",
        low=0.0,
        high=1000.0,
    )
    lengths: int = option(
        1,
        "How many likely lengths are tried and ranked; 1 fixes the median one at the first pass, "
        "0 none.",
        low=0,
        high=MOST_LENGTHS,
    )
    needs_encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        *,
        steps: int,
        generators: Sequence[torch.Generator] = (),
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`."""
        return _decode(self.step, self.lengths, denoiser, embedding, spec, steps, on_step)

    def step(
        self, state: DenoisingState, denoiser: DenoiserFn, passes: int, fixes: bool = False
    ) -> None:
        """Make one pass, of so many that are left; one that ``fixes`` the length does so first."""
        masked = state.masked
        probabilities, guesses, nats = _predict(state, denoiser, self._read, fixes)  # [M] each
        tokens = scatter_masked(guesses, masked, 0)
        confidences = scatter_masked(probabilities, masked, 0.0)
        scores = -scatter_masked(nats, masked, torch.inf)
        masked = state.masked
        scores = duplicates_last(tokens, scores, masked).masked_fill(~masked, -torch.inf)  # [B, L]
        rising = -scores.sort(dim=1, descending=True).values
        # Sorted, the largest of a run is its last: the sum of those before it is the bound's side
        before = rising.cumsum(dim=1) - rising
        fits = ((before <= self.gamma) & (rising < DEMOTION / 2)).sum(dim=1)
        count = torch.maximum(fits, tokens_per_step(masked, passes))
        state.guess(tokens, confidences)
        state.unmask(topk_mask(scores, masked, count), tokens, confidences)

    def _read(self, logits: Tensor, _: slice) -> tuple[Tensor, ...]:
        nats = entropies(logits)  # before the logits are spent
        return (*most_probable(logits), nats)


def _decode(
    step: _Step,
    lengths: int,
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    steps: int,
    on_step: OnStep | None,
) -> Decoded:
    """Repeat a step until nothing is masked, for one length or the best of several."""
    if lengths > 1 and spec.content is None:
        return search_lengths(step, denoiser, embedding, spec, lengths, steps, on_step)
    state = DenoisingState(embedding, spec)
    total = min(steps, spec.length)
    fixes = lengths == 1 and fixes_length(state, steps)
    for index in range(1, total + 1):
        step(state, denoiser, total - index + 1, fixes and index == 1)
        finished = not bool(state.masked.any())
        state.show(on_step, index, index if finished else total)
        if finished:
            break
    return state.decoded()


def _predict(
    state: DenoisingState, denoiser: DenoiserFn, reader: Reader, fixes: bool
) -> tuple[Tensor, ...]:
    """Read the logits of the masked positions, [M] each; first fix the length where asked."""
    if fixes:
        return predict_with_length(state, denoiser, reader)
    return state.predict(denoiser, state.masked, reader)
