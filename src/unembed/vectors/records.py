"""Vectors in JSON: lines, arrays, answers of embedding services, dumps of vector stores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unembed.data.readers import JsonLine, json_lines
from unembed.errors import EmbeddingError
from unembed.files import read_lines
from unembed.vectors.numbers import Reason, from_javascript

NAMES = ("embedding", "vector", "values", "embeddings", "vectors")
# Where services and stores put the records: OpenAI, its batch files, Qdrant, Elasticsearch, Vespa,
# Milvus, Vertex, Redis, Bedrock's batch files, DashScope, Weaviate
_INSIDE = ("data", "response", "body", "result", "results", "points", "hits", "embeddings",
           "float", "vectors", "matches", "fields", "rows", "predictions", "items", "documents",
           "entities", "value", "_source", "modelOutput", "output",
           "objects")  # fmt: skip
_FORMATS = ("float", "data", *NAMES)  # keys of a vector, not names of several
LINE_BYTES = 16 << 20
_DOCUMENT_BYTES = 256 << 20
_VALUES, _BRACKETS, _DEPTH = 16_000_000, 1_000_000, 6
_MISSING = object()
_INDEX = ("", "unnamed: 0", "index", "id", "row", "key", "name", "text")
_NUMBERED = re.compile(r"(.*?)(\d{1,9})(\D*)")
CORRECT_KEEP = "Correct --keep, or --text-column"

Record = tuple[Any, Any]  # a vector in whatever spelling, and the object it stands in


def find_vectors(document: Any, key: str | None = None) -> list[Record] | None:
    """Find the vectors of a JSON value, in order; None where there are none.

    Args:
        document: A vector, a list of vectors, a record with a vector, a list of records, or an
            object that holds one of these: an answer of an embedding service
            (``{"data": [{"embedding": [...]}]}``), a line of a batch file
            (``{"response": {"body": ...}}``), a dump (``{"ids": [...], "embeddings": [...]}``).
        key: Path of the vector from a record or from the whole: ``embedding``,
            ``response.body.data.0.embedding``, ``data.*.embedding``, ``*`` for all of a list or
            of an object of vectors by their names. Found by the usual names if not given.
    """
    document = _records_of_table(document, key)
    if key is not None:
        return _by_path(document, key)
    return _search(document, _DEPTH)


def _records_of_table(document: Any, key: str | None) -> Any:
    """Records of a table by columns or by names and rows, as ``DataFrame.to_json`` writes them.

    One by columns is known by rows that are numbers, or by a column that holds the vectors.
    """
    if not isinstance(document, dict) or not document:
        return document
    names, rows = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(rows, list):
        whole = all(isinstance(row, list) and len(row) == len(names) for row in rows)
        return [dict(zip(map(str, names), row, strict=True)) for row in rows] if whole else document
    columns = list(document.values())
    if all(isinstance(column, dict) for column in columns):
        rows = list(columns[0])
        same = all(list(column) == rows for column in columns)
        vectors = len(columns) > 1 and any(name in document for name in (key, *NAMES))
        if rows and same and (vectors or all(row.isdecimal() for row in rows)):
            return [{name: column[row] for name, column in document.items()} for row in rows]
    return document


def number_columns(
    names: Sequence[str], dimension: int, others: Sequence[str], first: Sequence[str] | None = None
) -> list[int]:
    """Find the D columns of a table with a number a column; none where it cannot be told.

    They are all; or those whose names differ in one number, in its order, wherever they stand
    (``id, dim_0, …, dim_383, label``); or all behind an index.

    Args:
        names: Of the columns.
        dimension: D.
        others: Names of columns that are none of them.
        first: The first row of a table without names: one whole number is an index or a label.
    """
    places = [place for place, name in enumerate(names) if name not in others]
    sets: dict[tuple[str, str], dict[int, int]] = {}
    for place in places:
        if match := _NUMBERED.fullmatch(names[place]):
            sets.setdefault((match[1], match[3]), {})[int(match[2])] = place
    ordered = [[columns[k] for k in sorted(columns)] for columns in sets.values()]
    whole = [columns for columns in ordered if len(columns) == dimension]
    if len(whole) == 1:
        return whole[0]
    if len(places) == dimension + 1:
        is_index = names[0].casefold() in _INDEX, False
        if first is not None:
            is_index = first[0].isdecimal(), first[-1].isdecimal()
        places = places[is_index[0] : len(places) - is_index[1]]
    distinct = {names[place] for place in places}  # not so where a second row has names as well
    return places if len(places) == len(distinct) == dimension else []


def look_up(record: Any, path: str) -> Any:
    """Value at a path of keys and positions joined by dots; a marker that is no value if absent."""
    if isinstance(record, dict) and path in record:
        return record[path]
    for name in path.split("."):
        if isinstance(record, dict) and name in record:
            record = record[name]
        elif isinstance(record, list) and name.isdecimal() and int(name) < len(record):
            record = record[int(name)]
        else:
            return _MISSING
    return record


def is_missing(value: Any) -> bool:
    """Tell whether `look_up` came back without a value."""
    return value is _MISSING


def _by_path(document: Any, key: str) -> list[Record] | None:
    if isinstance(document, list) and any(isinstance(row, dict) for row in document):
        entries = [(look_up(row, key), row) for row in document]
        if not all(is_missing(value) for value, _ in entries):
            return [(None if is_missing(value) else value, row) for value, row in entries]
    head, star, rest = f".{key}".partition(".*")
    value = look_up(document, head.removeprefix(".")) if head else document
    if star and isinstance(value, dict):  # by names: {"id": [...]}
        value = list(value.values())
    if star and isinstance(value, list):
        rest = rest.removeprefix(".")
        inner = [(look_up(row, rest) if rest else row, row) for row in value]
        return [(None if is_missing(vector) else vector, row) for vector, row in inner]
    if is_missing(value):
        return None
    return _many(value, document)


def _search(value: Any, depth: int) -> list[Record] | None:
    if depth == 0:
        return None
    if isinstance(value, list):
        return _search_list(value, depth)
    if not isinstance(value, dict):
        return None
    if not isinstance(array := from_javascript(value), dict):
        return [(array, None)]
    for name in NAMES:
        inner = _only_vector(name, value.get(name))
        if _is_vector(inner):
            plural = name in ("embeddings", "vectors")
            return _many(inner, value) if plural else [(inner, value)]
    for name in (*_INSIDE, *NAMES):
        records = _search(value.get(name), depth - 1)
        if records is not None:
            return _beside(records, value)
    if any(name in value for name in NAMES):  # there, and no vector: null, a number
        return [(next(value[name] for name in NAMES if name in value), value)]
    return _search_named(value)


def _only_vector(name: str, inner: Any) -> Any:
    """The one vector among named ones, ``{"vector": {"title": [...]}}``; anything else as it is.

    Raises:
        EmbeddingError: There are several.
    """
    inner = from_javascript(inner)
    if not isinstance(inner, dict):
        return inner
    if len(inner) == 1:
        return next(iter(inner.values()))
    vectors = [k for k, value in inner.items() if isinstance(value, list) and _is_vector(value)]
    if len(vectors) > 1 and not any(key in _FORMATS for key in inner):
        names = ", ".join(map(repr, vectors[:20]))
        fix = f"Pass --key with one of them ({name}.{vectors[0]}), or {name}.* for all"
        raise EmbeddingError(f"one vector at {name!r} of each record", names, fix)
    return inner[vectors[0]] if len(vectors) == 1 and vectors[0] not in _FORMATS else inner


def _search_named(value: dict[str, Any]) -> list[Record] | None:
    """Records by their names, as Pinecone's: ``{"id": {"id": ..., "values": [...]}}``."""
    if not value or not all(isinstance(row, dict) for row in value.values()):
        return None
    inner = [_search(row, 1) for row in value.values()]
    if all(records is not None and len(records) == 1 for records in inner):
        return [records[0] for records in inner if records]
    return None


