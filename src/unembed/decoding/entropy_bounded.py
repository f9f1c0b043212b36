"""Entropy-bounded unmasking: as many positions a pass as can be told apart from one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
from unembed.decoding.strategy import Canvas, Decoded, OnStep, Scorer, require_between
from unembed.diffusion import DenoiserFn


@dataclass(frozen=True)
class EntropyBounded:
    """Settles the positions of least entropy while what they may share stays below a bound.

    Positions settled in the same pass are drawn from a product of marginals, which is wrong by at
    most the sum of their entropies less the largest one. Each pass takes the longest run U of the
    masked positions in rising entropy H with sum_U H - max_U H <= gamma (Ben-Hamu et al., 2025,
    arXiv 2505.24857), at least one, and at least what the passes left require. Positions that would
    get the same token as a surer one wait for another pass. A sequence
    is done when it is done: passes are spent where they are needed. Likeliest tokens, no
    randomness.

    Attributes:
        gamma: The bound in nats, from 0 (one position a pass, but for certain ones).
        lengths: How many likely lengths are tried and ranked, from 1 (`decode_lengths`).
    """

    gamma: float = 0.1
    lengths: int = 1
    needs_encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_between("gamma", self.gamma, 0.0)
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
        for index in range(1, steps + 1):
            if self.fill(state, denoiser, steps - index + 1):
                state.show(on_step, index, index)
                break
            state.show(on_step, index, steps)
        return state.decoded()

    def fill(self, state: State, denoiser: DenoiserFn, passes: int) -> bool:
        """One pass of those left; whether nothing is masked after it."""
        masked = state.masked
        found = state.read(denoiser, masked, lambda x, _: (entropies(x), *most_probable(x)))
        in_nats, probabilities, guesses = found
        tokens = spread(guesses, masked, 0)
        entropy = spread(in_nats, masked, torch.inf)  # [B, L]
        entropy = entropy.masked_fill(said_before(tokens, -entropy, masked), -DOUBTED)
        rising = entropy.sort(dim=1).values
        # Sorted, the largest of a run is its last: the sum of those before it is the bound's side.
        before = rising.cumsum(dim=1) - rising
        fits = ((before <= self.gamma) & (rising < -DOUBTED)).sum(dim=1)
        count = torch.maximum(fits, even_share(masked, passes))
        chosen = mask_surest(-entropy, masked, count)
        sure = spread(probabilities, masked, 0.0)
        state.guess(tokens, sure)
        state.settle(chosen, tokens, sure)
        return not bool(state.masked.any())


def entropies(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of each distribution: float32 [M, V], some -infinity → [M]."""
    log_p = logits.log_softmax(dim=-1)
    entropy: Tensor = torch.special.entr(log_p.exp()).sum(dim=-1)
    return entropy
