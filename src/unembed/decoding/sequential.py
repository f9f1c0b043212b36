"""Sequential greedy decoding: settle the surest positions, look again, repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.lazy import LazyDenoiser, survey
from unembed.decoding.length_search import decode_lengths
from unembed.decoding.likeliest import most_probable
from unembed.decoding.state import (
    DOUBTED,
    State,
    even_share,
    mask_surest,
    said_before,
    spread,
)
from unembed.decoding.strategy import (
    Canvas,
    Decoded,
    OnStep,
    Scorer,
    require_among,
    require_between,
)
from unembed.diffusion import DenoiserFn

ORDERS = ("confidence", "margin", "left-to-right")
_FEW = 2  # settled in a pass; more change too much for what was known before to be of use


@dataclass(frozen=True)
class Greedy:
    """Each pass settles the surest masked positions with their likeliest tokens; no randomness.

    What is masked is spread evenly over the passes left: one position a pass when ``steps`` is L
    or more. Positions that would get the same token as a surer one in the same pass come last. The
    order by confidence is that of MaskGIT (Chang et al., 2022, arXiv 2202.04200) and LLaDA (Nie et
    al., 2025, arXiv 2502.09992), the one by margin that of Kim et al. (2025, arXiv 2502.06768).

    Attributes:
        order: Which positions come first: ``confidence`` (probability of the likeliest token),
            ``margin`` (its lead over the second) or ``left-to-right``.
        lengths: How many likely lengths are tried and ranked, from 1 (`decode_lengths`).
    """

    order: str = "confidence"
    lengths: int = 1
    needs_encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_among("order", self.order, ORDERS)
        require_between("lengths", self.lengths, 1)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        canvas: Canvas,
        *,
        steps: int,
        generators: Sequence[torch.Generator] = (),
        on_step: OnStep | None = None,
        scorer: Scorer | None = None,
    ) -> Decoded:
        """See `Strategy`."""
        if self.lengths > 1:
            return decode_lengths(
                self.fill, denoiser, embedding, canvas, self.lengths, steps, on_step
            )
        state = State(embedding, canvas)
        total = min(steps, canvas.length)
        for index in range(1, total + 1):
            if self.fill(state, denoiser, total - index + 1):
                state.show(on_step, index, index)
                break
            state.show(on_step, index, total)
        return state.decoded()

    def fill(self, state: State, denoiser: DenoiserFn, passes: int) -> bool:
        """One pass of those left; whether nothing is masked after it."""
        masked = state.masked
        count = even_share(masked, passes)
        leads: Sequence[Tensor] = ()
        few = self.order == "confidence" and bool((count <= _FEW).all())
        if few and isinstance(denoiser, LazyDenoiser):
            probabilities, guesses = survey(state, denoiser, masked, count)
        else:
            probabilities, guesses, *leads = state.read(denoiser, masked, self._read)
        best, tokens = spread(probabilities, masked, 0.0), spread(guesses, masked, 0)
        state.guess(tokens, best)
        sureness = best
        if self.order == "margin":
            sureness = spread(leads[0], masked, 0.0)
        elif self.order == "left-to-right":
            sureness = torch.arange(0.0, -masked.shape[1], -1.0, device=best.device).expand_as(best)
        sureness = sureness.masked_fill(said_before(tokens, sureness, masked), DOUBTED)
        chosen = mask_surest(sureness, masked, count)
        state.settle(chosen, tokens, best)
        return not bool(state.masked.any())

    def _read(self, logits: Tensor, _: slice) -> tuple[Tensor, ...]:
        leads = (margins(logits),) if self.order == "margin" else ()
        return (*most_probable(logits), *leads)


def margins(logits: Tensor) -> Tensor:
    """Probability of the likeliest token less that of the second: float32 [M, V] → [M]."""
    top = logits.topk(2, dim=-1).values
    pair = (top - logits.logsumexp(dim=-1, keepdim=True)).exp()  # [M, 2]
    return pair[:, 0] - pair[:, 1]
