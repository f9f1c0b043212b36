"""What every vector store is to us: facts, a count, streamed batches, a sample; never written."""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import ConfigError, StoreError, UnembedError, require_whole
from unembed.files import exists
from unembed.vectors.numbers import row_of, to_floats

if TYPE_CHECKING:
    from unembed.vectors.stores.address import Address

BATCH = 1000  # rows asked for at a time: servers limit ids, and the bytes of an answer
TEXT_NAMES = (
    "text",
    "content",
    "document",
    "page_content",
    "chunk",
    "chunk_text",
    "body",
    "passage",
    "_node_content",
)
_MOST_READ = 2  # times the sample, where rows without a usable vector are replaced
_MOST_CHARS = 300  # characters of a client's own message


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Some rows of a store.

    Attributes:
        ids: Of each row, as text; the last one is where a later run goes on.
        vectors: float32 [n, D], finite and not zero.
        texts: The text stored beside each vector, None where a row has none; None where the store
            has none at all.
        payload: Further fields asked for, by name, one value a row.
    """

    ids: list[str]
    vectors: NDArray[np.float32]
    texts: list[str | None] | None = None
    payload: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> VectorBatch:
        """Some of the rows, in the order given."""
        texts = None if self.texts is None else [self.texts[row] for row in rows]
        payload = {name: [values[row] for row in rows] for name, values in self.payload.items()}
        vectors = self.vectors[np.asarray(rows, dtype=np.int64)]
        return VectorBatch([self.ids[row] for row in rows], vectors, texts, payload)

    @staticmethod
    def concatenate(batches: Sequence[VectorBatch]) -> VectorBatch:
        """All rows of some batches of one store; at least one batch."""
        first = batches[0]
        texts = None if first.texts is None else [t for b in batches for t in b.texts or []]
        return VectorBatch(
            [name for batch in batches for name in batch.ids],
            np.concatenate([batch.vectors for batch in batches]),
            texts,
            {name: [v for b in batches for v in b.payload[name]] for name in first.payload},
        )


@dataclass
class StoreFacts:
    """What was learnt about a store without reading its vectors.

    Attributes:
        kind: ``pgvector``, ``chroma``, …
        collection: Table, collection, index or file.
        count: Rows, those without a vector included.
        dimension: D of the vectors; 0 where there are none.
        stored_type: Number format at rest: float32, halfvec, ….
        metric: Distance the store searches by, where it has one.
        normalised: Whether the store scales vectors to unit length; None if it is not known.
        lossy: Why the vectors are not the ones that were written; None where they are.
        index: The search index, and whether it is quantised; the exact vectors are kept beside it.
        deleted: Rows that were deleted and can still be read; None where there are none.
        tenants: Tenants, partitions or namespaces seen.
        text: Column or field of the text beside the vectors.
        fields: Other fields.
        not_read: Other vector columns and collections, and why they are not read.
        authentication: What it took to get in.
        encryption: Of the connection or at rest, as far as it can be seen.
        row_security: Whether rules hide rows from this login.
        tested: How this reader was tested: against the real store, or recorded answers only.
        notes: What else a reader of the report should know.
    """

    kind: str
    collection: str
    count: int = 0
    dimension: int = 0
    stored_type: str = "float32"
    metric: str | None = None
    normalised: bool | None = None
    lossy: str | None = None
    index: str | None = None
    deleted: str | None = None
    tenants: list[str] = field(default_factory=list)
    text: str | None = None
    fields: list[str] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)
    authentication: str = "not observed"
    encryption: str = "not observed"
    row_security: str | None = None
    tested: str = "against the real store"
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Store(ABC):
    """A collection of vectors, opened for reading.

    A reader says how to list the ids and how to fetch rows by id; sampling, streaming and
    resuming follow from these.

    Args:
        address: Where it is, and what of it is wanted.

    Attributes:
        facts: About the collection.
        left_out: Rows of the last read without a usable vector, by reason.
    """

    facts: StoreFacts

    def __init__(self, address: Address) -> None:
        self._address = address
        self.left_out: Counter[str] = Counter()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def ids(self, after: str | None = None) -> Iterator[str]:
        """The ids of all rows in an order that stays, from the one behind ``after``; no vectors."""

    @abstractmethod
    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """The rows of these ids, in this order, without those that have no usable vector."""

    def close(self) -> None:  # noqa: B027 - most readers hold nothing open
        """Let go of what is open."""

    def batches(self, after: str | None = None, size: int = BATCH) -> Iterator[VectorBatch]:
        """All rows in the order of `ids`, at most ``size`` in memory at a time.

        Args:
            after: Id of the last row that was read before; from the first row when None.
            size: Rows of a batch; those left out count.

        Raises:
            StoreError: The store cannot be read, or went away.
        """
        require_whole(size=(size, 1))
        self.left_out.clear()
        names = self.ids(after)
        while chunk := list(islice(names, size)):
            parts = (chunk[at : at + BATCH] for at in range(0, len(chunk), BATCH))
            yield VectorBatch.concatenate([self.fetch(part) for part in parts])

    def sample(self, n: int, seed: int = 0) -> VectorBatch:
        """Draw rows without reading the vectors of the others.

        The ids are listed, and those with the lowest hash of (seed, id) are taken: the same rows
        for the same seed whatever order the store lists them in, and a smaller sample is the
        beginning of a larger one. Rows without a usable vector are replaced, as long as no more
        than twice the sample is read.

        Args:
            n: Rows; all where the store has fewer.
            seed: Of the draw.

        Raises:
            StoreError: The store cannot be read, or holds no usable vector.
            ConfigError: ``n`` is no whole number of at least 1, or the seed none of at least 0.
        """
        n, seed = require_whole(sample=(n, 1), seed=(seed, 0))
        self.left_out.clear()
        names = draw_ids(self.ids(), _MOST_READ * n, seed)
        batches, count, place = [], 0, 0
        while count < n and place < len(names):
            chunk = names[place : place + min(BATCH, n - count)]
            batches.append(self.fetch(chunk))
            count, place = count + len(batches[-1]), place + len(chunk)
        if not count:
            reasons = "; ".join(f"{k} × {reason}" for reason, k in self.left_out.items())
            rules = self.facts.row_security
            empty = "an empty collection"
            if rules and "in force" in rules:
                empty = f"no row; row-level security: {rules}"
            raise StoreError(
                f"vectors in {self.facts.collection}",
                reasons or empty,
                "Choose another collection or column",
            )
        return VectorBatch.concatenate([batch for batch in batches if len(batch)])

    @property
    def place(self) -> Path | None:
        """File or folder that is read; None where it is none of this machine."""
        path = Path(self._address.place)
        return path if exists(path) else None

    @property
    def fields(self) -> list[str]:
        """What is read beside each vector: its text, where there is one, and what was asked for."""
        return [*([self.facts.text] if self.facts.text else []), *self._address.keep]

    def batch(self, rows: Sequence[Sequence[Any]]) -> VectorBatch:
        """Rows (id, vector, a value for each of `fields`) as a batch; see `clean`."""
        columns = list(zip(*rows, strict=True)) or [()] * (2 + len(self.fields))
        ids, vectors, *values = columns
        texts = values.pop(0) if self.facts.text else None
        payload = {n: list(v) for n, v in zip(self._address.keep, values, strict=True)}
        return self.clean(ids, vectors, texts, payload)

    def clean(
        self,
        ids: Sequence[str],
        vectors: NDArray[Any] | Sequence[Any],
        texts: Sequence[Any] | None = None,
        payload: dict[str, list[Any]] | None = None,
    ) -> VectorBatch:
        """Keep the rows that hold a vector, as float32; count the others by reason.

        Args:
            ids: Of the rows.
            vectors: [n, D], or for each row numbers, little-endian floats, text or None.
            texts: The text of each row; what is no string is taken as none.
            payload: Further fields.
        """
        array, reasons = as_float32(vectors, self.facts.dimension)
        self.left_out.update(reasons.values())
        good = [row for row in range(len(ids)) if row not in reasons]
        strings = None
        if texts is not None:
            strings = [texts[row] if isinstance(texts[row], str) else None for row in good]
        return VectorBatch(
            [str(ids[row]) for row in good],
            array[good] if reasons else array,
            strings,
            {name: [values[row] for row in good] for name, values in (payload or {}).items()},
        )


def require_store(store: Any) -> Store:
    """Return an open store; raises ConfigError for anything else."""
    if not isinstance(store, Store):
        actual = f"{type(store).__name__} {store!r:.80}"
        raise ConfigError("an open store", actual, "Open one with open_store(address)")
    return store


def as_float32(
    vectors: NDArray[Any] | Sequence[Any], dimension: int
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Vectors as float32 [n, D], and by row the reason why one cannot be used.

    Args:
        vectors: [n, D] of floats, which is quick, or what `row_of` takes, one a row.
        dimension: D.
    """
    reasons: dict[int, str] = {}
    if isinstance(vectors, np.ndarray) and vectors.dtype.kind == "f" and vectors.ndim == 2:  # noqa: PLR2004 - [n, D]
        with np.errstate(over="ignore"):
            array = vectors.astype(np.float32, copy=False)
        if array.shape[1] != dimension:
            other = f"{array.shape[1]} dimensions instead of {dimension}"
            return np.zeros((len(array), dimension), np.float32), dict.fromkeys(
                range(len(array)), other
            )
    else:
        array = np.ones((len(vectors), dimension), dtype=np.float32)
        for place, value in enumerate(vectors):
            row = _numbers(value, dimension)
            if isinstance(row, str):
                reasons[place] = row
            else:
                with np.errstate(over="ignore"):
                    array[place] = row
    peaks = np.abs(array).max(axis=1, initial=0.0)
    for place in np.flatnonzero(~(np.isfinite(peaks) & (peaks > 0))).tolist():
        reasons[place] = "only zeros" if peaks[place] == 0 else "NaN or infinity"
    return array, reasons


