"""What a step is made of: pairs, timesteps, masks, on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import free_bytes
from unembed.diffusion import WEIGHTS, Corrupted, Schedule, draw_masks, sample_timesteps

if TYPE_CHECKING:
    from unembed.config import DiffusionSection, TrainingSection

RowsFn = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]

_SPARE = 6.0  # standard deviations of room: one batch in 10^9 has more masks and is longer
_ROUND = 64


def rows_of(pairs: Pairs, settings: TrainingSection, device: torch.device) -> RowsFn:
    """A function from row numbers to token ids [b, L] and unit embeddings [b, D] on the device.

    The pairs are copied there whole where ``training.resident`` says so and they fit into half of
    its free memory; otherwise rows are read from the disk's cache and sent.
    """
    wanted = settings.resident == "always"
    if settings.resident == "auto" and device.type == "cuda":
        size = sum(a.nbytes for a in pairs.tokens) + sum(a.nbytes for a in pairs.embeddings)
        wanted = size <= free_bytes(device) // 2
    if wanted:
        return _resident(pairs, device)

    def read(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        tokens, vectors = pairs.rows(rows)
        return sent(torch.from_numpy(tokens), device), sent(torch.from_numpy(vectors), device)

    return read


def _resident(pairs: Pairs, device: torch.device) -> RowsFn:
    length, dimension = pairs.tokens[0].shape[1], pairs.embeddings[0].shape[1]
    tokens = torch.empty(len(pairs), length, dtype=torch.int32, device=device)
    embeddings = torch.empty(len(pairs), dimension, dtype=torch.float16, device=device)
    for start, ids, vectors in zip(pairs.starts, pairs.tokens, pairs.embeddings, strict=False):
        tokens[start : start + len(ids)] = torch.from_numpy(ids.astype(np.int32))
        embeddings[start : start + len(ids)] = torch.from_numpy(np.array(vectors))

    def gather(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        at = sent(torch.from_numpy(rows), device)
        vectors = embeddings[at].float()
        return tokens[at].long(), vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)

    return gather


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from pinned memory to a GPU, so that the host need not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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
        """The positions [M'] to score of the masked ones [M], and their weights.

        Args:
            x0: Clean ids [b, L]; on a GPU the host waits for them once.
            index: Masked positions, flat row-major [M], on the host.
            weights: Of each [M].
            draws: Uniform in [0, 1), one a position [b, L].
        """
        is_padding = (x0.cpu().flatten() == self.pad_id)[index]
        kept = ~is_padding | (draws.flatten()[index] < self.share)
        weights = torch.where(is_padding, weights / self.share, weights)
        return index[kept], weights[kept]


def masked_batch(
    x0: Tensor,
    own: slice,
    batch: int,
    process: DiffusionSection,
    schedule: Schedule,
    mask_id: int,
    generator: torch.Generator,
    count: int = 0,
    padding: ScoredPadding | None = None,
) -> Corrupted:
    """Draw timesteps and masks of a whole batch on the host, and apply this process's rows.

    The same draws as `diffusion.corrupt_batch`, whose result this is where ``own`` is everything
    and ``count`` is 0.

    Args:
        x0: Clean ids [b, L] of the rows ``own``, on the device.
        own: Which rows of the batch these are.
        batch: Pairs B of the whole batch, over all processes.
        process: The forward process and its weight.
        schedule: Of the process.
        mask_id: Id of the mask token.
        generator: Source of randomness.
        count: Masked positions to pad to with entries of weight 0, for shapes that never change.
        padding: Which of the masked padding is scored; all of it when not given.
    """
    length, device = x0.shape[1], x0.device
    t = sample_timesteps(batch, generator)
    masked = draw_masks((batch, length), 1.0 - schedule.alpha(t), generator)[own]
    t = t[own]
    # The number of masked positions is settled here, on the host, which need not ask a GPU
    index = masked.flatten().nonzero()[:, 0]  # [M]
    weights = WEIGHTS[process.weight](schedule, t)[index // length]
    if padding is not None:
        draws = torch.rand(batch, length, generator=generator)[own]
        index, weights = padding.choose(x0, index, weights, draws)
    missing = max(0, count - len(index))
    index, weights = F.pad(index, (0, missing)), F.pad(weights, (0, missing))
    masked, index = sent(masked, device), sent(index, device)
    xt = torch.where(masked, mask_id, x0)
    return Corrupted(
        xt=xt,
        t=sent(t, device),
        masked=masked,
        index=index,
        targets=x0.flatten()[index],
        weights=sent(weights, device),
        positions=batch * length,
    )


def most_masked(pairs: int, length: int, ratio: float, whole: bool) -> int:
    """Masked positions that a batch practically never exceeds.

    Args:
        pairs: Pairs b of it.
        length: Positions L of each.
        ratio: Mean share masked.
        whole: Whether its timesteps are stratified, as those of a whole batch are. Those of a
            process's part of one are a random choice, and their sum varies more.
    """
    # Variance of a binomial over L at most L / 4; of L times a ratio in [0, 1] at most L^2 / 12
    variance = pairs * length * (0.25 if whole else 0.25 + length / 12)
    wanted = pairs * length * ratio + _SPARE * math.sqrt(variance)
    return min(pairs * length, math.ceil(wanted / _ROUND) * _ROUND)


def perturb(
    embedding: Tensor,
    dropout: float,
    noise: float,
    generator: torch.Generator,
    batch: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Noisy unit vectors, some of them replaced by the null condition.

    The null condition is the zero vector: what a denoiser trained with it predicts there is its
    unconditional distribution, which classifier-free guidance (Ho and Salimans, 2022, arXiv
    2207.12598) needs.

    Args:
        embedding: Unit vectors [b, D].
        dropout: Probability of the null condition, 0 to 1.
        noise: Length of the Gaussian noise added before vectors are made unit again, as a share of
            theirs: 0.02 is the rounding of an int8 store.
        generator: Source of randomness; nothing is drawn from it where both are 0.
        batch: Size B of the batch these are the rows ``own`` of; it is drawn for all of it, so
            that the draws do not depend on how a batch is shared out.
        own: Which rows these are.

    Returns:
        [b, D].
    """
    batch, width = len(embedding) if batch is None else batch, embedding.shape[1]
    if noise:
        drawn = sent(torch.randn(batch, width, generator=generator)[own], embedding.device)
        embedding = F.normalize(embedding + drawn * (noise / width**0.5), dim=1)
    if dropout:
        kept = torch.rand(batch, 1, generator=generator)[own] >= dropout
        embedding = embedding * sent(kept, embedding.device)
    return embedding


_LOGITS = 1 << 24  # at a time


@torch.no_grad()
def with_own_samples(
    denoiser: Denoiser,
    batch: Corrupted,
    embedding: Tensor,
    chosen: Tensor,
    uniform: Tensor,
    mask_id: int,
    timestep: Callable[[Tensor], Tensor],
) -> Corrupted:
    """The batch with some visible tokens replaced by samples of p(x0 | z_t', embedding).

    z_t' is z_t with these positions masked as well, and t' the timestep of its mask ratio. The
    targets stay what they were: the loss is over the masked positions of z_t only.

    Args:
        denoiser: Samples, without gradient.
        batch: z_t.
        embedding: [B, D].
        chosen: Positions asked for, boolean [B, L]; masked ones among them are left alone.
        uniform: A draw in [0, 1) for each position [B, L]: samples come from the inverse of the
            distribution function, so the host's generator decides on every device.
        mask_id: The token that must not be sampled.
        timestep: The schedule's mask ratio → t.
    """
    chosen = chosen & ~batch.masked
    hidden = torch.where(chosen, mask_id, batch.xt)
    ratio = (chosen | batch.masked).float().mean(dim=1)
    index = chosen.flatten().nonzero()[:, 0]  # may be none; the pass takes all processes
    h = denoiser.hidden_states(hidden, embedding, timestep(ratio)).flatten(0, 1)[index]
    table, bias = denoiser.token_table.weight, denoiser.output_bias
    rows = max(1, _LOGITS // len(table))
    draws = uniform.flatten()[index].clamp(1e-6, 1.0 - 1e-6)
    samples = [
        _sample(F.linear(part.to(table), table, bias), draw, mask_id)
        for part, draw in zip(torch.split(h, rows), torch.split(draws, rows), strict=True)
    ]
    xt = batch.xt.flatten().scatter(0, index, torch.cat(samples)).view_as(batch.xt)
    return replace(batch, xt=xt)


def _sample(logits: Tensor, uniform: Tensor, mask_id: int) -> Tensor:
    """A token for each row of logits [R, V], by a uniform draw [R]."""
    logits[:, mask_id] = -torch.inf
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    wanted = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted)[:, 0]
