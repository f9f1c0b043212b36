"""Records of a store with their vectors, and queries with what they should find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.readers import csv_rows, json_lines, open_parquet, parquet_batches
from unembed.defences.defence import Vectors
from unembed.encoders.base import Encoder, EncoderIdentity, is_unicode
from unembed.encoders.vectors import as_unit_vectors, row_peaks, to_unit_length
from unembed.errors import (
    ConfigError,
    DataError,
    StoreError,
    require_kind,
    require_text,
    require_whole,
)
from unembed.files import as_path, file_format
from unembed.vectors.stores.address import open_store
from unembed.vectors.stores.store import BATCH, Store, VectorBatch

ID, TEXT, RELEVANT = "id", "text", "relevant"
_LEAST_RECORDS = 8
_ROUNDING = 1e-6  # of a unit vector's numbers
_SURPLUS = 2  # times the sample, in place of rows that have no text, or one that came before
_TABLES = (".parquet", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True, eq=False)
class Records:
    """Records of a store.

    Attributes:
        ids: Of each record, as text.
        texts: Of each.
        vectors: Unit vectors [N, D] of the encoder.
        left_out: Rows that were not used, by reason.
    """

    ids: list[str]
    texts: list[str]
    vectors: Vectors
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, rows: NDArray[np.int64]) -> Records:
        """The records of some rows, in their order."""
        names, texts = [self.ids[i] for i in rows], [self.texts[i] for i in rows]
        return Records(names, texts, self.vectors[rows])


@dataclass(frozen=True, eq=False)
class Queries:
    """What users ask.

    Attributes:
        vectors: Unit vectors [Q, D].
        relevant: For each the ids of the records it should find; None without labels.
        own: For each the record it is itself, which is left out of its results; None where they
            are no records.
    """

    vectors: Vectors
    relevant: list[frozenset[str]] | None = None
    own: list[int] | None = None

    def among(self, ids: Sequence[str]) -> Queries:
        """The queries that find some of these records; all of them where there are no labels.

        Raises:
            DataError: None finds any.
        """
        if self.relevant is None:
            return self
        there = set(ids)
        keep = [i for i, labels in enumerate(self.relevant) if labels & there]
        if not keep:
            raise DataError(
                "queries whose `relevant` names ids of records",
                "none that does",
                "Say which column holds the ids with --id-column",
            )
        return Queries(self.vectors[keep], [self.relevant[i] & there for i in keep])


def as_records(records: Any, encoder: EncoderIdentity) -> Records:
    """Check records that a caller hands over: a text and a vector each, no text twice.

    Args:
        records: Vectors of any length and float format, ids that are no text as well.
        encoder: The inverter's.

    Raises:
        DataError: Something else, too few, texts that are none or stand twice.
        EmbeddingError: Vectors that are none of the dimension.
    """
    if not isinstance(records, Records):
        actual = f"{type(records).__name__} {records!r:.80}"
        raise DataError(
            "records with a text and a vector each", actual, "Read them with read_records(STORE)"
        )
    for name, column in (("ids", records.ids), ("texts", records.texts)):
        require_kind(column, Iterable, f"{name} of records in a list", f"Correct {name}")
    ids, texts = [str(name) for name in records.ids], list[Any](records.texts)
    vectors = _unit(records.vectors, encoder, "records")
    if not len(ids) == len(texts) == len(vectors):
        counts = f"{len(ids)} ids, {len(texts)} texts and {len(vectors)} vectors"
        raise DataError("an id, a text and a vector for each record", counts, "Correct records")
    if len(ids) < _LEAST_RECORDS:
        expected = f"at least {_LEAST_RECORDS} records with a text and a vector"
        raise DataError(expected, f"{len(ids)}", "Choose another file")
    uniques = set[str]()
    for place, text in enumerate(texts):
        fault = _fault(text if isinstance(text, str) else None, uniques)
        if fault is not None:
            raise DataError(
                "a text of its own for each record", f"{fault} at {place}", "Leave it out"
            )
    return Records(ids, [str(text) for text in texts], vectors, records.left_out)


def as_queries(queries: Any, encoder: EncoderIdentity, records: int) -> Queries:
    """Check queries that a caller hands over.

    Args:
        queries: Vectors of any length; labels as any collections of ids.
        encoder: The inverter's.
        records: How many there are.

    Raises:
        DataError: Something else, or labels for some of them only.
        EmbeddingError: Vectors that are none of the dimension.
    """
    if not isinstance(queries, Queries):
        actual = f"{type(queries).__name__} {queries!r:.80}"
        raise DataError("queries", actual, "Read them with read_queries, or make Queries(vectors)")
    vectors = _unit(queries.vectors, encoder, "queries")
    if not len(vectors):
        raise DataError("queries", "none", "Leave queries out")
    labels = None
    if queries.relevant is not None:
        require_kind(queries.relevant, Iterable, "relevant in a list", "Correct relevant")
        labels = [_labels(each) for each in queries.relevant]
    for name, rows in (("relevant", labels), ("own", queries.own)):
        if rows is not None and len(rows) != len(vectors):
            counts = f"{len(vectors)} queries and {len(rows)}"
            raise DataError(f"one {name} for each query", counts, f"Correct {name}")
    if queries.own is not None and not all(0 <= row < records for row in queries.own):
        raise DataError(f"own: rows of {records} records", f"{queries.own}", "Correct own")
    return Queries(vectors, labels, queries.own)


def _unit(vectors: Any, encoder: EncoderIdentity, what: str) -> Vectors:
    """Vectors [N, D] of unit length; those that are so already keep every bit."""
    shape = np.shape(vectors)
    if len(shape) != 2 or shape[1] != encoder.dimension:  # noqa: PLR2004 - [N, D]
        raise DataError(
            f"{what} with vectors of {encoder.dimension} dimensions, which the inverter of "
            f"{encoder.name} reads",
            f"shape {list(shape)}",
            "Pass --checkpoint with an inverter of that encoder",
        )
    units = as_unit_vectors(vectors, encoder.dimension, encoder.name)
    same = isinstance(vectors, np.ndarray) and vectors.dtype == np.float32
    return vectors if same and np.allclose(vectors, units, rtol=0, atol=_ROUNDING) else units


def own_queries(records: Records, count: int, seed: int) -> Queries:
    """Some of the records as queries for their neighbours, without labels."""
    rows = np.random.default_rng([seed, 5]).permutation(len(records))[:count]
    return Queries(records.vectors[rows], None, rows.tolist())


def read_records(
    store: Store | str | Path,
    sample: int = 2000,
    seed: int = 0,
    *,
    id_column: str | None = None,
    relevant: Set[str] = frozenset(),
) -> Records:
    """Draw records of a vector store that has texts beside the vectors.

    Rows without a text or a usable vector, and texts that came before, are left out and counted:
    a text that is attacked must not be among those that an attacker knows.

    Args:
        store: Open, or the address of one (docs/audit.md lists the forms).
        sample: Records, all alike likely; all where there are fewer.
        seed: Of the draw.
        id_column: Field that names the records, one of those that the store was opened with. Its
            own ids if not given; of files a column ``id``, else the row's number from 0.
        relevant: Ids that are in the sample in any case: those that queries should find.

    Raises:
        StoreError: The store cannot be read, or has no texts.
        ConfigError: A sample or seed that is no whole number, or a field the store was not opened
            with.
    """
    sample, seed = require_whole(sample=(sample, 1), seed=(seed, 0))
    relevant = _as_ids(relevant)
    with ExitStack() as stack:
        if not isinstance(store, Store):
            store, id_column = open_records(store, id_column=id_column)
            stack.enter_context(store)
        if store.facts.text is None:
            raise StoreError(
                f"texts beside the vectors of {store.facts.collection}, to compare what comes back "
                "with",
                "none under a usual name",
                "Name their column with --text-column",
            )
        _require_field(store, id_column)
        there = _fetch(store, id_column, relevant)
        draw = store.sample(_SURPLUS * sample, seed)
    reasons, uniques = Counter(store.left_out), set[str]()
    rows: list[tuple[str, str, Vectors]] = []
    for batch in [*there, draw]:
        for place, (name, text) in enumerate(_ids_and_texts(batch, id_column)):
            if batch is draw and len(rows) >= sample:
                break
            fault = _fault(text, uniques)
            if fault is None:
                rows.append((name, str(text), batch.vectors[place]))
            elif name not in relevant:
                reasons[fault] += 1
    rows.sort(key=lambda row: row[0])
    order = np.random.default_rng([seed, 1]).permutation(len(rows))  # however the store lists them
    ids, texts = [rows[i][0] for i in order], [rows[i][1] for i in order]
    vectors = np.zeros((len(rows), draw.vectors.shape[1]))
    for place, i in enumerate(order):
        vectors[place] = rows[i][2]
    return Records(ids, texts, to_unit_length(vectors, row_peaks(vectors)), dict(reasons))


def open_records(
    address: str | Path, *, id_column: str | None = None, **options: Any
) -> tuple[Store, str | None]:
    """Open a store with the field that names its records.

    Args:
        address: Of the store.
        id_column: That field; if not given a column ``id`` of files, and the store's own ids.
        **options: Of `open_store`.
    """
    if id_column is not None:
        return open_store(address, keep=[id_column], **options), id_column
    store = open_store(address, **options)
    if store.facts.kind != "file" or ID not in store.facts.fields:
        return store, None
    store.close()
    return open_store(address, keep=[ID], **options), ID


def _as_ids(relevant: Any) -> frozenset[str]:
    if not isinstance(relevant, Iterable) or isinstance(relevant, (str, bytes)):
        raise ConfigError("relevant as ids in a set", f"{relevant!r:.80}", "Correct relevant")
    return frozenset(map(str, relevant))


def _require_field(store: Store, name: str | None) -> None:
    if name is not None and name not in store.fields:
        fix = "Open it with open_records(…, id_column=…)"
        raise ConfigError(f"a store opened with the field {name!r}", "one without", fix)


def _fetch(store: Store, id_column: str | None, relevant: Set[str]) -> list[VectorBatch]:
    """The rows of some ids, as far as they are there."""
    if not relevant:
        return []
    if id_column is None:
        ids = [name for name in store.ids() if name in relevant]
        return [store.fetch(ids[at : at + BATCH]) for at in range(0, len(ids), BATCH)]
    batches = []
    for batch in store.batches():
        rows = [i for i, value in enumerate(batch.payload[id_column]) if str(value) in relevant]
        batches += [batch.take(rows)] if rows else []
    return batches


def _ids_and_texts(batch: VectorBatch, id_column: str | None) -> Iterator[tuple[str, str | None]]:
    """Id and text of each row; a row whose field of ids is empty keeps the store's own."""
    values = batch.ids if id_column is None else batch.payload[id_column]
    texts = batch.texts or [None] * len(batch)
    for own, value, text in zip(batch.ids, values, texts, strict=True):
        yield own if value is None else str(value), text