def _numbers(value: Any, dimension: int) -> NDArray[Any] | str:
    """One row's numbers [D], or why there are none."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        other = f"{value.size} dimensions instead of {dimension}"
        return value if value.shape == (dimension,) else other
    row = row_of(value.tolist() if isinstance(value, np.ndarray) else value, dimension)
    if isinstance(row, str) or row.dtype == np.float64:
        return row
    numbers: NDArray[Any] = to_floats(row[None], dimension, None, "the store")[0][0]
    return numbers


def arrow_rows(column: Any, dimension: int) -> Any:
    """Vectors of an Arrow column of lists of one size: [n, D], or a row or None each with nulls.

    Args:
        column: Chunked array of FixedSizeList<float>.
        dimension: D.
    """
    if not column.null_count:
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
        flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
        if flat.dtype.kind == "f":
            return flat.reshape(-1, dimension)
    return [None if v is None else np.asarray(v, dtype=np.float64) for v in column.to_pylist()]


def draw_ids(ids: Iterable[str], n: int, seed: int) -> list[str]:
    """The n ids with the lowest hash of (seed, id), lowest first; memory for n of them."""
    key = (seed % (1 << 64)).to_bytes(8, "big")

    def rank(name: str) -> tuple[bytes, str]:
        text = name.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=8, key=key).digest(), name

    return heapq.nsmallest(n, ids, key=rank)


def choose(names: Sequence[str], name: str | None, what: str, option: str) -> str:
    """The collection, table or column that was asked for, or the only one.

    Args:
        names: Those that are there.
        name: What was asked for; None for the only one.
        what: For the message: "a table with vectors in DB".
        option: How to name one: "?table=".

    Raises:
        StoreError: It is not there, or there are several or none.
    """
    if name is None and len(names) == 1:
        return names[0]
    if name is not None and name in names:
        return name
    listing = ", ".join(map(repr, list(names)[:20])) or "none"
    raise StoreError(
        what if name is None else f"{what} named {name!r}",
        listing if name is not None or not names else f"several: {listing}",
        f"Name one with {option}" if names else "Choose another store",
    )


def choose_fields(
    names: Iterable[str], text: str | None, keep: Sequence[str] = ()
) -> tuple[str | None, list[str]]:
    """The field of the text, and the other fields.

    Args:
        names: Of all fields but that of the vectors.
        text: The one that was asked for; the first that has a usual name when None.
        keep: Others that are to be read.

    Raises:
        StoreError: One that was asked for is not there.
    """
    there = list(names)
    listing = ", ".join(map(repr, there[:40])) or "no other field"
    if text is not None and text not in there:
        raise StoreError(f"a text column {text!r}", listing, "Correct --text-column")
    for name in keep:
        if name not in there:
            raise StoreError(
                f"a field {name!r}", listing, "Correct --group-by, --id-column or --keep"
            )
    text = text or next((name for name in TEXT_NAMES if name in there), None)
    return text, [name for name in there if name != text]


def quoted(name: str) -> str:
    """A name as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def client_errors(
    expected: str,
    fix: str | Callable[[BaseException], str],
    *kinds: type[BaseException],
    secret: str | None = None,
) -> Iterator[None]:
    """Turn what a store's client raises into one line, without the secret.

    Args:
        expected: What should have been: "a PostgreSQL server at HOST".
        fix: What to do, or what tells it by the error.
        *kinds: What the client raises.
        secret: A password or key that must not be shown.
    """
    try:
        yield
    except UnembedError:
        raise
    except kinds as error:
        message = " ".join(str(error).split()).rstrip(".?!") or type(error).__name__
        if secret:
            message = message.replace(secret, "***")
        remedy = fix if isinstance(fix, str) else fix(error)
        raise StoreError(
            expected, message[:_MOST_CHARS], remedy
        ) from None  # a cause may hold the secret