def _search_list(value: list[Any], depth: int) -> list[Record] | None:
    if not value or not isinstance(value[0], dict):
        return _many(value, None) if _is_vector(value) or not value else None
    parts = [_search(row, depth - 1) if isinstance(row, dict) else [(row, None)] for row in value]
    if all(records is None for records in parts):
        return None
    return [
        record
        for row, records in zip(value, parts, strict=True)
        for record in ([(None, row)] if records is None else _beside(records, row))
    ]


def _beside(records: list[Record], outer: Any) -> list[Record]:
    """Records that also know what stands around them (an id beside a response)."""
    if not isinstance(outer, dict):
        return records
    if len(records) == 1:
        inner = records[0][1] if isinstance(records[0][1], dict) else {}
        return [(records[0][0], {**outer, **inner})]
    return [
        (vector, row if isinstance(row, dict) else _row_of(outer, index, len(records)))
        for index, (vector, row) in enumerate(records)
    ]


def _row_of(columns: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """Build the record of one vector from a dump of parallel lists."""
    return {
        name: value[index]
        for name, value in columns.items()
        if isinstance(value, list) and len(value) == count
    }


def _is_vector(value: Any) -> bool:
    """Numbers, texts that spell some, or lists of these; not records."""
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], dict)
    return isinstance(value, (str, bytes)) and len(value) > 1


def _many(value: Any, record: Any) -> list[Record]:
    """Return one vector, or the vectors of a list of them."""
    while isinstance(value, list) and len(value) == 1 and _nested(value[0]):
        value = value[0]
    if isinstance(value, list) and value and all(isinstance(row, (list, str)) for row in value):
        columns = record if isinstance(record, dict) else {}
        return [(row, _row_of(columns, i, len(value))) for i, row in enumerate(value)]
    return [] if value == [] and record is None else [(value, record)]


