"""Vectors in tables: a column of Parquet, Arrow (Feather) or CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.readers import column_values, open_parquet, parquet_batches, text_lines
from unembed.errors import EmbeddingError
from unembed.files import decompression_error, most_decompressed
from unembed.vectors.arrays import arrow_contents
from unembed.vectors.numbers import Reason, size_of
from unembed.vectors.records import CORRECT_KEEP, LINE_BYTES, NAMES, number_columns

# What decoding a column may cost beyond its rows of D numbers; metadata says how many there are
_EXCESS_VALUES = 8_000_000
_BATCH_VALUES = 4_000_000
_DELIMITERS = ",;\t|"
_ONE_A_LINE = "Export one vector a line"
# A block of rows: numbers [n, D], or each vector as it is spelled; columns to keep by name
Block = tuple[NDArray[Any] | list[Any], dict[str, list[Any]]]


@dataclass(frozen=True)
class Arrow:
    """A column of a Parquet or Arrow file.

    Attributes:
        path: ``.parquet``, or ``.arrow`` and ``.feather`` (Arrow's file or stream format).
        key: Column, or path of a field inside structs.
        keep: Columns whose values go with each vector.
        optional: Those of ``keep`` that may be absent.
    """

    path: Path
    key: str | None = None
    keep: Sequence[str] = ()
    optional: Sequence[str] = ()

    def count(self) -> int:
        """Rows; of a Parquet file by its footer."""
        if self._is_parquet:
            return int(open_parquet(self.path).metadata.num_rows)
        with self._arrow_stream() as source:
            return sum(rows for rows, _ in arrow_contents(source))

    def blocks(self, dimension: int, size: int) -> Iterator[Block]:
        """Rows, at most ``size`` at a time.

        Raises:
            EmbeddingError: No such column, or one that holds no vectors.
        """
        batches = (
            self._parquet_batches(dimension, size)
            if self._is_parquet
            else (
                batch.slice(start, size)
                for batch in self._arrow_batches()
                for start in range(0, batch.num_rows, size)
            )
        )
        for batch in batches:
            columns = {name: self._values_of(batch, name) for name in self.keep}
            if wide := self._wide(batch.schema, dimension):
                numbers = [batch.column(name).to_numpy(zero_copy_only=False) for name in wide]
                yield np.column_stack(numbers).astype(np.float64), columns
                continue
            column = self._column(batch.schema)
            values = _field(batch.column(column[0]), column[1:])
            yield _values(values, dimension, self.path, ".".join(column)), columns

    def sizes(self, count: int) -> list[int]:
        """Find the sizes of some of the first vectors."""
        batches = self._arrow_batches()
        if self._is_parquet:
            file = open_parquet(self.path)
            columns = self._column(file.schema_arrow)[:1]
            batches = parquet_batches(self.path, columns, size=1, file=file)
        sizes: list[int] = []
        for batch in batches:
            column = self._column(batch.schema)
            values = _plain(_field(batch.column(column[0]), column[1:]).slice(0, count))
            if _is_dictionary_of_lists(values.type):
                values = _used(values)
            if _is_list(values.type):
                sizes += [_length(row) for row in values]
            else:
                sizes += map(size_of, column_values(self.path, values))
            if len(sizes) >= count or sum(sizes) > _BATCH_VALUES:
                break
        return sizes

    @property
    def _is_parquet(self) -> bool:
        return self.path.suffix.lower() in (".parquet", ".pq")

    def _values_of(self, batch: Any, name: str) -> list[Any]:
        path = _path_of(batch.schema, name)
        if path is None and name in self.optional:
            return [None] * int(batch.num_rows)
        if path is None:
            raise _no_column(self.path, name, batch.schema.names, CORRECT_KEEP)
        return column_values(self.path, _field(batch.column(path[0]), path[1:]))

    def _wide(self, schema: Any, dimension: int) -> list[str]:
        """The columns of a table with a number a column, in which none has a usual name."""
        if self.key is not None or any(_path_of(schema, name) for name in NAMES):
            return []
        others = [*self.keep, "__index_level_0__"]  # pandas
        names = [field.name for field in schema if _is_number(field.type)]
        wide = [names[place] for place in number_columns(names, dimension, others)]
        return wide if len(set(wide)) == dimension else []

    def _column(self, schema: Any) -> list[str]:
        names = [self.key] if self.key is not None else NAMES
        for name in names:
            path = _path_of(schema, name)
            if path is not None:
                return path
        raise _no_column(
            self.path, names[0], schema.names, "Pass --column with the one that holds the vectors"
        )

    def _parquet_batches(self, dimension: int, size: int) -> Iterator[Any]:
        file = open_parquet(self.path)
        wide = self._wide(file.schema_arrow, dimension)
        columns = list(wide) or self._column(file.schema_arrow)[:1]
        vectors = columns[0]
        for name in self.keep:
            other = _path_of(file.schema_arrow, name)
            if other is None and name not in self.optional:
                raise _no_column(self.path, name, file.schema_arrow.names, CORRECT_KEEP)
            columns += [] if other is None else [other[0]]
        columns = list(dict.fromkeys(columns))
        if file.metadata.num_rows > most_decompressed(self.path):  # of nulls, which take no room
            raise decompression_error(self.path)
        for group in range(file.metadata.num_row_groups):
            most = dimension if wide else self._values_per_row(file, group, vectors, dimension)
            step = max(1, min(size, int(_BATCH_VALUES / max(1.0, most))))
            yield from parquet_batches(self.path, columns, size=step, group=group, file=file)

    def _values_per_row(self, file: Any, group: int, name: str, dimension: int) -> float:
        """Numbers (or 4-byte words) in a row on average, so that a few long ones are not read."""
        # Damaged sizes are an error to whoever reads rows, but end the process if asked for first
        next(parquet_batches(self.path, [name], size=1, group=group, file=file), None)
        metadata = file.metadata.row_group(group)
        rows = max(1, metadata.num_rows)
        most = 1.0
        for index in range(metadata.num_columns):
            if not f"{file.schema.column(index).path}.".startswith(f"{name}."):
                continue
            column = metadata.column(index)
            numbers = column.num_values
            if column.physical_type == "BYTE_ARRAY":  # a number is 8 letters or more
                numbers = column.total_uncompressed_size // 32
            elif column.physical_type == "FIXED_LEN_BYTE_ARRAY":
                numbers *= file.schema.column(index).length // 8
            if numbers - rows * dimension > _EXCESS_VALUES:
                raise EmbeddingError(
                    f"vectors of {dimension} dimensions in {self.path}",
                    f"{numbers / rows:,.0f} values a row",
                    "Pass --column with the one that holds the vectors",
                )
            most = max(most, numbers / rows)
        return most

    def _arrow_batches(self) -> Iterator[Any]:
        import pyarrow as pa

        with self._arrow_stream() as source:
            start = source.tell()
            if sum(rows + size for rows, size in arrow_contents(source)) > most_decompressed(
                self.path
            ):
                raise decompression_error(self.path)
            source.seek(start)
            for batch in pa.ipc.open_stream(source):
                batch.validate(full=True)  # Arrow ends the process at damaged offsets
                yield batch

    @contextmanager
    def _arrow_stream(self) -> Iterator[Any]:
        """The file at the start of its stream; Arrow's file format is one between two marks."""
        import pyarrow as pa

        with pa.memory_map(str(self.path)) as source:
            source.seek(8 if source.read(6) == b"ARROW1" else 0)
            yield source


def _no_column(path: Path, name: str, names: Sequence[str], fix: str) -> EmbeddingError:
    return EmbeddingError(
        f"a column {name!r} in {path}", f"the columns {', '.join(map(repr, names))[:800]}", fix
    )


def _path_of(schema: Any, name: str) -> list[str] | None:
    """Column and fields of a dotted name; a column of the whole name comes first."""
    import pyarrow as pa

    if name in schema.names:
        return [name]
    first, *fields = name.split(".")
    if first not in schema.names:
        return None
    kind = schema.field(first).type
    for field in fields:
        if not pa.types.is_struct(kind) or kind.get_field_index(field) < 0:
            return None
        kind = kind.field(field).type
    return [first, *fields]


def _field(values: Any, fields: Sequence[str]) -> Any:
    import pyarrow.compute as pc

    for field in fields:
        values = pc.struct_field(values, field)
    return values


def _values(values: Any, dimension: int, path: Path, name: str) -> NDArray[Any] | list[Any]:
    """A block of a column: numbers [n, D] where all rows have them, else each row by itself."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = _plain(values)
    if _is_dictionary_of_lists(values.type):  # a long list that many rows share stays one
        rows_of = dict(
            zip(
                values.indices.unique().drop_null().to_pylist(),
                _values(_used(values), dimension, path, name),
                strict=True,
            )
        )
        return [rows_of.get(index) for index in values.indices.to_pylist()]
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if _is_list(kind):
        if "view" in str(kind):
            return _views(values, dimension)
        length = math.nan
        if not values.null_count:
            ends = pc.min_max(pc.list_value_length(values)).as_py()
            length = ends["min"] if ends["min"] == ends["max"] else math.nan
        if length == dimension and _is_number(kind.value_type):
            flat = values.flatten()
            if not flat.null_count:
                numbers = flat.to_numpy(zero_copy_only=False)
                rows: NDArray[Any] = np.ascontiguousarray(numbers).reshape(len(values), dimension)
                return rows
        return _lists(values, dimension)
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
            pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_null)  # fmt: skip
    if any(test(kind) for test in text) or "view" in str(kind):
        return column_values(path, values)
    raise EmbeddingError(
        f"lists of numbers in the column {name!r} of {path}", str(kind), "Pass --column"
    )


def _plain(values: Any) -> Any:
    """The storage of an extension type (fixed_shape_tensor and others)."""
    import pyarrow as pa

    return values.storage if isinstance(values.type, pa.BaseExtensionType) else values


def _is_dictionary_of_lists(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_dictionary(kind) and _is_list(kind.value_type)


def _used(values: Any) -> Any:
    """The lists of a dictionary that some row has, each once."""
    return values.dictionary.take(values.indices.unique().drop_null())


def _length(row: Any) -> int:
    """Numbers in a row of lists; one inside a list of one is looked into."""
    size = len(row) if row.is_valid else 0
    return size_of(row.as_py()) if size == 1 else size


def _lists(values: Any, dimension: int) -> list[Any]:
    """Convert each row to a list; one of another size to a reason."""
    rows: list[Any] = []
    for scalar in values:
        size = None if not scalar.is_valid else len(scalar)
        if size is None:
            rows.append(None)
        elif size in (1, dimension):
            rows.append(scalar.as_py())
        else:
            rows.append(Reason(f"{size} dimensions instead of {dimension}"))
    return rows


def _views(values: Any, dimension: int) -> list[Any]:
    """Convert each row of a list view, whose rows may lie in any order."""
    flat = values.values.to_numpy(zero_copy_only=False)
    rows: list[Any] = []
    for valid, start, size in zip(
        values.is_valid().to_pylist(),
        values.offsets.to_pylist(),
        values.sizes.to_pylist(),
        strict=True,
    ):
        if not valid:
            rows.append(None)
        elif size == dimension:
            rows.append(flat[start : start + size])
        else:
            rows.append(Reason(f"{size} dimensions instead of {dimension}"))
    return rows


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test, lambda kind: False)(kind) for test in tests)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    number: bool = (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    )
    return number


@dataclass(frozen=True)
class Csv:
    """A ``.csv`` or ``.tsv``: a column of vectors as text, or one number a column.

    Attributes:
        path: Also ``.gz`` or ``.zst``.
        key: Column, by the header.
        keep: Columns whose values go with each vector.
        optional: Those of ``keep`` that may be absent.
    """

    path: Path
    key: str | None = None
    keep: Sequence[str] = ()
    optional: Sequence[str] = ()

    def count(self) -> int:
        """Rows without the header."""
        rows = self._rows()
        first = next(rows, None)
        return (
            0 if first is None else sum(1 for _ in rows) + (_column_of_vectors(first) is not None)
        )

    def records(self, dimension: int) -> Iterator[tuple[Any, list[Any]]]:
        """Yield each vector as it is spelled, and the values to keep beside it.

        Raises:
            EmbeddingError: No such column.
        """
        rows = self._rows()
        first = next(rows, None)
        if first is None:
            return
        bare = _column_of_vectors(first)
        names = [str(i) for i in range(len(first))] if bare is not None else first
        columns = self._columns(names, bare, dimension, first)
        positions = [
            -1
            if name in self.optional and name not in names
            else self._position(names, name, CORRECT_KEEP)
            for name in self.keep
        ]
        for row in chain([first] if bare is not None else [], rows):
            cells = [row[i] if i < len(row) else "" for i in columns]
            vector: Any = (cells[0] or None) if len(cells) == 1 else f"[{','.join(cells)}]"
            yield vector, [row[i] if 0 <= i < len(row) else None for i in positions]

    def _columns(
        self, names: list[str], bare: int | None, dimension: int, first: list[str]
    ) -> list[int]:
        if self.key is not None:
            return [self._position(names, self.key, "Pass --column with that of the vectors")]
        for name in NAMES:
            if name in names:
                return [names.index(name)]
        if bare is not None and bare >= 0:
            return [bare]
        if wide := number_columns(names, dimension, self.keep, None if bare is None else first):
            return wide
        raise _no_column(
            self.path, NAMES[0], names, "Pass --column with the one that holds the vectors"
        )

    def _position(self, names: list[str], name: str, fix: str) -> int:
        if name not in names:
            raise _no_column(self.path, name, names, fix)
        return names.index(name)

    def _rows(self) -> Iterator[list[str]]:
        lines = (f"{line}\n" for line in text_lines(self.path, LINE_BYTES, _ONE_A_LINE))
        first = next(lines, None)
        if first is None:
            return
        delimiter = "\t" if ".tsv" in self.path.suffixes else _delimiter(first)
        csv.field_size_limit(LINE_BYTES)
        try:
            for row in csv.reader(chain([first], lines), delimiter=delimiter):
                if any(row):
                    yield row
        except csv.Error as error:
            raise EmbeddingError(
                f"a table of text in {self.path}", str(error), "Export it again"
            ) from error


def _delimiter(line: str) -> str:
    """The separator of a header, or of a first row outside of brackets."""
    outside = line.partition("[")[0] + line.rpartition("]")[2]
    counts = {mark: outside.count(mark) for mark in _DELIMITERS}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _column_of_vectors(first: list[str]) -> int | None:
    """Find the vectors' column in a table without a header, -1 for a number a column; else None."""
    for index, cell in enumerate(first):
        if cell.startswith(("[", "{")) or size_of(cell) > 1:
            return index
    try:
        numbers = [float(cell) for cell in first]
    except ValueError:
        return None
    return None if numbers == list(range(len(numbers))) else -1
