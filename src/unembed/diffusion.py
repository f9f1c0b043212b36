"""Masked (absorbing-state) diffusion: schedules, corruption and losses.

Notation of MDLM (Sahoo et al., 2024, arXiv 2406.07524): a clean sequence x0 is corrupted into z_t
by keeping each token with probability alpha_t and masking it otherwise (eq. 4, absorbing state);
t = 0 is clean and t = 1 (almost) fully masked. Nothing here knows the network: a denoiser is any
callable ``(tokens [B, L], embedding [B, D], t [B], where) → logits [M, V]``; ``where`` says which M
positions are wanted, as a boolean [B, L] or as flat row-major indices [M].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

DenoiserFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CrossEntropyFn = Callable[..., tuple[Tensor, Tensor]]  # arguments: see `diffusion_loss`

MIN_T = 1e-3  # the weights diverge at t = 0


class Schedule(Protocol):
    """How fast tokens are masked."""

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still visible at t."""
        ...

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), the weight of the cross-entropy in the ELBO (MDLM eq. 10)."""
        ...

    def timestep(self, mask_ratio: Tensor) -> Tensor:
        """The t in [MIN_T, 1] at which this share of the tokens is masked."""
        ...


@dataclass(frozen=True)
class LogLinear:
    """alpha_t = exp(-rate * t), the schedule of arXiv 2602.11047 with rate 5.

    At t = 1 a share exp(-5) = 0.7% of the tokens is still visible; decoding starts from none.
    """

    rate: float = 5.0

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`."""
        return torch.exp(-self.rate * t)

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Rate * exp(-rate t) / (1 - exp(-rate t)) = rate / (exp(rate t) - 1)."""
        return self.rate / torch.expm1(self.rate * t)

    def timestep(self, mask_ratio: Tensor) -> Tensor:
        """See `Schedule.timestep`; a ratio above 1 - exp(-rate) gives t = 1."""
        return (-torch.log1p(-mask_ratio) / self.rate).clamp(MIN_T, 1.0)


@dataclass(frozen=True)
class Linear:
    """alpha_t = 1 - t; its ELBO weight is 1/t."""

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`."""
        return 1.0 - t

    def elbo_weight(self, t: Tensor) -> Tensor:
        """1 / t."""
        return 1.0 / t

    def timestep(self, mask_ratio: Tensor) -> Tensor:
        """See `Schedule.timestep`."""
        return mask_ratio.clamp(MIN_T, 1.0)


def mean_mask_ratio(schedule: Schedule) -> float:
    """Mean of 1 - alpha_t over t in [MIN_T, 1], to three digits: the share masked in training."""
    return float((1.0 - schedule.alpha(torch.linspace(MIN_T, 1.0, 1001))).mean())


def make_schedule(name: str, rate: float) -> Schedule:
    """The schedule of a configuration: ``log-linear`` or ``linear``."""
    schedules: dict[str, Schedule] = {"log-linear": LogLinear(rate), "linear": Linear()}
    return schedules[name]


WeightFn = Callable[[Schedule, Tensor], Tensor]

WEIGHTS: dict[str, WeightFn] = {
    # The report's weight (arXiv 2602.11047); equal to the ELBO's only for linear masking.
    "reciprocal-t": lambda schedule, t: 1.0 / t,
    # Exact negative ELBO of the schedule in use (MDLM eq. 10).
    "elbo": lambda schedule, t: schedule.elbo_weight(t),
    # Every masked token counts the same: most weight on nearly empty sequences, where decoding
    # starts and where all there is to go by is the embedding.
    "uniform": lambda schedule, t: torch.ones_like(t),
}


def sample_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Stratified t [B] in [MIN_T, 1]: one draw in each of B equal strata, in random order.

    The low-discrepancy sampler of MDLM (appendix C.3): less variance than independent draws.
    """
    u = torch.rand(batch, generator=generator)
    strata = (torch.randperm(batch, generator=generator) + u) / batch
    return MIN_T + (1.0 - MIN_T) * strata


def draw_masks(shape: tuple[int, int], mask_ratio: Tensor, generator: torch.Generator) -> Tensor:
    """Boolean [B, L]: each position masked independently with probability mask_ratio [B]."""
    return torch.rand(shape, generator=generator) < mask_ratio[:, None]


def corrupt(
    x0: Tensor,
    mask_ratio: Tensor,
    mask_id: int,
    generator: torch.Generator,
    maskable: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask each token independently: q(z_t | x0), MDLM eq. 4.

    Args:
        x0: Clean ids [B, L].
        mask_ratio: Probability of masking [B], which is 1 - alpha_t.
        mask_id: Id of the mask token.
        generator: Source of randomness.
        maskable: Boolean [B, L]; a position that is false is never masked. All when not given.

    Returns:
        z_t [B, L] and the boolean mask [B, L] of the positions to predict.
    """
    masked = draw_masks((len(x0), x0.shape[1]), mask_ratio, generator)
    if maskable is not None:
        masked = masked & maskable
    return torch.where(masked, mask_id, x0), masked


