"""Defended copy of a file of vectors, with what its owner needs to search it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from unembed.defences.defence import Defence, Vectors
from unembed.encoders.vectors import row_peaks, to_unit_length
from unembed.errors import ConfigError, DataError
from unembed.files import atomic
from unembed.vectors.output import plain
from unembed.vectors.read import Chunk, VectorFile, vector_size

_FITTED_ON = 20_000  # vectors that a defence is fitted to, the first of the file
_SEED_BYTES = 32
COLUMN = "embedding"


def write_copy(
    source: VectorFile,
    defence: Defence,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Path]:
    """Write the vectors of a file as a store should hold them, a chunk in memory at a time.

    Secrets and noise come from the system's entropy, not from a seed: what a report names must
    open nothing. Each noisy row has a generator of its own, so that the noise of a known text does
    not give away that of others.

    Args:
        source: The vectors, with the columns to keep; those without a usable vector are left out.
        defence: Not fitted.
        out: A ``.parquet`` to write: kept columns, and ``embedding`` (codes of a quantiser).
        progress: Called with (stage, rows written, rows).

    Returns:
        The copy, and what `Defence.save` wrote beside it.

    Raises:
        ConfigError: A defence of the texts, or a place that cannot be written.
        EmbeddingError: The vectors cannot be read.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError("--out of a copy that ends in .parquet", str(out), "Correct --out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"a folder for {out}", "none there", "Make it, or correct --out")
    if out.exists() and any(out.samefile(path) for path in source.parts()):
        raise ConfigError("--out apart from the vectors", str(out), "Choose another --out")
    if defence.rewrite(["a text"]) is not None:
        raise ConfigError(
            "--write with a defence of vectors",
            f"{defence}, which changes texts",
            "Change them where they are embedded, with unembed.defences.pii.replace_spans",
        )
    dimension, total = vector_size(source), len(source)
    defence.fit(_first(source, dimension), _entropy())
    source.left_out.clear()
    source.rows_left_out.clear()
    try:
        with ExitStack() as stack:
            file, writer = stack.enter_context(atomic(out)), None
            for chunk in source.chunks(dimension):
                if not chunk.rows:
                    continue
                table = _table(chunk, defence, source.keep)
                if writer is None:
                    writer = stack.enter_context(_writer(file, table, defence))
                writer.write_table(table)
                progress("writing", chunk.read, total)
            if writer is not None:
                writer.close()
            paths = defence.save(out)  # before the copy has its name: none without its key
    except OSError as error:
        raise DataError(f"a place to write {out}", str(error), "Choose another --out") from error
    return [out, *paths]


def _entropy() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(secrets.token_bytes(_SEED_BYTES), "big"))


def _units(chunk: Chunk) -> Vectors:
    return to_unit_length(chunk.vectors, row_peaks(chunk.vectors))


def _first(source: VectorFile, dimension: int) -> Vectors:
    parts, count = [], 0
    for chunk in source.chunks(dimension):
        parts.append(_units(chunk))
        count += len(chunk.rows)
        if count >= _FITTED_ON:
            break
    return np.concatenate(parts)[:_FITTED_ON]


def _protected(vectors: Vectors, defence: Defence) -> Iterator[Any]:
    noisy = defence.sigma(vectors.shape[1]) is not None
    parts = [vectors[i : i + 1] for i in range(len(vectors))] if noisy else [vectors]
    for part in parts:
        yield defence.codes(defence.apply(part, _entropy()))


def _table(chunk: Chunk, defence: Defence, keep: Sequence[str]) -> Any:
    import pyarrow as pa

    codes = np.concatenate(list(_protected(_units(chunk), defence)))
    columns: dict[str, Any] = {"row": pa.array(chunk.rows, pa.int64())}
    for name in keep:
        values = [plain(value) for value in chunk.columns[name]]
        kinds = {type(value) for value in values if value is not None}
        columns[name] = pa.array(
            values if kinds <= {int} else [None if v is None else str(v) for v in values],
            pa.int64() if kinds == {int} else pa.string(),
        )
    flat = pa.array(np.ascontiguousarray(codes).reshape(-1))
    columns[COLUMN] = pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])
    return pa.table(columns)


def _writer(file: Path, table: Any, defence: Defence) -> Any:
    import pyarrow.parquet as pq

    schema = table.schema.with_metadata({"unembed.defence": str(defence)})
    return pq.ParquetWriter(file, schema)
