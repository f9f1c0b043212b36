"""Where a store is: addresses, what a path holds, credentials; one call opens any of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from unembed.errors import StoreError, require_callable, require_text
from unembed.files import exists, require_extra
from unembed.vectors.read import file_kind
from unembed.vectors.stores.store import Store

# kind → module, extra, variables of the environment that may hold its secret
_READERS = {
    "file": ("files", None, ()),
    "pgvector": ("postgres", "postgres", ("PGPASSWORD",)),
    "chroma": ("chroma", "chroma", ("CHROMA_TOKEN",)),
    "lancedb": ("lance", "lancedb", ()),
    "faiss": ("faiss", "faiss", ()),
    "sqlite-vec": ("sqlite", None, ()),
    "duckdb": ("duckdb", "duckdb", ()),
    "qdrant": ("qdrant", "qdrant", ("QDRANT_API_KEY",)),
    "qdrant-folder": ("qdrant_folder", None, ()),
    "milvus": ("milvus", "milvus", ("MILVUS_TOKEN",)),
    "redis": ("redis", "redis", ("REDIS_PASSWORD", "REDISCLI_AUTH")),
    "elasticsearch": ("elastic", "elasticsearch", ("ELASTIC_API_KEY", "ELASTIC_PASSWORD")),
    "opensearch": ("elastic", "opensearch", ("OPENSEARCH_PASSWORD",)),
}
_SCHEMES = {
    "postgresql": "pgvector",
    "postgres": "pgvector",
    "chroma": "chroma",
    "chroma+https": "chroma",
    "qdrant": "qdrant",
    "http": "qdrant",
    "https": "qdrant",
    "qdrant+https": "qdrant",
    "milvus": "milvus",
    "milvus+https": "milvus",
    "redis": "redis",
    "rediss": "redis",
    "unix": "redis",
    "elasticsearch": "elasticsearch",
    "elasticsearch+https": "elasticsearch",
    "opensearch": "opensearch",
    "opensearch+https": "opensearch",
}
_PATH_SCHEMES = ("file", "faiss", "duckdb", "sqlite-vec", "lancedb")
_SECRET_OPTIONS = ("password", "pass", "token", "api_key", "apikey", "key", "sslpassword")
_OURS = ("collection", "table", "column", "text", "id", "dimension")  # not the client's
_FORMS = (
    "postgresql://, qdrant://, chroma://, milvus://, redis://, elasticsearch://, opensearch://, or "
    "the path of a Chroma, LanceDB, Qdrant or Milvus Lite folder, a FAISS, SQLite or DuckDB file, "
    "or of vectors in files"
)


@dataclass(frozen=True)
class Address:
    """Where a store is and what of it is wanted.

    Attributes:
        kind: Which reader.
        place: What its client opens, without our options.
        collection: Table, collection or index.
        column: Column or field of the vectors.
        text: Column or field of the text.
        row_id: Column or field of the ids, where it can be chosen.
        keep: Further fields to read.
        options: Everything else the address says.
        secret: Password or key; never shown.
    """

    kind: str
    place: str
    collection: str | None = None
    column: str | None = None
    text: str | None = None
    row_id: str | None = None
    keep: Sequence[str] = ()
    options: dict[str, str] = field(default_factory=dict)
    secret: str | None = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        """The place as a path."""
        return Path(self.place)


def open_store(
    address: str | Path,
    *,
    collection: str | None = None,
    column: str | None = None,
    text_column: str | None = None,
    keep: Sequence[str] = (),
    ask: Callable[[str], str] | None = None,
) -> Store:
    """Open a vector store for reading.

    Args:
        address: A URL with ``?collection=``, ``table=``, ``column=``, ``text=`` where needed, or a
            path, which may end in the same.
        collection: Table, collection or index, in place of the address's.
        column: Column or field of the vectors.
        text_column: Column or field of the text beside them; the usual names are found.
        keep: Further fields to read, such as a tenant.
        ask: Called with the name of a secret where none is in the environment.

    Raises:
        StoreError: No such store, or it cannot be read.
        ConfigError: Its client is not installed, or a name is no text.
    """
    where: Any = address  # from Python anything may come
    if not isinstance(where, (str, Path)) or not str(where).strip():
        actual = f"{type(address).__name__} {address!r:.80}"
        raise StoreError(f"a store: {_FORMS}", actual, "Correct the address")
    require_text(collection=collection, column=column, text_column=text_column)
    require_callable(ask=ask)
    keep = [keep] if isinstance(keep, str) else list(keep or ())
    require_text(**{f"keep[{place}]": name for place, name in enumerate(keep)})
    place = parse_address(
        str(address), collection=collection, column=column, text=text_column, keep=keep
    )
    module, extra, variables = _READERS[place.kind]
    if extra is not None:
        require_extra(extra, f"reading {place.kind}")
    secret = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if secret is None and ask is not None and variables:
        secret = ask(f"password or key for {place.place}")
    reader = importlib.import_module(f"unembed.vectors.stores.{module}")
    store: Store = reader.open_store(replace(place, secret=secret))
    return store


def parse_address(
    address: str,
    *,
    collection: str | None = None,
    column: str | None = None,
    text: str | None = None,
    keep: Sequence[str] = (),
) -> Address:
    """Read an address.

    Raises:
        StoreError: It has no known form, or holds a password: those are visible to every user of
            the machine as long as the command runs, and to its history after that.
    """
    scheme, colon, _ = address.partition("://")
    scheme = scheme.lower() if colon else ""
    bare, _, query = address.partition("?")
    if not colon and exists(Path(address)):  # a name with a question mark in it
        bare, query = address, ""
    options = dict(parse_qsl(query, keep_blank_values=True))
    _refuse_secrets(address if colon else "", options)
    ours = {name: options.pop(name, None) for name in _OURS if name != "dimension"}
    kind = _SCHEMES.get(scheme)
    if kind is None:
        path_kind = scheme if scheme in _PATH_SCHEMES else None
        if colon and path_kind is None:
            raise StoreError(f"a store: {_FORMS}", f"{scheme}://", "Correct the address")
        bare = bare.partition("://")[2] if colon else bare
        kind = path_kind or kind_of_path(Path(bare))
    return Address(
        kind,
        bare,
        collection or ours["collection"] or ours["table"],
        column or ours["column"],
        text or ours["text"],
        ours["id"],
        tuple(keep),
        options,
    )


def _refuse_secrets(url: str, options: dict[str, str]) -> None:
    try:
        password = urlsplit(url).password
    except ValueError as error:
        raise StoreError(f"a store: {_FORMS}", str(error), "Correct the address") from error
    secrets = [name for name in options if name.lower() in _SECRET_OPTIONS and options[name]]
    if password or secrets:
        raise StoreError(
            "an address without a password or key",
            "one in it, which `ps` and the shell's history show",
            "Set PGPASSWORD, QDRANT_API_KEY, CHROMA_TOKEN, MILVUS_TOKEN, REDIS_PASSWORD, "
            "ELASTIC_API_KEY or OPENSEARCH_PASSWORD, or pass --ask-password",
        )


def kind_of_path(path: Path) -> str:
    """Which reader a file or folder needs, by what is in it.

    Raises:
        StoreError: Nothing there, or nothing that holds vectors.
    """
    if not path.exists():
        raise StoreError(f"a store: {_FORMS}", f"nothing at {path}", "Correct the path")
    if path.is_dir():
        if (path / "chroma.sqlite3").is_file():
            return "chroma"
        if (path / "meta.json").is_file() and (path / "collection").is_dir():
            return "qdrant-folder"
        if (path / "_versions").is_dir() or any(path.glob("*.lance")):
            return "lancedb"
        if (path / "collections").is_dir() and (path / "LOCK").exists():
            return "milvus"
        if (path / "index.pkl").exists() and (path / "index.faiss").exists():
            return "faiss"  # LangChain's
        return "file"
    return _kind_of_file(path)


def _kind_of_file(path: Path) -> str:
    if file_kind(path) is not None:
        return "file"
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"SQLite format 3"):
        return "sqlite-vec"
    if head[8:12] == b"DUCK":
        return "duckdb"
    if path.suffix in (".faiss", ".index") or head[:2] in (b"Ix", b"Iw", b"IH", b"IB"):
        return "faiss"
    return "file"
