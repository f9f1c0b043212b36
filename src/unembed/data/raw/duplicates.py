"""Which texts were seen before, in memory fixed at the start."""

from __future__ import annotations

import math
import unicodedata
import zlib
from hashlib import blake2b
from typing import Any

import numpy as np

from unembed.errors import DataError

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
        kept = (value >> _HIGH_BITS) or 1
        place = (value & _LOW_BITS) * number >> _HIGH_BITS  # any number of slots, all alike often
        while slots[place] not in (0, kept):
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
        DataError: ``near`` is set and the package `datasketch` is missing.
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
        return self._exact.nbytes + (self._near.seen.nbytes if self._near else 0)

    @property
    def forgotten(self) -> int:
        """Hashes there was no room for."""
        return self._exact.forgotten + (self._near.seen.forgotten if self._near else 0)


class _Bands:
    """Locality-sensitive hashing: near-duplicates share a band of their MinHash, most likely.

    The bands' hashes are kept, not the texts, so a candidate is not compared again.
    """

    def __init__(self, capacity: int, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise DataError(
                "the package `datasketch`, which finds near-duplicates",
                "that it is not installed",
                "Run `pip install 'unembed[dedup]'`, or leave out --near-duplicates",
            ) from error
        shape = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS)
        self._bands, self._rows = int(shape.b), int(shape.r)
        self._blank: Any = MinHash(num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)
        self.seen = HashSet(capacity * self._bands, _MOST_BAND_SLOTS)

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
        if any(value in self.seen for value in hashes):
            return False
        for value in hashes:
            self.seen.add(value)
        return True
