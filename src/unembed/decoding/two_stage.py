"""Greedy, then sampling from that hypothesis with part of it masked again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.euler import Euler
from unembed.decoding.sampling import uniforms
from unembed.decoding.sequential import Greedy
from unembed.decoding.state import State, after_end
from unembed.decoding.strategy import Canvas, Decoded, OnStep, Scorer, require_between
from unembed.diffusion import DenoiserFn


@dataclass(frozen=True)
class TwoStage:
    """`Greedy` for half of the passes, then `Euler` from an intermediate t for the others.

    Between the two the hypothesis is noised by the forward process to the t at which a share
    ``noise`` of it is masked, q(z_t | x0) (MDLM eq. 4): what the greedy pass settled first, with
    little to go by, can be said again with the rest of the text in view.

    Attributes:
        noise: Share of the tokens masked again, 0 to 1.
        temperature: Of the second stage; see `Euler`.
        top_p: Of the second stage; see `Euler`.
    """

    noise: float = 0.3
    temperature: float = 1.0
    top_p: float = 1.0
    needs_encoder: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_between("noise", self.noise, 0.0, 1.0)
        Euler(self.temperature, self.top_p)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        canvas: Canvas,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        scorer: Scorer | None = None,
    ) -> Decoded:
        """See `Strategy`; with one pass only there is no second stage."""
        state = State(embedding, canvas)
        total = (steps + 1) // 2
        for index in range(1, total + 1):
            if bool(state.masked.any()):
                Greedy().fill(state, denoiser, total - index + 1)
            state.show(on_step, index, steps)
        later = steps - total
        if later:
            self._renoise(state, generators)
        start = float(canvas.schedule.timestep(torch.tensor(self.noise)))
        for index in range(1, later + 1):
            Euler(self.temperature, self.top_p).transition(
                state, denoiser, start, (index, later), generators
            )
            state.show(on_step, total + index, steps)
        return state.decoded()

    def _renoise(self, state: State, generators: Sequence[torch.Generator]) -> None:
        u = uniforms(generators, (state.canvas.length,), state.embedding)  # [B, L]
        chosen = u < self.noise
        if state.canvas.end_id is not None:
            chosen &= ~after_end(state.tokens, state.canvas.end_id)
        state.remask(chosen)
