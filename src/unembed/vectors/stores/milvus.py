"""Milvus: a collection of a server, or of a folder of Milvus Lite, which is read in a copy."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from unembed.errors import StoreError
from unembed.vectors.numbers import bfloat16
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
_TYPES = {
    "FLOAT_VECTOR": "float32",
    "FLOAT16_VECTOR": "float16",
    "BFLOAT16_VECTOR": "bfloat16",
    "INT8_VECTOR": "int8",
}


class MilvusStore(Store):
    """A collection of Milvus; cosine does not alter what is stored."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._stack = ExitStack()
        try:
            with self._errors():
                self._client = self._connect()
                names = sorted(self._client.list_collections())
                name = choose(
                    names, address.collection, f"a collection at {address.place}", "?collection="
                )
                self._learn(name, names)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, remove a copy."""
        self._stack.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Primary keys, ascending; see `Store.ids`."""
        condition = "" if after is None else f"{self._key} > {self._literal(after)}"
        names: list[Any] = []
        log = logging.getLogger("pymilvus.client.iterator.query_iterator")
        log.setLevel(logging.ERROR)  # or it warns that Milvus Lite gives no time stamps
        with self._errors():
            iterator = self._client.query_iterator(
                self.facts.collection,
                batch_size=_PAGE,
                filter=condition,
                output_fields=[self._key],
            )
            while rows := iterator.next():
                names += [row[self._key] for row in rows]
            iterator.close()
        yield from map(str, sorted(names))

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by primary key; see `Store.fetch`."""
        columns = [self._key, self._column, *self.fields]
        keys = [int(name) if self._whole else name for name in ids]
        with self._errors():
            rows = self._client.get(self.facts.collection, ids=keys, output_fields=columns)
        by_id = {str(row[self._key]): row for row in rows}
        return self.batch(
            [
                (
                    name,
                    self._numbers(by_id[name].get(self._column)),
                    *map(by_id[name].get, self.fields),
                )
                for name in ids
                if name in by_id
            ]
        )

    def _literal(self, name: str) -> str:
        return str(int(name)) if self._whole else json.dumps(name)

    def _numbers(self, value: Any) -> Any:
        """Half-precision vectors come as bytes, or as a list of one."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
            value = value[0]
        if not isinstance(value, bytes):
            return None if value is None else [float(number) for number in value]
        if self.facts.stored_type == "float16":
            return np.frombuffer(value, "<f2").astype(float).tolist()
        if self.facts.stored_type == "bfloat16":
            return bfloat16(np.frombuffer(value, "<u2")).tolist()
        return np.frombuffer(value, np.int8).astype(float).tolist()

    def _connect(self) -> Any:
        from pymilvus import MilvusClient

        place, secret = self._address.place, self._address.secret
        if "://" not in place:
            if self._address.path.is_file():
                raise StoreError(
                    f"a folder of Milvus Lite 3 at {place}",
                    "a file, as versions before 3 wrote",
                    "Export it with the version that wrote it",
                )
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="unembed-"))
            copy = Path(folder) / "store.db"
            shutil.copytree(self._address.path, copy)
            self._stack.callback(_end_lite, str(copy))
            client = MilvusClient(str(copy))
        else:
            where = urlsplit(place)
            scheme = "https" if where.scheme.endswith("https") else "http"
            client = MilvusClient(
                uri=f"{scheme}://{where.hostname or 'localhost'}:{where.port or 19530}",
                token=secret or "",
                db_name=self._address.options.get("database", ""),
                timeout=30,
            )
        self._stack.callback(client.close)
        return client

    def _learn(self, name: str, names: list[str]) -> None:
        local = "://" not in self._address.place
        schema = self._client.describe_collection(name)
        kinds = {f["name"]: f["type"].name for f in schema["fields"]}
        vectors = [field for field, kind in kinds.items() if kind in _TYPES]
        refused = [f for f, k in kinds.items() if k in ("BINARY_VECTOR", "SPARSE_FLOAT_VECTOR")]
        if not vectors and refused:
            raise StoreError(
                f"a field of dense floats in {name}",
                f"{refused[0]}: {kinds[refused[0]]}",
                "Choose another ?collection=: bits and weights of words are not inverted",
            )
        self._column = choose(
            vectors, self._address.column, f"a field of vectors in {name}", "?column="
        )
        field = next(f for f in schema["fields"] if f["name"] == self._column)
        primary = next(f for f in schema["fields"] if f.get("is_primary"))
        self._key, self._whole = primary["name"], primary["type"].name == "INT64"
        others = [n for n in kinds if n not in (*vectors, *refused, self._key)]
        text, others = choose_fields(others, self._address.text, self._address.keep)
        partitions = self._client.list_partitions(name)
        self._load(name)
        element = _TYPES[kinds[self._column]]
        self.facts = StoreFacts(
            kind="milvus",
            collection=name,
            count=int(self._client.get_collection_stats(name)["row_count"]),
            dimension=int(field["params"]["dim"]),
            stored_type=element,
            normalised=False,
            lossy=None if element == "float32" else f"{element} instead of 32 bits",
            tenants=[] if partitions == ["_default"] else list(partitions),
            text=text,
            fields=others,
            not_read=[f"collection {other}" for other in names if other != name]
            + [f"field {n}: {kinds[n]}" for n in (*vectors, *refused) if n != self._column],
            authentication="none: a folder"
            if local
            else ("a token" if self._address.secret else "none was needed"),
            encryption="none: the files are readable as they are"
            if local
            else ("of the connection: " + ("TLS" if "https" in self._address.place else "none")),
            tested="against Milvus Lite"
            + ("" if local else " and its server; not run against a full Milvus"),
            notes=["read in a copy"] if local else [],
        )
        for index in self._client.list_indexes(name):
            facts = self._client.describe_index(name, index)
            if facts.get("field_name") == self._column:
                kind = str(facts.get("index_type"))
                exact = ": quantised; the exact vectors are kept"
                lossy = any(word in kind for word in ("PQ", "SQ", "RABITQ"))
                self.facts.index = kind + (exact if lossy else "")
                self.facts.metric = str(facts.get("metric_type", "")).lower()

    def _load(self, name: str) -> None:
        """Have the server load the collection, as reading needs, and release it in the end."""
        state = self._client.get_load_state(name)["state"]
        if getattr(state, "name", str(state)) == "Loaded":
            return
        self._client.load_collection(name)
        self._stack.callback(self._client.release_collection, name)

    def _errors(self) -> Any:
        return client_errors(
            f"a readable collection of Milvus at {self._address.place}",
            "Start the server, or correct the address and MILVUS_TOKEN",
            Exception,  # of the client and of gRPC
            secret=self._address.secret,
        )


def _end_lite(folder: str) -> None:
    """End the server of Milvus Lite over a folder, which closing the client leaves running."""
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(folder)


def open_store(address: Address) -> MilvusStore:
    """Open a collection of Milvus."""
    return MilvusStore(address)