@dataclass(frozen=True)
class Candidates:
    """Part of the vocabulary over which a softmax is taken.

    Attributes:
        ids: Token ids, ascending [S]; every target of the batch is among them.
        log_inclusion: Log-probability of each to be a candidate [S], taken off its logit.
    """

    ids: Tensor
    log_inclusion: Tensor

    def to(self, device: torch.device) -> Candidates:
        """The same candidates on another device."""
        return Candidates(self.ids.to(device), self.log_inclusion.to(device))


@dataclass(frozen=True)
class Corrupted:
    """One corrupted batch, ready for the denoiser; build it with `corrupted`.

    What depends on the number M of masked positions is worked out where the masks are drawn, so
    that an accelerator is never asked how many there are.

    Attributes:
        xt: Corrupted ids [B, L].
        t: Timesteps [B].
        masked: Positions to predict, boolean [B, L].
        index: The same as flat row-major positions [M].
        targets: Clean ids there [M].
        weights: Weight of each cross-entropy [M].
        positions: How many positions could have been masked, over the batch.
        candidates: What the softmax is taken over; the whole vocabulary when None.
    """

    xt: Tensor
    t: Tensor
    masked: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    positions: int
    candidates: Candidates | None = None

    def to(self, device: torch.device) -> Corrupted:
        """The same batch on another device."""
        return Corrupted(
            xt=self.xt.to(device, non_blocking=True),
            t=self.t.to(device, non_blocking=True),
            masked=self.masked.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            positions=self.positions,
            candidates=None if self.candidates is None else self.candidates.to(device),
        )


def corrupted(
    x0: Tensor, xt: Tensor, masked: Tensor, t: Tensor, weight: Tensor, positions: int
) -> Corrupted:
    """A batch from clean ids [B, L], corrupted ids, mask, timesteps [B] and weights [B]."""
    index = masked.flatten().nonzero()[:, 0]  # [M]
    targets = x0.flatten()[index]
    weights = weight[index // x0.shape[1]]
    return Corrupted(xt, t, masked, index, targets, weights, positions)


def corrupt_batch(
    x0: Tensor,
    schedule: Schedule,
    weight: WeightFn,
    mask_id: int,
    generator: torch.Generator,
    maskable: Tensor | None = None,
) -> Corrupted:
    """Draw timesteps and masks for a batch of clean ids [B, L]."""
    t = sample_timesteps(len(x0), generator)
    xt, masked = corrupt(x0, 1.0 - schedule.alpha(t), mask_id, generator, maskable)
    positions = x0.numel() if maskable is None else int(maskable.sum())
    return corrupted(x0, xt, masked, t, weight(schedule, t), positions)


def diffusion_loss(
    cross_entropy: CrossEntropyFn, batch: Corrupted, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy at the masked positions.

    sum over b of w(t_b) * sum over masked l of -log p(x0_bl | z_t, embedding), divided by the
    number of positions. With the ``elbo`` weight its mean over t and masks is the negative ELBO
    in nats per position (MDLM eq. 10).

    Args:
        cross_entropy: ``(xt, embedding, t, index [M], targets [M], weights [M])`` and, where the
            batch has them, the candidates → the weighted sum and the M cross-entropies without
            gradient. `cross_entropy_of` makes one from a denoiser, for the whole vocabulary; the
            trainer has one that never holds all logits.
        batch: From `corrupt_batch`.
        embedding: Unit vectors [B, D].

    Returns:
        The loss (a scalar with gradient) and the cross-entropy of each masked position [M]
        (without).
    """
    given = (batch.xt, embedding, batch.t, batch.index, batch.targets, batch.weights)
    chosen = () if batch.candidates is None else (batch.candidates,)
    total, losses = cross_entropy(*given, *chosen)
    return total / batch.positions, losses


def cross_entropy_of(denoiser: DenoiserFn) -> CrossEntropyFn:
    """The plain path: logits at the masked positions, then their cross-entropies in float32."""

    def cross_entropy(
        xt: Tensor, embedding: Tensor, t: Tensor, index: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = denoiser(xt, embedding, t, index)  # [M, V]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights).sum(), losses.detach()

    return cross_entropy
