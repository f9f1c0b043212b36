"""Texts in batches: which go together, how nobody waits for them, which are known already."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EncoderError

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


class VectorCache:
    """Answers of one model on the disk: SHA-256 of a text → its vector, float32. No text is kept.

    Args:
        path: An SQLite file, made where it is missing; its owner alone may read it.

    Raises:
        EncoderError: It cannot be made, or is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._connect() as database:
            database.execute("PRAGMA journal_mode=WAL")  # readers do not wait for a writer
            database.execute(
                "CREATE TABLE IF NOT EXISTS vectors (text BLOB PRIMARY KEY, vector BLOB NOT NULL)"
            )

    def get(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The texts that are known, each with its vector."""
        by_key = {_digest(text): text for text in texts}
        vectors = {}
        with self._connect() as database:
            for key, text in by_key.items():
                row = database.execute("SELECT vector FROM vectors WHERE text = ?", [key])
                for (data,) in row:
                    if isinstance(data, bytes) and len(data) % 4 == 0:
                        vector = np.frombuffer(data, dtype="<f4").astype(np.float32)
                        if vector.any() and np.isfinite(vector).all():
                            vectors[text] = vector
        return vectors

    def put(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep the vectors [B, D] of texts, which are on the disk when this returns."""
        keys = map(_digest, texts)
        rows = [(k, v.astype("<f4").tobytes()) for k, v in zip(keys, vectors, strict=True)]
        with self._connect() as database:
            database.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each use, of any thread; committed when the block ends."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                database.execute("PRAGMA synchronous=NORMAL")
                yield database
        except (sqlite3.Error, OSError) as error:
            raise EncoderError(
                f"a cache of vectors that can be used at {self.path}",
                str(error),
                "Delete it, or choose another folder: encoder.cache",
            ) from error


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
