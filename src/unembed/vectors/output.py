"""Recovered texts on their way to a file: a part file that a later run goes on with."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from unembed.errors import EmbeddingError
from unembed.files import is_folder

_GROUP = 4096  # rows of a Parquet row group
_HEAD = "unembed"
FIELDS = ("row", "text", "token_ids", "confidences", "passes", "encoder_calls", "order", "cosine")
_INTEGERS = 1 << 62


def require_writable(out: Path, sources: list[Path]) -> None:
    """Refuse a place that cannot take the texts before anything is inverted.

    Raises:
        EmbeddingError: Another ending, a folder, no folder to be in, or one of the sources.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise EmbeddingError(
            "an --out that ends in .jsonl or .parquet", str(out), "Choose one of them"
        )
    if not is_folder(out.parent):
        raise EmbeddingError(
            f"a place to write {out}", f"no folder {out.parent}", "Choose another --out"
        )
    try:
        with suppress(FileNotFoundError):
            out.with_name(f"{out.name}.part").lstat()
        lost = out.resolve() in [path.resolve() for path in sources]
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise EmbeddingError(
            f"a place to write {out}", str(error), "Choose another --out"
        ) from error
    if is_folder(out) or lost:
        there = "a folder" if is_folder(out) else "the vectors themselves, which would be lost"
        raise EmbeddingError(f"a file to write at {out}", there, "Choose another --out")


def named_columns(columns: dict[str, Any]) -> dict[str, Any]:
    """Kept values as the output has them: plain data, names apart from a recovery's fields.

    A name of these gets ``source_`` before it, until it is no other column's.
    """
    values = {}
    for name, value in columns.items():
        new = name
        while new in FIELDS or (new != name and new in columns):
            new = f"source_{new}"
        values[plain(new)] = plain(value)
    return values


class PartFile:
    """Rows written so far, as JSON lines beside the file they become.

    Args:
        out: The file; the part file is ``out`` with ``.part`` at its end.
        identity: What the rows depend on. A part file of anything else is refused.

    Attributes:
        count: Rows in it.
        last: Index of the last vector in it; -1 without one.

    Raises:
        EmbeddingError: It cannot be written, another process is writing to it, or it is of other
            vectors or settings.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.out, self.path = out, out.with_name(out.name + ".part")
        self.count, self.last = 0, -1
        head = json.dumps({_HEAD: identity}, sort_keys=True).encode()
        # A link in its place would be written through
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            self._file: BinaryIO = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
        except (OSError, ValueError) as error:
            raise EmbeddingError(
                f"a place to write {self.path}", str(error), "Choose another --out"
            ) from error
        try:
            self._lock()
            self._go_on(head)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Refuse to write where another process writes; the lock ends with the file."""
        try:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EmbeddingError(
                f"{self.path} to be free",
                "another process writing to it",
                "Wait for it, or choose another --out",
            ) from error
        except (ImportError, OSError):
            return  # Windows, or a file system without locks

    def _go_on(self, head: bytes) -> None:
        first, end = self._file.readline(), 0
        if first.endswith(b"\n"):
            if first.rstrip() != head:
                raise EmbeddingError(
                    f"the beginning of the same call in {self.path}",
                    "one of other vectors, settings or weights",
                    "Repeat that call, delete the file, or choose another --out",
                )
            end = self._file.tell()
            for line in self._file:  # what was cut off in the middle is made again
                if not line.endswith(b"\n"):
                    break
                self.last, self.count = int(json.loads(line)["row"]), self.count + 1
                end += len(line)
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(head + b"\n")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append some rows; they survive the end of the process."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()
        if rows:
            self.count, self.last = self.count + len(rows), int(rows[-1]["row"])

    def finish(self) -> None:
        """Put the rows under the name of the file, which is replaced, and end the part file."""
        self._file.flush()
        parquet = self.path.with_name(self.path.name + ".whole")
        parquet.unlink(missing_ok=True)
        if self.out.suffix == ".parquet":
            _write_parquet(parquet, self._rows)
        else:
            self._file.seek(0)
            self._file.readline()
            with parquet.open("xb") as file:
                while block := self._file.read(1 << 20):
                    file.write(block)
        parquet.replace(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the part file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the part file for a later run; one without rows goes."""
        if not self._file.closed and not self.count:
            self.discard()
        self._file.close()

    def _rows(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        self._file.readline()
        yield from map(json.loads, self._file)


def plain(value: Any) -> Any:
    """A value of a kept column as JSON can write it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    if isinstance(value, str):  # half a surrogate pair, as cut-off JSON has it, fits no UTF-8
        return value.encode("utf-8", "backslashreplace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return plain(str(value))


def _write_parquet(path: Path, rows: Any) -> None:
    """Rows to Parquet; the types of kept columns are those of their values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds: dict[str, set[type]] = {}
    for row in rows():
        for name in row.keys() - set(FIELDS):
            value = row[name]
            wide = isinstance(value, int) and abs(value) > _INTEGERS
            kinds.setdefault(name, set()).add(str if wide else type(value))
    fields = [
        ("row", pa.int64()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int64())),
        ("confidences", pa.list_(pa.float32())),
        ("passes", pa.int64()),
        ("encoder_calls", pa.int64()),
        ("order", pa.list_(pa.int64())),
        ("cosine", pa.float32()),
    ]
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    kinds_of = {name: kind - {type(None)} for name, kind in sorted(kinds.items())}
    for name, kind in kinds_of.items():
        only = float if kind == {int, float} else next(iter(kind)) if len(kind) == 1 else str
        kinds_of[name] = {only}
        fields.append((name, types.get(only, pa.string())))
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []
        for row in rows():
            for name, kind in kinds_of.items():
                if next(iter(kind)) not in types and not isinstance(row.get(name), str | None):
                    row[name] = json.dumps(row[name], ensure_ascii=False)
            group.append(row)
            if len(group) >= _GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        writer.write_table(pa.Table.from_pylist(group, schema))
