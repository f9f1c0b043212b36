"""Vectors in files as a store: .npy, .npz, .safetensors, Parquet, Arrow, JSON lines, CSV."""

from __future__ import annotations

import json
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from unembed.data.readers import open_parquet
from unembed.errors import StoreError, UnembedError, require_whole
from unembed.files import read_lines
from unembed.vectors.arrays import Npy, Npz
from unembed.vectors.numbers import Reason, to_floats
from unembed.vectors.read import VectorFile, file_kind
from unembed.vectors.records import LINE_BYTES, NAMES, Json
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    BATCH,
    Store,
    StoreFacts,
    VectorBatch,
    choose_fields,
    draw_ids,
)
from unembed.vectors.tables import Csv

_FLOAT_BYTES = 4
_PEEKED = 64  # rows from which the dimension is taken


class FileStore(Store):
    """A file of vectors, or a folder of such files; the ids are the rows, from 0.

    Arrays are memory-mapped, and a sample reads its own rows. Of other formats a sample goes
    through the file once, a chunk in memory at a time.
    """

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        size = address.options.get("dimension", "1")
        if not size.isdecimal() or address.options.keys() - {"dimension"}:
            query = "&".join(f"{name}={value}" for name, value in address.options.items())
            expected = "column=, text= and dimension=NUMBER behind the path of files"
            raise StoreError(expected, repr(query), "Correct the address")
        self._file = VectorFile(address.path, address.column, skip_bad=True)
        try:
            parts = self._file.parts()
            text, fields = choose_fields(_columns(parts[0]), address.text, address.keep)
            beside = tuple(dict.fromkeys([*([text] if text else []), *address.keep]))
            self._file = VectorFile(address.path, address.column, skip_bad=True, keep=beside)
            dimension = int(address.options.get("dimension") or 0)
            dimension = dimension or _dimension(parts[0], address.column)
            count = len(self._file)
        except UnembedError as error:
            raise StoreError(error.expected, error.actual, error.fix) from error
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StoreError(
                f"vectors in {address.path}", str(error), "Save them with numpy.save"
            ) from error
        self.facts = StoreFacts(
            kind="file",
            collection=address.path.name,
            count=count,
            dimension=dimension,
            stored_type=f"as in the file ({parts[0].suffix})",
            text=text,
            fields=fields,
            authentication=_readers(parts[0]),
            encryption="none: the file is readable as it is",
        )

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Rows, as text."""
        return map(str, range(_row(after) + 1, self.facts.count))

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by their number; see `Store.fetch`."""
        if isinstance(ids, str):
            raise StoreError("ids of rows, as many as are wanted", repr(ids), "Pass them in a list")
        last = self.facts.count - 1
        ids = [str(name) for name in ids if str(name).isdecimal() and int(name) <= last]
        if not ids:
            nothing = {name: list[Any]() for name in self._address.keep}
            none = np.zeros((0, self.facts.dimension), np.float32)
            return VectorBatch([], none, [] if self.facts.text else None, nothing)
        if not self._seeks:
            selection = set(ids)
            batches = [
                b.take([i for i, n in enumerate(b.ids) if n in selection]) for b in self.batches()
            ]
            batch = VectorBatch.concatenate(batches)
            order = {name: row for row, name in enumerate(batch.ids)}
            return batch.take([order[name] for name in ids if name in order])
        array = next(Npy(self._file.path, self._file.key).blocks(self.facts.dimension, 1 << 62))
        rows = np.asarray([int(name) for name in ids])
        vectors, note = to_floats(array[rows], self.facts.dimension, None, str(self._file.path))
        self.facts.notes += [note] if note and note not in self.facts.notes else []
        return self.clean(ids, vectors)

    def batches(self, after: str | None = None, size: int = BATCH) -> Iterator[VectorBatch]:
        """All rows in order; see `Store.batches`."""
        self.left_out.clear()
        self._file.left_out.clear()
        require_whole(size=(size, 1))
        first = _row(after)
        for chunk in self._file.chunks(self.facts.dimension):
            for start in range(0, len(chunk.rows), size):
                part = chunk.part(start, start + size)
                keep = [i for i, row in enumerate(part.rows) if row > first]
                if keep:
                    yield self._batch(part).take(keep)
        self.left_out.update(self._file.left_out)
        self.facts.notes += [n for n in self._file.notes if n not in self.facts.notes]

    def sample(self, n: int, seed: int = 0) -> VectorBatch:
        """Draw rows; see `Store.sample`."""
        n, seed = require_whole(sample=(n, 1), seed=(seed, 0))
        if self._seeks:
            return super().sample(n, seed)
        names = draw_ids(self.ids(), 2 * n, seed)
        batch = self.fetch(names)
        return batch.take(range(min(n, len(batch))))

    @property
    def _seeks(self) -> bool:
        return self._file.path.suffix.lower() in (".npy", ".safetensors") and not self.fields

    def _batch(self, chunk: Any) -> VectorBatch:
        columns = {name: chunk.columns[name] for name in self._address.keep}
        texts = chunk.columns.get(self.facts.text) if self.facts.text else None
        return VectorBatch(
            [str(row) for row in chunk.rows],
            chunk.vectors.astype(np.float32),
            None if texts is None else [t if isinstance(t, str) else None for t in texts],
            columns,
        )


