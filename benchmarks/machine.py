"""What this machine can do, measured, and fair timing of two sides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def matmul_rate(
    dtype: torch.dtype = torch.float32,
    size: int = 2048,
    repeats: int = 12,
    device: torch.device | str = "cpu",
) -> float:
    """Operations a second of a large square matrix product, the best of several runs."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        product = a @ b
        if product.device.type != "cpu":
            product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn so that a drift of the machine's speed hits all alike."""
    for work in sides.values():
        work()  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |")
