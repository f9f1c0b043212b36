"""Qdrant: a collection of a server, by its client."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

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

_PAGE = 10_000
_PORT = 6333
_LOSSY = ("float16", "uint8")


class QdrantStore(Store):
    """A collection of Qdrant; quantisation there is of the index, the vectors stay."""

    def __init__(self, address: Address, client: Any = None) -> None:
        super().__init__(address)
        with self._errors():
            self._client = client or _client(address)
            names = sorted(item.name for item in self._client.get_collections().collections)
            name = choose(
                names, address.collection, f"a collection at {address.place}", "?collection="
            )
            self._learn(name, names)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Point ids, ascending; see `Store.ids`."""
        offset: Any = None if after is None else _point_id(after)
        while True:
            with self._errors():
                points, following = self._client.scroll(
                    self.facts.collection,
                    limit=_PAGE,
                    offset=offset,
                    with_vectors=False,
                    with_payload=False,
                )
            yield from (str(point.id) for point in points if str(point.id) != after)
            if following is None:
                return
            offset = following

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Points by id; see `Store.fetch`."""
        with self._errors():
            points = self._client.retrieve(
                self.facts.collection,
                [_point_id(name) for name in ids],
                with_vectors=[self._name] if self._name else True,
                with_payload=self.fields,
            )
        by_id = {str(point.id): point for point in points}
        return self.batch([self._row(by_id[name]) for name in ids if name in by_id])

    def _row(self, point: Any) -> tuple[Any, ...]:
        by_name = isinstance(point.vector, dict)
        vector = point.vector.get(self._name) if by_name else point.vector
        return str(point.id), vector, *map((point.payload or {}).get, self.fields)

    def _learn(self, name: str, names: list[str]) -> None:
        facts = self._client.get_collection(name)
        parameters = facts.config.params
        vectors = parameters.vectors or {}
        by_name = vectors if isinstance(vectors, dict) else {"": vectors}
        usable = [n for n, v in by_name.items() if v.multivector_config is None]
        if not usable:
            raise StoreError(
                f"a collection of dense vectors, one a point, at {self._address.place}",
                f"{name} with sparse or several vectors",
                "Choose another ?collection=",
            )
        self._name = choose(usable, self._address.column, f"a vector of {name}", "?column=")
        vector = by_name[self._name]
        kind = str(getattr(vector.datatype, "value", vector.datatype) or "float32")
        metric = str(getattr(vector.distance, "value", vector.distance)).lower()
        first, _ = self._client.scroll(name, limit=1, with_payload=True, with_vectors=False)
        names_there = sorted(first[0].payload or {}) if first else []
        text, fields = choose_fields(names_there, self._address.text)
        quantised = facts.config.quantization_config or vector.quantization_config
        encryption = "TLS"
        if self._address.place.startswith(("qdrant://", "http://")):
            encryption = "none" + (", and the key goes over it" if self._address.secret else "")
        self.facts = StoreFacts(
            kind="qdrant",
            collection=name,
            count=self._client.count(name, exact=True).count,
            dimension=int(vector.size),
            stored_type=kind,
            metric=metric,
            normalised=metric == "cosine",
            lossy=f"{kind} instead of 32 bits" if kind in _LOSSY else None,
            index="HNSW"
            + (
                ": quantised; the original vectors are kept and returned, so this is no defence"
                if quantised
                else ""
            ),
            text=text,
            fields=fields,
            not_read=[f"collection {other}" for other in names if other != name]
            + [f"vector {other}" for other in by_name if other != self._name]
            + [f"vector {other}: sparse" for other in parameters.sparse_vectors or {}],
            authentication="an API key" if self._address.secret else "none was needed",
            encryption=f"of the connection: {encryption}",
            tested="against the client's local mode; not run against a server",
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable collection of Qdrant at {self._address.place}",
            "Start the server, or correct the address and QDRANT_API_KEY",
            Exception,  # of the client, of HTTP libraries, of gRPC
            secret=self._address.secret,
        )


def _client(address: Address) -> Any:
    from qdrant_client import QdrantClient

    where = urlsplit(address.place)
    with warnings.catch_warnings():  # that a key goes unencrypted, the facts say
        warnings.simplefilter("ignore", UserWarning)
        return QdrantClient(
            host=where.hostname or "localhost",
            port=where.port or _PORT,
            https=where.scheme.endswith("https"),
            api_key=address.secret,
            timeout=30,
            check_compatibility=False,
        )


def _point_id(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


def open_store(address: Address) -> QdrantStore:
    """Open a collection of Qdrant."""
    return QdrantStore(address)
