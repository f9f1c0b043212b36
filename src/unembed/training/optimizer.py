"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from unembed.config import TrainingSection

_TABLE = "token_table.weight"


def make_optimizer(denoiser: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, not on norms, biases or embedding tables.

    The token table has a learning rate of its own: Adam moves the rows of rare tokens as far as
    those of frequent ones, away from what the encoder's word embeddings say about them.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in denoiser.named_parameters():
        if name != _TABLE:
            matrix = parameter.ndim > 1 and name != "positions"
            (decayed if matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay, "share": 1.0},
        {"params": plain, "weight_decay": 0.0, "share": 1.0},
    ]
    table = denoiser.get_parameter(_TABLE)
    table.requires_grad_(settings.table_lr > 0)
    if settings.table_lr > 0:
        groups.append({"params": [table], "weight_decay": 0.0, "share": settings.table_lr})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def learning_rate(step: int, settings: TrainingSection) -> float:
    """Linear warm-up to ``lr``, then a cosine down to ``final_lr * lr``; step counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr * (settings.final_lr + (1.0 - settings.final_lr) * cosine)
