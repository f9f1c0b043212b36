import json

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from unembed.errors import StoreError, UnembedError
from unembed.vectors.stores.address import open_store

from .conftest import TENANTS, TEXTS, VECTORS, check_contract, counting, digest, read_all

IDS = [str(row) for row in range(len(VECTORS))]


def write(path):
    table = pa.table({"embedding": VECTORS.tolist(), "content": TEXTS, "tenant": TENANTS})
    if path.suffix == ".npy":
        np.save(path, VECTORS)
    elif path.suffix == ".npz":
        np.savez(path, embedding=VECTORS)
    elif path.suffix == ".safetensors":
        save_file({"embedding": VECTORS}, path)
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=11)
    elif path.suffix == ".arrow":
        feather.write_feather(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".csv":
        rows = [f'"{json.dumps(v.tolist())}",{t}\n' for v, t in zip(VECTORS, TENANTS, strict=True)]
        path.write_text("embedding,tenant\n" + "".join(rows))
    return path


FORMATS = [".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".jsonl", ".csv"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_open_store_reads_files_and_leaves_them_alone(tmp_path, suffix):
    path = write(tmp_path / f"vectors{suffix}")
    before = digest(path)
    texts = TEXTS if suffix in (".parquet", ".arrow", ".jsonl") else None
    check_contract(lambda: open_store(path), IDS, texts)
    assert digest(path) == before


def test_sample_reads_its_own_rows_of_an_array(tmp_path):
    path = tmp_path / "large.npy"
    np.save(path, np.ones((5000, 8), dtype=np.float32))
    with open_store(path) as store, counting(store) as reads:
        assert len(store.sample(100)) == 100
    assert reads.rows == 100


def test_sample_replaces_bad_rows_and_counts_them(tmp_path):
    vectors = np.ones((100, 8), dtype=np.float32)
    vectors[::8] = 0
    vectors[1::8] = np.nan
    np.save(tmp_path / "bad.npy", vectors)
    with open_store(tmp_path / "bad.npy") as store, counting(store) as reads:
        batch = store.sample(20)
        assert len(batch) == 20
        assert {*store.left_out} <= {"only zeros", "NaN or infinity"}
        assert 20 < reads.rows <= 40
        assert len(read_all(store)) == 74
        assert store.left_out == {"only zeros": 13, "NaN or infinity": 13}


def test_batches_counts_rows_of_another_dimension(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"vector": [1.0] * 4}, {"vector": None}, {"vector": [1.0] * 5}, {"vector": [2.0] * 4}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_store(path) as store:
        assert list(read_all(store)) == ["0", "3"]
        assert sum(store.left_out.values()) == 2
        assert "5 dimensions instead of 4" in store.left_out


def test_open_store_keeps_fields_and_names_those_it_lacks(tmp_path):
    path = write(tmp_path / "v.parquet")
    with open_store(path, keep=["tenant"]) as store:
        assert store.sample(3).payload.keys() == {"tenant"}
        assert {extra["tenant"] for _, _, extra in read_all(store).values()} == {"north", "south"}
    with pytest.raises(StoreError, match="a text column 'body'"):
        open_store(path, text_column="body")
    with pytest.raises(StoreError, match=r"a column 'nope'.*found '.*Correct --column"):
        open_store(path, column="nope")


@pytest.mark.parametrize("name", ["gone.npy", "gone/"])
def test_open_store_says_what_it_takes(tmp_path, name):
    with pytest.raises(StoreError, match="nothing at"):
        open_store(tmp_path / name)


def test_open_store_refuses_pickled_arrays(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(StoreError, match="never loaded"):
        open_store(tmp_path / "objects.npy")


def test_sample_of_an_empty_file_is_an_error(tmp_path):
    np.save(tmp_path / "none.npy", np.empty((0, 8), dtype=np.float32))
    with open_store(tmp_path / "none.npy") as store, pytest.raises(StoreError, match="empty"):
        store.sample(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": None}, "a store: .*found NoneType"),
        ({"address": " "}, "a store: .*found str ' '"),
        ({"keep": [3]}, r"keep\[0\] as text"),
        ({"column": 3}, "column as text"),
        ({"ask": 3}, "ask as a function"),
    ],
)
def test_open_store_refuses_settings_of_another_kind(tmp_path, options, message):
    values = {"address": write(tmp_path / "v.parquet"), **options}
    with pytest.raises(UnembedError, match=message):
        open_store(**values)


@pytest.mark.parametrize("query", ["dimension=many", "colum=vector", "dimension=-8"])
def test_open_store_refuses_options_that_files_do_not_have(tmp_path, query):
    path = write(tmp_path / "v.parquet")
    with pytest.raises(StoreError, match=f"behind the path of files; found '{query}'"):
        open_store(f"{path}?{query}")
    assert open_store(f"{path}?dimension=8").facts.dimension == 8


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_fetch_and_sample_take_no_rows_for_others(tmp_path, suffix):
    path = tmp_path / f"v{suffix}"
    if suffix == ".npy":
        np.save(path, VECTORS)
    else:
        write(path)
    with open_store(path, keep="tenant" if suffix == ".parquet" else ()) as store:
        assert store.fetch([3, "4", "-1", "x", "99"]).ids == ["3", "4"]
        assert len(store.fetch([])) == 0
        with pytest.raises(StoreError, match="in a list"):
            store.fetch("12")
        with pytest.raises(StoreError, match="the id of a row"):
            list(store.batches(after="-5"))
        for sample in (0, "2", 2.5):
            with pytest.raises(UnembedError, match="sample as a whole number"):
                store.sample(sample)
        with pytest.raises(UnembedError, match="size as a whole number"):
            list(store.batches(size=0))
        assert store.sample(3, np.int64(7)).ids == store.sample(3, 7).ids


def test_open_store_takes_a_name_with_a_question_mark(tmp_path):
    path = write(tmp_path / "v.parquet").rename(tmp_path / "what?.parquet")
    assert open_store(path).facts.count == len(VECTORS)
