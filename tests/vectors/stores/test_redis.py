"""Against Debian's Redis, started here."""

import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import open_store

from .conftest import TENANTS, TEXTS, VECTORS, check_contract, package, read_all, required

IDS = [f"doc:{row}" for row in range(len(VECTORS))]
PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    redis = package("redis")
    program = shutil.which("redis-server")
    if program is None:
        assert not required("redis"), "redis-server is not installed"
        pytest.skip("redis-server is not installed: this store is not tested")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
         "--requirepass", PASSWORD],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    client = redis.Redis(port=port, password=PASSWORD)
    for _ in range(600):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.1)
    yield client, f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(60)


@pytest.fixture
def filled(server, monkeypatch):
    client, address = server
    client.flushall()
    for name, vector, text, tenant in zip(IDS, VECTORS, TEXTS, TENANTS, strict=True):
        client.hset(name, mapping={"vector": vector.tobytes(), "content": text, "tenant": tenant})
    client.set("doc:no hash", "x")
    monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
    return client, f"{address}?collection=doc:"


def state(client):
    return {key: client.dump(key) for key in client.keys()}  # noqa: SIM118 - no dictionary


def test_open_store_reads_redis_and_writes_nothing(filled):
    client, address = filled
    before = state(client)
    check_contract(lambda: open_store(address, keep=["tenant"]), IDS)
    assert state(client) == before


def test_open_store_with_a_wrong_password_does_not_show_it(filled, monkeypatch):
    monkeypatch.setenv("REDIS_PASSWORD", "guess5")
    with pytest.raises(StoreError, match="a readable Redis at redis://127") as caught:
        open_store(filled[1])
    assert "guess5" not in str(caught.value)


def test_open_store_asks_for_a_password(filled, monkeypatch):
    monkeypatch.delenv("REDIS_PASSWORD")
    with open_store(filled[1], ask=lambda prompt: PASSWORD) as store:
        assert store.facts.authentication == "a password"


def test_batches_leaves_out_what_is_no_vector(filled):
    client, address = filled
    client.hset("doc:0", "vector", b"abc")
    client.hdel("doc:1", "vector")
    client.hset("doc:2", "vector", np.zeros(8, np.float32).tobytes())
    with open_store(address) as store:
        assert len(read_all(store)) == len(IDS) - 3
        assert sum(store.left_out.values()) == 3


def test_open_store_says_that_no_hash_has_the_prefix(filled):
    with pytest.raises(StoreError, match=r"none.*collection=doc:"):
        open_store(filled[1].replace("doc:", "other:"))


def test_open_store_says_that_no_redis_listens():
    package("redis")
    with pytest.raises(StoreError, match="a readable Redis at redis://localhost:1"):
        open_store("redis://localhost:1")
