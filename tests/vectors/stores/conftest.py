"""Rows that every store is filled with, and a digest that shows whether one was written to."""

import hashlib
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

D = 8
N = 30
VECTORS = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
TEXTS = [f"text {row}, häßlich <b>&amp;</b> \x07" for row in range(N)]
TENANTS = ["north" if row % 2 else "south" for row in range(N)]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder, times left out."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        total.update(str(file.relative_to(path)).encode())
        total.update(file.read_bytes())
    return total.hexdigest()


def required(name: str) -> bool:
    """Whether a store that is missing is a failure: `.ci/run` says so."""
    return name in os.environ.get("UNEMBED_STORES", "").split() or (
        os.environ.get("UNEMBED_STORES") == "required"
    )


def package(name: str):
    """A store's client, or a skip that says so; a failure where it is required."""
    if required(name):
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: this store is not tested")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command, connect):
    """A server and a client of it; ``connect`` raises as long as it does not answer."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            try:
                client = connect()
                break
            except Exception:  # whatever its client raises
                time.sleep(0.1)
        yield client, process
    finally:
        process.kill()
        process.wait(60)


def read_all(store, **options):
    """Every row of a store by its id."""
    rows = {}
    for batch in store.batches(**options):
        for place, name in enumerate(batch.ids):
            assert name not in rows, "a row came twice"
            text = None if batch.texts is None else batch.texts[place]
            extra = {key: values[place] for key, values in batch.payload.items()}
            rows[name] = (batch.vectors[place], text, extra)
    return rows


def check_contract(opened, ids, texts=TEXTS, vectors=VECTORS, tolerance=1e-6):
    """The promises of `Store`, which every reader keeps; ``opened()`` opens it anew.

    Args:
        opened: Opens the store.
        ids: The id of each row of ``vectors``.
    """
    with opened() as store:
        assert store.facts.count == len(ids)
        assert store.facts.dimension == vectors.shape[1]
        rows = read_all(store, size=7)
        assert sorted(rows) == sorted(ids)
        for place, name in enumerate(ids):
            vector, text, _ = rows[name]
            assert vector.dtype == np.float32
            np.testing.assert_allclose(vector, vectors[place], atol=tolerance)
            assert text == (None if texts is None else texts[place])
        order = list(rows)
        assert list(read_all(store, after=order[9], size=4)) == order[10:]
        assert read_all(store, after=order[-1]) == {}
        first, again = store.sample(5, seed=3), store.sample(10, seed=3)
        assert len(first) == 5 and first.ids == again.ids[:5]
        assert set(again.ids) <= set(ids)
        assert store.sample(10, seed=4).ids != again.ids
        for place, name in enumerate(again.ids):
            np.testing.assert_array_equal(again.vectors[place], rows[name][0])
            assert again.texts is None or again.texts[place] == rows[name][1]
        assert sorted(store.sample(1000, seed=0).ids) == sorted(ids)
    with opened() as store:
        assert store.sample(10, seed=3).ids == again.ids


class counting:  # noqa: N801 - a context, used as one
    """Counts the rows that a store's ``fetch`` is asked for, in all and at most at a time."""

    def __init__(self, store):
        self.store, self.rows, self.most, self._fetch = store, 0, 0, store.fetch

    def __enter__(self):
        def fetch(ids):
            self.rows += len(ids)
            self.most = max(self.most, len(ids))
            return self._fetch(ids)

        self.store.fetch = fetch
        return self

    def __exit__(self, *error):
        del self.store.fetch
