"""Inverting a text or a file of vectors: what the command and the demo do with an `Inverter`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unembed.encoders.base import Encoder
from unembed.errors import EmbeddingError
from unembed.files import atomic
from unembed.inverter import Inversion, Inverter
from unembed.vectors.read import Chunk, VectorFile

_BATCH = 64
_GROUP = 4096  # rows of a Parquet row group


@dataclass(frozen=True)
class RoundTrip:
    """A text, what its embedding gave away, and how close that is.

    Attributes:
        original: The text.
        inversion: What was recovered from the vector.
        cosine: Between the vectors of the original and of the recovered text; None when nothing
            was recovered.
        token_recall: Share of the original's distinct tokens that came back.
        exact: The token sequences are the same.
        seconds: Decoding time, without loading and encoding.
    """

    original: str
    inversion: Inversion
    cosine: float | None
    token_recall: float
    exact: bool
    seconds: float


def invert_text(inverter: Inverter, encoder: Encoder, text: str, **options: Any) -> RoundTrip:
    """Encode a text, invert the vector, encode the recovery and compare.

    Args:
        inverter: Trained for this encoder.
        encoder: Makes the vectors; also what a strategy with encoder calls asks.
        text: At least one visible character.
        **options: Of `Inverter.invert`.

    Raises:
        EncoderError: The inverter belongs to another encoder.
        EmbeddingError: The text is empty.
    """
    inverter.require_encoder(encoder)
    vector = encoder.encode([text])
    began = time.perf_counter()
    inversion = inverter.invert(vector, encoder=encoder, **options)[0]
    seconds = time.perf_counter() - began
    cosine = None
    if inversion.text:
        cosine = float((encoder.encode([inversion.text]) @ vector[0])[0])
    original = inverter.tokenizer.encode([text])[0]
    wanted = set(original)
    return RoundTrip(
        original=text,
        inversion=inversion,
        cosine=cosine,
        token_recall=len(wanted & set(inversion.token_ids)) / max(len(wanted), 1),
        exact=original == inversion.token_ids,
        seconds=seconds,
    )


def invert_file(inverter: Inverter, source: Path | VectorFile, **options: Any) -> list[Inversion]:
    """Invert the vectors of a file; see `VectorFile` for what it may be.

    Args:
        inverter: Trained for the encoder that made them.
        source: The file.
        **options: Of `Inverter.invert`.

    Raises:
        EmbeddingError: The file cannot be read or its vectors cannot be inverted.
    """
    file = source if isinstance(source, VectorFile) else VectorFile(source)
    return [item for chunk, found in _stream(inverter, file, options) for item in found]


def invert_to_file(
    inverter: Inverter,
    source: VectorFile,
    out: Path,
    *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    **options: Any,
) -> int:
    """Invert the vectors of a file into another, a chunk in memory at a time.

    The file appears under its name when it is whole; one that was there is replaced then.

    Args:
        inverter: Trained for the encoder that made them.
        source: The vectors.
        out: ``.jsonl`` or ``.parquet``: for each vector ``row`` (its index in the source),
            ``text``, ``token_ids``, ``confidences``, ``passes``, ``encoder_calls`` and ``order``.
        progress: Called with (stage, rows read, rows in all).
        **options: Of `Inverter.invert`.

    Returns:
        Texts written.

    Raises:
        EmbeddingError: The vectors cannot be read or none can be inverted, or ``out`` cannot be
            written or is the source itself.
    """
    writers: dict[str, type[_JsonLines | _Parquet]] = {".jsonl": _JsonLines, ".parquet": _Parquet}
    if out.suffix not in writers:
        raise EmbeddingError(
            "an --out that ends in .jsonl or .parquet", str(out), "Choose one of them"
        )
    if out.resolve() == source.path.resolve() or out.is_dir():
        there = "a folder" if out.is_dir() else "the vectors themselves, which would be lost"
        raise EmbeddingError(f"a file to write at {out}", there, "Choose another --out")
    total, count = len(source), 0
    try:
        with atomic(out) as temporary, writers[out.suffix](temporary) as writer:
            for chunk, found in _stream(inverter, source, options):
                rows = [{"row": r, **asdict(i)} for r, i in zip(chunk.rows, found, strict=True)]
                writer.write(rows)
                count += len(rows)
                progress("inverting", chunk.read, total)
    except OSError as error:
        raise EmbeddingError(
            f"a place to write {out}", str(error), "Choose another --out"
        ) from error
    return count


def _stream(
    inverter: Inverter, source: VectorFile, options: dict[str, Any]
) -> Iterator[tuple[Chunk, list[Inversion]]]:
    """Some vectors and what is recovered from them, batch by batch."""
    for chunk in source.chunks(inverter.encoder.dimension):
        for start in range(0, len(chunk.rows), _BATCH):
            rows = chunk.rows[start : start + _BATCH]
            last = start + _BATCH >= len(chunk.rows)
            part = Chunk(
                rows, chunk.vectors[start : start + _BATCH], chunk.read if last else rows[-1] + 1
            )
            yield part, _inverted(inverter, part, options)
        if not chunk.rows:
            yield chunk, []


def _inverted(inverter: Inverter, part: Chunk, options: dict[str, Any]) -> list[Inversion]:
    """A vector draws from (seed, its row), whatever was left out before it."""
    found: list[Inversion] = []
    start = 0
    for stop in range(1, len(part.rows) + 1):
        if stop == len(part.rows) or part.rows[stop] != part.rows[stop - 1] + 1:
            run = part.vectors[start:stop]
            found += inverter.invert(run, first_index=part.rows[start], **options)
            start = stop
    return found


class _JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append some rows."""
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _Parquet:
    """A row group for as many batches as make it worth while."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            [
                ("row", pa.int64()),
                ("text", pa.string()),
                ("token_ids", pa.list_(pa.int64())),
                ("confidences", pa.list_(pa.float32())),
                ("passes", pa.int64()),
                ("encoder_calls", pa.int64()),
                ("order", pa.list_(pa.int64())),
            ]
        )
        self._writer = pq.ParquetWriter(path, self._schema)
        self._held: list[dict[str, Any]] = []

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append some rows."""
        self._held += rows
        if len(self._held) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._held, self._schema))
        self._held = []
