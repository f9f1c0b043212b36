"""LanceDB: a table of a folder, by the Lance reader; old versions are looked at, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import (
    Store,
    StoreFacts,
    VectorBatch,
    arrow_rows,
    choose,
    choose_fields,
    client_errors,
)

_PAGE = 50_000
_FORMATS = {"halffloat": "float16", "float": "float32", "double": "float64"}


class LanceStore(Store):
    """A table of LanceDB; ids are the rows, from 0, of the newest version."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        import lance

        with self._errors():
            path = _table(address)
            self._table = lance.dataset(str(path))
            self._learn(path)

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Rows, as text; see `Store.ids`."""
        return map(str, range(0 if after is None else int(after) + 1, self.facts.count))

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by their number, which Lance seeks; see `Store.fetch`."""
        text = self.facts.text
        with self._errors():
            rows = [int(name) for name in ids]
            table = self._table.take(rows, columns=[self._column, *self.fields])
            vectors = arrow_rows(table.column(self._column), self.facts.dimension)
            payload = {name: table.column(name).to_pylist() for name in self._address.keep}
            texts = table.column(text).to_pylist() if text else None
        return self.clean(ids, vectors, texts, payload)

    def _learn(self, path: Path) -> None:
        import pyarrow as pa

        schema = self._table.schema
        kinds = {field.name: field.type for field in schema}
        vectors = [
            name
            for name, kind in kinds.items()
            if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
        ]
        several = [
            n
            for n, k in kinds.items()
            if pa.types.is_list(k) and pa.types.is_fixed_size_list(k.value_type)
        ]
        if not vectors and several:
            raise StoreError(
                f"a column of one vector a row in {path}",
                f"{several[0]} with several vectors a row",
                "Choose another table: multivectors are not read",
            )
        self._column = choose(
            vectors, self._address.column, f"a column of vectors in {path}", "?column="
        )
        others = [name for name in kinds if name not in vectors]
        text, others = choose_fields(others, self._address.text, self._address.keep)
        kind = kinds[self._column]
        self.facts = StoreFacts(
            kind="lancedb",
            collection=path.stem,
            count=self._table.count_rows(),
            dimension=kind.list_size,
            stored_type=_FORMATS.get(str(kind.value_type), str(kind.value_type)),
            normalised=False,
            lossy="half precision" if "half" in str(kind.value_type) else None,
            text=text,
            fields=others,
            not_read=[f"column {name}" for name in [*vectors, *several] if name != self._column],
            deleted=self._deletions(),
            authentication="none: a folder",
            encryption="none: the files are readable as they are",
        )
        for index in self._table.describe_indices():
            if self._column in index.field_names:
                lossy = any(word in index.index_type for word in ("PQ", "SQ", "RQ"))
                exact = ": quantised; the table keeps the exact vectors"
                self.facts.index = index.index_type + (exact if lossy else "")

    def _deletions(self) -> str | None:
        """Rows of old versions that are gone from the newest one, as far as counts tell."""
        import lance

        versions = [int(item["version"]) for item in self._table.versions()]
        removed = 0
        for version in versions:
            rows = lance.dataset(self._table.uri, version=version).count_rows()
            removed = max(removed, rows - self._table.count_rows())
        tombs = sum(f.num_deletions or 0 for f in self._table.get_fragments())
        count = max(removed, tombs)
        return (
            f"at least {count} deleted rows that can be read in the {len(versions)} versions of "
            "the table, until they are compacted and cleaned up"
            if count
            else None
        )

    def _errors(self) -> Any:
        return client_errors(
            f"a readable table of LanceDB in {self._address.place}",
            "Correct the path or ?table=",
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
        )


def _table(address: Address) -> Path:
    path = address.path
    if (path / "_versions").is_dir():
        return path
    names = sorted(folder.stem for folder in path.glob("*.lance") if folder.is_dir())
    return path / f"{choose(names, address.collection, f'a table in {path}', '?table=')}.lance"


def open_store(address: Address) -> LanceStore:
    """Open a table of LanceDB."""
    return LanceStore(address)
