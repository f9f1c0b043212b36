"""Masked (absorbing-state) diffusion: schedules, corruption and losses.

Notation of MDLM (Sahoo et al., 2024, arXiv 2406.07524): a clean sequence x0 is corrupted into z_t
by keeping each token with probability alpha_t and masking it otherwise (eq. 4, absorbing state);
t = 0 is clean and t = 1 (almost) fully masked. Nothing here knows the network: a denoiser is any
callable ``(tokens [B, L], embedding [B, D], t [B], positions) → logits [M, V]``; ``positions`` are
the M wanted ones, as a boolean [B, L] or as flat row-major indices [M].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from unembed.device import send

DenoiserFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CrossEntropyFn = Callable[..., tuple[Tensor, Tensor]]  # arguments: see `diffusion_loss`

MIN_T = 1e-3  # the weights diverge at t = 0

# Schedules: how fast tokens are masked


class Schedule(Protocol):
    """Noise schedule: how fast tokens are masked."""

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
    """Average 1 - alpha_t over t in [MIN_T, 1], to three digits: the share masked in training."""
    return float((1.0 - schedule.alpha(torch.linspace(MIN_T, 1.0, 1001))).mean())


def make_schedule(name: str, rate: float) -> Schedule:
    """Make the schedule of a configuration: ``log-linear`` or ``linear``."""
    schedules: dict[str, Schedule] = {"log-linear": LogLinear(rate), "linear": Linear()}
    return schedules[name]


# Weights of the cross-entropy

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


# The forward process q(z_t | x0)


def sample_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Draw stratified t [B] in [MIN_T, 1]: one in each of B equal strata, in random order.

    The low-discrepancy sampler of MDLM (appendix C.3): less variance than independent draws.
    """
    u = torch.rand(batch, generator=generator)
    strata = (torch.randperm(batch, generator=generator) + u) / batch
    return MIN_T + (1.0 - MIN_T) * strata


def draw_masks(shape: tuple[int, int], mask_ratio: Tensor, generator: torch.Generator) -> Tensor:
    """Mask each position independently with probability mask_ratio [B]: boolean [B, L]."""
    return torch.rand(shape, generator=generator) < mask_ratio[:, None]


