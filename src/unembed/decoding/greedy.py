"""Sequential greedy decoding: settle the most confident positions, look again, repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unembed.decoding.base import Canvas, Decoded, DecodingStep, OnStep
from unembed.diffusion import DenoiserFn


def greedy(
    denoiser: DenoiserFn,
    embedding: Tensor,
    canvas: Canvas,
    *,
    steps: int,
    generators: Sequence[torch.Generator] = (),
    on_step: OnStep | None = None,
) -> Decoded:
    """Each pass settles the positions whose best token is most probable; no randomness.

    The L positions are spread evenly over ``steps`` passes (one a pass when ``steps`` is L or
    more). See `Strategy` for the arguments. The order by confidence is that of MaskGIT (Chang et
    al., 2022, arXiv 2202.04200) and LLaDA (Nie et al., 2025, arXiv 2502.09992).
    """
    batch, length = len(embedding), canvas.length
    total = min(steps, length)
    tokens = canvas.blank(batch, embedding.device)  # [B, L]
    confidences = torch.zeros(batch, length, device=embedding.device)
    order = torch.zeros(batch, length, dtype=torch.long, device=embedding.device)
    settled = 0
    for index in range(1, total + 1):
        masked = tokens == canvas.mask_id  # [B, L], L - settled true in every row
        mask_ratio = torch.full((batch,), 1.0 - settled / length, device=embedding.device)
        logits = denoiser(tokens, embedding, canvas.schedule.timestep(mask_ratio), masked)
        probabilities, guesses = most_probable(logits, canvas.mask_id)

        best = torch.full_like(confidences, -1.0)
        best[masked] = probabilities
        candidates = torch.zeros_like(tokens)
        candidates[masked] = guesses
        count = round(length * index / total) - settled
        chosen = best.topk(count, dim=1).indices  # [B, count]
        tokens.scatter_(1, chosen, candidates.gather(1, chosen))
        confidences.scatter_(1, chosen, best.gather(1, chosen))
        order.scatter_(1, chosen, index)
        settled += count
        if on_step is not None:
            on_step(DecodingStep(index, total, tokens.cpu().clone(), confidences.cpu().clone()))
    return Decoded(tokens, confidences, order, total)


def most_probable(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Probability and id of the likeliest token, the mask token excluded: [M, V] → [M], [M].

    The logits are the caller's to spend: their column of the mask token is overwritten, which
    saves a copy of the largest tensor of decoding.
    """
    logits = logits.float()
    logits[:, mask_id] = -torch.inf
    best, guesses = logits.max(dim=-1)
    return (best - logits.logsumexp(dim=-1)).exp(), guesses
