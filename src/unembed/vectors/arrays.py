"""Arrays in files: .npy and .npz of NumPy, .safetensors; bounded headers, those of Arrow too."""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError
from unembed.files import decompression_error, most_decompressed
from unembed.vectors.numbers import widths
from unembed.vectors.records import NAMES

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 1 << 16
_TENSOR_HEADER_BYTES = 8 << 20
_SMALL_BYTES = 256 << 20
_MOST = 1 << 48
_MATRIX = 2
_FIX = "Save the vectors with numpy.save"
_KINDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<V2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Header of an array.

    Attributes:
        shape: Of the array.
        by_columns: Fortran order.
        kind: Number format.
        offset: Where the data begins.
    """

    shape: tuple[int, ...]
    by_columns: bool
    kind: np.dtype[Any]
    offset: int

    @property
    def rows(self) -> int:
        """Vectors; 1 for a single one."""
        shape = self.shape
        while len(shape) > _MATRIX and shape[-1] == 1:
            shape = shape[:-1]
        return math.prod(shape[:-1]) if len(shape) > 1 else 1

    def matrix(self, dimension: int, path: Path) -> tuple[int, int]:
        """Rows and numbers of each, axes of one left out.

        Raises:
            EmbeddingError: Another shape than one or many vectors of D dimensions.
        """
        shape = self.shape
        while len(shape) > 1 and shape[-1] == 1 and dimension != 1:  # columns of one
            shape = shape[:-1]
        *outer, width = shape or (0,)
        if sum(size != 1 for size in outer) > 1 or width not in widths(dimension, self.kind):
            raise EmbeddingError(
                f"embeddings of {dimension} dimensions, [{dimension}] or [N, {dimension}]",
                f"shape {list(self.shape)} in {path}",
                "Use vectors of the encoder the inverter was trained for",
            )
        return math.prod(outer), width


def read_header(file: BinaryIO) -> Header:
    """Read the header of a .npy file without evaluating it.

    Raises:
        ValueError: It is damaged, or of an array of objects or records.
    """
    start = file.read(8)
    if start[:6] != _MAGIC:
        raise ValueError("the magic string is not correct: no .npy file")
    if start[6:7] not in (b"\x01", b"\x02", b"\x03"):
        raise ValueError(f"version {start[6:7].hex()} of the format")
    digits = 2 if start[6:7] == b"\x01" else 4
    size = int.from_bytes(file.read(digits), "little")
    if size > _HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    text = file.read(size).decode("latin-1")
    kind = re.search(r"'descr':\s*'([<>|=]?[a-zA-Z]\d{0,3})'", text)
    order = re.search(r"'fortran_order':\s*(True|False)\b", text)
    shape = re.search(r"'shape':\s*\(([0-9,\sL]{0,400})\)", text)
    if kind is None or order is None or shape is None or len(text) < size:
        raise ValueError("a header without type, order or shape of an array of numbers")
    sizes = tuple(int(n) for n in re.findall(r"\d{1,30}", shape[1]))
    dtype = np.dtype(kind[1])
    if dtype.kind == "O":
        raise ValueError("an array of Python objects, which is pickled and never loaded")
    if math.prod(sizes) * max(1, dtype.itemsize) > _MOST:
        raise ValueError(f"a shape of {list(sizes)}")
    return Header(sizes, order[1] == "True", dtype, 8 + digits + size)


def read_small(path: Path) -> NDArray[Any]:
    """Read a .npy of numbers whole, of at most 256 MiB.

    Raises:
        EmbeddingError: It is damaged, larger, or holds no numbers.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if math.prod(header.shape) * header.kind.itemsize > _SMALL_BYTES:
                raise ValueError("an array of more than 256 MiB")
        if header.kind.kind not in "fiu":
            raise ValueError(str(header.kind))
        array: NDArray[Any] = np.array(_map(path, header))
    except (OSError, ValueError) as error:
        raise no_array(path, error) from error
    return array


def no_array(path: Path, error: BaseException) -> EmbeddingError:
    """The error of a file that is no array, or a damaged one."""
    return EmbeddingError(f"a NumPy array at {path}", str(error) or type(error).__name__, _FIX)


@dataclass(frozen=True)
class Npy:
    """A ``.npy`` or ``.safetensors``, memory-mapped; ``key`` chooses among tensors."""

    path: Path
    key: str | None = None

    def count(self) -> int:
        """Rows by the header."""
        return self._header().rows

    def shape(self) -> tuple[int, ...]:
        """Of the array, by the header."""
        return self._header().shape

    def blocks(self, dimension: int, size: int) -> Iterator[NDArray[Any]]:
        """Rows [n, D] in their own number format, at most ``size`` at a time."""
        header = self._header()
        rows, width = header.matrix(dimension, self.path)
        array = _map(self.path, header).reshape(rows, width)
        for start in range(0, rows, size):
            yield np.ascontiguousarray(array[start : start + size])

    def _header(self) -> Header:
        with self.path.open("rb") as file:
            if self.path.suffix.lower() == ".safetensors":
                return _tensor(file, self.key, self.path)
            return read_header(file)


def _map(path: Path, header: Header) -> NDArray[Any]:
    size = math.prod(header.shape) * header.kind.itemsize
    there = path.stat().st_size - header.offset
    if there < size:
        raise ValueError(f"{there} bytes of the {size} of its array: the file is cut short")
    if size == 0:
        return np.empty(header.shape, dtype=header.kind)
    order = "F" if header.by_columns else "C"
    return np.memmap(
        path, header.kind, "r", header.offset, header.shape, cast(Any, order)
    )  # pages are read as they are used