def _row(after: str | None) -> int:
    """Number of the row behind which a run goes on; -1 for the beginning."""
    if after is None:
        return -1
    if not str(after).isdecimal():
        raise StoreError("the id of a row, its number", repr(after), "Correct after")
    return int(after)


def open_store(address: Address) -> FileStore:
    """Open files of vectors."""
    return FileStore(address)


def _columns(path: Path) -> list[str]:
    """Names of the columns, or of the keys of the first line; none of an array."""
    kind = file_kind(path)
    if kind == ".parquet":
        names: list[str] = _first_rows(path).schema.names
        return names
    if kind == ".json":
        first = next((line for line in read_lines(path, LINE_BYTES) if line), b"")
        try:
            record = json.loads(first)
        except (ValueError, RecursionError):
            return []
        return list(record) if isinstance(record, dict) else []
    if kind == ".csv":
        header = (next(read_lines(path, LINE_BYTES), b"") or b"").decode("utf-8", "replace")
        return [name.strip('" ') for sign in (",", ";", "\t") for name in header.split(sign)]
    return []


def _dimension(path: Path, key: str | None) -> int:
    """D of the vectors, from a header or from the first rows.

    Raises:
        StoreError: It cannot be told.
    """
    kind = file_kind(path)
    if kind in (".npy", ".npz"):
        shape = (Npz(path, key) if kind == ".npz" else Npy(path, key)).shape()
        return shape[-1] if shape else 0
    values: Iterator[Any]
    if kind == ".parquet":
        rows = _first_rows(path)
        if key and key not in rows.schema.names:
            columns = ", ".join(map(repr, rows.schema.names))
            raise StoreError(f"a column {key!r} in {path}", columns, "Correct --column")
        name = next((n for n in ((key,) if key else NAMES) if n in rows.schema.names), None)
        values = iter(rows.column(name).to_pylist() if name is not None else ())
    elif kind == ".json":
        values = (value for value, _ in Json(path, key, skip_bad=True).records())
    else:
        values = (value for value, _ in Csv(path, key).records(-1))
    widths = Counter(map(_width, islice(values, _PEEKED)))
    widths.pop(0, None)
    if not widths:
        raise StoreError(
            f"vectors in {path}", "none in its first rows", "Pass --column, or ?dimension="
        )
    return widths.most_common(1)[0][0]


def _width(value: Any) -> int:
    """Numbers of one record's vector, however it is spelled; 0 where it is none."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], (list, str)):
        value = value[0]
    if isinstance(value, list):
        return len(value)
    if isinstance(value, Reason) or not isinstance(value, (str, bytes)):
        return 0
    if isinstance(value, bytes):
        return len(value) // _FLOAT_BYTES
    if value.strip().startswith(("[", "{", "(")):
        return len(value.strip("[](){} \n").replace(",", " ").split())
    return len(value) * 3 // 4 // _FLOAT_BYTES  # base64


def _first_rows(path: Path) -> Any:
    import pyarrow as pa

    if path.suffix.lower() in (".parquet", ".pq"):
        file = open_parquet(path)
        batch = next(file.iter_batches(batch_size=_PEEKED), None)
        return file.schema_arrow.empty_table() if batch is None else batch
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_file(source).get_batch(0).slice(0, _PEEKED)
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_next_batch().slice(0, _PEEKED)


def _readers(path: Path) -> str:
    """Who may read the file, by its permissions."""
    mode = stat.S_IMODE(path.stat().st_mode)
    everyone = "any user of the machine" if mode & stat.S_IROTH else "its owner or group"
    return f"none: file permissions {mode:04o}, readable by {everyone}"
