"""Raw text from files or folders of them, in order, read a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from unembed.data.files import count_lines, file_format, read_lines, text_files
from unembed.errors import DataError

_BATCH_ROWS = 4096
_BUFFER_BYTES = 1 << 20
_LINE_BYTES = 64 << 20


def read_texts(path: Path, column: str = "text") -> Iterator[str]:
    """Yield the texts of a file or folder in order, never holding more than a batch of it.

    Args:
        path: ``.parquet``, ``.jsonl`` (one object a line) or ``.txt`` (one text a line), the last
            two also ``.gz`` or ``.zst``; or a folder of such files, read in the order of names.
        column: Column or key that holds the text; plain text ignores it.

    Raises:
        DataError: A file cannot be read or lacks the column, or the folder is one that
            `unembed prepare --stage 1` has not finished.
    """
    files = text_files(path)
    _refuse_unfinished(path)
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
        ".txt": _read_lines,
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
    if file_format(path) == ".parquet":
        return int(open_parquet(path).metadata.num_rows)
    return count_lines(path)


def _refuse_unfinished(folder: Path) -> None:
    """Half of a collection, read as if it were all, would go unnoticed."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return  # not ours
    if isinstance(found, dict) and found.get("kind") == "texts" and not found.get("complete"):
        raise DataError(
            f"a finished collection of texts in {folder}",
            "one that stopped on the way",
            "Run `unembed prepare --stage 1` again with the same options; it goes on",
        )


def open_parquet(path: Path):  # type: ignore[no-untyped-def]  # noqa: ANN201 - pyarrow is untyped
    """Open a Parquet file so that a large row group is read in pieces.

    Raises:
        DataError: It is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # pre_buffer would read all row groups ahead and keep them, at twice the time
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a Parquet file at {path}", str(error), "Copy the file again") from error


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa

    file = open_parquet(path)
    if column not in file.schema_arrow.names:
        raise missing_column(path, column, file.schema_arrow.names)
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _as_text(text, path, column)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"readable rows in {path}", str(error), "Copy the file again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"UTF-8 text in {path}", str(error), "Convert the file") from error


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path, column), start=1):
        where = f"line {number} of {path}"
        try:
            row = json.loads(line) if line.strip() else {column: ""}
        except (ValueError, RecursionError) as error:  # not JSON, a number too long, too deep
            raise DataError(
                "one JSON object a line", f"{where}: {error}", "Correct the line"
            ) from error
        if not isinstance(row, dict):
            found = f"{where}: a {type(row).__name__}"
            raise DataError("one JSON object a line", found, "Correct the line")
        if column not in row:
            raise missing_column(where, column, list(row))
        yield _as_text(row[column], where, column)


def _read_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(path, _LINE_BYTES), start=1):
        if line is None:
            raise DataError(
                f"lines of at most {_LINE_BYTES >> 20} MiB",
                f"a longer one, line {number} of {path}",
                "Break it up, or let `unembed prepare --stage 1` pass over it",
            )
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"UTF-8 text in {path}", f"line {number}: {error}", "Convert the file"
            ) from error


def _as_text(value: object, path: Path | str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"text in the column {column!r} of {path}", type(value).__name__, "Pass --column"
        )
    return value


def missing_column(path: Path | str, column: str, found: list[str]) -> DataError:
    """The error of a file without the column that was asked for."""
    return DataError(
        f"a column {column!r} in {path}",
        f"the columns {', '.join(map(repr, found))}",
        "Pass --column with the one that holds the text",
    )
