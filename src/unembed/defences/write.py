"""Defences put to use: tried out, applied to vectors, a defended copy of a store."""

from __future__ import annotations

import copy
import math
import secrets
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.defences.defence import Defence, Vectors, as_defence, beside
from unembed.defences.records import ID
from unembed.encoders.vectors import row_peaks, to_unit_length
from unembed.errors import (
    ConfigError,
    DataError,
    StoreError,
    UnembedError,
    require_callable,
    require_number,
)
from unembed.files import as_path, atomic
from unembed.vectors.stores.export import spell
from unembed.vectors.stores.store import Store, VectorBatch, require_store

_FIT_ROWS = 20_000  # vectors that a defence is fitted to, the first of the store
_ROWS = 10_000  # in memory at a time
_TRIAL_ROWS = 1000  # vectors that a defence is first tried on
_SEED_BYTES = 32
COLUMN = "embedding"


def fit_and_apply(defence: Defence, vectors: Vectors, seed: int) -> Vectors:
    """Fit a defence to unit vectors [N, D] and turn them into what the store holds, [N, D'].

    Raises:
        ConfigError: A user's own defence fails, or gives something else than N finite vectors.
    """
    number = zlib.crc32(str(defence).encode())  # each draws numbers of its own
    with _own_faults(defence, "applied"):
        defence.fit(vectors, np.random.default_rng([seed, 6, number]))
        store = np.asarray(defence.apply(vectors, np.random.default_rng([seed, 7, number])))
    _require_vectors(defence, "vectors", store, len(vectors))
    return store.astype(np.float32)


def try_out(defences: Sequence[Defence], vectors: Vectors, encodes: bool = True) -> None:
    """Use a copy of each defence once, on a text and the first of unit vectors [N, D].

    Args:
        defences: Not fitted; they stay as they are.
        vectors: Of the store.
        encodes: Whether there is an encoder, for those that change texts.

    Raises:
        ConfigError: One fails, gives something else than it should, or needs an encoder.
    """
    few = vectors[:_TRIAL_ROWS].copy()
    few.flags.writeable = False  # others read them as well
    for defence in defences:
        trial = copy.deepcopy(defence)
        with _own_faults(defence, "used on a text"):
            rewrites = rewrite(trial, ["a text"]) is not None
        if rewrites and not encodes:
            raise ConfigError(
                f"the encoder, to embed texts again for {defence}",
                "none here",
                "Pass --encoder, or leave the defence out",
            )
        store = fit_and_apply(trial, few, 0)
        with _own_faults(defence, "used on queries and inverted"):
            queries, inverse = np.asarray(trial.query(few)), trial.invert(store)
            trial.bytes_each(store.shape[1])
            sigma = trial.sigma(few.shape[1])
            if sigma is not None:
                require_number(sigma=(sigma, 0.0, math.inf))
        _require_vectors(defence, "queries", queries, len(few), store.shape[1])
        if inverse is not None:
            _require_vectors(defence, "inverses", inverse, *few.shape)


def rewrite(defence: Defence, texts: Sequence[str]) -> list[str] | None:
    """The texts as a defence changes them; None where it does not.

    Raises:
        ConfigError: It gives something else than a text for each.
    """
    others: Any = defence.rewrite(texts)
    if others is None:
        return None
    fits = isinstance(others, (list, tuple)) and len(others) == len(texts)
    if not fits or not all(isinstance(text, str) and text.strip() for text in others):
        raise ConfigError(
            f"{defence} to give a text for each of {len(texts)}", f"{others!r:.80}", "Correct it"
        )
    return list(others)


@contextmanager
def _own_faults(defence: Defence, use: str) -> Iterator[None]:
    try:
        yield
    except UnembedError:
        raise
    except Exception as error:  # a user's own class
        raise ConfigError(
            f"{defence} to be {use}", f"{type(error).__name__}: {error}", "Correct it"
        ) from error


def _require_vectors(
    defence: Defence, what: str, rows: NDArray[Any], count: int, width: int | None = None
) -> None:
    """Refuse what is no array of that many finite rows."""
    size = "" if width is None else f" of {width} numbers"
    fits = rows.ndim == 2 and len(rows) == count and width in (None, rows.shape[1])  # noqa: PLR2004
    fits = fits and rows.size > 0
    if not fits or rows.dtype.kind not in "fiub" or not np.isfinite(rows).all():
        fault = "NaN or infinity" if fits else f"shape {list(rows.shape)}"
        raise ConfigError(f"{defence} to give {count} finite {what}{size}", fault, "Correct it")


def write_copy(
    store: Store,
    defence: Defence | str,
    out: str | Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Write the vectors of a store as it should hold them, a batch in memory at a time.

    Secrets and noise come from the system's entropy, not from a seed: what a report names must
    open nothing. Each noisy row has a generator of its own, so that the noise of a known text does
    not give away that of others.

    Args:
        store: Opened with the fields to keep; rows without a usable vector are left out.
        defence: Not fitted, or its name with settings.
        out: A ``.parquet`` to write: ids, fields kept, and ``embedding`` (codes of a quantiser);
            no text that is not kept.
        progress: Called with (stage, rows written, rows).

    Returns:
        The copy, and what `Defence.save` wrote beside it.

    Raises:
        ConfigError: A defence of the texts, or a place that cannot be written.
        StoreError: The vectors cannot be read.
    """
    store, defence, out = require_store(store), as_defence(defence), as_path(out)
    require_callable(progress=progress)
    _require_new(out)
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
                if progress is not None:
                    progress("writing", done, store.facts.count)
            if writer is not None:
                writer.close()
            paths = defence.save(out)  # before the copy has its name: none without its key
    except OSError as error:
        raise DataError(f"a place to write {out}", str(error), "Choose another --out") from error
    return [out, *paths]


def _require_new(out: Path) -> None:
    if out.suffix != ".parquet" or out.is_dir():
        raise ConfigError("--out of a copy that ends in .parquet", str(out), "Correct --out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"a folder for {out}", "none there", "Make it, or correct --out")
    there = [path.name for path in (out, *beside(out)) if path.exists()]
    if there:  # the vectors themselves, or a key that still opens something
        raise ConfigError(
            f"a new file at {out}", f"{' and '.join(there)} there", "Choose another --out"
        )


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
        if count >= _FIT_ROWS:
            break
    if not count:
        raise StoreError(
            f"vectors in {store.facts.collection}", "none", "Choose another collection or column"
        )
    return np.concatenate(parts)[:_FIT_ROWS]


def _protect(vectors: Vectors, defence: Defence) -> Iterator[Any]:
    noisy = defence.sigma(vectors.shape[1]) is not None
    parts = [vectors[i : i + 1] for i in range(len(vectors))] if noisy else [vectors]
    for part in parts:
        yield defence.codes(defence.apply(part, _entropy()))


def _table(batch: VectorBatch, defence: Defence) -> Any:
    import pyarrow as pa

    codes = np.concatenate(list(_protect(_units(batch), defence)))
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
