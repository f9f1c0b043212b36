"""Vectors from files and folders of them, a chunk in memory at a time, whatever the format."""

from __future__ import annotations

import lzma
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.vectors import VectorStatistics, row_peaks
from unembed.errors import EmbeddingError
from unembed.files import SIDE_FILES, exists, is_file, is_folder, read_json
from unembed.vectors.arrays import Npy, Npz, no_array
from unembed.vectors.numbers import Ranges, Reason, row_of, size_of, to_floats
from unembed.vectors.records import Json, find_vectors
from unembed.vectors.tables import Arrow, Csv

CHUNK = 1024
ROWS_SHOWN = 10
_SIDE_BYTES = 1 << 20  # of a JSON file beside others that is looked into
STDIN = "-"
_SUFFIXES = {
    ".npy": ".npy", ".npz": ".npz", ".safetensors": ".npy",
    ".parquet": ".parquet", ".pq": ".parquet", ".arrow": ".parquet", ".feather": ".parquet",
    ".ipc": ".parquet", ".json": ".json", ".jsonl": ".json", ".ndjson": ".json",
    ".csv": ".csv", ".tsv": ".csv",
}  # fmt: skip
_PACKED, _PACKABLE = (".gz", ".zst"), (".json", ".csv")
_MAGIC = {b"\x93NUMPY": ".npy", b"PK": ".npz", b"PAR1": ".parquet", b"ARROW1": ".arrow"}
# What the readers of the standard library, NumPy and Arrow raise for damaged or hostile files
_DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
           OverflowError, MemoryError, RuntimeError, SystemError, SyntaxError, ArithmeticError,
           zlib.error, lzma.LZMAError, zipfile.BadZipFile, struct.error)  # fmt: skip

