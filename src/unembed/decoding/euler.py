"""Sampling the reverse process in uniform time steps, with or without re-masking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.length_search import fixes_length
from unembed.decoding.logits import sample, uniforms
from unembed.decoding.sequential import Sequential
from unembed.decoding.state import DenoisingState, after_end, scatter_masked
from unembed.decoding.strategy import Decoded, OnStep, Oracle, SequenceSpec, check_options, option
from unembed.diffusion import DenoiserFn

HOTTEST = 100.0  # all tokens are about as likely as each other long before


@dataclass(frozen=True)
class Euler:
    """Ancestral sampling from t = 1 to t = 0 in ``steps`` equal parts.

    From t to s < t each masked position is unmasked with probability
    (alpha_s - alpha_t) / (1 - alpha_t) and then holds a draw from the denoiser's distribution (the
    reverse process of MDLM, Sahoo et al., 2024, arXiv 2406.07524). Which positions are unmasked
    does not depend on the denoiser, so it is asked about those alone, and not at all where there
    are none.

    Attributes:
        temperature: See below.
        top_p: See below.
    """

    temperature: float = option(
        1.0,
        "Of the draws; 0 takes the most probable token, 1 is the denoiser's own distribution.",
        low=0.0,
        high=HOTTEST,
    )
    top_p: float = option(
        1.0,
        "Draw among the most probable tokens with this probability together.",
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
        """See `Strategy`."""
        state = DenoisingState(embedding, spec)
        for index in range(1, steps + 1):
            self.transition(state, denoiser, 1.0, (index, steps), generators)
            state.show(on_step, index, steps)
        return state.decoded()

    def transition(
        self,
        state: DenoisingState,
        denoiser: DenoiserFn,
        start: float,
        step: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        """Step i of n on the way from t = start to 0: from t to s = start (1 - i / n)."""
        index, steps = step
        t, s = (
            torch.full((1,), start * (1.0 - i / steps), device=state.embedding.device)
            for i in (index - 1, index)
        )
        schedule = state.spec.schedule
        rate = (schedule.alpha(s) - schedule.alpha(t)) / (1.0 - schedule.alpha(t))
        u = uniforms(generators, (2, state.spec.length), state.embedding)  # [B, 2, L]
        positions = state.masked & (u[:, 0] < rate if index < steps else True)
        if not bool(positions.any()):
            return
        draws = u[:, 1][positions]  # [M]

        def draw(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            return sample(logits, draws[part], self.temperature, self.top_p)

        tokens, confidences = state.predict(denoiser, positions, draw, t.expand(len(positions)))
        state.unmask(
            positions,
            scatter_masked(tokens, positions, 0),
            scatter_masked(confidences, positions, 0.0),
        )


@dataclass(frozen=True)
class EulerRemask(Euler):
    """`Euler` that takes tokens back: after every step but the last some are masked again.

    A token unmasked with a confidence of at most ``threshold`` is masked again with probability
    ``probability``. The two forms of arXiv 2602.11047 are its corners: by probability alone
    (threshold 1, the default, any token with p = 0.05) and by threshold alone (probability 1).
    What is masked is filled again by the steps to come, the last of which fills everything; with
    probability 1 a doubtful token is thus refused as soon as it is drawn.

    Attributes:
        threshold: See below.
        probability: See below.
    """

    threshold: float = option(
        1.0, "Highest confidence of a token that may be taken back.", low=0.0, high=1.0
    )
    probability: float = option(
        0.05, "Of taking back such a token after a step.", low=0.0, high=1.0
    )

    def transition(
        self,
        state: DenoisingState,
        denoiser: DenoiserFn,
        start: float,
        step: tuple[int, int],
        generators: Sequence[torch.Generator],
    ) -> None:
        """See `Euler.transition`; then the re-masking."""
        super().transition(state, denoiser, start, step, generators)
        u = uniforms(generators, (state.spec.length,), state.embedding)  # [B, L]
        if step[0] == step[1]:
            return
        doubtful = ~state.masked & (state.confidences <= self.threshold) & (u < self.probability)
        if state.spec.end_id is not None:  # nothing behind the end is worth a pass
            doubtful &= ~after_end(state.tokens, state.spec.end_id)
        state.remask(doubtful)


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
        fixes = fixes_length(state, steps)
        for index in range(1, total + 1):
            if bool(state.masked.any()):
                Sequential().step(state, denoiser, total - index + 1, fixes and index == 1)
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
        positions = u < self.noise
        if state.spec.end_id is not None:
            positions &= ~after_end(state.tokens, state.spec.end_id)
        state.remask(positions)
