"""Number formats → float64: quantised, half-precision and bit formats, and what is none of them."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError

BITS = 8
_LEVELS = 255
_UNIT = (0.9, 1.1)  # lengths of rows by which 16 bits are known as halves of unit vectors
_SHOWN_CHARS = 12
_LETTERS = 64  # of a number and what is around it, at most
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_SCALAR = re.compile(r"np\.float\d+\(([^()]*)\)")  # as NumPy 2 writes lists of its numbers
_CALL = re.compile(r"[A-Za-z.]+\(\s*\[")  # array([...], dtype=float32), tensor([...])
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_PICKLE = b"\x80"
_FIX = "Save the vectors as float32 with numpy.save"
_RANGES_FIX = (
    "Pass --ranges: the calibration's vectors or their [2, D] lowest and highest values as .npy, "
    "or LOW,HIGH"
)


class Reason(str):
    """Why a record has no vector, in the place of one."""


@dataclass(frozen=True)
class Ranges:
    """Lowest and highest value of each dimension, between which 256 levels were laid.

    Attributes:
        low: Float64 [D] or [1].
        high: As ``low``, above it.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def parse(cls, text: str) -> Ranges:
        """``LOW,HIGH``, or a ``.npy`` of [2, D] ranges or of [N, D] vectors to take them from.

        Raises:
            EmbeddingError: Neither, or a range is empty.
        """
        from unembed.vectors.arrays import read_small

        path = Path(text)
        if path.suffix == ".npy":
            array = read_small(path).astype(np.float64)
            low, high = array.min(axis=0, initial=np.inf), array.max(axis=0, initial=-np.inf)
            if array.ndim != 2 or not len(array):  # noqa: PLR2004 - [2, D] or [N, D]
                low = high = np.zeros(1)
        else:
            parts = text.split(",")
            try:
                low, high = (np.array([float(part)]) for part in parts)
            except ValueError as error:
                raise EmbeddingError(
                    "--ranges as LOW,HIGH or a .npy file", repr(text), "Write --ranges=-0.3,0.3"
                ) from error
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise EmbeddingError(
                "ranges with a lowest value below the highest in each dimension",
                f"others in {text}",
                "Pass [2, D] ranges, or vectors the quantisation was calibrated on",
            )
        return cls(low, high)

    def restore(self, levels: NDArray[np.float64], signed: bool) -> NDArray[np.float64]:
        """Values in the middle of levels 0 to 255, or -128 to 127 when signed, [n, D]."""
        step = (self.high - self.low) / _LEVELS
        values: NDArray[np.float64] = self.low + (levels + 128 * signed + 0.5) * step
        return values


