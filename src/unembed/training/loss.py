"""The training loss: vocabulary projection and cross-entropy, never holding all logits.

The logits of a batch, [M, V], are the largest tensor of training: gigabytes at a vocabulary of
262 K. Softmax cross-entropy has a closed gradient, (p - onehot) * weight, so a chunk of rows can be
projected, scored and turned into gradients before the next one, at the cost of the same three
matrix products as the plain path and no recomputation. With a sampler the softmax is over part of
the vocabulary only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unembed.denoiser import Denoiser
from unembed.diffusion import Candidates

# Logits at a time: few enough for a CPU's cache and allocator, enough to fill a GPU
_CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
_BLOCK = 64  # rows: what the kernels of a product divide it into
_CHUNKS_PER_SUM = 8  # products added in the format of h before float32 takes their sum


def _rows_at_a_time(device: str, vocabulary: int) -> int:
    rows = max(1, _CHUNK_LOGITS.get(device, _CHUNK_LOGITS["cpu"]) // vocabulary)
    return rows - rows % _BLOCK if rows > _BLOCK else rows


class _Rows(torch.autograd.Function):
    """Some rows of a table, table[ids] for ascending ids, with a gradient of those rows alone.

    It is sparse, and autograd adds it in place to the dense one that the same table has as the
    input embedding: a step fills one gradient [V, H] and not two.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        gradient = torch.sparse_coo_tensor(
            ids[None], grads[0], ctx.shape, is_coalesced=True, check_invariants=False
        )
        return gradient, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of h @ table.T + bias; gradients made on the way forward.

    The products run in the format of h; sums over chunks are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, table: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix, offset = table.to(h.dtype), bias.to(h.dtype)
        losses = torch.empty(len(h), device=h.device, dtype=torch.float32)
        hits = torch.empty(len(h), device=h.device, dtype=torch.bool)
        grad_h = torch.empty_like(h)
        grad_bias = torch.zeros_like(bias)
        grad_table = partial = None
        if ctx.needs_input_grad[1]:
            grad_table, partial = torch.zeros_like(table), torch.zeros_like(matrix)
        size = _rows_at_a_time(h.device.type, len(table))
        chunks = math.ceil(len(h) / size)
        for index in range(1, chunks + 1):
            rows = slice((index - 1) * size, index * size)
            logits = F.linear(h[rows], matrix, offset)  # [R, V]
            target, weight = targets[rows, None], weights[rows, None]  # [R, 1]
            target_logits, top = logits.gather(1, target), logits.amax(dim=-1, keepdim=True)
            hits[rows] = (target_logits == top)[:, 0]
            p = logits.softmax(dim=-1)
            # -log p_target, by way of the largest p so that nothing underflows. Twice amax: on a
            # CPU it is four times as quick as max, which also says where
            largest = p.amax(dim=-1, keepdim=True)
            losses[rows] = (top.float() - largest.float().log() - target_logits.float())[:, 0]
            # d loss / d logits = weight * (p - onehot); the weight goes to the small factors
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            grad_bias += weights[rows].to(p) @ p
            grad_h[rows] = (p @ matrix) * weight.to(p)
            if grad_table is not None and partial is not None:
                partial.addmm_(p.T, (h[rows] * weight).to(p))
                if index % _CHUNKS_PER_SUM == 0 or index == chunks:
                    grad_table += partial
                    partial.zero_()
        ctx.save_for_backward(grad_h, grad_bias)
        ctx.grad_table = grad_table
        ctx.mark_non_differentiable(losses, hits)
        return (losses * weights).sum(), losses, hits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_bias = ctx.saved_tensors
        upstream = grads[0]
        grad_table = None if ctx.grad_table is None else ctx.grad_table * upstream
        return grad_h * upstream.to(grad_h), grad_table, grad_bias * upstream, None, None


class ChunkedCrossEntropy(nn.Module):
    """The fast twin of `diffusion.cross_entropy_of`, for the tied output of our denoiser.

    A module around the denoiser, because that is what data-parallel training wraps.

    Args:
        denoiser: The network.
        compile: Run its hidden states through ``torch.compile``; the loss below is loops over
            chunks,
            which it would unroll.

    Attributes:
        tally: Positions scored since it was last set to zero, and how many of their tokens had the
            largest logit (ties included), [2] on the device. Entries of weight 0 do not count.
    """

    def __init__(self, denoiser: Denoiser, compile: bool = False) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.tally = torch.zeros(2, device=denoiser.output_bias.device)
        states = denoiser.hidden_states
        self._hidden_states = torch.compile(states) if compile else states

    def forward(
        self,
        xt: Tensor,
        embedding: Tensor,
        t: Tensor,
        index: Tensor,
        targets: Tensor,
        weights: Tensor,
        candidates: Candidates | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted sum and the M cross-entropies; see `diffusion_loss`."""
        h = self._hidden_states(xt, embedding, t).flatten(0, 1)[index]  # [M, H]
        device = h.device.type
        if torch.is_autocast_enabled(device):
            h = h.to(torch.get_autocast_dtype(device))  # it leaves in-place products alone
        table: Tensor = self.denoiser.token_table.weight
        bias: Tensor = self.denoiser.output_bias
        if candidates is not None:
            table = _Rows.apply(table, candidates.ids)  # type: ignore[no-untyped-call]
            bias = bias[candidates.ids] - candidates.log_inclusion
            targets = torch.searchsorted(candidates.ids, targets)
        with torch.autocast(device, enabled=False):
            total, losses, hits = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
                h, table, bias, targets, weights
            )
        if candidates is None:  # the best of some tokens is not the best of all
            scored = weights > 0
            self.tally += torch.stack([scored.sum(), (hits & scored).sum()])
        return total, losses


# A softmax over part of the vocabulary


class CandidateSampler:
    """A sampler of the tokens a softmax is over: targets, the most frequent, and random others.

    Args:
        counts: How often each token of the vocabulary is a target [V]; proportional is enough.
        size: Candidates beside the targets, half of them the most frequent tokens; at least 2.
    """

    def __init__(self, counts: NDArray[np.float64], size: int) -> None:
        order = torch.from_numpy(np.argsort(-counts, kind="stable"))
        self._frequent, self._others = order[: size // 2], order[size // 2 :]
        self._random = min(size - size // 2, len(self._others))
        self._shares = torch.from_numpy(counts / counts.sum())  # [V]

    def draw(self, targets: Tensor, generator: torch.Generator) -> Candidates:
        """Draw the candidates for a batch's targets [M], on their device; a GPU is waited for."""
        picks = torch.randperm(len(self._others), generator=generator)[: self._random]
        mask = torch.zeros(len(self._shares), dtype=torch.bool)
        for ids in (self._frequent, self._others[picks], targets.cpu()):
            mask[ids] = True
        # A token is left out when neither the draw nor any of the M targets is it
        chance = self._random / max(len(self._others), 1)
        inclusion = 1.0 - (1.0 - self._shares) ** len(targets) * (1.0 - chance)
        inclusion[self._frequent] = 1.0
        ids = mask.nonzero()[:, 0]
        log_inclusion = inclusion[ids].log().float()
        return Candidates(ids, log_inclusion).to(targets.device)
