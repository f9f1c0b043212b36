"""Rows of Parquet, JSON lines, CSV and plain text: a batch at a time, no line past a limit."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from unembed.errors import DataError
from unembed.files import (
    MANIFEST_BYTES,
    count_lines,
    file_format,
    is_file,
    read_json,
    read_lines,
    text_files,
)

_DELIMITERS = {".csv": ",;", ".tsv": "\t"}
BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20
LINE_BYTES = 64 << 20
_BREAK_UP = "Break it up, or let `unembed prepare --stage 1` pass over it"


def read_texts(path: str | Path, column: str = "text") -> Iterator[str]:
    """Yield the texts of a file or folder in order, never holding more than a batch of it.

    Args:
        path: ``.parquet``, ``.jsonl`` (one object a line), ``.csv`` or ``.tsv`` (names in the
            first row) or ``.txt`` (one text a line), all but the first also ``.gz`` or ``.zst``;
            or a folder of such files, read in the order of names.
        column: Column or key that holds the text; plain text ignores it.

    Raises:
        DataError: A file cannot be read or lacks the column, or the folder is one that
            `unembed prepare --stage 1` has not finished.
    """
    files = text_files(path)
    _refuse_unfinished(Path(path))
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".txt": _read_text,
    }
    return chain.from_iterable(readers[file_format(file)](file, column) for file in files)


def require_texts(path: Path, column: str = "text") -> None:
    """Refuse a wrong file, a wrong column or no text at all before anything is done for them.

    Raises:
        DataError: As `read_texts`, or there is no text.
    """
    if next(read_texts(path, column), None) is None:
        raise DataError(f"texts in {path}", "an empty file", "Choose another source")


def count_texts(path: Path) -> int:
    """Number of texts, blank ones included: from the footer of Parquet, else the number of lines.

    Raises:
        DataError: A file cannot be read.
    """
    return sum(_count(file) for file in text_files(path))


def _count(path: Path) -> int:
    suffix = file_format(path)
    if suffix == ".parquet":
        return int(open_parquet(path).metadata.num_rows)
    if suffix in _DELIMITERS:
        return sum(1 for _ in csv_rows(path))
    return count_lines(path)


def _refuse_unfinished(folder: Path) -> None:
    """Half of a collection, read as if it were all, would go unnoticed."""
    manifest = folder / "manifest.json"
    if not is_file(manifest):
        return
    try:
        data = read_json(manifest, MANIFEST_BYTES)
    except ValueError:
        return  # not ours
    if isinstance(data, dict) and data.get("kind") == "texts" and not data.get("complete"):
        raise DataError(
            f"a finished collection of texts in {folder}",
            "one that stopped on the way",
            "Run `unembed prepare --stage 1` again with the same options; it goes on",
        )


def open_parquet(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN201 - pyarrow is untyped
    """Open a Parquet file so that a large row group is read in pieces.

    Columns of text come as dictionaries: a long one that the file holds once takes its room once.

    Raises:
        DataError: It is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # pre_buffer would read all row groups ahead and keep them, at twice the time
    options: dict[str, Any] = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    try:
        file = pq.ParquetFile(path, **options)
        columns = [file.schema.column(index) for index in range(len(file.schema.names))]
        texts = [
            column.path
            for column in columns
            if column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level
        ]
        file.schema_arrow.names  # noqa: B018 - a name that is no UTF-8 is an error here
        if file.metadata.num_rows < 0:
            raise OSError(f"{file.metadata.num_rows} rows")
        return pq.ParquetFile(path, metadata=file.metadata, read_dictionary=texts, **options)
    except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        raise DataError(f"a Parquet file at {path}", str(error), "Copy the file again") from error


def column_values(path: Path, column: Any) -> list[Any]:
    """Convert a part of a column to Python; equal texts are one object, however long and many.

    Raises:
        DataError: Text that is no UTF-8, or damaged.
    """
    import pyarrow as pa

    try:
        if not pa.types.is_dictionary(column.type):
            values: list[Any] = column.to_pylist()
            return values
        used = column.indices.unique().drop_null()
        texts = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
        return [texts.get(index) for index in column.indices.to_pylist()]
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"UTF-8 text in {path}", str(error), "Convert the file") from error


def parquet_batches(
    path: Path,
    columns: Sequence[str],
    *,
    size: int = BATCH_ROWS,
    group: int | None = None,
    file: Any = None,
) -> Iterator[Any]:
    """Yield the rows of some columns of a Parquet file, as Arrow record batches.

    Args:
        path: The file.
        columns: Names of the columns, which are there.
        size: Most rows in a batch.
        group: The row group to read; all when None.
        file: The file as `open_parquet` opened it; opened here when None.

    Raises:
        DataError: It is no Parquet file, or damaged.
    """
    import pyarrow as pa

    file = open_parquet(path) if file is None else file
    groups = None if group is None else [group]
    try:
        yield from file.iter_batches(batch_size=size, row_groups=groups, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"readable rows in {path}", str(error), "Copy the file again") from error


class JsonLine(NamedTuple):
    """A line of a file of JSON lines.

    Attributes:
        number: From 1.
        value: What it spells; None where it has a fault.
        fault: ``blank``, ``too_long``, ``invalid_utf8``, ``not_json``, or None.
        detail: The fault in words.
    """

    number: int
    value: Any = None
    fault: str | None = None
    detail: str = ""


