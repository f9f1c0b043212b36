"""Texts of one language out of one file; rows that cannot be read are counted, not fatal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unembed.errors import DataError
from unembed.files import csv_rows, file_format, missing_column, open_parquet, read_lines

_BATCH_ROWS = 1024
_LINE_BYTES = 16 << 20

Skip = Callable[[str], None]


@dataclass(frozen=True)
class Pick:
    """Which rows to take, and what of them.

    Attributes:
        column: Column or key of the text.
        lang_column: Column or key of the language.
        lang: The language wanted.
        known: All rows are in that language, whatever the columns say.
        alone: No other language is asked for, so a file that names none is taken whole.
    """

    column: str
    lang_column: str
    lang: str
    known: bool
    alone: bool

    def filters(self, place: Path | str, columns: Sequence[str]) -> bool:
        """Whether rows are chosen by their language column.

        Raises:
            DataError: The columns lack the text, or the language where it is needed.
        """
        if self.column not in columns:
            raise missing_column(place, self.column, list(columns))
        if self.known:
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
    import pyarrow.compute as pc

    file = open_parquet(path)
    schema = file.schema_arrow
    filtering = pick.filters(path, schema.names)
    _check_text_type(schema.field(pick.column).type, path, pick.column)
    columns = [pick.column, pick.lang_column] if filtering else [pick.column]
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            texts = batch.column(pick.column)
            if filtering:
                langs = batch.column(pick.lang_column).cast(pa.string())
                texts = texts.filter(pc.equal(langs, pick.lang))
            if pa.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            for raw in texts.cast(pa.large_binary()).to_pylist():
                text = _decode(raw, skip)
                if text is not None:
                    yield text
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"readable rows in {path}", str(error), "Copy the file again") from error


def _check_text_type(kind: Any, path: Path, column: str) -> None:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(f"text in the column {column!r} of {path}", str(kind), "Pass --column")


def _json_rows(path: Path, pick: Pick, skip: Skip) -> Iterator[str]:
    filtering: bool | None = None
    for line in _lines(path, skip):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            skip("not_json")
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
    if not (pick.known or pick.alone):
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