def _nested(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


@dataclass(frozen=True)
class Json:
    """A ``.json`` document, or JSON lines.

    Attributes:
        path: Also ``.gz`` or ``.zst``.
        key: See `find_vectors`.
        skip_bad: A line that is no JSON, or has no vector, is a reason in place of a record.
        keep: Keys whose values go with each vector.
        optional: Those of ``keep`` that a record may lack.
    """

    path: Path
    key: str | None = None
    skip_bad: bool = False
    keep: Sequence[str] = ()
    optional: Sequence[str] = ()

    def count(self) -> int:
        """Vectors of a document; lines that are not blank, of which each may hold several."""
        document = self._document()
        if document is not None:
            return len(self._records(document[0], f"{self.path}"))
        lines = (line for line in json_lines(self.path, LINE_BYTES) if line.fault != "blank")
        first = next(lines, None)
        count = (first is not None) + sum(1 for _ in lines)
        if count == 1 and first is not None and first.fault is None:  # a document in one line
            return len(self._of_line(first))
        return count

    def records(self) -> Iterator[tuple[Any, list[Any]]]:
        """Yield each vector as it is spelled, and the values to keep beside it."""
        document = self._document()
        records = self._lines() if document is None else self._records(document[0], str(self.path))
        for vector, record in records:
            values = [look_up(record, name) for name in self.keep]
            pairs = zip(self.keep, values, strict=True)
            absent = [n for n, value in pairs if is_missing(value) and n not in self.optional]
            if absent and not self.skip_bad:
                raise EmbeddingError(
                    f"the keys {', '.join(map(repr, absent))} beside each vector of {self.path}",
                    f"the keys {_names(record or {})}",
                    CORRECT_KEEP,
                )
            yield vector, [None if is_missing(value) else value for value in values]

    def _document(self) -> tuple[Any] | None:
        """The value of a file that is one JSON value over several lines; None for JSON lines."""
        lines = read_lines(self.path, LINE_BYTES)
        first = next((line for line in lines if line is None or line.strip()), b"")
        has_suffix = ".json" in [suffix.lower() for suffix in self.path.suffixes]
        if first is None:
            return self._parse() if has_suffix else None
        opening = first.strip()
        if _is_json(opening) or not (has_suffix or opening in (b"[", b"{")):
            return None
        return self._parse() if opening.startswith((b"[", b"{")) else None

    def _parse(self) -> tuple[Any] | None:
        data = bytearray()
        for line in read_lines(self.path, _DOCUMENT_BYTES):
            data += b"\n" if line is None else line + b"\n"
            if line is None or len(data) > _DOCUMENT_BYTES:
                raise _too_large(self.path, f"more than {_DOCUMENT_BYTES >> 20} MiB")
        if data.count(b",") > _VALUES or data.count(b"[") + data.count(b"{") > _BRACKETS:
            raise _too_large(self.path, "more values than fit in memory")
        try:
            return (json.loads(data),)
        except (ValueError, RecursionError) as error:
            raise EmbeddingError(
                f"JSON in {self.path}", f"{error}", "Correct it, or write one vector a line"
            ) from error

    def _records(self, document: Any, where: str) -> list[Record]:
        records = find_vectors(document, self.key)
        if records is None and isinstance(document, list) and not isinstance(document[0], dict):
            raise EmbeddingError(
                f"a key {self.key or 'embedding'!r} in {where}",
                "lists without keys",
                "Leave --key out",
            )
        if records is None:
            actual = f"the keys {_names(document)}" if isinstance(document, dict) else "others"
            if isinstance(document, list) and document and isinstance(document[0], dict):
                actual = f"a list of objects with the keys {_names(document[0])}"
            raise EmbeddingError(
                f"a key {self.key or 'embedding'!r} in {where}",
                actual,
                "Pass --key with the one that holds the vector, or its path: data.*.embedding",
            )
        return records

    def _lines(self) -> Iterator[Record]:
        several = False
        for line in json_lines(self.path, LINE_BYTES):
            if line.fault == "blank":
                continue
            try:
                yield from self._of_line(line)
                several = True
            except EmbeddingError as error:
                if not self.skip_bad and several:  # not all are of another kind: this one is bad
                    fix = "Leave it out, or pass --skip-bad"
                    raise EmbeddingError(error.expected, error.actual, fix) from error
                if not self.skip_bad:
                    raise
                yield Reason("no JSON with the key that was asked for"), None

    def _of_line(self, line: JsonLine) -> list[Record]:
        where, value = f"line {line.number} of {self.path}", line.value
        if line.fault is not None:
            raise EmbeddingError(
                "one JSON object or list a line", f"{where}: {line.detail}", "Correct the line"
            )
        bare = isinstance(value, list) and not (value and isinstance(value[0], (list, dict)))
        if bare and self.key is None:
            return [(value, None)]
        return self._records(value, where)


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, islice(record, 20))) or "none"


def _is_json(line: bytes | None) -> bool:
    try:
        json.loads(line or b"")
    except (ValueError, RecursionError):
        return False
    return True


def _too_large(path: Path, actual: str) -> EmbeddingError:
    return EmbeddingError(
        f"a JSON document of at most {_VALUES:,} values in {path}",
        actual,
        "Write one vector a line (.jsonl), or .npy or .parquet",
    )
