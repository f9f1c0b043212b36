"""Qdrant: the folder of the client's local mode, hostile pickles in it, and the client's calls."""

import pickle
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address, open_store
from unembed.vectors.stores.pickled import read_record

from .conftest import TENANTS, TEXTS, VECTORS, D, check_contract, digest, package, read_all

IDS = [str(row) for row in range(len(VECTORS) - 1)] + ["6d2cbb0e-4d0c-4a39-8a0a-0f5a4f4a5b5d"]


def fill(client, name="docs", distance="DOT", vectors=VECTORS):
    from qdrant_client import models

    client.create_collection(
        name,
        vectors_config=models.VectorParams(size=D, distance=models.Distance[distance]),
    )
    points = [
        models.PointStruct(
            id=int(i) if i.isdecimal() else i,
            vector=v.tolist(),
            payload={"text": t, "tenant": u},
        )
        for i, v, t, u in zip(IDS, vectors, TEXTS, TENANTS, strict=True)
    ]
    client.upsert(name, points)
    return client


@pytest.fixture
def folder(tmp_path):
    qdrant_client = package("qdrant_client")
    fill(qdrant_client.QdrantClient(path=str(tmp_path / "qdrant"))).close()
    return tmp_path / "qdrant"


def test_open_store_reads_a_folder_of_qdrant_and_leaves_it_alone(folder):
    before = digest(folder)
    check_contract(lambda: open_store(folder), IDS)
    with open_store(folder, keep=["tenant"]) as store:
        assert [extra["tenant"] for *_, extra in read_all(store).values()] == TENANTS
    assert digest(folder) == before


class Bomb:
    """What a stranger's folder may hold: loading it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(folder, data):
    database = sqlite3.connect(folder / "collection" / "docs" / "storage.sqlite")
    database.execute("UPDATE points SET point = ? WHERE rowid = 5", [data])
    database.commit()
    database.close()


def test_fetch_never_runs_a_pickle_planted_in_a_folder(folder, tmp_path):
    mark = tmp_path / "ran"
    plant(folder, pickle.dumps(Bomb(mark)))
    before = digest(folder)
    with open_store(folder) as store, pytest.raises(StoreError, match="which was not run"):
        store.sample(100)
    assert not mark.exists()
    assert digest(folder) == before
    pickle.loads(pickle.dumps(Bomb(mark)))  # the bomb is a real one
    assert mark.exists()


def test_open_store_never_runs_a_pickled_key(folder, tmp_path):
    import base64

    mark = tmp_path / "ran"
    key = base64.b64encode(pickle.dumps(Bomb(mark))).decode()
    database = sqlite3.connect(folder / "collection" / "docs" / "storage.sqlite")
    database.execute("UPDATE points SET id = ? WHERE rowid = 5", [key])
    database.commit()
    with pytest.raises(StoreError, match="which was not run"):
        open_store(folder)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_read_record_refuses_other_protocols_without_running_them(tmp_path, protocol):
    mark = tmp_path / "ran"
    with pytest.raises(StoreError):
        read_record(pickle.dumps(Bomb(mark), protocol), "m", frozenset({"C"}), "here")
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_read_record_reads_plain_data(protocol):
    value = {"a": [1, -2.5, None, True, "é", 2**40], "b": (1, (2, 3)), "c": {"d": b"x"}}
    assert read_record(pickle.dumps(value, protocol), "m", frozenset(), "here") == value


def test_read_record_refuses_damage():
    data = pickle.dumps({"a": list(range(100))})
    for end in range(len(data)):
        with pytest.raises(StoreError, match="pickles of the client's own records"):
            read_record(data[:end], "m", frozenset(), "here")
    assert read_record(data, "m", frozenset(), "here") == {"a": list(range(100))}


@pytest.fixture
def local():
    """The client in memory, behind the reader that talks to servers."""
    from unembed.vectors.stores.qdrant import QdrantStore

    client = fill(package("qdrant_client").QdrantClient(":memory:"), distance="COSINE")
    client.close = lambda: None
    address = Address("qdrant", "qdrant://localhost", "docs", keep=("tenant",))
    return lambda: QdrantStore(address, client)


def test_qdrant_store_reads_by_the_client_and_knows_that_cosine_normalises(local):
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    check_contract(local, IDS, vectors=unit)
    assert local().facts.normalised is True
    assert "not run against a server" in local().facts.tested


def test_open_store_says_that_no_qdrant_listens():
    package("qdrant_client")
    with pytest.raises(
        StoreError, match=r"a readable collection of Qdrant at qdrant://localhost:1"
    ):
        open_store("qdrant://localhost:1?collection=docs")
