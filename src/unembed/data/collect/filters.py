"""Named filters: why a text is left out. The first that fails is the one that is counted."""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from unembed.data.readers import (
    column_values,
    csv_rows,
    json_lines,
    missing_column,
    open_parquet,
    parquet_batches,
)
from unembed.errors import DataError
from unembed.files import file_format, read_lines, require_extra

_LOOKED_AT = 4000  # characters; enough to judge a long text
_LETTERS_END = 0x40000  # the planes that hold scripts
_REPETITION_FROM = 200  # characters; shorter texts do not compress whatever they say


@dataclass(frozen=True)
class Limits:
    """Limits of the filters.

    Attributes:
        min_chars: Shortest text, in characters.
        max_chars: Longest text, in characters.
        min_letters: Least share of letters and their marks among the visible characters, in any
            script: texts of emoji, numbers or markup stay below.
        min_compressed: Least size after compression as a share of the size before: a text that
            says one thing a hundred times stays below.
    """

    min_chars: int = 10
    max_chars: int = 100_000
    min_letters: float = 0.5
    min_compressed: float = 0.08

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through.

        Raises:
            DataError: The shortest is longer than the longest.
        """
        if self.min_chars > self.max_chars:
            raise DataError(
                f"at least {self.min_chars} as the second of --chars",
                str(self.max_chars),
                "Raise it or lower the first",
            )


def first_failure(text: str, limits: Limits) -> str | None:
    """The name of the first filter that a text fails, or none.

    Args:
        text: Without white space around it.
        limits: What the filters let through.
    """
    return next((name for name, fails in FILTERS.items() if fails(text, limits)), None)


def _is_too_long(text: str, limits: Limits) -> bool:
    return len(text) > limits.max_chars


def _is_empty(text: str, limits: Limits) -> bool:
    return not text


def _has_nul(text: str, limits: Limits) -> bool:
    return "\0" in text


def _is_not_unicode(text: str, limits: Limits) -> bool:
    """Half of a surrogate pair, as JSON may spell it, has no place in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _is_too_short(text: str, limits: Limits) -> bool:
    return len(text) < limits.min_chars


def _has_few_letters(text: str, limits: Limits) -> bool:
    visible = "".join(text[:_LOOKED_AT].split())
    letters = sum(len(run) for run in _letters().findall(visible))
    return letters < limits.min_letters * len(visible)


def _repeats_itself(text: str, limits: Limits) -> bool:
    if len(text) < _REPETITION_FROM:
        return False
    content = text[:_LOOKED_AT].encode("utf-8")
    return len(zlib.compress(content, 1)) < limits.min_compressed * len(content)


@cache
def _letters() -> re.Pattern[str]:
    """Runs of letters and marks; ``str.isalpha`` leaves the vowel signs of Hindi or Thai out."""
    ranges: list[str] = []
    start: int | None = None
    for code in range(_LETTERS_END + 1):
        inside = code < _LETTERS_END and unicodedata.category(chr(code))[0] in "LM"
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return re.compile(f"[{''.join(ranges)}]+")


FILTERS: dict[str, Callable[[str, Limits], bool]] = {
    "too_long": _is_too_long,
    "empty": _is_empty,
    "nul_bytes": _has_nul,
    "invalid_utf8": _is_not_unicode,
    "too_short": _is_too_short,
    "few_letters": _has_few_letters,
    "repetitive": _repeats_itself,
}


_LEAST_SLOTS, _MOST_SLOTS = 1 << 10, 1 << 27  # 4 KiB, 512 MiB
_MOST_BAND_SLOTS = 1 << 26  # 256 MiB, so that 5 million texts take below 1 GB in all
_FULL = 0.8  # above, too many slots are looked at
_PERMUTATIONS = 128
_SHINGLE = 5
_SHINGLED = 10_000  # characters; near-duplicates differ early or hardly
_HIGH_BITS, _LOW_BITS = 32, (1 << 32) - 1