def _fault(text: str | None, uniques: set[str]) -> str | None:
    if text is None or not text.strip():
        return "no text"
    if not is_unicode(text):
        return "text that UTF-8 cannot write"
    if text in uniques:
        return "text of a row before"
    uniques.add(text)
    return None


def read_queries(
    path: str | Path,
    encoder: Encoder | None,
    dimension: int,
    *,
    column: str | None = None,
    text_column: str = TEXT,
    most: int = 1000,
) -> Queries:
    """Read queries: vectors, or texts that are embedded here, and the ids they should find.

    The ids stand in a column ``relevant``: a list, or one id. Without it there are no labels.

    Args:
        path: Parquet, JSON lines, CSV or TSV.
        encoder: Embeds the texts; None where it cannot be loaded.
        dimension: D of the records.
        column: Of the vector; ``embedding`` and ``vector`` are tried.
        text_column: Of the text, where there is no vector.
        most: Queries read, the first of the file.

    Raises:
        DataError: The file cannot be read, or has neither; or some queries have labels only.
        ConfigError: A number that is none, or a name that is no text.
    """
    path = as_path(path)
    dimension, most = require_whole(dimension=(dimension, 1), most=(most, 1))
    require_text(column=column, text_column=text_column)
    rows = []
    for row in _rows(path):
        rows.append(row)
        if len(rows) == most:
            break
    if not rows:
        raise DataError(f"queries in {path}", "none", "Choose another --queries")
    names = [column] if column else ["embedding", "vector"]
    name = next((n for n in names if n in rows[0]), None)
    if column is not None and name is None:
        there = ", ".join(map(repr, rows[0]))
        raise DataError(f"a column {column!r} in {path}", there, "Correct column")
    if name is not None:
        vectors = _as_vectors(path, [row.get(name) for row in rows], dimension)
    else:
        texts = [row.get(text_column) for row in rows]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(
                f"a column {text_column!r} or 'embedding' in every row of {path}",
                f"the columns {', '.join(map(repr, rows[0]))}",
                "Correct --queries",
            )
        if encoder is None:
            raise DataError("the encoder, for texts of queries", "none here", "Give their vectors")
        vectors = encoder.encode([str(text) for text in texts])
    labels = [_labels(row.get(RELEVANT)) for row in rows]
    if not any(labels):
        return Queries(vectors)
    keep = [i for i, each in enumerate(labels) if each]
    return Queries(vectors[keep], [labels[i] for i in keep])


