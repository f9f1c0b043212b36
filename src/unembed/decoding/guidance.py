"""Classifier-free guidance: a denoiser pushed away from what it would say without the embedding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unembed.decoding.lazy import LazyDenoiser
from unembed.decoding.strategy import require_between
from unembed.diffusion import DenoiserFn, Schedule


@dataclass(frozen=True)
class Guidance:
    """Logits (1 + w) l(embedding) - w l(nothing), with a strength w that changes on the way.

    Ho and Salimans (2022, arXiv 2207.12598), eq. 6, on logits; nothing is the zero vector, which a
    network trained with condition dropout knows. The strength goes from ``early`` at a fully
    masked sequence to ``late`` at a clean one in proportion to the share of visible tokens,
    w(t) = early + (late - early) alpha_t: little guidance while nothing is settled, since early
    mistakes are kept.

    Attributes:
        early: w at t = 1, from 0; 0 is the plain denoiser.
        late: w at t = 0, from 0.
    """

    early: float = 0.0
    late: float = 1.0

    def __post_init__(self) -> None:
        require_between("early guidance", self.early, 0.0)
        require_between("late guidance", self.late, 0.0)

    def strength(self, alpha: Tensor) -> Tensor:
        """The w at each share alpha of visible tokens."""
        return self.early + (self.late - self.early) * alpha

    def wrap(self, denoiser: DenoiserFn, schedule: Schedule) -> DenoiserFn:
        """The guided denoiser, usable with every strategy; each pass runs both sides at once."""
        asked = denoiser.features if isinstance(denoiser, LazyDenoiser) else denoiser

        def guided(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
            nothing = torch.zeros_like(embedding)
            both = asked(
                torch.cat([tokens, tokens]),
                torch.cat([embedding, nothing]),
                torch.cat([t, t]),
                torch.cat([where, where]),
            ).float()
            told, untold = both.chunk(2)  # each [M, V], or [M, H]
            w = self.strength(schedule.alpha(t))  # [B]
            w = w[:, None].expand(where.shape)[where][:, None]  # [M, 1]
            return told + w * (told - untold)

        # Logits are linear in features, with weights that sum to one
        return replace(denoiser, features=guided) if isinstance(denoiser, LazyDenoiser) else guided
