"""Qdrant's local folder: pickled points in SQLite, read without the client and without loading."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.pickled import read_record
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
)

_MODULE = "qdrant_client.http.models.models"
_CLASSES = frozenset({"PointStruct", "SparseVector"})


class QdrantFolderStore(Store):
    """A collection of a folder that the client's local mode wrote.

    The client would load pickles, and with them run whatever somebody put into the folder, and
    holds a lock while it does; this reads the SQLite file and the records alone.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        with self._errors():
            facts = json.loads((address.path / "meta.json").read_text(encoding="utf-8"))
            collections = facts.get("collections", {})
            name = choose(
                list(collections),
                address.collection,
                f"a collection in {address.place}",
                "?collection=",
            )
            self._file = address.path / "collection" / name / "storage.sqlite"
            uri = f"file:{quote(str(self._file.resolve()))}?mode=ro&immutable=1"
            self._connection = sqlite3.connect(uri, uri=True)
            self._learn(name, collections)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Ids in the order they were written; see `Store.ids`."""
        names = list(self._keys)
        start = 0 if after is None else names.index(after) + 1
        yield from names[start:]

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by id; see `Store.fetch`."""
        points = [(name, self._point(self._keys[name])) for name in ids]
        return self.batch(
            [
                (
                    name,
                    self._vector(p.get("vector")),
                    *map((p.get("payload") or {}).get, self.fields),
                )
                for name, p in points
            ]
        )

    def _point(self, row: int) -> dict[str, Any]:
        with self._errors():
            (data,) = self._connection.execute(
                "SELECT point FROM points WHERE rowid = ?", [row]
            ).fetchone()
        record: dict[str, Any] = read_record(data, _MODULE, _CLASSES, str(self._file))
        return record

    def _vector(self, value: Any) -> Any:
        if isinstance(value, dict):
            value = value.get(self._name)
        return value if isinstance(value, list) else None

    def _learn(self, name: str, collections: dict[str, Any]) -> None:
        settings = collections[name].get("vectors") or {}
        by_name = settings if "size" not in settings else {"": settings}
        usable = [n for n, s in by_name.items() if not s.get("multivector_config")]
        self._name = choose(usable, self._address.column, f"a dense vector in {name}", "?column=")
        vector = by_name[self._name]
        rows = self._connection.execute("SELECT id, rowid FROM points ORDER BY rowid").fetchall()
        self._keys = {_key(str(key), str(self._file)): row for key, row in rows}
        first = self._point(rows[0][1]) if rows else {}
        text, fields = choose_fields(sorted(first.get("payload") or {}), self._address.text)
        sparse = list(collections[name].get("sparse_vectors") or {})
        self.facts = StoreFacts(
            kind="qdrant (local folder)",
            collection=name,
            count=len(rows),
            dimension=int(vector["size"]),
            stored_type=str(vector.get("datatype") or "float32"),
            metric=str(vector.get("distance", "")).lower(),
            normalised=False,  # the client scales in memory, what lies on disk is as it came
            text=text,
            fields=fields,
            not_read=[f"collection {other}" for other in collections if other != name]
            + [
                f"vector {other}: several vectors a point"
                for other in by_name
                if other not in usable
            ]
            + [f"vector {other}: sparse" for other in sparse]
            + [f"vector {other}" for other in usable if other != self._name],
            authentication="none: a folder",
            encryption="none: SQLite, readable as it is",
            notes=["points lie there as pickles; their records were read, none was loaded"],
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable collection of Qdrant in {self._address.place}",
            "Correct the path or ?collection=",
            sqlite3.Error,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        )


def _key(key: str, where: str) -> str:
    """The id that a key spells: base64 of a pickled number or text, or itself in old folders."""
    try:
        data = base64.b64decode(key, validate=True)
    except ValueError:
        return key
    try:
        return str(read_record(data, _MODULE, frozenset(), where))
    except StoreError:
        raise
    except ValueError:
        return key


def open_store(address: Address) -> QdrantFolderStore:
    """Open a collection of a folder of Qdrant."""
    return QdrantFolderStore(address)
