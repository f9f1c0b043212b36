"""Chroma: a folder, read in a copy because opening migrates it, or a server."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
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

_PAGE = 1000  # a `get` without a limit dies on large collections
_PORT = 8000
_DOCUMENT = "document"


class ChromaStore(Store):
    """A collection of Chroma; the vectors are those that were added, not normalised."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._stack = ExitStack()
        try:
            client = self._client()
            with self._errors():
                names = sorted(
                    c if isinstance(c, str) else c.name for c in client.list_collections()
                )
                name = choose(
                    names, address.collection, f"a collection in {address.place}", "?collection="
                )
                # No embedding function: the default one would be downloaded
                self._collection = client.get_collection(name, embedding_function=None)
                self._learn(names)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the copy."""
        self._stack.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Ids in the order they were added; see `Store.ids`."""
        start, waiting = 0, after is not None
        while True:
            with self._errors():
                page = self._collection.get(limit=_PAGE, offset=start, include=[])["ids"]
            if not page:
                return
            for name in page:
                if not waiting:
                    yield name
                elif name == after:
                    waiting = False
            start += len(page)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by id; see `Store.fetch`."""
        with self._errors():
            got = self._collection.get(
                ids=list(ids), include=["embeddings", "documents", "metadatas"]
            )
        none = [None] * len(got["ids"])
        columns = (
            got["ids"],
            got["embeddings"],
            got["documents"] or none,
            got["metadatas"] or none,
        )
        rows = {row[0]: row for row in zip(*columns, strict=True)}
        return self.batch([self._row(*rows[name]) for name in ids if name in rows])

    def _row(self, name: str, vector: Any, document: Any, metadata: Any) -> tuple[Any, ...]:
        values = {**(metadata or {}), _DOCUMENT: document}
        return name, vector, *map(values.get, self.fields)

    def _client(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        settings = Settings(anonymized_telemetry=False)
        if "://" not in self._address.place:
            copy = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="unembed-")))
            shutil.copytree(self._address.path, copy / "store")
            _refuse_pickles(copy / "store")
            client = chromadb.PersistentClient(str(copy / "store"), settings=settings)
            self._stack.callback(
                chromadb.api.shared_system_client.SharedSystemClient.clear_system_cache
            )
            return client
        where = urlsplit(self._address.place)
        secret = self._address.secret
        headers = {"Authorization": f"Bearer {secret}"} if secret else None
        with self._errors():
            return chromadb.HttpClient(
                where.hostname or "localhost",
                where.port or _PORT,
                ssl=where.scheme.endswith("https"),
                headers=headers,
                settings=settings,
                tenant=self._address.options.get("tenant", "default_tenant"),
                database=self._address.options.get("database", "default_database"),
            )

    def _learn(self, names: list[str]) -> None:
        local = "://" not in self._address.place
        space = (self._collection.configuration_json or {}).get("hnsw") or {}
        first = self._collection.get(limit=1, include=["embeddings", "documents", "metadatas"])
        there = sorted((first["metadatas"] or [None])[0] or {}) if first["ids"] else []
        if first["ids"] and (first["documents"] or [None])[0]:
            there = [_DOCUMENT, *there]
        usual = _DOCUMENT if _DOCUMENT in there else None
        text, fields = choose_fields(there, self._address.text or usual)
        self.facts = StoreFacts(
            kind="chroma",
            collection=self._collection.name,
            count=self._collection.count(),
            dimension=len(first["embeddings"][0]) if first["ids"] else 0,
            metric=str(space.get("space", "l2")),
            normalised=False,
            text=text,
            fields=fields,
            not_read=[f"collection {name}" for name in names if name != self._collection.name],
            authentication="none: a folder"
            if local
            else ("a token" if self._address.secret else "none was needed"),
            encryption="none: SQLite and index files are readable as they are"
            if local
            else (
                "of the connection: "
                + ("TLS" if self._address.place.startswith("chroma+https") else "none")
            ),
            notes=["read in a copy: opening a folder of Chroma migrates it"] if local else [],
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable collection of Chroma at {self._address.place}",
            "Start the server, or correct the address and CHROMA_TOKEN",
            Exception,  # the client raises those of SQLite, of Rust and of HTTP libraries
            secret=self._address.secret,
        )


def _refuse_pickles(folder: Path) -> None:
    """Old versions kept their index's metadata as a pickle, which a client would load."""
    pickles = [path.name for path in folder.rglob("*.pickle")]
    if pickles:
        raise StoreError(
            "a folder of Chroma without pickles",
            ", ".join(pickles[:5]),
            "Export the collection with the version that wrote it; pickles are never loaded",
        )


def open_store(address: Address) -> ChromaStore:
    """Open a collection of Chroma."""
    return ChromaStore(address)