class HashSet:
    """A set of 64-bit hashes in 4 bytes a slot, as many slots as it will ever have.

    The 32 low bits of a hash say where to look, the 32 high ones are kept: a hash never seen is
    taken for one that was about once in 10⁹ questions. When four fifths of the slots are taken it
    stops remembering new ones and counts them instead, so its memory never grows.

    Args:
        capacity: Hashes expected.
        most: Slots at most.

    Attributes:
        forgotten: Hashes that found no place.
    """

    def __init__(self, capacity: int, most: int = _MOST_SLOTS) -> None:
        slots = min(max(math.ceil(capacity / _FULL), _LEAST_SLOTS), most)
        self._slots = np.zeros(slots, dtype=np.uint32).data
        self._room = int(slots * _FULL)
        self.forgotten = 0

    def __contains__(self, value: int) -> bool:
        return self._slots[self._find(value)] != 0

    def add(self, value: int) -> None:
        """Remember a hash."""
        place = self._find(value)
        if self._slots[place]:
            return
        if self._room == 0:
            self.forgotten += 1
            return
        self._slots[place] = (value >> _HIGH_BITS) or 1
        self._room -= 1

    @property
    def nbytes(self) -> int:
        """Memory of the slots, in bytes, once all are used."""
        return self._slots.nbytes

    def _find(self, value: int) -> int:
        """The slot that holds the hash, or the empty one where it belongs."""
        slots, number = self._slots, len(self._slots)
        mark = (value >> _HIGH_BITS) or 1
        place = (value & _LOW_BITS) * number >> _HIGH_BITS  # any number of slots, all alike often
        while slots[place] not in (0, mark):
            place = place + 1 if place + 1 < number else 0
        return place


