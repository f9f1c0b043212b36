"""SQLite: virtual tables of sqlite-vec, and plain tables with vectors as blobs; never written."""

from __future__ import annotations

import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unembed.errors import ConfigError, StoreError
from unembed.files import install_line, require_extra
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    client_errors,
    text_field,
)

_COLUMN = re.compile(r"""^\s*["'\[`]?(\w+)["'\]`]?\s+(float|int8|bit)\[(\d+)\](.*)$""", re.I | re.S)
_FLOAT_BYTES = 4


class SqliteStore(Store):
    """A table of an SQLite file.

    The file is opened ``immutable``, so that not even a lock is written; where a write-ahead log
    lies beside it, which that would pass over, both are read in a copy.
    """

    def __init__(self, address: Address) -> None:
        super().__init__()
        self._address, self._stack = address, ExitStack()
        try:
            with self._errors():
                self._connection = self._open(address.path)
                self._stack.callback(self._connection.close)
                self._learn()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, remove a copy."""
        self._stack.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Keys, ascending; see `Store.ids`."""
        key, table = self._key, _quoted(self._keys)
        query = f"SELECT {key} FROM {table} WHERE ? IS NULL OR {key} > ? ORDER BY {key}"
        place: Any = after if after is None or self._texts_as_keys else int(after)
        with self._errors():
            for (name,) in self._connection.execute(query, [place, place]):
                yield str(name)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by key, one question each; see `Store.fetch`."""
        query = (
            f"SELECT {self._columns} FROM {_quoted(self.facts.collection)} WHERE {self._key} = ?"
        )
        rows, names = [], []
        with self._errors():
            for name in ids:
                key = name if self._texts_as_keys else int(name)
                row = self._connection.execute(query, [key]).fetchone()
                if row is not None:
                    rows.append(row)
                    names.append(name)
        start = 2 if self.facts.text else 1
        payload = {
            name: [row[start + i] for row in rows] for i, name in enumerate(self._address.keep)
        }
        texts = [row[1] for row in rows] if self.facts.text else None
        return self.clean(names, [row[0] for row in rows], texts, payload)

    def _open(self, path: Path) -> sqlite3.Connection:
        log = path.with_name(path.name + "-wal")
        if log.exists() and log.stat().st_size:
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="unembed-")))
            for file in (path, log):
                shutil.copyfile(file, folder / file.name)
            path = folder / path.name
            return sqlite3.connect(str(path))
        return sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)

    def _learn(self) -> None:
        path = self._address.path
        tables = {
            name: sql or "" for name, sql in self._connection.execute(
                "SELECT name, sql FROM sqlite_schema WHERE type = 'table' ORDER BY name")
        }  # fmt: skip
        virtual = {n: s for n, s in tables.items() if re.search(r"USING\s+vec0\b", s, re.I)}
        if virtual and self._address.collection not in set(tables) - set(virtual):
            name = choose(list(virtual), self._address.collection, f"a vec0 table in {path}",
                          "?table=")  # fmt: skip
            self._load_extension()
            self._learn_virtual(name, virtual[name])
        else:
            self._learn_plain(tables)
        self.facts.authentication = "none: a file"
        self.facts.encryption = "none: the file is readable as it is"
        self.facts.not_read += [f"table {n}" for n in virtual if n != self.facts.collection]

    def _load_extension(self) -> None:
        require_extra("sqlite-vec", "reading tables of sqlite-vec")
        if not hasattr(self._connection, "enable_load_extension"):
            raise ConfigError(
                "a Python whose sqlite3 loads extensions", "one built without them",
                f"Use another Python build with {install_line('sqlite-vec')}",
            )  # fmt: skip
        import sqlite_vec

        self._connection.enable_load_extension(True)
        sqlite_vec.load(self._connection)
        self._connection.enable_load_extension(False)

    def _learn_virtual(self, name: str, sql: str) -> None:
        inside = sql[sql.index("(") + 1 : sql.rindex(")")]
        parts = [part.strip() for part in re.split(r",(?![^\[(]*[\])])", inside)]
        vectors = {m[1]: m for part in parts if (m := _COLUMN.match(part))}
        column = choose(list(vectors), self._address.column, f"a column of vectors in {name}",
                        "?column=")  # fmt: skip
        kind, size, rest = vectors[column][2].lower(), int(vectors[column][3]), vectors[column][4]
        if kind == "bit":
            raise StoreError(
                f"a column of floats in {name}", f"{column} bit[{size}]",
                "Choose another ?column=: bits alone are the signs of a vector",
            )  # fmt: skip
        others = [p.lstrip("+").split()[0].strip("\"'`[]") for p in parts if not _COLUMN.match(p)]
        others = [other for other in others if "=" not in other]
        primary = next((p.split()[0] for p in parts if re.search(r"text\s+primary\s+key", p, re.I)),
                       None)  # fmt: skip
        metric = re.search(r"distance_metric\s*=\s*(\w+)", rest, re.I)
        self._texts_as_keys = primary is not None
        self._key = _quoted(primary) if primary else "rowid"
        self._keys = name if primary else f"{name}_rowids"
        count = self._connection.execute(f"SELECT count(*) FROM {_quoted(name + '_rowids')}")
        self._set(name, column, others, StoreFacts(
            kind="sqlite-vec", collection=name, count=count.fetchone()[0], dimension=size,
            stored_type="float32" if kind == "float" else "int8",
            metric=metric[1].lower() if metric else "l2", normalised=False,
            lossy="8 bits of each number" if kind == "int8" else None,
            not_read=[f"column {other}" for other in vectors if other != column],
        ))  # fmt: skip

    def _learn_plain(self, tables: dict[str, str]) -> None:
        """A table of our naming whose vectors are blobs of little-endian floats, or JSON."""
        name = choose(list(tables), self._address.collection,
                      f"a table of vectors in {self._address.path}", "?table=")  # fmt: skip
        columns = [row[1] for row in self._connection.execute(
            f"PRAGMA table_info({_quoted(name)})")]  # fmt: skip
        usual = [c for c in ("embedding", "vector", "embeddings", "vec") if c in columns]
        column = choose(columns if self._address.column else usual, self._address.column,
                        f"a column of vectors in {name}", "?column=")  # fmt: skip
        quoted, table = _quoted(column), _quoted(name)
        sizes = self._connection.execute(
            f"SELECT CASE typeof({quoted}) WHEN 'blob' THEN length({quoted}) / {_FLOAT_BYTES} "
            f"WHEN 'text' THEN json_array_length({quoted}) END d, count(*) FROM {table} "
            "WHERE d > 0 GROUP BY 1 ORDER BY 2 DESC, 1").fetchall()  # fmt: skip
        count = self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        self._texts_as_keys, self._key, self._keys = False, "rowid", name
        facts = StoreFacts(
            kind="sqlite", collection=name, count=count,
            dimension=int(self._address.options.get("dimension") or (sizes[0][0] if sizes else 0)),
            stored_type="blobs or text taken as float32", normalised=False,
        )  # fmt: skip
        self._set(name, column, [c for c in columns if c != column], facts)

    def _set(self, name: str, column: str, others: list[str], facts: StoreFacts) -> None:
        facts.text = text_field(others, self._address.text)
        facts.fields = [other for other in others if other != facts.text]
        for wanted in self._address.keep:
            text_field(others, wanted)
        names = [column, *([facts.text] if facts.text else []), *self._address.keep]
        self._columns, self.facts = ", ".join(map(_quoted, names)), facts

    def _errors(self) -> Any:
        return client_errors(
            f"a readable table of SQLite in {self._address.place}",
            "Correct the path or ?table=", sqlite3.Error, OSError, ValueError,
        )  # fmt: skip


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def open_store(address: Address) -> SqliteStore:
    """Open a table of SQLite."""
    return SqliteStore(address)
