"""Sequential greedy decoding: unmask the most confident positions, predict again, repeat."""

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
from unembed.decoding.logits import margins, most_probable
from unembed.decoding.state import (
    DenoisingState,
    duplicates_last,
    scatter_masked,
    tokens_per_step,
    topk_mask,
)
from unembed.decoding.strategy import Decoded, OnStep, Oracle, SequenceSpec, check_options, option
from unembed.diffusion import DenoiserFn

ORDERS = ("confidence", "margin", "left-to-right")


@dataclass(frozen=True)
class Sequential:
    """Each pass unmasks the most confident positions with their most probable tokens.

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
        if self.lengths > 1 and spec.content is None:
            return search_lengths(
                self.step, denoiser, embedding, spec, self.lengths, steps, on_step
            )
        state = DenoisingState(embedding, spec)
        total = min(steps, spec.length)
        fixes = self.lengths == 1 and fixes_length(state, steps)
        for index in range(1, total + 1):
            self.step(state, denoiser, total - index + 1, fixes and index == 1)
            finished = not bool(state.masked.any())
            state.show(on_step, index, index if finished else total)
            if finished:
                break
        return state.decoded()

    def step(
        self, state: DenoisingState, denoiser: DenoiserFn, passes: int, fixes: bool = False
    ) -> None:
        """Make one pass, of so many that are left; one that ``fixes`` the length does so first."""
        masked = state.masked
        if fixes:
            figures = predict_with_length(state, denoiser, self._read)
        else:
            figures = state.predict(denoiser, masked, self._read)
        probabilities, guesses, *leads = figures  # [M] each
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