def text_hash(text: str) -> int:
    """64 bits of a text, blind to case, white space and Unicode's several spellings."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(blake2b(plain.encode("utf-8"), digest_size=8).digest(), "little")


class Duplicates:
    """Tells texts that were kept before from new ones.

    Args:
        capacity: Texts that will be kept.
        near: Also take texts for duplicates whose sets of 5-character shingles overlap by about
            this much (Jaccard), by MinHash; none compares whole texts alone.

    Raises:
        ConfigError: ``near`` is set and the package `datasketch` is missing.
    """

    def __init__(self, capacity: int, near: float | None = None) -> None:
        self._exact = HashSet(capacity)
        self._near = _Bands(capacity, near) if near is not None else None

    def reason(self, text: str) -> str | None:
        """Remember a new text; of an old one say which kind of duplicate it is."""
        value = text_hash(text)
        if value in self._exact:
            return "duplicate"
        if self._near is not None and not self._near.add(text):
            return "near_duplicate"
        self._exact.add(value)
        return None

    @property
    def nbytes(self) -> int:
        """Memory of what is remembered, in bytes: 5 a text, and 5 a text and band of MinHash."""
        return self._exact.nbytes + (self._near.table.nbytes if self._near else 0)

    @property
    def forgotten(self) -> int:
        """Hashes there was no room for."""
        return self._exact.forgotten + (self._near.table.forgotten if self._near else 0)


class _Bands:
    """Locality-sensitive hashing: near-duplicates share a band of their MinHash, most likely.

    The bands' hashes are kept, not the texts, so a candidate is not compared again.
    """

    def __init__(self, capacity: int, threshold: float) -> None:
        require_extra("dedup", "--near-duplicates", "leave it out")
        from datasketch import MinHash, MinHashLSH

        shape = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._bands, self._rows = int(shape.b), int(shape.r)
        self._blank: Any = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        self.table = HashSet(capacity * self._bands, _MOST_BAND_SLOTS)

    def add(self, text: str) -> bool:
        """Remember a text if none of its bands was seen; says whether it is new."""
        sketch = self._blank.copy()
        plain = " ".join(text[:_SHINGLED].casefold().split())
        last = max(len(plain) - _SHINGLE, 0)
        shingles = {plain[start : start + _SHINGLE] for start in range(last + 1)}
        sketch.update_batch([shingle.encode("utf-8") for shingle in sorted(shingles)])
        values = sketch.hashvalues.astype("<u8").tobytes()
        size = self._rows * 8
        hashes = [
            int.from_bytes(
                blake2b(
                    values[band * size : (band + 1) * size], digest_size=8, salt=bytes([band])
                ).digest(),
                "little",
            )
            for band in range(self._bands)
        ]
        if any(value in self.table for value in hashes):
            return False
        for value in hashes:
            self.table.add(value)
        return True


_BATCH_ROWS = 1024  # of passages, which may be long
_LINE_BYTES = 16 << 20

Skip = Callable[[str], None]


@dataclass(frozen=True)
class Pick:
    """Selection of rows, and what to take of them.

    Attributes:
        column: Column or key of the text.
        lang_column: Column or key of the language.
        lang: The language wanted.
        monolingual: All rows are in that language, whatever the columns say.
        alone: No other language is asked for, so a file that names none is taken whole.
    """

    column: str
    lang_column: str
    lang: str
    monolingual: bool
    alone: bool

    def filters(self, place: Path | str, columns: Sequence[str]) -> bool:
        """Tell whether rows are chosen by their language column.

        Raises:
            DataError: The columns lack the text, or the language where it is needed.
        """
        if self.column not in columns:
            raise missing_column(place, self.column, list(columns))
        if self.monolingual:
            return False
        if self.lang_column in columns:
            return True
        if self.alone:
            return False
        raise DataError(
            f"a column {self.lang_column!r} in {place} to tell the languages apart",
            f"the columns {', '.join(map(repr, columns))}",
            "Pass --lang-column, name files by language with {lang}, or ask for one language",
        )


def read_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    """Yield the texts of a file that are picked, a batch in memory at a time.

    Args:
        path: Parquet, JSON lines, CSV, TSV or plain text; all but Parquet also ``.gz``, ``.zst``.
        pick: Language and columns.
        skip: Called with the reason for each row that cannot be read.

    Raises:
        DataError: The file cannot be read or lacks a column.
    """
    readers = {
        ".parquet": _parquet_rows,
        ".jsonl": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _text_rows,
    }
    return readers[file_format(path)](path, pick, skip)


def _parquet_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    import pyarrow as pa

    file = open_parquet(path)
    schema = file.schema_arrow
    filtering = pick.filters(path, schema.names)
    _check_text_type(schema.field(pick.column).type, path, pick.column)
    columns = [pick.column, pick.lang_column] if filtering else [pick.column]
    for batch in parquet_batches(path, columns, size=_BATCH_ROWS, file=file):
        texts = batch.column(pick.column)
        if filtering:
            langs = column_values(path, batch.column(pick.lang_column))
            texts = texts.filter(pa.array([str(lang) == pick.lang for lang in langs]))
        if pa.types.is_dictionary(texts.type):
            words = texts.dictionary.cast(pa.large_binary())
            texts = pa.DictionaryArray.from_arrays(texts.indices, words)
        else:
            texts = texts.cast(pa.large_binary())
        for raw in column_values(path, texts):
            text = _decode(raw, skip)
            if text is not None:
                yield text


def _check_text_type(kind: Any, path: Path, column: str) -> None:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(f"text in the column {column!r} of {path}", str(kind), "Pass --column")


def _json_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    filtering: bool | None = None
    for line in json_lines(path, _LINE_BYTES):
        row = line.value
        if line.fault is not None and line.fault != "blank":
            skip(line.fault)
            continue
        if not isinstance(row, dict):
            skip("no_text" if row is None else "not_json")
            continue
        if filtering is None:
            filtering = pick.filters(path, list(row))
        if filtering and row.get(pick.lang_column) != pick.lang:
            continue
        text = row.get(pick.column)
        if isinstance(text, str):
            yield text
        else:
            skip("no_text")


def _csv_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    filtering: bool | None = None
    for row in csv_rows(path, pick.column):
        if filtering is None:
            filtering = pick.filters(path, list(row))
        if not filtering or row[pick.lang_column] == pick.lang:
            yield row[pick.column]


def _text_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    if not (pick.monolingual or pick.alone):
        raise DataError(
            f"one language in the plain text of {path}",
            "several asked for",
            "Name files by language with {lang}, or ask for one language",
        )
    return _lines(path, skip)


def _lines(path: Path, skip: Skip) -> Iterator[str]:
    for raw in read_lines(path, _LINE_BYTES):
        if raw is None:
            skip("too_long")
        elif (line := _decode(raw, skip)) is not None:
            yield line


def _decode(raw: bytes | None, skip: Skip) -> str | None:
    if raw is None:
        skip("no_text")
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        skip("invalid_utf8")
        return None
