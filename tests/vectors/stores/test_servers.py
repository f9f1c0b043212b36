"""Against servers started here: Debian's Redis, Chroma's, that of Milvus Lite; and Qdrant's API.

Qdrant's server cannot be had as a package: its client talks to one here that answers, from the
client's local mode, as the API is documented.
"""

import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import open_store

from .conftest import (
    TENANTS,
    TEXTS,
    VECTORS,
    check_contract,
    counting,
    digest,
    free_port,
    package,
    read_all,
    required,
    running,
)
from .test_embedded import fill_milvus, write_chroma
from .test_qdrant import IDS as POINTS
from .test_qdrant import fill

IDS = [f"doc:{row}" for row in range(len(VECTORS))]
PASSWORD = "hunter2"


def cut_off(store, stop):
    """Read a few rows, end the server, and go on reading."""
    stream = store.batches(size=5)
    assert len(next(stream)) == 5
    stop()
    list(stream)


# Redis


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    redis = package("redis")
    program = shutil.which("redis-server")
    if program is None:
        assert not required("redis"), "redis-server is not installed"
        pytest.skip("redis-server is not installed: this store is not tested")
    port, folder = free_port(), tmp_path_factory.mktemp("redis")
    command = [program, "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "",
               "--requirepass", PASSWORD]  # fmt: skip

    def connect():
        client = redis.Redis(port=port, password=PASSWORD)
        client.ping()
        return client

    with running(command, connect) as (client, _):
        yield client, f"redis://127.0.0.1:{port}/0"


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


# Chroma


@pytest.mark.slow
def test_open_store_reads_the_server_of_chroma_and_names_one_that_went_away(tmp_path):
    chromadb = package("chromadb")
    folder, port = write_chroma(tmp_path / "chroma"), free_port()
    command = [Path(sys.executable).parent / "chroma", "run", "--path", folder, "--port", port]

    def connect():
        client = chromadb.HttpClient("localhost", port)
        client.heartbeat()
        return client

    with running(command, connect) as (client, process):
        # Whoever reads a collection first makes the server write its index anew
        client.get_collection("docs", embedding_function=None).get(limit=1, include=["embeddings"])
        address, before = f"chroma://localhost:{port}", digest(folder)
        check_contract(lambda: open_store(address), [f"id {row}" for row in range(len(VECTORS))])
        with open_store(address, keep=["tenant"]) as store, counting(store) as reads:
            assert set(store.sample(6).payload["tenant"]) <= set(TENANTS)
            assert reads.rows == 6
            assert store.facts.authentication == "none was needed"
            assert store.facts.metric == "cosine"
        assert digest(folder) == before
        with (
            open_store(address) as store,
            pytest.raises(StoreError, match="a readable collection of Chroma at chroma://local"),
        ):
            cut_off(store, process.kill)


# Milvus


@pytest.mark.slow
def test_open_store_reads_the_server_of_milvus_lite_and_names_one_that_went_away(tmp_path):
    pymilvus = package("pymilvus")
    package("milvus_lite")
    port = free_port()
    command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", tmp_path / "milvus.db",
               "--host", "127.0.0.1", "--port", port]  # fmt: skip

    def connect():
        client = pymilvus.MilvusClient(f"http://127.0.0.1:{port}", timeout=5)
        client.list_collections()
        return client

    with running(command, connect) as (client, process):
        fill_milvus(client)
        address = f"milvus://127.0.0.1:{port}"
        before = client.query("docs", filter="id >= 0", output_fields=["*"])
        check_contract(lambda: open_store(address), [str(row) for row in range(len(VECTORS))])
        assert client.query("docs", filter="id >= 0", output_fields=["*"]) == before
        with open_store(address) as store:
            assert store.facts.authentication == "none was needed"
            assert "not run against a full Milvus" in store.facts.tested
            with pytest.raises(StoreError, match="a readable collection of Milvus at milvus://"):
                cut_off(store, process.kill)


# Qdrant


class Qdrant(BaseHTTPRequestHandler):
    """The REST API of Qdrant as far as a reader needs it, over the client's local mode."""

    def log_message(self, *words):
        pass

    def answer(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        self.server.requests.append((self.command, self.path))
        if self.headers.get("api-key") != PASSWORD:
            return self.send(401, {"status": {"error": "Invalid API key"}})
        with self.server.lock:
            return self.send(200, {"status": "ok", "time": 0.0, "result": self.result(body)})

    do_GET = do_POST = answer  # noqa: N815 - the library's names

    def send(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def result(self, body):
        local = self.server.local
        path = re.sub(r"\?.*", "", self.path)
        if path == "/collections":
            return plain(local.get_collections())
        if path == "/collections/docs":
            return plain(local.get_collection("docs"))
        if path == "/collections/docs/points/count":
            return plain(local.count("docs"))
        wanted = {"with_vectors": body.get("with_vector"), "with_payload": body["with_payload"]}
        if path == "/collections/docs/points/scroll":
            points, following = local.scroll(
                "docs", limit=min(body["limit"], 7), offset=body.get("offset"), **wanted
            )
            return {"points": list(map(plain, points)), "next_page_offset": following}
        assert path == "/collections/docs/points"
        return [plain(point) for point in local.retrieve("docs", body["ids"], **wanted)]


def plain(model):
    return model.model_dump(mode="json", exclude_none=True)


@pytest.fixture
def qdrant():
    local = fill(package("qdrant_client").QdrantClient(":memory:"), distance="COSINE")
    with ThreadingHTTPServer(("127.0.0.1", 0), Qdrant) as server:
        server.local, server.requests, server.lock = local, [], threading.Lock()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}?collection=docs"
        server.shutdown()


def test_open_store_reads_the_api_of_qdrant_and_writes_nothing(qdrant, monkeypatch):
    server, address = qdrant
    monkeypatch.setenv("QDRANT_API_KEY", PASSWORD)
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    check_contract(lambda: open_store(address), POINTS, vectors=unit)
    with open_store(address, keep=["tenant"]) as store:
        assert [extra["tenant"] for *_, extra in read_all(store).values()] == TENANTS
        assert store.facts.authentication == "an API key"
        assert "not run against a server" in store.facts.tested
    reads = {("GET", "/collections"), ("GET", "/collections/docs")} | {
        ("POST", f"/collections/docs/points{end}") for end in ("", "/count", "/scroll")
    }
    assert {(method, path.partition("?")[0]) for method, path in server.requests} <= reads


def test_open_store_with_a_wrong_key_of_qdrant_does_not_show_it(qdrant, monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "guess5")
    with pytest.raises(StoreError, match="a readable collection of Qdrant at http://") as caught:
        open_store(qdrant[1])
    assert "guess5" not in str(caught.value)
    assert "QDRANT_API_KEY" in str(caught.value)
