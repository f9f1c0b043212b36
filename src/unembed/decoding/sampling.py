"""Drawing tokens: float32 logits, cumulative sums and uniform numbers in float64.

Low-precision noise silently lowers the temperature (Zheng et al., 2024, arXiv 2409.02908), so no
number here is coarser than float32. Each position has its own uniform number, drawn whether or not
it is used, so that a sequence's randomness depends on its generator and the step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TOP = 256  # tokens that nearly always hold the nucleus
_COLD = 1e-4  # temperature below which logits divided by it may overflow


def uniforms(generators: Sequence[torch.Generator], shape: tuple[int, ...], to: Tensor) -> Tensor:
    """Numbers in [0, 1) from each sequence's own generator [B, *shape], on the device of ``to``."""
    drawn = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(drawn).to(to.device, _precise(to.device))


def sample(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token at each position by inverting the cumulative distribution.

    Args:
        logits: Float32 [M, V]; -infinity where a token must not be drawn.
        u: Uniform numbers in [0, 1) [M].
        temperature: Divides the logits; 0, or next to it, takes the likeliest token.
        top_p: Probability of the likeliest tokens to draw from; 1 is all of them.

    Returns:
        The tokens [M], and the probability [M] that the denoiser itself gave each, whatever the
        temperature.
    """
    if temperature < _COLD:
        tokens = logits.argmax(dim=-1)
    else:
        p = (logits / temperature).softmax(dim=-1)
        if top_p < 1.0:
            p = p.masked_fill(p < nucleus_floor(p, top_p)[:, None], 0.0)
        cumulative = p.cumsum(dim=-1, dtype=_precise(p.device))  # [M, V]
        below_one = 1.0 - torch.finfo(cumulative.dtype).eps
        target = u.to(cumulative.dtype)[:, None] * below_one * cumulative[:, -1:]
        # The first token whose sum exceeds the target, which is never one of probability zero.
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return tokens, (chosen - logits.logsumexp(dim=-1)).exp()


def nucleus_floor(p: Tensor, top_p: float) -> Tensor:
    """The probability of the least likely token of each nucleus: [M, V] → [M].

    The nucleus is the fewest likeliest tokens with at least ``top_p`` together (Holtzman et al.,
    2020, arXiv 1904.09751).
    """
    top = p.topk(min(_TOP, p.shape[1]), dim=-1).values  # [M, 256], falling
    floor = _floor_of(top, top_p)
    wide = top.sum(dim=-1) < top_p
    if wide.any():
        floor[wide] = _floor_of(p[wide].sort(dim=-1, descending=True).values, top_p)
    return floor


def _floor_of(falling: Tensor, top_p: float) -> Tensor:
    before = falling.cumsum(dim=-1) - falling
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return falling.gather(1, last)[:, 0]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which knows no float64
