"""Defended copy of a store's vectors, with what its owner needs to search it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from unembed.defences.defence import Defence, Vectors, beside, try_out
from unembed.defences.records import ID
from unembed.encoders.vectors import row_peaks, to_unit_length
from unembed.errors import ConfigError, DataError, StoreError
from unembed.files import atomic
from unembed.vectors.stores.export import spell
from unembed.vectors.stores.store import Store, VectorBatch

_FITTED_ON = 20_000  # vectors that a defence is fitted to, the first of the store
_ROWS = 10_000  # in memory at a time
_SEED_BYTES = 32
COLUMN = "embedding"


def write_copy(
    store: Store,
    defence: Defence,
    out: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Path]:
    """Write the vectors of a store as it should hold them, a batch in memory at a time.

    Secrets and noise come from the system's entropy, not from a seed: what a report names must
    open nothing. Each noisy row has a generator of its own, so that the noise of a known text does
    not give away that of others.

    Args:
        store: Opened with the fields to keep; rows without a usable vector are left out.
        defence: Not fitted.
        out: A ``.parquet`` to write: ids, fields kept, and ``embedding`` (codes of a quantiser);
            no text that is not kept.
        progress: Called with (stage, rows written, rows).

    Returns:
        The copy, and what `Defence.save` wrote beside it.

    Raises:
        ConfigError: A defence of the texts, or a place that cannot be written.
        StoreError: The vectors cannot be read.
    """
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError("--out of a copy that ends in .parquet", str(out), "Correct --out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"a folder for {out}", "none there", "Make it, or correct --out")
    there = [path.name for path in (out, *beside(out)) if path.exists()]
    if there:  # the vectors themselves, or a key that still opens something
        raise ConfigError(
            f"a new file at {out}", f"{' and '.join(there)} there", "Choose another --out"
        )
    if defence.rewrite(["a text"]) is not None:
        raise ConfigError(
            "--write with a defence of vectors",
            f"{defence}, which changes texts",
            "Change them where they are embedded, with unembed.defences.pii.replace_spans",
        )
    vectors = _first(store)
    try_out([defence], vectors)
    defence.fit(vectors, _entropy())
    try:
        with ExitStack() as stack:
            file, writer, done = stack.enter_context(atomic(out)), None, 0
            for batch in store.batches(size=_ROWS):
                if not batch.ids:
                    continue
                table = _table(batch, defence)
                if writer is None:
                    writer = stack.enter_context(_writer(file, table, defence))
                writer.write_table(table)
                done += len(batch)
                progress("writing", done, store.facts.count)
            if writer is not None:
                writer.close()
            paths = defence.save(out)  # before the copy has its name: none without its key
    except OSError as error:
        raise DataError(f"a place to write {out}", str(error), "Choose another --out") from error
    return [out, *paths]


def _entropy() -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(secrets.token_bytes(_SEED_BYTES), "big"))


def _units(batch: VectorBatch) -> Vectors:
    rows = batch.vectors.astype(np.float64)
    return to_unit_length(rows, row_peaks(rows))


def _first(store: Store) -> Vectors:
    parts, count = list[Vectors](), 0
    for batch in store.batches():
        parts.append(_units(batch))
        count += len(batch)
        if count >= _FITTED_ON:
            break
    if not count:
        raise StoreError(
            f"vectors in {store.facts.collection}", "none", "Choose another collection or column"
        )
    return np.concatenate(parts)[:_FITTED_ON]


def _protected(vectors: Vectors, defence: Defence) -> Iterator[Any]:
    noisy = defence.sigma(vectors.shape[1]) is not None
    parts = [vectors[i : i + 1] for i in range(len(vectors))] if noisy else [vectors]
    for part in parts:
        yield defence.codes(defence.apply(part, _entropy()))


def _table(batch: VectorBatch, defence: Defence) -> Any:
    import pyarrow as pa

    codes = np.concatenate(list(_protected(_units(batch), defence)))
    columns: dict[str, Any] = {ID: pa.array(batch.ids, pa.string())}
    for name, values in batch.payload.items():  # a field `id` of a file in place of its rows
        columns[name] = pa.array(map(spell, values), pa.string())
    flat = pa.array(np.ascontiguousarray(codes).reshape(-1))
    columns[COLUMN] = pa.FixedSizeListArray.from_arrays(flat, codes.shape[1])
    return pa.table(columns)


def _writer(file: Path, table: Any, defence: Defence) -> Any:
    import pyarrow.parquet as pq

    schema = table.schema.with_metadata({"unembed.defence": str(defence)})
    return pq.ParquetWriter(file, schema)