@dataclass(frozen=True)
class ScoredPadding:
    """A sample of the masked padding, weighted so that the loss stays the same on average.

    A third of the positions is padding, soon predicted almost surely: each costs a projection onto
    the whole vocabulary and teaches next to nothing.

    Attributes:
        pad_id: Id of the padding token.
        share: Probability with which a masked padding position is scored, above 0; its weight is
            divided by it.
    """

    pad_id: int
    share: float

    def choose(
        self, x0: Tensor, index: Tensor, weights: Tensor, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the positions [M'] to score of the masked ones [M], and their weights.

        Args:
            x0: Clean ids [b, L]; on a GPU the host waits for them once.
            index: Masked positions, flat row-major [M], on the host.
            weights: Of each [M].
            draws: Uniform in [0, 1), one a position [b, L].
        """
        is_padding = (x0.cpu().flatten() == self.pad_id)[index]
        scored = ~is_padding | (draws.flatten()[index] < self.share)
        weights = torch.where(is_padding, weights / self.share, weights)
        return index[scored], weights[scored]


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
        """Copy the candidates to another device."""
        return Candidates(self.ids.to(device), self.log_inclusion.to(device))


@dataclass(frozen=True)
class CorruptedBatch:
    """Corrupted batch, ready for the denoiser; `corrupt_batch` draws one.

    What depends on the number M of scored positions is worked out where the masks are drawn, so
    that an accelerator is never asked how many there are.

    Attributes:
        xt: Corrupted ids [b, L].
        t: Timesteps [b].
        masked: Masked positions, boolean [b, L].
        index: Positions to score, flat row-major [M].
        targets: Clean ids there [M].
        weights: Weight of each cross-entropy [M].
        positions: What the weighted sum is divided by: how many positions could have been masked,
            over the batch of all processes.
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

    @classmethod
    def from_masks(
        cls, x0: Tensor, xt: Tensor, masked: Tensor, t: Tensor, weight: Tensor, positions: int
    ) -> CorruptedBatch:
        """Build a batch from ids x0 and xt [B, L], masks [B, L], timesteps and weights [B]."""
        index = masked.flatten().nonzero()[:, 0]  # [M]
        weights = weight[index // x0.shape[1]]
        return cls(xt, t, masked, index, x0.flatten()[index], weights, positions)

    def to(self, device: torch.device) -> CorruptedBatch:
        """Copy the batch to another device."""
        return CorruptedBatch(
            xt=self.xt.to(device, non_blocking=True),
            t=self.t.to(device, non_blocking=True),
            masked=self.masked.to(device, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            positions=self.positions,
            candidates=None if self.candidates is None else self.candidates.to(device),
        )


def corrupt_batch(
    x0: Tensor,
    schedule: Schedule,
    weight: WeightFn,
    mask_id: int,
    generator: torch.Generator,
    *,
    batch: int | None = None,
    rows: slice = slice(None),
    padding: ScoredPadding | None = None,
    min_count: int = 0,
) -> CorruptedBatch:
    """Mask each token with probability 1 - alpha_t: a sample of q(z_t | x0), MDLM eq. 4.

    Everything is drawn on the host and for the whole batch, so that several processes, each with
    some of its rows, see what one would.

    Args:
        x0: Clean ids [b, L] of the rows, on any device, on which the result is too.
        schedule: How fast tokens are masked.
        weight: Weight of the cross-entropy at t, one of `WEIGHTS`.
        mask_id: Id of the mask token.
        generator: Source of randomness, on the host.
        batch: Sequences B of the whole batch; those of ``x0`` when not given.
        rows: Which rows of the whole batch ``x0`` has.
        padding: Which of the masked padding is scored; all of it when not given.
        min_count: Entries of weight 0 are added up to so many scored positions, for shapes that
            never change.
    """
    batch, length, device = len(x0) if batch is None else batch, x0.shape[1], x0.device
    t = sample_timesteps(batch, generator)
    masked = draw_masks((batch, length), 1.0 - schedule.alpha(t), generator)[rows]  # [b, L]
    t = t[rows]

    # The number of scored positions is known here, on the host, which need not ask a GPU
    index = masked.flatten().nonzero()[:, 0]  # [M]
    weights = weight(schedule, t)[index // length]  # [M]
    if padding is not None:
        draws = torch.rand(batch, length, generator=generator)[rows]
        index, weights = padding.choose(x0, index, weights, draws)
    missing = max(0, min_count - len(index))
    index, weights = F.pad(index, (0, missing)), F.pad(weights, (0, missing))

    masked, index = send(masked, device), send(index, device)
    return CorruptedBatch(
        xt=torch.where(masked, mask_id, x0),
        t=send(t, device),
        masked=masked,
        index=index,
        targets=x0.flatten()[index],
        weights=send(weights, device),
        positions=batch * length,
    )


# The loss


def diffusion_loss(
    cross_entropy: CrossEntropyFn, batch: CorruptedBatch, embedding: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weighted cross-entropy at the masked positions.

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
    inputs = (batch.xt, embedding, batch.t, batch.index, batch.targets, batch.weights)
    candidates = () if batch.candidates is None else (batch.candidates,)
    total, losses = cross_entropy(*inputs, *candidates)
    return total / batch.positions, losses


def cross_entropy_of(denoiser: DenoiserFn) -> CrossEntropyFn:
    """Make the plain path of a denoiser: logits at the masked positions, scored in float32."""

    def cross_entropy(
        xt: Tensor, embedding: Tensor, t: Tensor, index: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = denoiser(xt, embedding, t, index)  # [M, V]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return (losses * weights).sum(), losses.detach()

    return cross_entropy