# Float64 [n, D], a row of NaN with a reason where there is no vector, and the columns kept
Rows = tuple[NDArray[np.float64], dict[int, str], dict[str, list[Any]]]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Chunk of the vectors of a file.

    Attributes:
        rows: Index of each in the file, from 0, ascending.
        vectors: float64 [n, D], finite and not zero.
        end: Row of the file up to which it is read.
        columns: Values of the columns kept, by name, one for each vector.
    """

    rows: list[int]
    vectors: NDArray[np.float64]
    end: int
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def part(self, start: int, stop: int) -> Chunk:
        """The vectors from ``start`` to ``stop``; the file is read up to the last of them."""
        rows = self.rows[start:stop]
        end = self.end if stop >= len(self.rows) else rows[-1] + 1
        columns = {name: values[start:stop] for name, values in self.columns.items()}
        return Chunk(rows, self.vectors[start:stop], end, columns)


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors, or a folder of such files, read in the order of their names.

    Attributes:
        path: ``.npy`` and ``.safetensors`` (memory-mapped), ``.npz``, ``.parquet`` and ``.pq``,
            ``.arrow`` and ``.feather``, ``.json``, ``.jsonl`` and ``.ndjson``, ``.csv`` and
            ``.tsv``; text also ``.gz`` or ``.zst``.
        key: Array of an archive, which may be left out for a single one; column of a table, key
            of JSON, either also as a path (``response.body.data.0.embedding``). The usual names
            are tried if not given.
        skip_bad: Pass over vectors that are zero, not finite, missing or of another size (and
            lines that are no JSON), and count them in ``left_out``, by reason; else the first one
            is an error.
        keep: Columns or keys whose values go with each vector.
        ranges: Of a quantisation to 8 bits, to undo it.
        optional: Those of ``keep`` that a file may lack; None stands for them.
        left_out: Filled while reading.
        rows_left_out: The first ten rows of each reason.
        notes: What was taken for what; filled while reading.
        notes_shown: Those of them that were shown already.
        marks: What was noted once and is not to be again.
    """

    path: Path
    key: str | None = None
    skip_bad: bool = False
    keep: Sequence[str] = ()
    ranges: Ranges | None = None
    optional: Sequence[str] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    rows_left_out: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    notes_shown: list[str] = field(default_factory=list)
    marks: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, value in (("path", self.path), ("keep", self.keep)):  # from Python, as text
            if isinstance(value, str):
                object.__setattr__(self, name, Path(value) if name == "path" else (value,))
        if not isinstance(self.path, Path):
            raise EmbeddingError("the path of a file of vectors", repr(self.path), "Correct it")
        if not isinstance(self.key, str | None):
            raise EmbeddingError("a key or column as text", repr(self.key), "Correct key")
        if not isinstance(self.ranges, Ranges | None):
            raise EmbeddingError("Ranges", repr(self.ranges), "Make them with Ranges.parse")
        are_names = isinstance(self.keep, (list, tuple))
        if not are_names or not all(isinstance(name, str) for name in self.keep):
            raise EmbeddingError("names of columns to keep", repr(self.keep), "Correct keep")

    def __len__(self) -> int:
        """Rows, bad ones included; of JSON lines the lines.

        Raises:
            EmbeddingError: The file cannot be read.
        """
        total = 0
        for path in self.parts():
            with _damage_as_errors(path):
                total += self._source(path).count()
        return total

    def parts(self) -> list[Path]:
        """The file itself, or the files of vectors in the folder, sorted by name.

        Raises:
            EmbeddingError: Nothing there, or nothing that can hold vectors.
        """
        if not is_folder(self.path) or file_kind(self.path) is not None:
            _require_file(self.path)
            self._refuse_idle_key([self.path])
            return [self.path]
        files = sorted(file for file in self.path.rglob("*") if _is_part(file, self.path))
        if any(file.suffix.lower() != ".json" for file in files):
            for file in [file for file in files if _describes(file, self.key)]:
                self.note(f"{file} has no vectors and is passed over")
                files.remove(file)
        if not files:
            raise EmbeddingError(
                f"files of vectors in the folder {self.path}",
                "none",
                f"Put there {', '.join(_SUFFIXES)}",
            )
        self._refuse_idle_key(files)
        return files

    def chunks(self, dimension: int) -> Iterator[Chunk]:
        """The vectors in order.

        Args:
            dimension: Their size D.

        Raises:
            EmbeddingError: The file cannot be read, holds vectors of another size or none that can
                be inverted, or has a bad one that is not to be skipped.
        """
        end = usable = 0
        for vectors, reasons, columns in self._rows(dimension):
            peaks = row_peaks(vectors)
            for row in np.flatnonzero(~np.isfinite(peaks) | (peaks == 0)).tolist():
                reason = "only zeros" if peaks[row] == 0 else "NaN or infinity"
                reasons.setdefault(row, reason)
            for row in sorted(reasons):
                self._leave_out(end + row, reasons[row], dimension)
            good = [row for row in range(len(vectors)) if row not in reasons]
            first, end, usable = end, end + len(vectors), usable + len(good)
            metadata = {name: [values[row] for row in good] for name, values in columns.items()}
            yield Chunk([first + row for row in good], vectors[good], end, metadata)
        if not usable:
            left_out = "; ".join(self.describe_left_out())
            raise EmbeddingError(
                f"at least one vector that can be inverted in {self.path}",
                f"{end} left out: {left_out}" if end else "none at all",
                "Correct the file, or choose another",
            )

    def describe_left_out(self) -> list[str]:
        """Count the vectors left out for each reason, with the first of their rows."""
        lines = []
        for reason, count in self.left_out.items():
            rows = ", ".join(map(str, self.rows_left_out[reason]))
            lines.append(f"{count} × {reason} (row {rows}{', …' if count > ROWS_SHOWN else ''})")
        return lines

    def note(self, text: str | None) -> None:
        """Remember something that the reader of the texts should know, once."""
        if text is not None and text not in self.notes:
            self.notes.append(text)

    def compare(self, chunk: Chunk, statistics: VectorStatistics | None, encoder: str) -> None:
        """Note vectors that cannot be an encoder's, by what those have in common; once a file."""
        if statistics is None or not chunk.rows or "strange" in self.marks:
            return
        doubt = statistics.doubt(chunk.vectors, encoder)
        if doubt is not None:
            self.marks.add("strange")
            self.note(f"rows {chunk.rows[0]} to {chunk.rows[-1]} of {self.path}: {doubt}")

    def _refuse_idle_key(self, files: list[Path]) -> None:
        nameless = [path for path in files if path.suffix.lower() == ".npy"]
        if self.key is not None and nameless:
            raise EmbeddingError(
                f"no key (--key, --column) for {nameless[0]}, which holds one array without a name",
                repr(self.key),
                "Leave it out",
            )

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

    def _source(self, path: Path) -> Npy | Npz | Arrow | Json | Csv:
        kind = file_kind(path)
        if kind in (".npy", ".npz"):
            if set(self.keep) - set(self.optional):
                raise EmbeddingError(
                    "columns beside the vectors (--keep, --text-column)",
                    f"{path}, which has none",
                    "Use Parquet, CSV or JSON",
                )
            return Npz(path, self.key) if kind == ".npz" else Npy(path, self.key)
        if kind == ".parquet":
            return Arrow(path, self.key, self.keep, self.optional)
        if kind == ".csv":
            return Csv(path, self.key, self.keep, self.optional)
        return Json(path, self.key, self.skip_bad, self.keep, self.optional)

    def _rows(self, dimension: int) -> Iterator[Rows]:
        for path in self.parts():
            with _damage_as_errors(path):
                source = self._source(path)
                convert = partial(self._convert, dimension=dimension, path=path)
                if isinstance(source, (Npy, Npz)):
                    for array in source.blocks(dimension, CHUNK):
                        nothing: list[Any] = [None] * len(array)
                        yield convert(array, dict.fromkeys(self.keep, nothing))
                elif isinstance(source, Arrow):
                    for block, columns in source.blocks(dimension, CHUNK):
                        yield convert(block, columns)
                else:
                    items = (
                        source.records() if isinstance(source, Json) else source.records(dimension)
                    )
                    for block, columns in _gather(items, dimension, self.keep):
                        yield convert(block, columns)

    def _convert(
        self,
        block: NDArray[Any] | list[Any],
        columns: dict[str, list[Any]],
        *,
        dimension: int,
        path: Path,
    ) -> Rows:
        where = str(path)
        if isinstance(block, np.ndarray):
            vectors, note = to_floats(block, dimension, self.ranges, where)
            self.note(None if note is None else f"{where}: {note}")
            return vectors, {}, columns
        vectors, reasons = np.full((len(block), dimension), np.nan), {}
        for index, value in enumerate(block):
            row = row_of(value, dimension)
            if isinstance(row, str):
                reasons[index] = row
                continue
            floats, note = row[None], None
            if row.dtype != np.float64 or self.ranges is not None:
                floats, note = to_floats(row[None], dimension, self.ranges, where)
            self.note(None if note is None else f"{where}: {note}")
            vectors[index] = floats[0]
        return vectors, reasons, columns


