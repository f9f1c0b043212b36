"""The likeliest token of each position."""

from __future__ import annotations

import torch
from torch import Tensor

_RUN = 64  # columns whose maximum is found first


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probability and id of the likeliest token: float32 [M, V] → [M], [M].

    The logits are spent: what is left in their place are the probabilities.
    """
    guesses = where_largest(logits)
    # In place: on a CPU another tensor of this size costs more than the arithmetic
    return torch.softmax(logits, dim=-1, out=logits).gather(1, guesses)[:, 0], guesses[:, 0]


def where_largest(logits: Tensor) -> Tensor:
    """Where the largest logit of each row is, the first of equals: [M, V] → [M, 1].

    What `torch.argmax` gives, by the maxima of runs of columns: on a CPU those alone are quick to
    find.
    """
    runs = logits.shape[1] // _RUN
    columns = runs * _RUN
    if columns == 0:
        return logits.argmax(dim=1, keepdim=True)
    maxima = logits[:, :columns].view(len(logits), runs, _RUN).amax(dim=2)  # [M, V / 64]
    best_run = maxima.argmax(dim=1, keepdim=True)
    within = best_run * _RUN + torch.arange(_RUN, device=logits.device)
    best, at = logits.gather(1, within).max(dim=1, keepdim=True)
    places = within.gather(1, at)
    if columns < logits.shape[1]:
        rest, at = logits[:, columns:].max(dim=1, keepdim=True)
        return torch.where(rest > best, columns + at, places)
    return places
