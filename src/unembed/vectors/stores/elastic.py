"""Elasticsearch and OpenSearch: an index with a dense vector; read at one point in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
)

_PAGE = 1000
_KEEP_ALIVE = "10m"
_DENSE = ("dense_vector", "knn_vector")
_SPARSE = ("sparse_vector", "rank_features")


class ElasticStore(Store):
    """An index of Elasticsearch or OpenSearch; ids are the documents'."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        with self._errors():
            self._call = _client(address)
            self._learn()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Ids in the order of the index, by pages of one point in time; see `Store.ids`."""
        waiting, last = after is not None, None
        with self._errors():
            point = self._open_point()
        try:
            while True:
                body: dict[str, Any] = {
                    "size": _PAGE,
                    "_source": False,
                    "track_total_hits": False,
                    "pit": {"id": point, "keep_alive": _KEEP_ALIVE},
                    "sort": [{"_shard_doc": "asc"} if self._elastic else {"_doc": "asc"}],
                }
                if last is not None:
                    body["search_after"] = last
                with self._errors():
                    hits = self._call("POST", "/_search", body)["hits"]["hits"]
                if not hits:
                    return
                for hit in hits:
                    if not waiting:
                        yield hit["_id"]
                    waiting = waiting and hit["_id"] != after
                last = hits[-1]["sort"]
        finally:
            with self._errors():
                self._close_point(point)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Documents by id; see `Store.fetch`."""
        columns = [self._column, *self.fields]
        source: dict[str, Any] = {"includes": columns}
        if self._elastic:
            source["exclude_vectors"] = False  # since 9.2 they are left out unless asked for
        body = {"size": len(ids), "query": {"ids": {"values": list(ids)}}, "_source": source}
        with self._errors():
            hits = self._call("POST", f"/{self._index}/_search", body)["hits"]["hits"]
        by_id = {hit["_id"]: hit.get("_source") or {} for hit in hits}
        rows = [
            (name, *(_look_up(by_id[name], column) for column in columns))
            for name in ids
            if name in by_id
        ]
        if rows and all(vector is None for _, vector, *_ in rows):
            note = "the index leaves vectors out of _source: they are not read"
            self.facts.notes += [note] if note not in self.facts.notes else []
        return self.batch(rows)

    @property
    def _elastic(self) -> bool:
        return self._address.kind == "elasticsearch"

    def _open_point(self) -> str:
        if self._elastic:
            path = f"/{self._index}/_pit?keep_alive={_KEEP_ALIVE}"
            return str(self._call("POST", path, None)["id"])
        path = f"/{self._index}/_search/point_in_time?keep_alive={_KEEP_ALIVE}"
        return str(self._call("POST", path, None)["pit_id"])

    def _close_point(self, point: str) -> None:
        if self._elastic:
            self._call("DELETE", "/_pit", {"id": point})
        else:
            self._call("DELETE", "/_search/point_in_time", {"pit_id": [point]})

    def _learn(self) -> None:
        indices = self._call("GET", f"/{quote(self._address.collection or '*')}/_mapping", None)
        fields = {
            name: _fields(item["mappings"].get("properties", {})) for name, item in indices.items()
        }
        usable = [n for n, f in fields.items() if any(v["type"] in _DENSE for v in f.values())]
        sparse = [n for n, f in fields.items() if any(v["type"] in _SPARSE for v in f.values())]
        if not usable and sparse:
            raise StoreError(
                f"an index with a dense vector at {self._address.place}",
                f"{sparse[0]} with sparse vectors",
                "Choose another ?collection=",
            )
        name = choose(
            usable,
            self._address.collection if self._address.collection in usable else None,
            f"an index with a dense vector at {self._address.place}",
            "?collection=",
        )
        self._index = quote(name)
        kinds = fields[name]
        vectors = [field for field, item in kinds.items() if item["type"] in _DENSE]
        self._column = choose(
            vectors, self._address.column, f"a vector field in {name}", "?column="
        )
        mapping = kinds[self._column]
        if mapping.get("element_type") == "bit" or mapping.get("data_type") == "binary":
            raise StoreError(
                f"a field of floats in {name}", f"{self._column} of bits", "Choose another field"
            )
        others = [field for field, item in kinds.items() if item["type"] not in _DENSE]
        text, others = choose_fields(others, self._address.text, self._address.keep)
        options = mapping.get("index_options") or mapping.get("method") or {}
        kind = str(options.get("type") or options.get("name") or "not indexed")
        quantised = any(word in str(options) for word in ("int8", "int4", "bbq", "sq", "pq"))
        element = str(mapping.get("element_type") or mapping.get("data_type") or "float")
        self.facts = StoreFacts(
            kind=self._address.kind,
            collection=name,
            count=int(self._call("GET", f"/{self._index}/_count", None)["count"]),
            dimension=int(mapping.get("dims") or mapping.get("dimension") or 0),
            stored_type="float32" if element == "float" else element,
            metric=mapping.get("similarity") or options.get("space_type"),
            normalised=False,
            lossy=None if element == "float" else f"{element} instead of 32 bits",
            index=kind + (": quantised; the original vectors are kept" if quantised else ""),
            text=text,
            fields=others,
            not_read=[f"index {other}" for other in usable if other != name]
            + [f"field {other}" for other in vectors if other != self._column],
            authentication="a key or password" if self._address.secret else "none was needed",
            encryption="of the connection: "
            + ("TLS" if "https" in self._address.place else "none"),
            tested="against answers written after the documentation; not run against a server",
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable index at {self._address.place}",
            "Start the server, or correct the address and its key or password",
            Exception,  # of the clients and of HTTP libraries
            secret=self._address.secret,
        )


def _client(address: Address) -> Any:
    """A function that sends a request by the official client: method, path, body → answer."""
    where = urlsplit(address.place)
    scheme = "https" if where.scheme.endswith("https") else "http"
    url = f"{scheme}://{where.hostname or 'localhost'}:{where.port or 9200}"
    login = (where.username, address.secret) if where.username and address.secret else None
    if address.kind == "elasticsearch":
        from elasticsearch import Elasticsearch

        key = None if login else address.secret
        client = Elasticsearch(url, basic_auth=login, api_key=key, request_timeout=60)
        headers = {"accept": "application/json", "content-type": "application/json"}
        return lambda method, path, body: (
            client.perform_request(method, path, headers=headers, body=body).body
        )
    from opensearchpy import OpenSearch

    other = OpenSearch(url, http_auth=login, timeout=60)
    return lambda method, path, body: other.transport.perform_request(method, path, body=body)


def _fields(properties: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Fields of a mapping by their dotted names."""
    fields: dict[str, dict[str, Any]] = {}
    for name, item in properties.items():
        if "properties" in item:
            fields |= _fields(item["properties"], f"{prefix}{name}.")
        elif "type" in item:
            fields[prefix + name] = item
    return fields


def _look_up(row: Any, name: str) -> Any:
    for part in name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def open_store(address: Address) -> ElasticStore:
    """Open an index of Elasticsearch or OpenSearch."""
    return ElasticStore(address)