def _gather(
    items: Iterator[tuple[Any, list[Any]]], dimension: int, keep: Sequence[str]
) -> Iterator[tuple[list[Any], dict[str, list[Any]]]]:
    """Records in blocks; each is turned into numbers at once, which take less room."""
    values: list[Any] = []
    rows: list[list[Any]] = []
    for value, row in items:
        numbers = row_of(value, dimension)
        values.append(Reason(numbers) if isinstance(numbers, str) else numbers)
        rows.append(row)
        if len(values) == CHUNK:
            yield values, _columns(keep, rows)
            values, rows = [], []
    if values:
        yield values, _columns(keep, rows)


def _columns(keep: Sequence[str], rows: list[list[Any]]) -> dict[str, list[Any]]:
    return {name: [row[index] for row in rows] for index, name in enumerate(keep)}


def vector_size(file: VectorFile) -> int:
    """Find the dimension of the vectors of a file: that of most of its first 1,024 rows.

    Raises:
        EmbeddingError: The file cannot be read, or no size can be told (no vectors, base64).
    """
    path = file.parts()[0]
    with _damage_as_errors(path):
        source = file._source(path)
        if isinstance(source, Arrow):
            sizes = Counter(source.sizes(CHUNK))
        elif isinstance(source, (Json, Csv)):
            records = source.records() if isinstance(source, Json) else source.records(0)
            sizes = Counter(size_of(value) for value, _ in islice(records, CHUNK))
        else:
            sizes = Counter(map(size_of, next(iter(source.blocks(0, CHUNK)), [])))
    del sizes[0]
    if not sizes:
        raise EmbeddingError(
            f"vectors in {file.path}, as lists of numbers", "none", "Say which column holds them"
        )
    return sizes.most_common(1)[0][0]


