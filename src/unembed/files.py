"""Files: replaced in one step, digested, and texts read from them (plain, gz or zst); extras."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import BinaryIO, cast

from unembed.errors import ConfigError, DataError

_LINES = (".jsonl", ".json", ".txt", ".csv", ".tsv")
_KINDS = ".parquet, .jsonl, .json, .csv, .tsv or .txt (all but the first also with .gz or .zst)"
_DELIMITERS = {".csv": ",;", ".tsv": "\t"}
_COMPRESSED = (".gz", ".zst")
_READ_BUFFER = 1 << 20
_SIDE_FILES = ("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_SIDE_BYTES = 1 << 20  # of a JSON file looked at whole, to tell a side file
EXTRAS = {  # the extras of pyproject.toml → packages that are imported
    "chroma": ("chromadb",),
    "dedup": ("datasketch",),
    "demo": ("fastapi", "prometheus_client", "uvicorn"),
    "distributed": ("ray",),
    "duckdb": ("duckdb",),
    "elasticsearch": ("elasticsearch",),
    "evaluation": ("rouge_score", "sacrebleu"),
    "faiss": ("faiss",),
    "hub": ("datasets",),
    "lancedb": ("lance",),
    "languages": ("py3langid",),
    "milvus": ("milvus_lite", "pymilvus"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "opensearch": ("opensearchpy",),
    "pii": ("presidio_analyzer",),
    "plots": ("matplotlib",),
    "postgres": ("psycopg",),
    "qdrant": ("qdrant_client",),
    "redis": ("redis",),
    "tensorboard": ("tensorboard",),
}


def install_line(extra: str) -> str:
    """The command that installs an extra; from a checkout the package index may lack us."""
    checkout = (Path(__file__).parents[2] / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install 'unembed[{extra}]'"


def has_extra(extra: str) -> bool:
    """Whether the packages of an extra are installed."""
    return all(importlib.util.find_spec(name) is not None for name in EXTRAS[extra])


def require_extra(extra: str, purpose: str, otherwise: str = "") -> None:
    """Refuse to go on without the packages of an extra.

    Args:
        extra: A key of ``EXTRAS``.
        purpose: What needs them, for the message.
        otherwise: What to do in place of installing them: "leave --png out".

    Raises:
        ConfigError: One of them is not installed.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        fix = f"Run `{install_line(extra)}`" + (f", or {otherwise}" if otherwise else "")
        raise ConfigError(
            f"the packages of the extra {extra} for {purpose}",
            f"that {', '.join(missing)} is not installed",
            fix,
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a file to write beside ``path`` that takes its place when the block ends well.

    Its name cannot be guessed and it is created by us alone, so that no link of somebody else is
    followed. It is flushed to the disk before it is renamed; whatever goes wrong, it is removed.

    Raises:
        OSError: The folder or the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what `atomic` left in a folder when its process was killed; nobody else may write."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def file_format(path: Path) -> str:
    """The format of a text file by its name: ``.parquet``, ``.jsonl``, ``.csv``, ``.txt``.

    Raises:
        DataError: The name says none of them.
    """
    suffix = _known_format(path)
    if suffix is None:
        raise DataError(f"a file ending in {_KINDS}", str(path), "Convert the file")
    return suffix


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
            f"none that ends in {_KINDS}",
            "Choose another folder",
        )
    return files


def _is_text_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    known = _known_format(file) is not None and file.name not in _SIDE_FILES
    return known and not hidden and file.is_file() and not _is_one_object(file)


def _is_one_object(file: Path) -> bool:
    """Whether a JSON file is a single object over several lines, as those beside data sets are."""
    if file.suffix.lower() != ".json" or file.stat().st_size > _SIDE_BYTES:
        return False
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
        return "\n" in text and isinstance(json.loads(text), dict)
    except (OSError, ValueError, RecursionError):
        return False


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
        path: ``.parquet``, ``.jsonl`` (one object a line), ``.csv`` or ``.tsv`` (names in the
            first row) or ``.txt`` (one text a line), all but the first also ``.gz`` or ``.zst``;
            or a folder of such files, read in the order of names.
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
        ".csv": _read_csv,
        ".tsv": _read_csv,
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
    suffix = file_format(path)
    if suffix == ".parquet":
        return int(open_parquet(path).metadata.num_rows)
    if suffix in _DELIMITERS:
        return sum(1 for _ in csv_rows(path))
    return count_lines(path)


def _refuse_unfinished(folder: Path) -> None:
    """Half of a collection, read as if it were all, would go unnoticed."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
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
            problem = f"{where}: a {type(row).__name__}"
            raise DataError("one JSON object a line", problem, "Correct the line")
        if column not in row:
            raise missing_column(where, column, list(row))
        yield _as_text(row[column], where, column)


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
    lines = (f"{line}\n" for line in _read_lines(path, column))
    first = next(lines, "")
    delimiters = _DELIMITERS[file_format(path)]
    names = [next(csv.reader([first], delimiter=sign), []) for sign in delimiters]
    best = max(range(len(names)), key=lambda k: (column in names[k], len(names[k])))
    csv.field_size_limit(_LINE_BYTES)
    try:
        for cells in csv.reader(lines, delimiter=delimiters[best], strict=True):
            if cells:
                yield dict(zip_longest(names[best], cells[: len(names[best])], fillvalue=""))
    except csv.Error as error:
        raise DataError(f"rows of {delimiters[best]!r} in {path}", str(error), "Mend it") from error


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
