"""Loss and accuracy on held-out pairs, with the same masks every time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unembed.config import Config
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import WEIGHTS, Corrupted, corrupt_batch, corrupted, make_schedule

_SEED = 1_000_003
_BATCH = 128


@torch.no_grad()
def validate(
    denoiser: Denoiser, pairs: Pairs, config: Config, compute: Compute
) -> dict[str, float]:
    """Score the first ``validation_pairs`` rows, which are never trained on.

    Returns:
        ``validation_loss``: the training objective. ``masked_accuracy``: hits at masked positions
        with the other tokens visible, which flatters and is not what decoding reaches.
        ``full_mask_cross_entropy``: nats per content token from a fully masked sequence, where
        decoding starts.
    """
    denoiser.eval()
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.rate)
    weight = WEIGHTS[config.diffusion.weight]
    tokenizer = pairs.tokenizer
    generator = torch.Generator().manual_seed(_SEED)
    total = config.training.validation_pairs
    sums = dict.fromkeys(("loss", "positions", "hits", "masked", "full", "content"), 0.0)
    for start in range(0, total, _BATCH):
        tokens, vectors = pairs.rows(np.arange(start, min(start + _BATCH, total)))
        x0 = torch.from_numpy(tokens)
        embedding = torch.from_numpy(vectors).to(compute.device)
        batch = corrupt_batch(x0, schedule, weight, tokenizer.mask_id, generator)
        content = x0 != tokenizer.pad_id
        ones = torch.ones(len(x0))
        hidden = torch.full_like(x0, tokenizer.mask_id)
        full = corrupted(x0, hidden, content, ones, ones, int(content.sum()))
        with compute.autocast():
            losses, hits = _score(denoiser, batch.to(compute.device), embedding)
            full_losses, _ = _score(denoiser, full.to(compute.device), embedding)
        sums["loss"] += float((losses * batch.weights.to(losses)).sum())
        sums["positions"] += batch.positions
        sums["hits"] += float(hits.sum())
        sums["masked"] += len(hits)
        sums["full"] += float(full_losses.sum())
        sums["content"] += len(full_losses)
    denoiser.train()
    return {
        "validation_loss": sums["loss"] / sums["positions"],
        "masked_accuracy": sums["hits"] / sums["masked"],
        "full_mask_cross_entropy": sums["full"] / sums["content"],
    }


def _score(denoiser: Denoiser, batch: Corrupted, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and correctness of the best guess at each masked position, [M] each."""
    logits = denoiser(batch.xt, embedding, batch.t, batch.index).float()
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    return losses, logits.argmax(dim=-1) == batch.targets
