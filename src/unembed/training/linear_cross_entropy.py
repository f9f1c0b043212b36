"""Vocabulary projection and cross-entropy in one pass that never holds all logits.

The logits of a batch, [M, V], are the largest tensor of training: gigabytes at a vocabulary of
262 K. Softmax cross-entropy has a closed gradient, (p - onehot) * weight, so a chunk of rows can be
projected, scored and turned into gradients before the next one, at the cost of the same three
matrix products as the plain path and no recomputation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unembed.denoiser import Denoiser
from unembed.diffusion import CrossEntropyFn

_CHUNK_LOGITS = 1 << 24  # 64 MB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of h @ table.T + bias; gradients made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, table: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        matrix = table.to(h.dtype)
        losses = torch.empty(len(h), device=h.device, dtype=torch.float32)
        grad_h = torch.empty_like(h)
        grad_table = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias)
        chunks = max(1, math.ceil(len(h) * len(table) / _CHUNK_LOGITS))
        bounds = [len(h) * index // chunks for index in range(chunks + 1)]
        for rows in map(slice, bounds, bounds[1:]):
            logits = torch.addmm(bias.to(h.dtype), h[rows], matrix.T).float()  # [R, V]
            target, weight = targets[rows, None], weights[rows, None]  # [R, 1]
            top, at = logits.max(dim=-1, keepdim=True)
            p = logits.softmax(dim=-1)
            # -log p_target, by way of the largest p so that nothing underflows
            losses[rows] = (top - p.gather(1, at).log() - logits.gather(1, target))[:, 0]
            # d loss / d logits = weight * (p - onehot); the weight goes to the small factors
            p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
            grad_bias += p.T @ weights[rows].to(p)
            p = p.to(h.dtype)
            grad_h[rows] = (p @ matrix) * weight
            if grad_table is not None:
                grad_table.addmm_(p.T, (h[rows] * weight).to(h.dtype))
        ctx.save_for_backward(grad_h, grad_bias)
        ctx.grad_table = None if grad_table is None else grad_table.to(table.dtype)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_bias = ctx.saved_tensors
        upstream = grads[0]
        grad_table = None if ctx.grad_table is None else ctx.grad_table * upstream
        return grad_h * upstream, grad_table, grad_bias * upstream, None, None


def chunked_cross_entropy_of(denoiser: Denoiser) -> CrossEntropyFn:
    """The fast twin of `diffusion.cross_entropy_of`, for the tied output of our denoiser."""

    def cross_entropy(
        xt: Tensor, embedding: Tensor, t: Tensor, index: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = denoiser.features(xt, embedding, t).flatten(0, 1)[index]  # [M, H]
        total, losses = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            h, denoiser.token_table.weight, denoiser.output_bias, targets, weights
        )
        return total, losses

    return cross_entropy
