"""Raw text from files: Parquet, JSON lines or plain text, read a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from unembed.errors import DataError

_BATCH_ROWS = 4096


def read_texts(path: Path, column: str = "text", skip: int = 0) -> Iterator[str]:
    """Yield the texts of a file in order, never holding more than a batch of it.

    Args:
        path: ``.parquet``, ``.jsonl`` (one object a line) or ``.txt`` (one text a line).
        column: Column or key that holds the text; plain text ignores it.
        skip: Texts to pass over first.

    Raises:
        DataError: The file cannot be read, or lacks the column.
    """
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".txt": _read_lines,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"a file ending in {', '.join(readers)}", str(path), "Convert the file")
    if not path.is_file():
        raise DataError("a text file", f"nothing at {path}", "Correct the path")
    return islice(reader(path, column), skip, None)


def count_texts(path: Path) -> int:
    """Number of texts, blank ones included: from the footer of Parquet, else the number of lines.

    Raises:
        DataError: The file cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return int(_open_parquet(path).metadata.num_rows)
    try:
        lines, last = 0, b"\n"
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                lines, last = lines + block.count(b"\n"), block
        return lines + (not last.endswith(b"\n"))
    except OSError as error:
        raise DataError(f"a readable file at {path}", str(error), "Correct the path") from error


def _open_parquet(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN202 - pyarrow is untyped
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a Parquet file at {path}", str(error), "Copy the file again") from error


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa

    file = _open_parquet(path)
    if column not in file.schema_arrow.names:
        raise _missing_column(path, column, file.schema_arrow.names)
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _as_text(text, path, column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"readable rows in {path}", str(error), "Copy the file again") from error


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path, column), start=1):
        try:
            row = json.loads(line) if line.strip() else {column: ""}
        except json.JSONDecodeError as error:
            raise DataError(
                "one JSON object a line", f"line {number} of {path}: {error}", "Correct the line"
            ) from error
        if not isinstance(row, dict) or column not in row:
            keys = list(row) if isinstance(row, dict) else [type(row).__name__]
            raise _missing_column(path, column, keys)
        yield _as_text(row[column], path, column)


def _read_lines(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"UTF-8 text in {path}", str(error), "Convert the file") from error
    except OSError as error:
        raise DataError(f"a readable file at {path}", str(error), "Correct the path") from error


def _as_text(value: object, path: Path, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"text in the column {column!r} of {path}", type(value).__name__, "Pass --column"
        )
    return value


def _missing_column(path: Path, column: str, found: list[str]) -> DataError:
    return DataError(
        f"a column {column!r} in {path}",
        f"the columns {', '.join(map(repr, found))}",
        "Pass --column with the one that holds the text",
    )
