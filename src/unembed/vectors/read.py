"""Vectors from files, a chunk in memory at a time: .npy, .npz, Parquet, JSON lines."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError
from unembed.files import count_lines, open_parquet, read_lines

CHUNK = 1024
ROWS_SHOWN = 10
_KEY = "embedding"
_PACKED = (".gz", ".zst")
_MATRIX = 2
_LINE_BYTES = 16 << 20

# Vectors of a file in order, float64 [n, D]; a row of NaN with a reason where there is none
Raw = tuple[NDArray[np.float64], dict[int, str]]


@dataclass(frozen=True)
class Chunk:
    """Some vectors of a file.

    Attributes:
        rows: Index of each in the file, from 0, ascending.
        vectors: float64 [n, D], finite and not zero.
        read: Rows of the file read so far.
    """

    rows: list[int]
    vectors: NDArray[np.float64]
    read: int


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors.

    Attributes:
        path: ``.npy`` (one vector [D] or many [N, D], memory-mapped), ``.npz`` (read in order from
            the archive), ``.parquet`` (a column of lists) or ``.jsonl`` (objects with a key, or
            bare lists; also ``.gz`` or ``.zst``).
        key: Array of an ``.npz``, which may be left out for a single one; column or key of the
            others, ``embedding`` if not given.
        skip_bad: Pass over vectors that are zero, not finite, missing or of another size (and
            lines that are no JSON), and count them in ``left_out``, by reason; else the first one
            is an error.
        left_out: Filled while reading.
        rows_left_out: The first ten rows of each reason.
    """

    path: Path
    key: str | None = None
    skip_bad: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    rows_left_out: dict[str, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Rows, bad ones included.

        Raises:
            EmbeddingError: The file cannot be read.
        """
        kind = _kind(self.path)
        if kind == ".parquet":
            return int(open_parquet(self.path).metadata.num_rows)
        if kind == ".jsonl":
            return count_lines(self.path)
        if kind == ".npz":
            try:
                with _member(self.path, self.key) as file:
                    return _rows(_header(file)[0])
            except ValueError as error:
                raise _no_array(self.path, error) from error
        return _rows(_map(self.path).shape)

    def chunks(self, dimension: int) -> Iterator[Chunk]:
        """The vectors in order.

        Args:
            dimension: Their size D.

        Raises:
            EmbeddingError: The file cannot be read, holds vectors of another size or none that can
                be inverted, or has a bad one that is not to be skipped.
        """
        read = usable = 0
        for vectors, reasons in self._raw(dimension):
            norms = np.linalg.norm(vectors, axis=1)
            for row in np.flatnonzero(~np.isfinite(norms) | (norms == 0)).tolist():
                found = "only zeros" if norms[row] == 0 else "NaN or infinity"
                reasons.setdefault(row, found)
            for row in sorted(reasons):
                self._leave_out(read + row, reasons[row], dimension)
            good = [row for row in range(len(vectors)) if row not in reasons]
            first, read, usable = read, read + len(vectors), usable + len(good)
            yield Chunk([first + row for row in good], vectors[good], read)
        if not usable:
            left_out = "; ".join(self.describe_left_out())
            raise EmbeddingError(
                f"at least one vector that can be inverted in {self.path}",
                f"{read} left out: {left_out}" if read else "none at all",
                "Correct the file, or choose another --embedding",
            )

    def describe_left_out(self) -> list[str]:
        """For each reason the number of vectors left out and the first of their rows."""
        lines = []
        for reason, count in self.left_out.items():
            rows = ", ".join(map(str, self.rows_left_out[reason]))
            lines.append(f"{count} × {reason} (row {rows}{', …' if count > ROWS_SHOWN else ''})")
        return lines

    def _leave_out(self, row: int, reason: str, dimension: int) -> None:
        if not self.skip_bad:
            raise EmbeddingError(
                f"finite, non-zero vectors of {dimension} dimensions",
                f"{reason} in vector {row} of {self.path} (counted from 0)",
                "Leave it out, or pass --skip-bad",
            )
        self.left_out[reason] += 1
        rows = self.rows_left_out.setdefault(reason, [])
        if len(rows) < ROWS_SHOWN:
            rows.append(row)

    def _raw(self, dimension: int) -> Iterator[Raw]:
        kind = _kind(self.path)
        if kind == ".npy":
            return _sliced(_map(self.path), dimension, self.path)
        if kind == ".npz":
            return _archived(self.path, self.key, dimension)
        if kind == ".parquet":
            return _column(self.path, self.key or _KEY, dimension)
        return _lines(self.path, self.key or _KEY, dimension, self.skip_bad)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix in (".jsonl", ".json")]
    last = suffixes[-1] if suffixes else ""
    kind = ".jsonl" if last == ".json" else last
    if kind not in (".npy", ".npz", ".parquet", ".jsonl"):
        raise EmbeddingError(
            "a file ending in .npy, .npz, .parquet or .jsonl (the last also .gz or .zst)",
            str(path),
            "Save the vectors with numpy.save",
        )
    if not path.is_file():
        what = "NumPy array" if kind == ".npy" else "file of vectors"
        found = "a folder" if path.is_dir() else "nothing there"
        raise EmbeddingError(f"a {what} at {path}", found, "Save the vectors with numpy.save")
    return kind


def _map(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _no_array(path, error) from error
    return array


def _no_array(path: Path, error: Exception) -> EmbeddingError:
    return EmbeddingError(
        f"a NumPy array at {path}", str(error), "Save the vectors with numpy.save"
    )


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == _MATRIX else 1


def _checked(shape: tuple[int, ...], kind: np.dtype[Any], dimension: int, path: Path) -> None:
    """Refuse an array of another size or of what are no numbers."""
    if kind.kind not in "fiub":
        raise EmbeddingError(f"numbers in {path}", str(kind), "Save the vectors with numpy.save")
    if len(shape) not in (1, _MATRIX) or shape[-1] != dimension:
        raise EmbeddingError(
            f"embeddings of {dimension} dimensions, [{dimension}] or [N, {dimension}]",
            f"shape {list(shape)} in {path}",
            "Use vectors of the encoder the inverter was trained for",
        )


def _sliced(array: NDArray[Any], dimension: int, path: Path) -> Iterator[Raw]:
    _checked(array.shape, array.dtype, dimension, path)
    matrix = array[None] if array.ndim == 1 else array
    for start in range(0, len(matrix), CHUNK):
        yield np.asarray(matrix[start : start + CHUNK], dtype=np.float64), {}


class _member:  # noqa: N801 - used as a function
    """One array of an archive as a stream."""

    def __init__(self, path: Path, key: str | None) -> None:
        self._path, self._key = path, key

    def __enter__(self) -> BinaryIO:
        try:
            self._archive = zipfile.ZipFile(self._path)
        except (OSError, zipfile.BadZipFile) as error:
            raise EmbeddingError(
                f"an .npz archive at {self._path}", str(error), "Save it with numpy.savez"
            ) from error
        names = [n.removesuffix(".npy") for n in self._archive.namelist() if n.endswith(".npy")]
        only = names[0] if len(names) == 1 else None
        key = self._key or only
        if key not in names:
            self._archive.close()
            asked = "one array" if self._key is None else f"an array {self._key!r}"
            found = ", ".join(names) or "none"
            fix = "Pass --key with its name" if names else "Save the vectors with numpy.savez"
            raise EmbeddingError(f"{asked} in {self._path}", found, fix)
        return cast(BinaryIO, self._archive.open(f"{key}.npy"))

    def __exit__(self, *error: object) -> None:
        self._archive.close()


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of the array that follows."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    return readers[version](file)


def _archived(path: Path, key: str | None, dimension: int) -> Iterator[Raw]:
    try:
        with _member(path, key) as file:
            shape, by_columns, kind = _header(file)
            _checked(shape, kind, dimension, path)
            if by_columns and len(shape) == _MATRIX:
                raise ValueError("an array stored column by column; save it with order='C'")
            left = _rows(shape)
            while left:
                count = min(CHUNK, left)
                data = file.read(count * dimension * kind.itemsize)
                rows = np.frombuffer(data, dtype=kind).reshape(count, dimension)
                left -= count
                yield rows.astype(np.float64), {}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise _no_array(path, error) from error


def _column(path: Path, key: str, dimension: int) -> Iterator[Raw]:
    import pyarrow as pa

    file = open_parquet(path)
    names = file.schema_arrow.names
    if key not in names:
        raise EmbeddingError(
            f"a column {key!r} in {path}",
            f"the columns {', '.join(map(repr, names))}",
            "Pass --column with the one that holds the vectors",
        )
    kind = file.schema_arrow.field(key).type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(test(kind) for test in lists):
        raise EmbeddingError(
            f"lists of numbers in the column {key!r} of {path}", str(kind), "Pass --column"
        )
    try:
        for batch in file.iter_batches(batch_size=CHUNK, columns=[key]):
            yield _rows_of(batch.column(0).to_pylist(), dimension)
    except (pa.ArrowException, OSError) as error:
        raise EmbeddingError(
            f"readable rows in {path}", str(error), "Copy the file again"
        ) from error


def _lines(path: Path, key: str, dimension: int, skip_bad: bool) -> Iterator[Raw]:
    values: list[Any] = []
    for number, line in enumerate(read_lines(path, _LINE_BYTES), start=1):
        try:
            values.append(_value(line, key, f"line {number} of {path}"))
        except EmbeddingError as error:
            if not skip_bad:
                raise
            values.append(error)
        if len(values) == CHUNK:
            yield _rows_of(values, dimension)
            values = []
    if values:
        yield _rows_of(values, dimension)


def _value(line: bytes | None, key: str, where: str) -> Any:
    """What a line gives in the place of a vector."""
    try:
        if line is None:
            raise ValueError(f"more than {_LINE_BYTES >> 20} MiB")
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EmbeddingError(
            "one JSON object or list a line", f"{where}: {error}", "Correct the line"
        ) from error
    if isinstance(row, dict) and key not in row:
        raise EmbeddingError(
            f"a key {key!r} in {where}",
            f"the keys {', '.join(map(repr, row))}",
            "Pass --key with the one that holds the vector",
        )
    return row[key] if isinstance(row, dict) else row


def _rows_of(values: list[Any], dimension: int) -> Raw:
    """Lists → rows; what is no list of the right size becomes NaN and a reason."""
    rows = np.full((len(values), dimension), np.nan)
    reasons: dict[int, str] = {}
    for index, value in enumerate(values):
        if value is None:
            reasons[index] = "no vector"
        elif isinstance(value, EmbeddingError):
            reasons[index] = "no JSON with the key that was asked for"
        elif not isinstance(value, list) or (value and isinstance(value[0], list)):
            reasons[index] = "no list of numbers"
        elif len(value) != dimension:
            reasons[index] = f"{len(value)} dimensions instead of {dimension}"
        else:
            try:
                rows[index] = value
            except (TypeError, ValueError, OverflowError):
                reasons[index] = "no list of numbers"
    return rows, reasons
