"""A store → one Parquet file, in parts that a later run goes on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unembed.data.readers import open_parquet
from unembed.errors import StoreError, require_callable
from unembed.files import as_path, atomic, require_apart
from unembed.vectors.output import plain
from unembed.vectors.stores.store import Store, VectorBatch, require_store

_ROWS = 10_000  # of a part
_HEAD = "store.json"


def export_store(
    store: Store, out: str | Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Write all vectors of a store with ids, texts and the fields that were asked for.

    Parts lie in ``out`` with ``.part`` at its end until all are there; the same call goes on
    behind the last id written. At no time are more than 10,000 rows in memory.

    Args:
        store: Opened with the fields to keep.
        out: ``.parquet``, replaced when all is written.
        progress: Called with (rows written, rows in all).

    Returns:
        Rows written.

    Raises:
        StoreError: The store cannot be read, or ``out`` cannot be written.
        DataError: ``out`` is what is read, or lies in it.
    """
    store, out = require_store(store), as_path(out)
    require_callable(progress=progress)
    if out.suffix != ".parquet" or not out.parent.is_dir():
        raise StoreError(
            "an --out in a folder that exists, ending in .parquet", str(out), "Choose another --out"
        )
    if store.place is not None:
        require_apart(store.place, out)
    folder = out.with_name(out.name + ".part")
    done, last = _begin(folder, store)
    number = len(list(folder.glob("*.parquet")))
    for batch in store.batches(after=last, size=_ROWS):
        if len(batch):
            with atomic(folder / f"{number:06}.parquet") as part:
                _write(part, batch, store)
            number, done = number + 1, done + len(batch)
        if progress is not None:
            progress(done, store.facts.count)
    if number == 0:
        reasons = "; ".join(f"{k} × {r}" for r, k in store.left_out.items())
        shutil.rmtree(folder)
        raise StoreError(
            f"vectors in {store.facts.collection}",
            reasons or "an empty collection",
            "Choose another collection or column",
        )
    with atomic(out) as whole:
        _join(sorted(folder.glob("*.parquet")), whole)
    shutil.rmtree(folder)
    return done


def _begin(folder: Path, store: Store) -> tuple[int, str | None]:
    """Rows that an earlier run wrote, and the id of the last."""
    head = store.facts.to_dict()
    head = {name: head[name] for name in ("kind", "collection", "dimension", "text", "fields")}
    try:
        folder.mkdir(exist_ok=True)
        if not (folder / _HEAD).exists():
            with atomic(folder / _HEAD) as file:
                file.write_text(json.dumps(head), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"a folder at {folder}", str(error), "Choose another --out") from error
    try:
        same = json.loads((folder / _HEAD).read_text(encoding="utf-8")) == head
    except (OSError, ValueError):
        same = False
    if not same:
        raise StoreError(
            f"the beginning of the same export in {folder}",
            "one of another store",
            "Delete it, or choose another --out",
        )
    rows, last = 0, None
    for part in sorted(folder.glob("*.parquet")):
        file = open_parquet(part)
        rows += file.metadata.num_rows
        last = file.read(columns=["id"]).column("id")[-1].as_py()
    return rows, last


def _write(path: Path, batch: VectorBatch, store: Store) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(batch.vectors.ravel()), store.facts.dimension
    )
    columns: dict[str, Any] = {"id": pa.array(batch.ids, pa.string()), "embedding": vectors}
    if batch.texts is not None:
        columns["text"] = pa.array(map(_unicode, batch.texts), pa.string())
    for name, values in batch.payload.items():
        label = f"source_{name}" if name in columns else name
        columns[label] = pa.array(map(spell, values), pa.string())
    pq.write_table(pa.table(columns), path)


def spell(value: Any) -> str | None:
    """A field as text, whatever it is: rows of one store may differ in it."""
    value = plain(value)
    if value is None or isinstance(value, str):
        return _unicode(value)
    return json.dumps(value, ensure_ascii=False)


def _unicode(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def _join(parts: list[Path], whole: Path) -> None:
    import pyarrow.parquet as pq

    def tables() -> Iterator[Any]:
        for part in parts:
            yield open_parquet(part).read()

    stream = tables()
    first = next(stream)
    with pq.ParquetWriter(whole, first.schema) as writer:
        writer.write_table(first)
        for table in stream:
            writer.write_table(table)