def _is_part(file: Path, folder: Path) -> bool:
    """Tell whether a file in a folder holds rows; what a library keeps beside them does not."""
    hidden = any(part[0] in "._" for part in file.relative_to(folder).parts)
    side = hidden or file.name in SIDE_FILES
    if file.name.startswith("cache-"):  # of a Hugging Face dataset: an order, or its rows again
        side |= is_file(file.with_name("state.json"))
    return not side and file_kind(file) is not None and file.is_file()


def _describes(file: Path, key: str | None) -> bool:
    """Tell whether a small JSON file is one object without vectors, as stands beside arrays."""
    if file.suffix.lower() != ".json":
        return False
    try:
        value = read_json(file, _SIDE_BYTES)
        return isinstance(value, dict) and find_vectors(value, key) is None
    except (OSError, ValueError, EmbeddingError):
        return False


def file_kind(path: Path) -> str | None:
    """The reader of a file by its name; None where it is no file of vectors."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    if suffixes[-1] in _PACKED:
        kind = _SUFFIXES.get(suffixes[-2] if len(suffixes) > 1 else "")
        return kind if kind in _PACKABLE else None
    return _SUFFIXES.get(suffixes[-1])


def _require_file(path: Path) -> None:
    if file_kind(path) is None:
        pickled = path.suffix.lower() in (".pkl", ".pickle", ".pt", ".pth")
        raise EmbeddingError(
            f"a file ending in {', '.join(_SUFFIXES)} (JSON and CSV also .gz or .zst), or a folder "
            "of such files",
            f"{path}, pickled data, which is never loaded" if pickled else str(path),
            "Save the vectors with numpy.save",
        )
    if not is_file(path):
        what = "NumPy array" if file_kind(path) == ".npy" else "file of vectors"
        actual = "nothing there"
        if exists(path):
            actual = "a folder" if is_folder(path) else "a pipe or a device"
        raise EmbeddingError(f"a {what} at {path}", actual, "Save the vectors with numpy.save")


@contextmanager
def _damage_as_errors(path: Path) -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into an error that names the file."""
    import pyarrow as pa

    try:
        yield
    except (*_DAMAGE, pa.ArrowException) as error:
        if file_kind(path) in (".npy", ".npz"):
            raise no_array(path, error) from error
        raise EmbeddingError(
            f"readable rows in {path}", str(error)[:400] or type(error).__name__, "Copy it again"
        ) from error


@contextmanager
def standard_input(stream: BinaryIO, source: VectorFile) -> Iterator[VectorFile]:
    """The vectors of a stream, copied to a temporary file whose kind its first bytes tell."""
    with tempfile.TemporaryDirectory(prefix="unembed-") as folder:
        head = stream.read(1 << 12)
        text = head.lstrip(b"\xef\xbb\xbf \r\n\t")
        suffix = ".json" if text[:1] in (b"[", b"{") else ".csv"
        suffix = next((s for magic, s in _MAGIC.items() if head.startswith(magic)), suffix)
        path = Path(folder) / f"stdin{suffix}"
        with path.open("wb") as file:
            file.write(head)
            shutil.copyfileobj(stream, file)
        yield replace(source, path=path)