def widths(dimension: int, kind: np.dtype[Any]) -> tuple[int, ...]:
    """Numbers a row of this kind may have for vectors of D dimensions: D, or D/8 bytes of bits."""
    packed = kind in (np.uint8, np.int8) and dimension % BITS == 0 and dimension > BITS
    return (dimension, dimension // BITS) if packed else (dimension,)


def to_floats(
    array: NDArray[Any], dimension: int, ranges: Ranges | None, where: str
) -> tuple[NDArray[np.float64], str | None]:
    """Convert rows of any number format to float64.

    Args:
        array: [n, D], or [n, D/8] for packed bits.
        dimension: D.
        ranges: Of a quantisation to 8 bits.
        where: For messages.

    Returns:
        Float64 [n, D], and a note where the format had to be taken for something.

    Raises:
        EmbeddingError: A format that holds no embedding, or not without ranges.
    """
    kind = array.dtype
    if ranges is not None:
        return _dequantise(array, dimension, ranges, where)
    truth = kind.kind == "b"
    if truth or array.shape[1] != dimension:
        bits = array
        if not truth:
            flip = np.uint8(128 if kind == np.int8 else 0)
            bits = np.unpackbits(np.bitwise_xor(array.view(np.uint8), flip), axis=1)
        note = f"{kind} taken as the signs of {dimension} numbers (binary quantisation)"
        return np.where(bits, 1.0, -1.0), note
    if kind.kind == "V" and kind.itemsize == 2:  # noqa: PLR2004 - bfloat16 saved by NumPy
        return bfloat16(array.view(np.uint16)), "2 bytes without a type taken as bfloat16"
    if kind.kind in "ui" and kind.itemsize == 2:  # noqa: PLR2004 - bytes of a half
        halves = _as_halves(array)
        if halves is not None:
            return halves
    if kind == np.uint8:
        raise EmbeddingError(
            f"floats in {where}",
            "uint8: a quantisation whose ranges are not in the file",
            _RANGES_FIX,
        )
    if kind.kind not in "fi":
        raise EmbeddingError(
            f"numbers in {where}, floats as an encoder writes them", str(kind), _FIX
        )
    sign = None
    if kind == np.int8:
        sign = "int8 taken as even steps around zero; with --ranges the vectors are closer"
    with np.errstate(invalid="ignore", over="ignore"):  # a signalling NaN is found later
        return array.astype(np.float64), sign


def _dequantise(
    array: NDArray[Any], dimension: int, ranges: Ranges, where: str
) -> tuple[NDArray[np.float64], str | None]:
    floats = array.astype(np.float64) if array.dtype.kind in "fiu" else np.full((1, 1), np.nan)
    if ranges.low.size not in (1, dimension) or array.shape[1] != dimension:
        raise EmbeddingError(
            f"ranges and 8-bit numbers of {dimension} dimensions",
            f"{ranges.low.size} ranges, {array.shape[1]} numbers in {where}",
            "Correct --ranges",
        )
    finite = floats[np.isfinite(floats)]
    signed = array.dtype == np.int8 or bool((finite < 0).any())
    lowest, highest = (-128, 127) if signed else (0, _LEVELS)
    if (finite != np.round(finite)).any() or ((finite < lowest) | (finite > highest)).any():
        raise EmbeddingError(
            f"whole numbers from {lowest} to {highest} in {where}, as --ranges says",
            str(array.dtype),
            "Leave --ranges out",
        )
    return ranges.restore(floats, signed), None


def _as_halves(array: NDArray[Any]) -> tuple[NDArray[np.float64], str] | None:
    """Rows of 16-bit whole numbers whose bits are halves of unit vectors."""
    bits = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("=")).view(np.uint16)
    for name, values in (
        ("bfloat16", bfloat16(bits)),
        ("float16", bits.view(np.float16).astype(np.float64)),
    ):
        with np.errstate(all="ignore"):
            lengths = np.linalg.norm(values, axis=1)
        if len(values) and _UNIT[0] < float(np.median(lengths)) < _UNIT[1]:
            return values, f"{array.dtype} taken as the bits of {name}"
    return None


def bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The numbers that 16 bits spell as bfloat16."""
    wide = np.left_shift(bits.astype(np.uint32), np.uint32(16))
    return wide.view(np.float32).astype(np.float64)


def row_of(value: Any, dimension: int) -> NDArray[Any] | str:
    """Convert one record's vector to numbers, or say why it is none.

    Args:
        value: A list of numbers, ``[1, 2]``, ``{1, 2}`` or ``1, 2`` as text, base64 or bytes of
            little-endian floats, an array as JavaScript writes it; any inside a list of one.
        dimension: Size D of the vector.

    Returns:
        Numbers [D], or [D/8] of packed bits; or a reason.
    """
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], (list, str, bytes)):
        value = value[0]
    value = from_javascript(value)
    if isinstance(value, (Reason, np.ndarray)):
        return value
    if value is None:
        return "no vector"
    if isinstance(value, str) and len(value) > _LETTERS * (dimension + 1):
        return f"a text of {len(value):,} letters, too long for {dimension} numbers"
    if isinstance(value, str):
        value = _parse(value, dimension)
    if isinstance(value, bytes):
        value = _from_bytes(value, dimension)
    return _from_list(value, dimension) if isinstance(value, list) else _or_reason(value)


def size_of(value: Any) -> int:
    """How many numbers a record's vector has, as far as its spelling tells; else 0."""
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], (list, str)):
        value = value[0]
    value = from_javascript(value)
    if isinstance(value, str):
        return len(_items(value.strip()) or ())
    return len(value) if isinstance(value, (list, np.ndarray)) else 0


