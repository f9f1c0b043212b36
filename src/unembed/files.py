"""Text files and folders of them: which there are, their format, their lines; plain, gz or zst."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from unembed.errors import DataError

_LINES = (".jsonl", ".json", ".txt")
_COMPRESSED = (".gz", ".zst")
_READ_BUFFER = 1 << 20
_BLOCK = 1 << 16
_BLOCKS, _LEAST_BLOCKS = 4096, 16  # read for a digest: in all, and of each of many files
_SIDE_FILES = ("manifest.json",)


def file_format(path: Path) -> str:
    """The format of a text file by its name: ``.parquet``, ``.jsonl`` or ``.txt``.

    Raises:
        DataError: The name says none of them.
    """
    found = _known_format(path)
    if found is None:
        raise DataError(
            "a file ending in .parquet, .jsonl, .txt (the last two also with .gz or .zst)",
            str(path),
            "Convert the file",
        )
    return found


def _known_format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    elif suffixes and suffixes[-1] == ".parquet":
        return ".parquet"
    last = suffixes[-1] if suffixes else ""
    if last not in _LINES:
        return None
    return ".jsonl" if last == ".json" else last


def require_apart(source: Path, out: Path) -> None:
    """Refuse to write into the folder that is read: what is written would be read as text.

    Raises:
        DataError: ``out`` is the folder ``source``, or lies in it.
    """
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise DataError(f"an --out folder outside of {source}", str(out), "Choose another --out")


def make_folder(out: Path) -> None:
    """Create a folder for what a command writes, unless it is there.

    Raises:
        DataError: It cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"a folder at {out}", str(error), "Choose another --out") from error


def text_files(path: Path) -> list[Path]:
    """The text files of a path: itself, or those in a folder and its folders, sorted by name.

    Raises:
        DataError: Nothing is there, or nothing that holds text.
    """
    if path.is_file():
        file_format(path)
        return [path]
    if not path.is_dir():
        if path.suffix:
            file_format(path)
        raise DataError("a text file", f"nothing at {path}", "Correct the path")
    files = sorted(file for file in path.rglob("*") if _is_text_file(file, path))
    if not files:
        raise DataError(
            f"a text file in the folder {path}",
            "none that ends in .parquet, .jsonl, .json or .txt (the last three also .gz or .zst)",
            "Choose another folder",
        )
    return files


def _is_text_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    known = _known_format(file) is not None and file.name not in _SIDE_FILES
    return known and not hidden and file.is_file()


def source_digest(path: Path) -> str:
    """SHA-256 by which a changed source is noticed: of the files' names, sizes and content.

    A folder's names are taken below it, a file's own not at all. A file of up to 256 MiB is read
    whole; of a larger one 4096 blocks of 64 KiB are: the first, the last and evenly spaced ones.
    Of n files each gets an n-th of that, but at least 16 blocks.

    Raises:
        DataError: There is no text file.
    """
    files = text_files(path)
    blocks = max(_LEAST_BLOCKS, _BLOCKS // len(files))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= blocks * _BLOCK:
                digest.update(hashlib.file_digest(content, "sha256").digest())
                continue
            for block in range(blocks):
                content.seek((size - _BLOCK) * block // (blocks - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def read_lines(path: Path, limit: int | None = None) -> Iterator[bytes | None]:
    """Yield the lines of a file without their ends.

    Args:
        path: Plain, ``.gz`` or ``.zst``.
        limit: Longest line in bytes. A longer one is passed over, never held whole, and ``None``
            stands in its place.

    Raises:
        DataError: The file cannot be read, or its compressed data is damaged.
    """
    try:
        with _open(path) as file:
            yield from _split(file, limit)
    except FileNotFoundError as error:
        raise DataError("a text file", f"nothing at {path}", "Correct the path") from error
    except (OSError, EOFError, zlib.error) as error:
        packed = path.suffix.lower() in _COMPRESSED
        expected = f"whole {path.suffix} data in {path}" if packed else f"a readable file at {path}"
        fix = "Copy the file again" if packed else "Correct the path"
        raise DataError(expected, str(error), fix) from error


def count_lines(path: Path) -> int:
    """Number of lines of a file; a last one without its end counts.

    Raises:
        DataError: The file cannot be read, or its compressed data is damaged.
    """
    return sum(1 for _ in read_lines(path, _READ_BUFFER))


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, io.BufferedReader(gzip.open(path, "rb"), _READ_BUFFER))
    if suffix == ".zst":
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd", buffer_size=_READ_BUFFER)
        return cast(BinaryIO, io.BufferedReader(stream, _READ_BUFFER))
    return path.open("rb", buffering=_READ_BUFFER)


def _split(file: BinaryIO, limit: int | None) -> Iterator[bytes | None]:
    size = -1 if limit is None else limit
    first = True
    while line := file.readline(size):
        if len(line) == limit and not line.endswith(b"\n"):
            while (rest := file.readline(size)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            line = line.removeprefix(codecs.BOM_UTF8) if first else line
            yield line.removesuffix(b"\n").removesuffix(b"\r")
        first = False


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
