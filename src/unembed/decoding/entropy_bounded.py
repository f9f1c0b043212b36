"""Entropy-bounded unmasking: as many positions a pass as can be told apart from one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.length_search import (
    MOST_LENGTHS,
    fixes_length,
    predict_with_length,
    search_lengths,
)
from unembed.decoding.logits import entropies, most_probable
from unembed.decoding.state import (
    DEMOTION,
    DenoisingState,
    duplicates_last,
    scatter_masked,
    tokens_per_step,
    topk_mask,
)
from unembed.decoding.strategy import Decoded, OnStep, Oracle, SequenceSpec, check_options, option
from unembed.diffusion import DenoiserFn


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
        if self.lengths > 1 and spec.content is None:
            return search_lengths(
                self.step, denoiser, embedding, spec, self.lengths, steps, on_step
            )
        state = DenoisingState(embedding, spec)
        fixes = self.lengths == 1 and fixes_length(state, steps)
        for index in range(1, steps + 1):
            self.step(state, denoiser, steps - index + 1, fixes and index == 1)
            finished = not bool(state.masked.any())
            state.show(on_step, index, index if finished else steps)
            if finished:
                break
        return state.decoded()

    def step(
        self, state: DenoisingState, denoiser: DenoiserFn, passes: int, fixes: bool = False
    ) -> None:
        """Make one pass, of so many that are left; one that ``fixes`` the length does so first."""
        masked = state.masked
        if fixes:
            figures = predict_with_length(state, denoiser, _read)
        else:
            figures = state.predict(denoiser, masked, _read)
        probabilities, guesses, nats = figures  # [M] each
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


def _read(logits: Tensor, _: slice) -> tuple[Tensor, ...]:
    nats = entropies(logits)  # before the logits are spent
    return (*most_probable(logits), nats)
