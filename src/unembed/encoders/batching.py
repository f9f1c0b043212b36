"""Texts in batches: which go together, and how they are worked on without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def plan_batches(lengths: Sequence[int], budget: int, texts: int | None = None) -> list[list[int]]:
    """Group texts of like length, longest first, so that hardly any padding is computed.

    Args:
        lengths: Tokens of each text.
        budget: Most tokens in a batch, padding included; a longer text is a batch by itself.
        texts: Texts in a batch, whatever their tokens.

    Returns:
        Indices of the texts of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = texts or max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


def run_batches(
    work: Callable[[list[int]], None], batches: Sequence[list[int]], threads: int
) -> Iterator[int]:
    """Run every batch and yield its size when it is done, as many at a time as there are threads.

    CPU cores that work on batches of their own need not wait for each other inside every product.
    """
    import torch

    if threads == 1:
        for batch in batches:
            work(batch)
            yield len(batch)
        return
    if not batches:
        return
    before = torch.get_num_threads()
    work(batches[0])  # alone: what the libraries set up at their first call is not thread-safe
    yield len(batches[0])
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = [pool.submit(work, batch) for batch in batches[1:]]
            for batch, future in zip(batches[1:], running, strict=True):
                future.result()
                yield len(batch)
    finally:
        torch.set_num_threads(before)


def one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield items, each made by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
