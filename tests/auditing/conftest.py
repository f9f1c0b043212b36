"""A store of the fake encoder's vectors, with invented people in some of its texts."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import unembed
from unembed.auditing import audit as module
from unembed.encoders.base import FakeEncoder

N = 60


@pytest.fixture(scope="session")
def texts():
    draw = random.Random(1)
    words = "cat dog bird fish house river city road tree sun moon star rain snow".split()
    return [" ".join(draw.sample(words, 3)) + "." for _ in range(N)]


@pytest.fixture(scope="session")
def store(texts, encoder, tmp_path_factory):
    """A Parquet file of vectors with texts and a tenant."""
    return write(tmp_path_factory.mktemp("store") / "store.parquet", texts, encoder)


@pytest.fixture(scope="session")
def report(store, inverter, encoder):
    """An audit of fifty of its rows."""
    return unembed.audit(store, to=inverter, encoder=encoder, sample=50, group_by="tenant")


@pytest.fixture(scope="session")
def bare_report(texts, encoder, inverter, tmp_path_factory):
    """An audit of vectors without texts."""
    path = tmp_path_factory.mktemp("bare") / "bare.parquet"
    return unembed.audit(
        write(path, texts, encoder, with_text=False), to=inverter, encoder=encoder, sample=20
    )


def write(path, texts, encoder, vectors=None, with_text=True):
    vectors = encoder.encode(texts) if vectors is None else vectors
    columns = {"embedding": [v.tolist() for v in np.asarray(vectors)]}
    columns["tenant"] = ["north" if row % 2 else "south" for row in range(len(texts))]
    if with_text:
        columns["text"] = texts
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    """The inverter's encoder is found by its name."""
    monkeypatch.setattr(module, "load_encoder", lambda name, **options: FakeEncoder())
