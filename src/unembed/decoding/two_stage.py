"""Sequential, then sampling from that hypothesis with part of it masked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.euler import HOTTEST, Euler
from unembed.decoding.logits import uniforms
from unembed.decoding.sequential import Sequential
from unembed.decoding.state import DenoisingState, after_end
from unembed.decoding.strategy import Decoded, OnStep, Oracle, SequenceSpec, check_options, option
from unembed.diffusion import DenoiserFn


@dataclass(frozen=True)
class TwoStage:
    """`Sequential` for half of the passes, then `Euler` from an intermediate t for the others.

    Between the two the hypothesis is noised by the forward process to the t at which a share
    ``noise`` of it is masked, q(z_t | x0) (MDLM eq. 4): what the first stage unmasked first, with
    little to go by, can be said again with the rest of the text in view.

    Attributes:
        noise: See below.
        temperature: See below.
        top_p: See below.
    """

    noise: float = option(0.3, "Share of the tokens masked again.", low=0.0, high=1.0)
    temperature: float = option(1.0, "Of the second stage.", low=0.0, high=HOTTEST)
    top_p: float = option(
        1.0,
        "In the second stage draw among the most probable tokens with this probability together.",
        above=0.0,
        high=1.0,
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
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`; with one pass only there is no second stage."""
        state = DenoisingState(embedding, spec)
        total = (steps + 1) // 2
        for index in range(1, total + 1):
            if bool(state.masked.any()):
                Sequential().step(state, denoiser, total - index + 1)
            state.show(on_step, index, steps)
        later = steps - total
        if later:
            self._renoise(state, generators)
        start = float(spec.schedule.timestep(torch.tensor(self.noise)))
        for index in range(1, later + 1):
            Euler(self.temperature, self.top_p).transition(
                state, denoiser, start, (index, later), generators
            )
            state.show(on_step, total + index, steps)
        return state.decoded()

    def _renoise(self, state: DenoisingState, generators: Sequence[torch.Generator]) -> None:
        u = uniforms(generators, (state.spec.length,), state.embedding)  # [B, L]
        chosen = u < self.noise
        if state.spec.end_id is not None:
            chosen &= ~after_end(state.tokens, state.spec.end_id)
        state.remask(chosen)