def _as_vectors(path: Path, values: Sequence[Any], dimension: int) -> Vectors:
    try:
        rows = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"a vector of {dimension} numbers in every row of {path}",
            "rows that have none, or one of another length",
            "Correct --queries",
        ) from error
    peaks = row_peaks(rows) if rows.ndim == 2 else np.zeros(1)  # noqa: PLR2004 - [Q, D]
    if rows.ndim != 2 or rows.shape[1] != dimension or not (np.isfinite(peaks) & (peaks > 0)).all():  # noqa: PLR2004
        raise DataError(
            f"finite vectors of {dimension} dimensions in {path}",
            f"shape {list(rows.shape)}" if rows.shape[1:] != (dimension,) else "NaN or zeros",
            "Embed the queries with the encoder of the records",
        )
    return to_unit_length(rows, peaks)


def _labels(value: Any) -> frozenset[str]:
    if value is None or (isinstance(value, str) and value == ""):
        return frozenset()
    many = isinstance(value, (list, tuple, Set, np.ndarray))
    return frozenset(map(str, value)) if many else frozenset([str(value)])


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError("a file of queries", f"nothing at {path}", "Correct --queries")
    kind = file_format(path)
    if kind not in _TABLES:
        raise DataError("queries as Parquet, JSON lines or CSV", str(path), "Convert the file")
    if kind == ".parquet":
        file = open_parquet(path)
        for batch in parquet_batches(path, file.schema_arrow.names, file=file):
            yield from batch.to_pylist()
    elif kind == ".jsonl":
        for line in json_lines(path):
            if line.fault not in (None, "blank") or not isinstance(line.value, dict | None):
                raise DataError(
                    "one JSON object a line", f"line {line.number} of {path}", "Correct the line"
                )
            if line.value is not None:
                yield line.value
    else:
        yield from csv_rows(path, TEXT)
