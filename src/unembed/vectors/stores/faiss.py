"""FAISS: an index file, memory-mapped; whether the vectors in it are exact, its kind says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import StoreError
from unembed.vectors.stores.address import Address
from unembed.vectors.stores.store import Store, StoreFacts, VectorBatch, client_errors

_METRICS = {0: "inner product", 1: "l2"}
# Kind → why what comes out is not what went in
_LOSSY = {
    "IndexPQ": "product quantisation: each vector is rebuilt from a few codes",
    "IndexIVFPQ": "product quantisation: each vector is rebuilt from a few codes",
    "IndexScalarQuantizer": "scalar quantisation: 4, 6, 8 or 16 bits of each number",
    "IndexIVFScalarQuantizer": "scalar quantisation: 4, 6, 8 or 16 bits of each number",
    "IndexHNSWPQ": "product quantisation: each vector is rebuilt from a few codes",
    "IndexHNSWSQ": "scalar quantisation: 4, 6, 8 or 16 bits of each number",
    "IndexLSH": "hashing: one bit of each rotated number",
}
_EXACT = ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat")


class FaissStore(Store):
    """An index of FAISS; ids are its own where it has some, else the places."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        import faiss

        path = address.path
        if path.is_dir():  # LangChain's folder: the pickle beside the index stays closed
            path = path / "index.faiss"
        pickled = (path.parent / "index.pkl").is_file()
        self._path = path
        with self._errors():
            with path.open("rb") as file:
                bits = file.read(2) == b"IB"
            if bits:
                raise StoreError(
                    f"an index of floats at {path}",
                    "one of bits (IndexBinary)",
                    "Choose an index of floats",
                )
            whole = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            self._owner = whole  # what follows points into it, and dies with it
            self._open(faiss.downcast_index(whole))
        if pickled:
            self.facts.notes.append(
                "index.pkl beside the index is a pickle of texts, which is never loaded: opening "
                "it would run whatever is in it. Export the texts to be scored against them"
            )

    def ids(self, after: str | None = None) -> Iterator[str]:
        """Ids in the order of the index; see `Store.ids`."""
        start = 0 if after is None else self._place[after] + 1 if self._place else int(after) + 1
        names = self._names[start:] if self._place else range(start, self.facts.count)
        return map(str, names)

    def fetch(self, ids: Sequence[str]) -> VectorBatch:
        """Rows by id; see `Store.fetch`."""
        places = [self._place[name] if self._place else int(name) for name in ids]
        with self._errors():
            vectors = np.stack([self._vector(place) for place in places])
        return self.clean(ids, vectors)

    def _open(self, index: Any) -> None:
        import faiss

        self._whole, self._names, kinds = index, [], [type(index).__name__]
        self._place: dict[str, int] = {}
        self._transforms: list[Any] = []
        while True:
            if hasattr(index, "id_map"):
                self._names = list(map(str, faiss.vector_to_array(index.id_map)))
            elif hasattr(index, "chain"):
                chain = index.chain
                steps = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
                self._transforms = steps[::-1]
            else:
                break
            index = faiss.downcast_index(index.index)
            kinds.append(type(index).__name__)
        self._index, kind = index, kinds[-1]
        if kind not in (*_EXACT, *_LOSSY):
            raise StoreError(
                f"an index whose vectors can be rebuilt, in {self._path}",
                kind,
                f"Use one of {', '.join((*_EXACT, *_LOSSY))}",
            )
        if hasattr(index, "make_direct_map"):
            self._inverted(index)
        self._place = {name: place for place, name in enumerate(self._names)}
        lossy = _LOSSY.get(kind)
        if any("PCA" in type(step).__name__ for step in self._transforms):
            lossy = f"{lossy + '; ' if lossy else ''}fewer dimensions (PCA)"
        self.facts = StoreFacts(
            kind="faiss",
            collection=self._path.name,
            count=int(self._whole.ntotal),
            dimension=int(self._whole.d),
            stored_type=" over ".join(kinds),
            metric=_METRICS.get(int(self._whole.metric_type), "other"),
            normalised=False,
            lossy=lossy,
            authentication="none: a file",
            encryption="none: the file is readable as it is",
            notes=[f"the store holds a lossy copy ({lossy}); the attack was run on it"]
            if lossy
            else [],
        )

    def _inverted(self, index: Any) -> None:
        """Where each vector lies in the lists; ids of the index itself are its names."""
        import faiss

        lists, where = index.invlists, []
        for number in range(int(index.nlist)):
            size = lists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size).copy()
                where += [(int(name), number, offset) for offset, name in enumerate(ids)]
        where.sort()
        self._lists = [(number, offset) for _, number, offset in where]
        if not self._names:
            self._names = [str(name) for name, _, _ in where]

    def _vector(self, place: int) -> NDArray[np.float32]:
        import faiss

        if hasattr(self, "_lists"):
            vector = np.zeros(self._index.d, dtype=np.float32)
            number, offset = self._lists[place]
            self._index.reconstruct_from_offset(number, offset, faiss.swig_ptr(vector))
        else:
            vector = self._index.reconstruct(place)
        rows = vector[None]
        for step in self._transforms:
            rows = step.reverse_transform(rows)
        result: NDArray[np.float32] = rows[0]
        return result

    def _errors(self) -> Any:
        return client_errors(
            f"a readable index of FAISS at {self._path}",
            "Correct the path",
            OSError,
            RuntimeError,
            AttributeError,
            KeyError,
        )


def open_store(address: Address) -> FaissStore:
    """Open an index of FAISS."""
    return FaissStore(address)
