"""Records of a store with their vectors, and queries with what they should find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.readers import csv_rows, json_lines, open_parquet, parquet_batches
from unembed.defences.defence import Vectors
from unembed.encoders.base import Encoder, is_unicode
from unembed.encoders.vectors import row_peaks, to_unit_length
from unembed.errors import DataError, EmbeddingError
from unembed.files import file_format
from unembed.vectors.read import VectorFile, vector_size

ID, TEXT, RELEVANT = "id", "text", "relevant"
_TABLES = (".parquet", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Records:
    """Records of a store: any `Store.sample` gives these three too.

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


@dataclass(frozen=True)
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


def own_queries(records: Records, count: int, seed: int) -> Queries:
    """Some of the records as queries for their neighbours, without labels."""
    rows = np.random.default_rng([seed, 5]).permutation(len(records))[:count]
    return Queries(records.vectors[rows], None, rows.tolist())


def read_records(
    path: Path,
    sample: int,
    seed: int,
    *,
    column: str | None = None,
    text_column: str = TEXT,
    id_column: str = ID,
    wanted: Set[str] = frozenset(),
) -> Records:
    """Draw records of a file of vectors that has texts beside them, a chunk in memory at a time.

    Rows without a text or a usable vector, and texts that came before, are left out and counted:
    a text that is attacked must not be among those that an attacker knows.

    Args:
        path: What `VectorFile` reads.
        sample: Records, all alike likely; all where there are fewer.
        seed: Of the draw.
        column: Of the vector; the usual names are tried.
        text_column: Of the text.
        id_column: Of the id; the row's index, from 0, where there is none.
        wanted: Ids that are in the sample in any case: those that queries should find.

    Raises:
        EmbeddingError: The file cannot be read, or has no texts.
    """
    file = VectorFile(path, column, True, [text_column, id_column], optional=[id_column])
    random, reasons = np.random.default_rng(seed), Counter[str]()
    ids, texts, keys, seen = list[str](), list[str](), np.empty(0), set[int]()
    vectors = np.empty((0, 0), np.float32)
    for names, contents, rows in _chunks(file, text_column, id_column):
        faults = [_fault(text, seen) for text in contents]
        reasons.update(fault for fault in faults if fault is not None)
        good = [i for i, fault in enumerate(faults) if fault is None]
        more = random.random(len(contents))
        for i, name in enumerate(names):
            if name in wanted:
                more[i] -= 1.0
        units = to_unit_length(rows[good], row_peaks(rows[good])) if good else rows[good]
        vectors = np.concatenate([vectors, units]) if len(ids) else units.astype(np.float32)
        ids += [names[i] for i in good]
        texts += [str(contents[i]) for i in good]
        keys = np.concatenate([keys, more[good]])
        best = np.argsort(keys, kind="stable")[: max(sample, int((keys < 0).sum()))]
        ids, texts = [ids[i] for i in best], [texts[i] for i in best]
        keys, vectors = keys[best], vectors[best]
    reasons.update(file.left_out)
    order = np.random.default_rng([seed, 1]).permutation(len(ids))  # wanted ones stand anywhere
    return Records(
        [ids[i] for i in order], [texts[i] for i in order], vectors[order], dict(reasons)
    )


def _chunks(
    file: VectorFile, text_column: str, id_column: str
) -> Iterator[tuple[list[str], list[Any], Any]]:
    try:
        for chunk in file.chunks(vector_size(file)):
            ids = chunk.columns.get(id_column, [None] * len(chunk.rows))
            names = [str(r if i is None else i) for i, r in zip(ids, chunk.rows, strict=True)]
            yield names, chunk.columns.get(text_column, [None] * len(names)), chunk.vectors
    except EmbeddingError as error:
        if "--keep" not in error.fix and "--keep" not in error.expected:
            raise
        raise EmbeddingError(
            f"texts beside the vectors of {file.path}, to compare what comes back with",
            error.found,
            "Name their column with --text-column",
        ) from error


def _fault(text: Any, seen: set[int]) -> str | None:
    if not isinstance(text, str) or not text.strip():
        return "no text"
    if not is_unicode(text):
        return "text that UTF-8 cannot write"
    if hash(text) in seen:
        return "text of a row before"
    seen.add(hash(text))
    return None


def read_queries(
    path: Path,
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
    """
    rows = []
    for row in _rows(path):
        rows.append(row)
        if len(rows) == most:
            break
    if not rows:
        raise DataError(f"queries in {path}", "none", "Choose another --queries")
    names = [column] if column else ["embedding", "vector"]
    name = next((n for n in names if n in rows[0]), None)
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
        raise DataError(f"vectors of queries in {path}", str(error), "Correct the file") from error
    peaks = row_peaks(rows) if rows.ndim == 2 else np.zeros(1)  # noqa: PLR2004 - [Q, D]
    if rows.ndim != 2 or rows.shape[1] != dimension or not (np.isfinite(peaks) & (peaks > 0)).all():  # noqa: PLR2004
        raise DataError(
            f"finite vectors of {dimension} dimensions in {path}",
            f"shape {list(rows.shape)}" if rows.shape[1:] != (dimension,) else "NaN or zeros",
            "Embed the queries with the encoder of the records",
        )
    return to_unit_length(rows, peaks)


def _labels(value: Any) -> frozenset[str]:
    if value is None or value == "":
        return frozenset()
    return frozenset(map(str, value)) if isinstance(value, list) else frozenset([str(value)])


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
