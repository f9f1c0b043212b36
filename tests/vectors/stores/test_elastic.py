"""The official clients against a server that gives answers in the shape the vendors document.

No Elasticsearch or OpenSearch runs here: what these tests prove is what is asked, and how an
answer of the documented shape is read.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import open_store

from .conftest import TENANTS, TEXTS, VECTORS, D, check_contract, package

IDS = [f"doc-{row}" for row in range(len(VECTORS))]
DENSE = {"type": "dense_vector", "dims": D, "similarity": "cosine", "index": True,
         "index_options": {"type": "int8_hnsw"}}  # fmt: skip
KNN = {"type": "knn_vector", "dimension": D,
       "method": {"name": "hnsw", "space_type": "l2", "engine": "faiss"}}  # fmt: skip
PAGE = 8


class Answers(BaseHTTPRequestHandler):
    """What a server of one index answers; every request is kept."""

    def log_message(self, *words):
        pass

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("X-Elastic-Product", "Elasticsearch")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_request(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        self.server.requests.append((self.command, self.path, body))
        path = self.path.partition("?")[0]
        if path.endswith("/_mapping"):
            self.answer({"docs": {"mappings": {"properties": self.server.fields}}})
        elif path.endswith("/_count"):
            self.answer({"count": len(IDS), "_shards": {"total": 1}})
        elif path.endswith("/_pit") and self.command == "POST":
            self.answer({"id": "a-point"})
        elif path.endswith("/point_in_time") and self.command == "POST":
            self.answer({"pit_id": "a-point"})
        elif path.endswith("/_search"):
            self.answer({"hits": {"hits": self.hits(body)}})
        else:
            self.answer({"succeeded": True})

    do_GET = do_POST = do_DELETE = handle_request  # noqa: N815 - the library's names

    def hits(self, body):
        if "pit" in body:
            assert body["pit"]["id"] == "a-point"
            start = body.get("search_after", [-1])[0] + 1
            rows = range(start, min(start + min(PAGE, body["size"]), len(IDS)))
            return [{"_id": IDS[row], "sort": [row]} for row in rows]
        hits = []
        for name in body["query"]["ids"]["values"][::-1]:
            row = IDS.index(name)
            source = {"content": TEXTS[row], "meta": {"tenant": TENANTS[row]}}
            leaves_out = self.server.elastic and body["_source"].get("exclude_vectors") is not False
            if not leaves_out and not self.server.derived:
                source["embedding"] = VECTORS[row].tolist()
            hits.append({"_id": name, "_source": source})
        return hits


@pytest.fixture(params=["elasticsearch", "opensearch"])
def server(request):
    package("elasticsearch" if request.param == "elasticsearch" else "opensearchpy")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.requests, server.derived = [], False
        server.elastic = request.param == "elasticsearch"
        server.fields = {
            "embedding": DENSE if server.elastic else KNN,
            "content": {"type": "text"},
            "meta": {"properties": {"tenant": {"type": "keyword"}}},
        }
        server.address = f"{request.param}://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_open_store_pages_one_point_in_time_and_asks_for_vectors(server):
    check_contract(lambda: open_store(server.address, keep=["meta.tenant"]), IDS)
    methods = {(method, path.partition("?")[0]) for method, path, _ in server.requests}
    written = {"/_doc", "/_bulk", "/_update", "/_create"}
    assert not [path for _, path in methods if any(word in path for word in written)]
    opened = sum("_pit" in p or "point_in_time" in p for m, p, _ in server.requests if m == "POST")
    closed = sum(m == "DELETE" for m, _, _ in server.requests)
    assert opened == closed > 0
    if server.elastic:
        sources = [b["_source"] for _, _, b in server.requests if b.get("_source")]
        assert sources and all(source["exclude_vectors"] is False for source in sources)


def test_open_store_keeps_nested_fields_and_says_what_it_was_tested_against(server):
    with open_store(server.address, keep=["meta.tenant"]) as store:
        batch = store.sample(5)
        assert batch.payload["meta.tenant"] == [TENANTS[IDS.index(name)] for name in batch.ids]
        assert "not run against a server" in store.facts.tested
        assert store.facts.text == "content"
        if server.elastic:
            assert "the original vectors are kept" in store.facts.index


def test_fetch_says_that_an_index_holds_no_vectors(server):
    server.derived = True
    with open_store(server.address) as store:
        with pytest.raises(StoreError, match="30 × no vector"):
            store.sample(20)
        assert "leaves vectors out of _source" in store.facts.notes[0]


def test_open_store_refuses_sparse_and_binary_fields(server):
    server.fields = {"embedding": {"type": "sparse_vector"}}
    with pytest.raises(StoreError, match="sparse vectors"):
        open_store(server.address)
    bits = {"element_type": "bit"} if server.elastic else {"data_type": "binary"}
    server.fields = {"embedding": {**(DENSE if server.elastic else KNN), **bits}}
    with pytest.raises(StoreError, match="embedding of bits"):
        open_store(server.address)


def test_open_store_says_that_no_server_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(StoreError, match="a readable index at"):
        open_store(server.address)
