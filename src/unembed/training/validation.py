"""Validation on held-out pairs: the loss with fixed masks, and texts decoded from full ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.decoding import Decoding, SequenceSpec
from unembed.decoding.logits import RepetitionPenalty, with_processors
from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import WEIGHTS, CorruptedBatch, corrupt_batch, make_schedule
from unembed.encoders.base import Encoder

if TYPE_CHECKING:
    from unembed.config import Config

_SEED = 1_000_003
_BATCH = 128
_LOGITS = 1 << 27  # at a time: a vocabulary of 262 K has a billion in a batch


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
        x0 = torch.from_numpy(tokens[:, : denoiser.sizes.prefix or None])
        embedding = torch.from_numpy(vectors).to(compute.device)
        batch = corrupt_batch(x0, schedule, weight, tokenizer.mask_id, generator)
        content = x0 != tokenizer.pad_id
        ones = torch.ones(len(x0))
        hidden = torch.full_like(x0, tokenizer.mask_id)
        full = CorruptedBatch.from_masks(x0, hidden, content, ones, ones, int(content.sum()))
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


def _score(denoiser: Denoiser, batch: CorruptedBatch, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy and correctness of the argmax at each scored position, [M] each."""
    h = denoiser.hidden_states(batch.xt, embedding, batch.t).flatten(0, 1)[batch.index]  # [M, H]
    table, bias = denoiser.token_table.weight, denoiser.output_bias
    rows = max(1, _LOGITS // len(table))
    losses, hits = [], []
    for part, targets in zip(torch.split(h, rows), torch.split(batch.targets, rows), strict=True):
        logits = F.linear(part, table, bias).float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
        hits.append(logits.argmax(dim=-1) == targets)
    return torch.cat(losses), torch.cat(hits)


@torch.no_grad()
def decode_held_out(
    denoiser: Denoiser,
    pairs: Pairs,
    config: Config,
    compute: Compute,
    encoder: Encoder | None = None,
) -> dict[str, float]:
    """Decode the first ``decoded_pairs`` held-out rows from their embeddings alone, greedily.

    Each starts from a full mask and is decoded as `unembed evaluate` does by default.

    Args:
        denoiser: The network.
        pairs: Of the run.
        config: Of the run.
        compute: Device and number format.
        encoder: Embeds what was decoded, if given.

    Returns:
        ``decoded_token_accuracy``: share of the original's tokens that stand at the same position
        in the recovery. ``decoded_exact_match``: share of texts recovered whole. With an encoder
        ``decoded_cosine``: of the recovered text's embedding with the target's, over the texts in
        which something was recovered. Nothing when ``decoded_pairs`` is 0.
    """
    count = min(config.training.decoded_pairs, config.training.validation_pairs)
    if count == 0:
        return {}
    schedule = make_schedule(config.diffusion.schedule, config.diffusion.rate)
    tokens, vectors = pairs.rows(np.arange(count))
    ids = pairs.tokenizer
    tokens = tokens[:, : denoiser.sizes.prefix or None]
    spec = SequenceSpec(tokens.shape[1], ids.mask_id, schedule, ids.end_id, ids.pad_id)
    decoding = Decoding()
    penalised = with_processors(denoiser, [RepetitionPenalty(spec)])
    rows: list[list[int]] = []
    denoiser.eval()
    batch = max(1, min(_BATCH, _LOGITS // (spec.length * ids.size)))
    for part in torch.split(torch.from_numpy(vectors), batch):
        with compute.autocast():
            decoded = decoding.strategy(
                penalised, part.to(compute.device), spec, steps=decoding.steps, generators=()
            )
        rows += decoded.tokens.tolist()
    denoiser.train()

    accuracies, matches = [], []
    for original, recovered in zip(tokens.tolist(), rows, strict=True):
        a, b = ([row[i] for i in ids.content_positions(row)] for row in (original, recovered))
        accuracies.append(sum(x == y for x, y in zip(a, b, strict=False)) / len(a))
        matches.append(float(a == b))
    figures = {
        "decoded_token_accuracy": float(np.mean(accuracies)),
        "decoded_exact_match": float(np.mean(matches)),
    }
    if encoder is not None:
        texts = pairs.tokenizer.decode(rows)
        index = [i for i, text in enumerate(texts) if text.strip()]
        if index:
            embeddings = encoder.encode([texts[i] for i in index])
            figures["decoded_cosine"] = float((embeddings * vectors[index]).sum(axis=1).mean())
    return figures