def from_javascript(value: Any) -> Any:
    """A typed array (``{"0": x, "1": y}``) as a list, a Buffer as bytes; all else as it is."""
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Buffer" and isinstance(value.get("data"), list):
        data = value["data"]
        whole = all(type(item) is int and 0 <= item < 1 << BITS for item in data)
        return bytes(data) if whole else value
    by_place = "0" in value and "1" in value and list(value) == [str(i) for i in range(len(value))]
    numbers = by_place and not any(isinstance(item, (dict, list, str)) for item in value.values())
    return list(value.values()) if numbers else value


def _or_reason(value: Any) -> NDArray[Any] | str:
    return value if isinstance(value, (np.ndarray, str)) else "no list of numbers"


def _are_bytes(value: list[Any]) -> bool:
    """Tell whether a list holds bytes: of packed bits, where it has an eighth of the numbers."""
    return all(type(item) is int and -128 <= item <= _LEVELS for item in value) and (  # noqa: PLR2004
        min(value) >= 0 or max(value) < 128  # noqa: PLR2004
    )


def _from_list(value: list[Any], dimension: int) -> NDArray[Any] | str:
    if value and isinstance(value[0], list):
        return "no list of numbers"
    if len(value) * BITS == dimension and dimension > BITS and _are_bytes(value):
        return np.array(value, dtype=np.int8 if min(value) < 0 else np.uint8)
    if len(value) != dimension:
        return f"{len(value)} dimensions instead of {dimension}"
    are_texts = all(isinstance(item, str) for item in value)  # as exports without loss write them
    if not are_texts and any(isinstance(item, (str, bytes, bool)) for item in value):
        return "no list of numbers"
    try:
        return np.asarray([float(item) for item in value] if are_texts else value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return "no list of numbers"


def _parse(text: str, dimension: int) -> NDArray[np.float64] | bytes | str:
    """Numbers of pgvector's, PostgreSQL's or NumPy's spelling, or the bytes that a text spells."""
    text = text.strip()
    numbers = _items(text)
    if numbers is not None:
        if "..." in text:
            return "numbers left out with '...'"
        if len(numbers) != dimension:
            return f"{len(numbers)} dimensions instead of {dimension}"
        try:
            return np.array([float(number) for number in numbers])
        except ValueError:
            return "no list of numbers"
    try:
        if text.startswith("\\x"):
            return bytes.fromhex(text[2:])
        if len(text) == dimension and dimension % BITS == 0 and not text.strip("01"):  # pgvector
            return int(text, 2).to_bytes(dimension // BITS, "big")
        if len(text) > _SHOWN_CHARS and _BASE64.fullmatch(text):
            return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error):
        return "text that is no base64"
    return "no list of numbers"


def _items(text: str) -> list[str] | None:
    """The parts of a list in brackets, or of numbers without any; None of other text."""
    if _CALL.match(text) and "]" in text:
        text = text[text.index("[") : text.rindex("]") + 1]
    parts = _SCALAR.sub(r"\1", text).strip("[](){} \n").replace(",", " ").split()
    bare = len(parts) > 1 and _NUMBER.fullmatch(parts[0]) and _NUMBER.fullmatch(parts[-1])
    return parts if bare or text.startswith(("[", "{", "(")) else None


def _from_bytes(data: bytes, dimension: int) -> NDArray[Any] | str:
    if data.startswith(_PICKLE) and data.endswith(b"."):
        return "pickled data, which is never loaded"
    kinds: dict[int, str] = {4 * dimension: "<f4", 8 * dimension: "<f8", 2 * dimension: "<f2"}
    if len(data) in kinds:
        return np.frombuffer(data, dtype=kinds[len(data)]).astype(np.float64)
    if len(data) == dimension:
        return np.frombuffer(data, dtype=np.int8)
    if len(data) * BITS == dimension:
        return np.frombuffer(data, dtype=np.uint8)
    return f"{len(data)} bytes, not those of {dimension} floats"