def json_lines(path: Path, limit: int | None = None) -> Iterator[JsonLine]:
    """Parse the lines of a file, and say what is wrong with those that are no JSON.

    Args:
        path: Plain, ``.gz`` or ``.zst``.
        limit: Longest line in bytes, 64 MiB when None; a longer one is never held whole.

    Raises:
        DataError: The file cannot be read, or its compressed data is damaged.
    """
    limit = LINE_BYTES if limit is None else limit
    for number, raw in enumerate(read_lines(path, limit), start=1):
        if raw is None:
            yield JsonLine(number, None, "too_long", f"more than {limit >> 20} MiB")
            continue
        try:
            line = raw.decode("utf-8")
            if line.strip():
                yield JsonLine(number, json.loads(line))
            else:
                yield JsonLine(number, None, "blank", "a blank line")
        except UnicodeDecodeError as error:
            yield JsonLine(number, None, "invalid_utf8", str(error))
        except (ValueError, RecursionError) as error:  # not JSON, a number too long, too deep
            yield JsonLine(number, None, "not_json", str(error))


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        raise missing_column(path, column, file.schema_arrow.names)
    for batch in parquet_batches(path, [column], file=file):
        for text in column_values(path, batch.column(0)):
            yield _as_text(text, path, column)


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for line in json_lines(path):
        where = f"line {line.number} of {path}"
        if line.fault == "blank":
            yield ""
            continue
        if line.fault is not None:
            raise _line_error(path, line)
        if not isinstance(line.value, dict):
            problem = f"{where}: a {type(line.value).__name__}"
            raise DataError("one JSON object a line", problem, "Write each text as a line (.jsonl)")
        if column not in line.value:
            raise missing_column(where, column, list(line.value))
        yield _as_text(line.value[column], where, column)


def _line_error(path: Path, line: JsonLine) -> DataError:
    if line.fault == "too_long":
        return _too_long(path, line.number, LINE_BYTES, _BREAK_UP)
    if line.fault == "invalid_utf8":
        return _not_utf8(path, line.number, line.detail)
    problem = f"line {line.number} of {path}: {line.detail}"
    is_document = ".json" in path.suffixes and line.number == 1  # over several lines
    fix = "Write each object as a line (.jsonl)" if is_document else "Correct the line"
    return DataError("one JSON object a line", problem, fix)


def _read_text(path: Path, column: str) -> Iterator[str]:
    return text_lines(path)


def _read_csv(path: Path, column: str) -> Iterator[str]:
    for row in csv_rows(path, column):
        if column not in row:
            raise missing_column(path, column, list(row))
        yield row[column]


def csv_rows(path: Path, column: str = "text") -> Iterator[dict[str, str]]:
    """Yield the rows of a ``.csv`` or ``.tsv`` file by the names in its first row.

    Args:
        path: Plain, ``.gz`` or ``.zst``. Fields may be quoted and hold line ends.
        column: Found among the names, it tells commas from semicolons between the fields; else
            the sign that makes more names does.

    Raises:
        DataError: The file cannot be read, is not UTF-8, or a quoted field has no end.
    """
    lines = (f"{line}\n" for line in text_lines(path))
    first = next(lines, "")
    delimiters = _DELIMITERS[file_format(path)]
    names = [next(csv.reader([first], delimiter=sign), []) for sign in delimiters]
    best = max(range(len(names)), key=lambda k: (column in names[k], len(names[k])))
    csv.field_size_limit(LINE_BYTES)
    try:
        for cells in csv.reader(lines, delimiter=delimiters[best], strict=True):
            if cells:
                yield dict(zip_longest(names[best], cells[: len(names[best])], fillvalue=""))
    except csv.Error as error:
        raise DataError(f"rows of {delimiters[best]!r} in {path}", str(error), "Mend it") from error


def text_lines(path: Path, limit: int | None = None, fix: str | None = None) -> Iterator[str]:
    """Yield the lines of a file as text, without their ends.

    Args:
        path: Plain, ``.gz`` or ``.zst``.
        limit: Longest line in bytes, 64 MiB when None.
        fix: What to do about a longer one, for the message.

    Raises:
        DataError: A line is longer or is not UTF-8, or the file cannot be read.
    """
    limit = LINE_BYTES if limit is None else limit
    for number, line in enumerate(read_lines(path, limit), start=1):
        if line is None:
            raise _too_long(path, number, limit, _BREAK_UP if fix is None else fix)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, str(error)) from error


def _too_long(path: Path, number: int, limit: int, fix: str) -> DataError:
    return DataError(
        f"lines of at most {limit >> 20} MiB", f"a longer one, line {number} of {path}", fix
    )


def _not_utf8(path: Path, number: int, detail: str) -> DataError:
    return DataError(f"UTF-8 text in {path}", f"line {number}: {detail}", "Convert the file")


def _as_text(value: object, path: Path | str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"text in the column {column!r} of {path}", type(value).__name__, "Pass --column"
        )
    return value


def missing_column(path: Path | str, column: str, names: list[str]) -> DataError:
    """The error of a file without the column that was asked for."""
    return DataError(
        f"a column {column!r} in {path}",
        f"the columns {', '.join(map(repr, names))}",
        "Pass --column with the one that holds the text",
    )
