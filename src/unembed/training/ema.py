"""Exponential moving average of the weights, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The averaged weights of a module.

    Args:
        module: Its parameters are averaged.
        decay: Weight of the past at each step. Early on it is (1 + step) / (10 + step) when that
            is smaller, so that the random start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self._live = list(module.parameters())
        self.averages = [p.detach().float().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the live weights after optimiser step ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [p.detach().float() for p in self._live], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module runs with the averaged weights."""
        live = [p.detach().clone() for p in self._live]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(live)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)
