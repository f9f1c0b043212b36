"""What every strategy takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unembed.diffusion import DenoiserFn, Schedule


@dataclass(frozen=True)
class Canvas:
    """The sequence to fill.

    Attributes:
        length: Positions L.
        mask_id: Id of the mask token, which no strategy may leave behind.
        schedule: Turns the share of masked positions into the denoiser's timestep.
    """

    length: int
    mask_id: int
    schedule: Schedule

    def blank(self, batch: int, device: torch.device) -> Tensor:
        """Fully masked sequences [B, L]."""
        return torch.full((batch, self.length), self.mask_id, device=device)


@dataclass(frozen=True)
class DecodingStep:
    """The state after one denoiser pass, for live displays; tensors are copies on the CPU.

    Attributes:
        index: Passes done, from 1.
        total: Passes planned.
        tokens: Ids [B, L]; the mask token where undecided.
        confidences: Probability the denoiser gave each settled token [B, L]; 0 where undecided.
    """

    index: int
    total: int
    tokens: Tensor
    confidences: Tensor


@dataclass(frozen=True)
class Decoded:
    """What a strategy returns.

    Attributes:
        tokens: Ids [B, L], none of them the mask token.
        confidences: Probability the denoiser gave each token when it was settled [B, L].
        order: Pass (from 1) in which each position was settled [B, L].
        passes: Denoiser passes, each over the whole batch.
        encoder_calls: Texts embedded on the way; 0 for every vector-only strategy.
    """

    tokens: Tensor
    confidences: Tensor
    order: Tensor
    passes: int
    encoder_calls: int = 0


OnStep = Callable[[DecodingStep], None]


class Strategy(Protocol):
    """From embeddings to token ids with a budget of denoiser passes."""

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        canvas: Canvas,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
    ) -> Decoded:
        """Fill the canvas for each embedding.

        Args:
            denoiser: ``(tokens [B, L], embedding [B, D], t [B], where [B, L]) → logits [M, V]``.
            embedding: Unit vectors [B, D].
            canvas: Length, mask token and schedule.
            steps: Denoiser passes at most, from 1.
            generators: One source of randomness per sequence, so that a text does not depend on
                what else is in its batch.
            on_step: Called after every pass.
        """
        ...
