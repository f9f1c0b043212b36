"""Self-generated contexts: some visible tokens replaced by what the denoiser itself would say.

In decoding the visible tokens are the denoiser's own, mistakes included; in training they are
always right. Showing it some of its own samples closes that gap (scheduled sampling: Bengio et
al., 2015, arXiv 1506.03099, there for recurrent networks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unembed.denoiser import Denoiser
from unembed.diffusion import Corrupted

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
    h = denoiser.features(hidden, embedding, timestep(ratio)).flatten(0, 1)[index]
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