def _tensor(file: BinaryIO, key: str | None, path: Path) -> Header:
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= _TENSOR_HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes: no safetensors file")
    tensors = json.loads(file.read(size))
    names = [name for name in tensors if name != "__metadata__"]
    facts = tensors[_array_name(names, key, path)]
    shape = tuple(facts["shape"])
    whole = all(type(size) is int and size >= 0 for size in shape)
    if not whole or math.prod(shape) > _MOST:
        raise ValueError(f"a shape of {str(shape)[:100]}")
    if facts["dtype"] not in _KINDS:
        raise ValueError(f"numbers of the format {facts['dtype']}")
    begin = int(facts["data_offsets"][0])
    if not 0 <= begin < _MOST:
        raise ValueError("data outside of the file")
    return Header(shape, False, np.dtype(_KINDS[facts["dtype"]]), 8 + size + begin)


def _array_name(names: list[str], key: str | None, path: Path) -> str:
    """The array that was asked for, or the only one, or the one of a usual name."""
    if key is None and len(names) > 1:
        key = next((name for name in NAMES if name in names), None)
    name = names[0] if key is None and len(names) == 1 else key
    if name is None or name not in names:
        expected = "one array" if key is None else f"an array {key!r}"
        fix = "Pass --key with its name" if names else "Save the vectors with numpy.savez"
        raise EmbeddingError(f"{expected} in {path}", ", ".join(names)[:400] or "none", fix)
    return name


@dataclass(frozen=True)
class Npz:
    """An array of an ``.npz``, read from the archive in order."""

    path: Path
    key: str | None = None

    def count(self) -> int:
        """Rows by the header."""
        with self._archive() as archive, self._member(archive) as file:
            return read_header(file).rows

    def shape(self) -> tuple[int, ...]:
        """Of the array, by the header."""
        with self._archive() as archive, self._member(archive) as file:
            return read_header(file).shape

    def blocks(self, dimension: int, size: int) -> Iterator[NDArray[Any]]:
        """Rows [n, D] in their own number format, at most ``size`` at a time."""
        with self._archive() as archive, self._member(archive) as file:
            header = read_header(file)
            rows, width = header.matrix(dimension, self.path)
            if header.by_columns and len(header.shape) > 1:
                array = self._whole(file, header)
                yield from (array[i : i + size] for i in range(0, rows, size))
                return
            for start in range(0, rows, size):
                count = min(size, rows - start)
                data = file.read(count * width * header.kind.itemsize)
                yield np.frombuffer(data, dtype=header.kind).reshape(count, width)

    def _whole(self, file: BinaryIO, header: Header) -> NDArray[Any]:
        """An array by columns has its first row at its end."""
        size = math.prod(header.shape) * header.kind.itemsize
        if size > _SMALL_BYTES:
            raise ValueError(
                "an array stored column by column, of more than 256 MiB; save "
                "numpy.ascontiguousarray of it"
            )
        flat = np.frombuffer(file.read(size), dtype=header.kind)
        array = flat.reshape(header.shape, order="F")
        return np.ascontiguousarray(array).reshape(header.rows, -1)

    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def _member(self, archive: zipfile.ZipFile) -> BinaryIO:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        name = f"{_array_name(names, self.key, self.path)}.npy"
        if archive.getinfo(name).file_size > most_decompressed(self.path):
            raise decompression_error(self.path)
        return cast(BinaryIO, archive.open(name))


def arrow_contents(source: Any) -> Iterator[tuple[int, int]]:
    """Rows of each record batch of an Arrow stream, and the bytes its buffers decompress to.

    Arrow decompresses whole batches; their sizes are read here without. Source: Message.fbs of the
    columnar format, and its "Compression": each compressed buffer begins with its size, int64.
    """
    import pyarrow as pa

    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type not in ("record batch", "dictionary"):
            continue
        data, body, size = message.metadata.to_pybytes(), memoryview(message.body), 0
        batch = _follow(data, _member(data, _follow(data, 0), 2))
        if message.type == "dictionary":
            batch = _follow(data, _member(data, batch, 1))
        rows = _member(data, batch, 0)
        buffers = _member(data, batch, 2)
        if buffers and _member(data, batch, 3):
            buffers = _follow(data, buffers)
            (count,) = struct.unpack_from("<I", data, buffers)
            for start, length in struct.iter_unpack("<qq", data[buffers + 4 :][: 16 * count]):
                size += max(0, struct.unpack_from("<q", body, start)[0]) if length else 0
        (count,) = struct.unpack_from("<q", data, rows) if rows else (0,)
        if count < 0:
            raise ValueError(f"a batch of {count} rows")
        yield count if message.type == "record batch" else 0, size


def _member(data: bytes, table: int, index: int) -> int:
    """Position of a member of a FlatBuffers table; 0 where it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (size,) = struct.unpack_from("<H", data, vtable)
    slot = 4 + 2 * index
    (offset,) = struct.unpack_from("<H", data, vtable + slot) if slot < size else (0,)
    return table + int(offset) if offset else 0


def _follow(data: bytes, position: int) -> int:
    return position + int(struct.unpack_from("<I", data, position)[0])
