"""DuckDB: a table with a column FLOAT[N] or FLOAT[]; the file is opened read-only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    BATCH,
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
    quoted,
)

_VECTOR = re.compile(r"(?:FLOAT|DOUBLE|REAL)\[(\d*)\]")


class DuckStore(Store):
    """A table of DuckDB; ids are those of a column that is named, else DuckDB's row ids."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        import duckdb

        self._fail = (duckdb.Error, OSError)
        with self._errors():
            self._connection = duckdb.connect(
                str(address.path),
                read_only=True,
                config={"enable_external_access": "false", "autoinstall_known_extensions": "false"},
            )
            self._learn()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Row ids, ascending; see `Store.ids`."""
        query = f"SELECT rowid FROM {self._table} WHERE rowid > ? ORDER BY rowid"
        with self._errors():
            cursor = self._connection.cursor()
            cursor.execute(query, [-1 if after is None else int(after)])
            while rows := cursor.fetchmany(50_000):
                yield from (str(row[0]) for row in rows)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by row id; see `Store.fetch`."""
        query = (
            f"SELECT rowid, {self._columns} FROM {self._table} WHERE rowid IN (SELECT unnest(?))"
        )
        with self._errors():
            rows = self._connection.execute(query, [[int(name) for name in ids]]).fetchall()
        by_id = {str(row[0]): row for row in rows}
        return self._to_batch([by_id[name] for name in ids if name in by_id])

    def batches(self, after: str | None = None, size: int = BATCH) -> Iterator[VectorBatch]:
        """All rows as a stream; see `Store.batches`."""
        self.left_out.clear()
        query = f"SELECT rowid, {self._columns} FROM {self._table} WHERE rowid > ? ORDER BY rowid"
        with self._errors():
            cursor = self._connection.cursor()
            cursor.execute(query, [-1 if after is None else int(after)])
            while rows := cursor.fetchmany(size):
                yield self._to_batch(rows)

    def _to_batch(self, rows: list[tuple[Any, ...]]) -> VectorBatch:
        """Rows whose vectors come as tuples."""
        return self.batch([(k, None if v is None else list(v), *rest) for k, v, *rest in rows])

    def _learn(self) -> None:
        place = self._address.path
        rows = self._connection.execute(
            "SELECT table_schema, table_name, column_name, data_type FROM "
            "information_schema.columns ORDER BY 1, 2, ordinal_position"
        ).fetchall()
        tables: dict[str, dict[str, str]] = {}
        for schema, table, column, kind in rows:
            name = table if schema == "main" else f"{schema}.{table}"
            tables.setdefault(name, {})[column] = kind
        usable = [
            t for t, columns in tables.items() if any(map(_VECTOR.fullmatch, columns.values()))
        ]
        table = choose(
            usable, self._address.collection, f"a table of vectors in {place}", "?table="
        )
        kinds = tables[table]
        vectors = [name for name, kind in kinds.items() if _VECTOR.fullmatch(kind)]
        column = choose(
            vectors, self._address.column, f"a column of vectors in {table}", "?column="
        )
        others = [name for name in kinds if name not in vectors]
        text, fields = choose_fields(others, self._address.text, self._address.keep)
        self._table = ".".join(map(quoted, table.split(".")))
        self.facts = StoreFacts(
            kind="duckdb",
            collection=table,
            count=self._value(f"SELECT count(*) FROM {self._table}"),
            stored_type=kinds[column],
            normalised=False,
            text=text,
            fields=fields,
            not_read=[f"column {name}" for name in vectors if name != column]
            + [f"table {name}" for name in usable if name != table],
            authentication="none: a file",
            encryption="none: the file is readable as it is",
        )
        self._columns = ", ".join(map(quoted, [column, *self.fields]))
        declared = _VECTOR.fullmatch(kinds[column])
        if declared and declared[1]:
            self.facts.dimension = int(declared[1])
            return
        sizes = self._connection.execute(
            f"SELECT len({quoted(column)}) d, count(*) FROM {self._table} "
            f"WHERE {quoted(column)} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
        self.facts.dimension = int(sizes[0][0]) if sizes else 0
        if len(sizes) > 1:
            listing = ", ".join(f"{count} × {size}" for size, count in sizes[:5])
            self.facts.notes.append(f"the column holds vectors of several dimensions: {listing}")

    def _value(self, query: str) -> int:
        row = self._connection.execute(query).fetchone()
        return int(row[0]) if row else 0

    def _errors(self) -> Any:
        return client_errors(
            f"a readable table of DuckDB in {self._address.place}",
            "Correct the path or ?table=; a file that another process writes cannot be opened",
            *self._fail,
        )


def open_store(address: Address) -> DuckStore:
    """Open a table of DuckDB."""
    return DuckStore(address)
