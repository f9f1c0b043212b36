"""PostgreSQL: columns of pgvector (vector, halfvec) and plain arrays of numbers, by psycopg 3."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import numpy as np

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    BATCH,
    Store,
    StoreFacts,
    VectorBatch,
    choose,
    choose_fields,
    client_errors,
)

_ARRAYS = {
    "vector": "float32",
    "halfvec": "float16",
    "real[]": "float32",
    "double precision[]": "float64",
    "numeric[]": "numeric",
}
_REFUSED = {
    "sparsevec": "sparse vectors hold weights of words, which are read and not inverted",
    "bit": "bits alone are the signs of a vector: export them, and use `unembed invert --ranges`",
}
_TIMEOUT = "10min"  # of one statement
_DENIED, _WRONG_LOGIN = "42501", ("28P01", "28000")  # SQLSTATE


class PostgresStore(Store):
    """A table with a column of vectors.

    One connection and one transaction, REPEATABLE READ and READ ONLY: what is read is one state of
    the table, and the server itself refuses to write.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        import psycopg
        from psycopg import sql

        self._sql = sql
        self._fail = (psycopg.Error, OSError)
        self.facts = StoreFacts("pgvector", "")
        query = f"?{urlencode(address.options, quote_via=quote)}" if address.options else ""
        with self._errors():
            self._connection = psycopg.connect(
                address.place + query,
                password=address.secret,
                connect_timeout=10,
                application_name="unembed",
                autocommit=False,
            )
            self._connection.read_only = True
            self._connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            self._connection.execute(f"SET statement_timeout = '{_TIMEOUT}'")
            self._learn()

    def close(self) -> None:
        """End the transaction and the connection."""
        self._connection.close()

    def ids(self, after: str | None = None) -> Iterator[str]:
        """The key of every row, ascending; see `Store.ids`."""
        query = self._select("{id}::text", after)
        with self._errors(), self._connection.cursor(name="unembed_ids") as cursor:
            cursor.itersize = 50_000
            cursor.execute(query, {"after": after})
            for (name,) in cursor:
                yield name

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by their key; see `Store.fetch`."""
        query = self._sql.SQL(
            "SELECT {columns} FROM {table} t WHERE {id} = ANY(%s::text[]::" + self._id_type + "[])"
        ).format(columns=self._columns, **self._names)
        with self._errors():
            rows = {row[0]: row for row in self._connection.execute(query, [list(ids)])}
        return self._arrays([rows[name] for name in ids if name in rows])

    def batches(self, after: str | None = None, size: int = BATCH) -> Iterator[VectorBatch]:
        """All rows by a cursor of the server; see `Store.batches`."""
        self.left_out.clear()
        query = self._select(self._columns, after)
        with self._errors(), self._connection.cursor(name="unembed_rows") as cursor:
            cursor.itersize = size
            cursor.execute(query, {"after": after})
            while rows := cursor.fetchmany(size):
                yield self._arrays(rows)

    def _errors(self) -> Any:
        where = urlsplit(self._address.place)
        place = f"{where.hostname or 'this machine'}{where.path}"
        return client_errors(
            f"a readable PostgreSQL table at {place}",
            _fix,
            *self._fail,
            secret=self._address.secret,
        )

    def _select(self, columns: Any, after: str | None) -> Any:
        condition = f"WHERE {{id}} > %(after)s::text::{self._id_type}" if after is not None else ""
        text = f"SELECT {{columns}} FROM {{table}} t {condition} ORDER BY {{id}}"
        if isinstance(columns, str):
            columns = self._sql.SQL(columns).format(**self._names)
        return self._sql.SQL(text).format(columns=columns, **self._names)

    def _arrays(self, rows: list[tuple[Any, ...]]) -> VectorBatch:
        return self.batch([(key, _array(vector), *rest) for key, vector, *rest in rows])

    # What is there

    def _learn(self) -> None:
        """Find table, columns and key, and what protects them."""
        schema, table = self._table()
        columns = self._rows(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod), "
            "format_type(a.atttypid, NULL) FROM pg_attribute a WHERE a.attrelid = %s::regclass "
            "AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            [self._regclass(schema, table)],
        )
        types = {name: base for name, _, base in columns}
        column = self._column(types, f"{schema}.{table}")
        others = [name for name in types if name != column]
        hidden = self._hidden(schema, table, types, column)
        readable = [name for name in others if name not in hidden]
        text, fields = choose_fields(readable, self._address.text, self._address.keep)
        self._identify(schema, table, types)
        identifier = self._identifier
        self._names = {"table": identifier(schema, table), "id": self._id}
        declared = next(full for name, full, _ in columns if name == column)
        self.facts = StoreFacts(
            kind="pgvector" if types[column] in ("vector", "halfvec") else "postgresql",
            collection=f"{schema}.{table}",
            count=self._value("SELECT count(*) FROM {table}"),
            stored_type=declared,
            normalised=False,
            lossy="half precision: 11 bits of each number" if types[column] == "halfvec" else None,
            text=text,
            fields=fields,
            not_read=[
                f"column {name}: {kind}"
                for name, kind in types.items()
                if name != column and kind in (*_ARRAYS, *_REFUSED)
            ]
            + [f"column {name}: this login has no right to read it" for name in hidden],
        )
        cast = "" if types[column].endswith("[]") else "::real[]"
        parts = [
            self._sql.SQL("{}::text").format(self._id),
            self._sql.SQL("{}" + cast).format(identifier(column)),
            *map(identifier, self.fields),
        ]
        self._columns = self._sql.SQL(", ").join(parts)
        self.facts.dimension = self._dimension(column, types[column], declared)
        self._indexes(schema, table, column)
        self._protection(schema, table)

    def _table(self) -> tuple[str, str]:
        tables = self._rows(
            "SELECT DISTINCT n.nspname, c.relname FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_attribute a ON a.attrelid = c.oid "
            "WHERE c.relkind IN ('r','p','v','m','f') AND NOT a.attisdropped AND a.attnum > 0 "
            "AND n.nspname NOT IN ('pg_catalog','information_schema') "
            "AND format_type(a.atttypid, NULL) = ANY(%s) ORDER BY 1, 2",
            [[*_ARRAYS, *_REFUSED]],
        )
        target = self._address.collection
        names = {f"{schema}.{name}": (schema, name) for schema, name in tables}
        short = {name: (schema, name) for schema, name in tables}
        if target in names:
            return names[target]
        if target in short:
            return short[target]
        if target is not None and self._exists(target):
            schema, _, name = target.rpartition(".")
            return schema or "public", name
        return names[choose(list(names), target, "a table with a column of vectors", "?table=")]

    def _exists(self, name: str) -> bool:
        return bool(self._rows("SELECT to_regclass(quote_ident(%s)) IS NOT NULL", [name])[0][0])

    def _hidden(self, schema: str, table: str, types: dict[str, str], column: str) -> list[str]:
        """Columns that this login may not read; that of the vectors must not be one."""
        name = self._regclass(schema, table)
        rows = self._rows(
            "SELECT c, has_column_privilege(%s::text, c, 'SELECT') FROM unnest(%s::text[]) c",
            [name, list(types)],
        )
        hidden = [each for each, allowed in rows if not allowed]
        if column in hidden:
            user = self._connection.info.user
            raise StoreError(
                f"the right to read {column} of {schema}.{table}",
                f"none for the login {user!r}",
                f"Grant it: GRANT SELECT ON {name} TO {user}",
            )
        return hidden

    def _identifier(self, *parts: str) -> Any:
        """A name for a query that takes values: there a percent sign is written twice."""
        name = self._sql.Identifier(*parts).as_string(self._connection)
        return self._sql.SQL(name.replace("%", "%%"))

    def _regclass(self, schema: str, table: str) -> str:
        return str(self._sql.Identifier(schema, table).as_string(None))

    def _column(self, types: dict[str, str], table: str) -> str:
        usable = [name for name, kind in types.items() if kind in _ARRAYS]
        target = self._address.column
        refused = {n: k for n, k in types.items() if k in _REFUSED and target in (None, n)}
        if refused and (target is not None or not usable):
            name, kind = next(iter(refused.items()))
            raise StoreError(
                f"a column of vector, halfvec or real[] in {table}",
                f"{name}, of the type {kind}: {_REFUSED[kind]}",
                "Choose another ?column=",
            )
        if target in types and target not in usable:
            raise StoreError(
                f"a column of vector, halfvec or real[] in {table}",
                f"{target}, of the type {types[target]}",
                f"Choose another ?column=: {', '.join(usable) or 'none has vectors'}",
            )
        candidates = [n for n in usable if types[n] in ("vector", "halfvec")] or usable
        return choose(
            usable if target else candidates, target, f"a column of vectors in {table}", "?column="
        )

    def _identify(self, schema: str, table: str, types: dict[str, str]) -> None:
        """The key that rows are listed and fetched by: chosen, primary, or the row's place."""
        keys = self._rows(
            "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid "
            "AND a.attnum = ANY(i.indkey) WHERE i.indrelid = %s::regclass AND i.indisprimary",
            [self._regclass(schema, table)],
        )
        name = self._address.row_id or (keys[0][0] if len(keys) == 1 else None)
        if name is not None and name not in types:
            raise StoreError(f"a column {name!r}", ", ".join(types), "Correct ?id=")
        # With the table's name before it, or ORDER BY takes the text of the same name
        self._id = self._sql.SQL("t.{}").format(self._identifier(name or "ctid"))
        self._id_type = re.sub(r"[^\w ]", "", types[name]) if name else "tid"

    def _dimension(self, column: str, kind: str, declared: str) -> int:
        size = re.search(r"\((\d+)\)", declared)
        if size:
            return int(size[1])
        length = "vector_dims" if kind in ("vector", "halfvec") else "cardinality"
        sizes = self._rows(
            "SELECT "
            + length
            + "({column}) AS d, count(*) FROM {table} WHERE {column} IS NOT NULL "
            "GROUP BY 1 ORDER BY 2 DESC, 1",
            [],
            column=self._identifier(column),
        )
        if len(sizes) > 1:
            listing = ", ".join(f"{rows} × {size}" for size, rows in sizes[:5])
            self.facts.notes.append(f"the column holds vectors of several dimensions: {listing}")
        return int(sizes[0][0]) if sizes else 0

    def _indexes(self, schema: str, table: str, column: str) -> None:
        rows = self._rows(
            "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %s::regclass",
            [self._regclass(schema, table)],
        )
        metrics = {"cosine": "cosine", "ip_ops": "inner product", "l2": "l2", "l1": "l1"}
        for (text,) in rows:
            if column not in text or "USING btree" in text:
                continue
            quantised = any(word in text for word in ("binary_quantize", "::halfvec", "subvector"))
            self.facts.index = text.partition(" USING ")[2] + (
                ": quantised; the column keeps the exact vectors, so this is no defence"
                if quantised
                else ""
            )
            self.facts.metric = next((m for key, m in metrics.items() if key in text), None)

    def _protection(self, schema: str, table: str) -> None:
        name = self._regclass(schema, table)
        kind, secured, active, estimate = self._rows(
            "SELECT relkind::text, relrowsecurity, row_security_active(oid), reltuples "
            "FROM pg_class WHERE oid = %s::regclass",
            [name],
        )[0]
        everyone = self._rows("SELECT has_table_privilege('public', %s, 'SELECT')", [name])[0][0]
        about = f"of about {int(estimate)}" if estimate >= 0 else "of how many is not known"
        if kind in "vmf":
            rules = "not visible: a view or foreign table, whose rules lie beneath it"
        elif not secured:
            rules = "off: every row is visible to this login"
        elif active:
            rules = f"on and in force: this login sees {self.facts.count} rows {about}"
        else:
            rules = "on, passed over by this login: a superuser, the owner, or BYPASSRLS"
        self.facts.row_security = rules
        info = self._connection.info
        used = self._connection.pgconn.used_password
        self.facts.authentication = (
            f"login {info.user!r} {'with a password' if used else 'without a password'}"
            + ("; the table is readable by every login (PUBLIC)" if everyone else "")
        )
        tls = self._connection.pgconn.ssl_in_use
        self.facts.encryption = (
            f"of the connection: {'TLS' if tls else 'none'}; of the disk: not visible from here"
        )

    def _rows(self, query: str, values: list[Any], **names: Any) -> list[tuple[Any, ...]]:
        identifiers = getattr(self, "_names", {})
        text = self._sql.SQL(query).format(**identifiers, **names) if "{" in query else query
        rows: list[tuple[Any, ...]] = self._connection.execute(text, values).fetchall()
        return rows

    def _value(self, query: str) -> Any:
        return self._rows(query, [])[0][0]


def _fix(error: BaseException) -> str:
    """What to do about an error, by its SQLSTATE."""
    state = getattr(error, "sqlstate", None)
    if state == _DENIED:
        return "Grant it: GRANT SELECT ON the table TO this login"
    if state in _WRONG_LOGIN or "password" in str(error):
        return "Correct the login; PGPASSWORD or --ask-password has its password"
    if state is not None:
        return "Correct the table, its columns, or the view's own code"
    return "Start the server or correct the address; the same command goes on"


def _array(value: list[Any] | None) -> Any:
    """An array of the table as floats; None where it is NULL or holds one."""
    if value is None or None in value:
        return None
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):  # rows of arrays are of no one dimension
        return value


def open_store(address: Address) -> PostgresStore:
    """Open a table of PostgreSQL."""
    return PostgresStore(address)
