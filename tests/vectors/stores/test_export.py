import numpy as np
import pyarrow.parquet as pq
import pytest

from unembed.errors import DataError, StoreError, UnembedError
from unembed.vectors.stores import export as module
from unembed.vectors.stores.address import open_store
from unembed.vectors.stores.export import export_store

from .conftest import TENANTS, TEXTS, VECTORS, digest
from .test_files import write


def test_export_store_writes_ids_vectors_texts_and_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 7)
    source = write(tmp_path / "v.parquet")
    seen = []
    with open_store(source, keep=["tenant"]) as store:
        assert export_store(store, tmp_path / "out.parquet", lambda *x: seen.append(x)) == 30
    table = pq.read_table(tmp_path / "out.parquet")
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), VECTORS)
    assert table["text"].to_pylist() == TEXTS
    assert table["tenant"].to_pylist() == TENANTS
    assert seen[-1] == (30, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "v.parquet"]
    with open_store(tmp_path / "out.parquet") as store:
        assert store.facts.dimension == 8


def test_export_store_goes_on_behind_the_last_id(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 7)
    source = write(tmp_path / "v.jsonl")

    class KilledError(Exception):
        pass

    def kill(done, total):
        if done >= 14:
            raise KilledError

    with open_store(source) as store, pytest.raises(KilledError):
        export_store(store, tmp_path / "out.parquet", kill)
    assert not (tmp_path / "out.parquet").exists()
    seen = []
    with open_store(source) as store:
        assert export_store(store, tmp_path / "out.parquet", lambda *x: seen.append(x[0])) == 30
    assert min(seen) > 14
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == [str(row) for row in range(30)]


def test_export_store_refuses_parts_of_another_store(tmp_path):
    (tmp_path / "out.parquet.part").mkdir()
    (tmp_path / "out.parquet.part" / "store.json").write_text("{}")
    with open_store(write(tmp_path / "v.npy")) as store:
        with pytest.raises(StoreError, match="one of another store"):
            export_store(store, tmp_path / "out.parquet")
        with pytest.raises(StoreError, match=r"ending in \.parquet"):
            export_store(store, tmp_path / "out.csv")


def test_export_store_never_writes_over_what_it_reads(tmp_path):
    source = write(tmp_path / "v.parquet")
    (tmp_path / "linked.parquet").symlink_to(source)
    before = digest(source)
    for out in (source, tmp_path / "linked.parquet", str(source)):
        with open_store(source) as store, pytest.raises(DataError, match="an --out outside of"):
            export_store(store, out)
    with open_store(tmp_path) as store, pytest.raises(DataError, match="an --out outside of"):
        export_store(store, tmp_path / "new.parquet")  # it would be read as a part the next time
    assert digest(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linked.parquet", "v.parquet"]


def test_export_store_refuses_what_is_no_store_or_path(tmp_path):
    source = write(tmp_path / "v.parquet")
    with pytest.raises(UnembedError, match="an open store; found str"):
        export_store(str(source), tmp_path / "out.parquet")
    with open_store(source) as store:
        with pytest.raises(UnembedError, match="a path; found NoneType"):
            export_store(store, None)
        with pytest.raises(UnembedError, match="progress as a function"):
            export_store(store, tmp_path / "out.parquet", 3)
        assert export_store(store, str(tmp_path / "out.parquet"), None) == 30


@pytest.mark.parametrize("head", ["{", "[]", ""])
def test_export_store_refuses_a_damaged_beginning(tmp_path, head):
    (tmp_path / "out.parquet.part").mkdir()
    (tmp_path / "out.parquet.part" / "store.json").write_text(head)
    store = open_store(write(tmp_path / "v.parquet"))
    with pytest.raises(StoreError, match="the beginning of the same export"):
        export_store(store, tmp_path / "out.parquet")
