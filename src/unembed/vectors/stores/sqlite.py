"""SQLite: virtual tables of sqlite-vec, and plain tables with vectors as blobs; never written."""

from __future__ import annotations

import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
    quoted,
)

_COLUMN = re.compile(r"""^\s*["'\[`]?(\w+)["'\]`]?\s+(float|int8|bit)\[(\d+)\](.*)$""", re.I | re.S)
_FLOAT_BYTES = 4


class SqliteStore(Store):
    """A table of an SQLite file.

    The file is opened ``immutable``, so that not even a lock is written; where a write-ahead log
    lies beside it, which that would pass over, both are read in a copy.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._stack = ExitStack()
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
        key, table = self._key, quoted(self._keys)
        query = f"SELECT {key} FROM {table} WHERE ? IS NULL OR {key} > ? ORDER BY {key}"
        place: Any = after if after is None or self._texts_as_keys else int(after)
        with self._errors():
            for (name,) in self._connection.execute(query, [place, place]):
                yield str(name)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by key, one question each; see `Store.fetch`."""
        with self._errors():
            rows = [(k, self._row(k if self._texts_as_keys else int(k))) for k in ids]
        return self.batch([(name, *row) for name, row in rows if row is not None])

    def _row(self, key: str | int) -> tuple[Any, ...] | None:
        if self.facts.kind == "sqlite-vec":
            return self._virtual_row(key)
        table = quoted(self.facts.collection)
        query = f"SELECT {self._columns} FROM {table} WHERE {self._key} = ?"
        row: tuple[Any, ...] | None = self._connection.execute(query, [key]).fetchone()
        return row

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
            name: sql or ""
            for name, sql in self._connection.execute(
                "SELECT name, sql FROM sqlite_schema WHERE type = 'table' ORDER BY name"
            )
        }
        virtual = {n: s for n, s in tables.items() if re.search(r"USING\s+vec0\b", s, re.I)}
        if virtual and self._address.collection not in set(tables) - set(virtual):
            name = choose(
                list(virtual), self._address.collection, f"a vec0 table in {path}", "?table="
            )
            self._learn_virtual(name, virtual[name])
        else:
            self._learn_plain(tables)
        self.facts.authentication = "none: a file"
        self.facts.encryption = "none: the file is readable as it is"
        self.facts.not_read += [f"table {n}" for n in virtual if n != self.facts.collection]

    def _learn_virtual(self, name: str, sql: str) -> None:
        layout = _Layout(name, sql)
        target = self._address.column
        column = choose(list(layout.vectors), target, f"a column of vectors in {name}", "?column=")
        kind, size, metric = layout.vectors[column]
        if kind == "bit":
            raise StoreError(
                f"a column of floats in {name}",
                f"{column} bit[{size}]",
                "Choose another ?column=: bits alone are the signs of a vector",
            )
        self._layout, self._number = layout, list(layout.vectors).index(column)
        self._key, self._keys = "id" if layout.primary else "rowid", f"{name}_rowids"
        self._texts_as_keys = layout.primary is not None
        count = self._connection.execute(f"SELECT count(*) FROM {quoted(self._keys)}").fetchone()
        facts = StoreFacts(
            kind="sqlite-vec",
            collection=name,
            count=count[0],
            dimension=size,
            stored_type="float32" if kind == "float" else "int8",
            metric=metric,
            normalised=False,
            lossy="8 bits of each number" if kind == "int8" else None,
            not_read=[f"column {other}" for other in layout.vectors if other != column],
        )
        self._set(column, list(layout.fields), facts)
        chunks = f"{name}_vector_chunks{self._number:02}"  # its column rowid is not SQLite's
        self._chunks = dict(
            self._connection.execute(f"SELECT rowid, oid FROM {quoted(chunks)}").fetchall()
        )

    def _virtual_row(self, key: str | int) -> tuple[Any, ...] | None:
        """Vector and fields of one row, from the tables that hold them."""
        name, layout = self.facts.collection, self._layout
        row = self._connection.execute(
            f"SELECT rowid, chunk_id, chunk_offset FROM {quoted(self._keys)} WHERE {self._key} = ?",
            [key],
        ).fetchone()
        if row is None:
            return None
        rowid, chunk, offset = row
        size = self.facts.dimension * (_FLOAT_BYTES if self.facts.stored_type == "float32" else 1)
        table = f"{name}_vector_chunks{self._number:02}"
        with self._connection.blobopen(
            table, "vectors", self._chunks[chunk], readonly=True
        ) as blob:  # of a chunk of a thousand vectors one is read
            blob.seek(offset * size)
            vector = blob.read(size)
        return (
            vector,
            *(layout.value(self._connection, f, rowid, chunk, offset) for f in self.fields),
        )

    def _learn_plain(self, tables: dict[str, str]) -> None:
        """A table of our naming whose vectors are blobs of little-endian floats, or JSON."""
        name = choose(
            list(tables),
            self._address.collection,
            f"a table of vectors in {self._address.path}",
            "?table=",
        )
        columns = [row[1] for row in self._connection.execute(f"PRAGMA table_info({quoted(name)})")]
        usual = [c for c in ("embedding", "vector", "embeddings", "vec") if c in columns]
        column = choose(
            columns if self._address.column else usual,
            self._address.column,
            f"a column of vectors in {name}",
            "?column=",
        )
        vector, table = quoted(column), quoted(name)
        sizes = self._connection.execute(
            f"SELECT CASE typeof({vector}) WHEN 'blob' THEN length({vector}) / {_FLOAT_BYTES} "
            f"WHEN 'text' THEN json_array_length({vector}) END d, count(*) FROM {table} "
            "WHERE d > 0 GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
        count = self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        self._texts_as_keys, self._key, self._keys = False, "rowid", name
        facts = StoreFacts(
            kind="sqlite",
            collection=name,
            count=count,
            dimension=int(self._address.options.get("dimension") or (sizes[0][0] if sizes else 0)),
            stored_type="blobs or text taken as float32",
            normalised=False,
        )
        self._set(column, [c for c in columns if c != column], facts)

    def _set(self, column: str, others: list[str], facts: StoreFacts) -> None:
        address = self._address
        facts.text, facts.fields = choose_fields(others, address.text, address.keep)
        self.facts = facts
        self._columns = ", ".join(map(quoted, [column, *self.fields]))

    def _errors(self) -> Any:
        return client_errors(
            f"a readable table of SQLite in {self._address.place}",
            "Correct the path or ?table=",
            sqlite3.Error,
            OSError,
            ValueError,
        )


class _Layout:
    """Where sqlite-vec keeps the columns of a virtual table: in tables of its name and more.

    Reading these needs no extension, which many builds of Python cannot load. Written for
    sqlite-vec 0.1.

    Args:
        name: Of the table.
        sql: Its CREATE statement.
    """

    def __init__(self, name: str, sql: str) -> None:
        inside = sql[sql.index("(") + 1 : sql.rindex(")")]
        self.name, self.primary = name, None
        self.vectors: dict[str, tuple[str, int, str]] = {}
        self.fields: dict[str, tuple[str, int]] = {}  # name → where, which of those there
        counts: Counter[str] = Counter()
        for part in re.split(r",(?![^\[(]*[\])])", inside):
            vector, words = _COLUMN.match(part), part.strip().lstrip("+").split()
            if vector:
                metric = re.search(r"distance_metric\s*=\s*(\w+)", vector[4], re.I)
                kind = (vector[2].lower(), int(vector[3]), metric[1].lower() if metric else "l2")
                self.vectors[vector[1]] = kind
            elif re.search(r"primary\s+key", part, re.I):
                self.primary = words[0] if "text" in part.lower() else None
            elif words and "=" not in words[0]:
                where = "metadata_" + (words[1].lower() if len(words) > 1 else "any")
                if part.strip().startswith("+"):
                    where = "auxiliary"
                elif re.search(r"partition\s+key", part, re.I):
                    where = "partition"
                group = where.partition("_")[0]
                self.fields[words[0].strip("\"'`[]")] = (where, counts[group])
                counts[group] += 1

    def value(
        self, connection: sqlite3.Connection, field: str, rowid: int, chunk: int, offset: int
    ) -> Any:
        """A field of a row; None where its kind is not read."""
        where, number = self.fields[field]

        def one(table: str, column: str, key: str, value: int) -> Any:
            query = f"SELECT {column} FROM {quoted(self.name + table)} WHERE {key} = ?"
            row = connection.execute(query, [value]).fetchone()
            return None if row is None else row[0]

        if where == "auxiliary":
            return one("_auxiliary", f"value{number:02}", "rowid", rowid)
        if where == "partition":
            return one("_chunks", f"partition{number:02}", "chunk_id", chunk)
        data = one(f"_metadatachunks{number:02}", "data", "rowid", chunk)
        if where == "metadata_text":  # a length and twelve bytes; longer ones lie elsewhere
            view = data[16 * offset : 16 * (offset + 1)]
            size = int.from_bytes(view[:4], "little")
            long = size > 12  # noqa: PLR2004 - the twelve bytes
            short = view[4 : 4 + size].decode("utf-8", "replace")
            return one(f"_metadatatext{number:02}", "data", "rowid", rowid) if long else short
        if where == "metadata_integer":
            return int.from_bytes(data[8 * offset : 8 * (offset + 1)], "little", signed=True)
        return None


def open_store(address: Address) -> SqliteStore:
    """Open a table of SQLite."""
    return SqliteStore(address)
