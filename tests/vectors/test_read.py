import gzip
import json
import pickle
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed import files
from unembed.data.readers import read_texts
from unembed.errors import DataError, EmbeddingError, UnembedError
from unembed.vectors import read as module
from unembed.vectors.read import VectorFile

D = 4
VECTORS = np.arange(1, 41, dtype=np.float32).reshape(10, D)


def write(path, vectors, key="embedding"):
    rows = vectors.tolist()
    if path.suffix == ".npy":
        np.save(path, vectors)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **{key: vectors})
    elif path.suffix == ".parquet":
        lists = pa.array(rows, None if rows else pa.list_(pa.float32()))
        pq.write_table(pa.table({key: lists, "other": [0] * len(rows)}), path, row_group_size=3)
    else:
        text = "".join(json.dumps({key: row}) + "\n" for row in rows)
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


NAMES = ["v.npy", "v.npz", "v.parquet", "v.jsonl", "v.jsonl.gz"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_vector_file_every_format_gives_the_same_rows(tmp_path, monkeypatch, name, size):
    monkeypatch.setattr(module, "CHUNK", size)
    file = VectorFile(write(tmp_path / name, VECTORS))
    assert len(file) == 10
    chunks = list(file.chunks(D))
    assert max(len(chunk.rows) for chunk in chunks) <= size
    assert np.array_equal(np.concatenate([chunk.vectors for chunk in chunks]), VECTORS)
    assert [row for chunk in chunks for row in chunk.rows] == list(range(10))
    assert chunks[-1].end == 10


def test_vector_file_takes_a_path_and_a_column_as_text(tmp_path):
    file = VectorFile(str(write(tmp_path / "v.parquet", VECTORS)), keep="other")
    assert next(file.chunks(D)).columns["other"][:2] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": 3}, "the path of a file of vectors; found 3"),
        ({"path": None}, "the path of a file of vectors; found None"),
        ({"key": 3}, "a key or column as text; found 3"),
        ({"keep": 3}, "names of columns to keep; found 3"),
        ({"keep": [3]}, r"names of columns to keep; found \[3\]"),
        ({"ranges": (0, 1)}, r"Ranges; found \(0, 1\)"),
    ],
)
def test_vector_file_refuses_arguments_of_another_kind(tmp_path, settings, said):
    with pytest.raises(EmbeddingError, match=said):
        VectorFile(**{"path": tmp_path, **settings})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0.0, "only zeros")],
)
def test_vector_file_a_bad_vector_is_named_or_counted(tmp_path, monkeypatch, name, value, said):
    monkeypatch.setattr(module, "CHUNK", 3)
    vectors = VECTORS.copy()
    vectors[7] = value
    path = write(tmp_path / name, vectors)
    with pytest.raises(EmbeddingError, match=f"{said} in vector 7 of "):
        list(VectorFile(path).chunks(D))
    file = VectorFile(path, skip_bad=True)
    rows = [row for chunk in file.chunks(D) for row in chunk.rows]
    assert rows == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert file.left_out == {said: 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0, 2.0], "2 dimensions instead of 4"),
        (None, "no vector"),
        (["a", "b", "c", "d"], "no list of numbers"),
        ([[1.0, 2.0, 3.0, 4.0]] * 2, "no list of numbers"),
        ([10**400, 1, 1, 1], "no list of numbers"),
        ("text", "no list of numbers"),
    ],
)
def test_vector_file_rows_that_hold_no_vector(tmp_path, row, said):
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps([1, 2, 3, 4]) + "\n" + json.dumps({"embedding": row}) + "\n")
    with pytest.raises(EmbeddingError, match=f"{said} in vector 1 of "):
        list(VectorFile(path).chunks(D))
    file = VectorFile(path, skip_bad=True)
    assert [chunk.rows for chunk in file.chunks(D)] == [[0]]
    assert file.left_out == {said: 1}


@pytest.mark.parametrize("size", [D, -1])
def test_rows_of_parquet_may_be_of_fixed_size_or_missing(tmp_path, size):
    kind = pa.list_(pa.float32(), size)
    table = pa.table({"v": pa.array([[1, 2, 3, 4], None], kind)})
    pq.write_table(table, tmp_path / "v.parquet")
    if size == D and int(pa.__version__.split(".")[0]) < 26:  # Arrow could not read these back
        with pytest.raises(DataError, match=r"readable rows in .*lists to be of size=4"):
            list(VectorFile(tmp_path / "v.parquet", "v", skip_bad=True).chunks(D))
        return
    file = VectorFile(tmp_path / "v.parquet", "v", skip_bad=True)
    assert [chunk.rows for chunk in file.chunks(D)] == [[0]]
    assert file.left_out == {"no vector": 1}


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("v.npz", "other", "an array 'other' in .*found embedding.*--key"),
        ("v.parquet", "text", "a column 'text' in .*'embedding', 'other'.*--column"),
        ("v.parquet", "other", "lists of numbers in the column 'other'"),
        ("v.jsonl", "text", "a key 'text' in line 1 of .*'embedding'.*--key"),
        ("v.json", "text", "a key 'text' in .*lists without keys. Leave --key out"),
        ("v.ndjson", "embedding", "a key 'embedding' in line 1 .*lists without keys. Leave"),
    ],
)
def test_vector_file_a_wrong_key_is_answered_with_the_right_ones(tmp_path, name, key, said):
    path = write(tmp_path / name, VECTORS)
    if name == "v.json":
        path.write_text(json.dumps(VECTORS.tolist()))
    if name == "v.ndjson":
        path.write_text("".join(f"{row}\n" for row in VECTORS.tolist()))
    with pytest.raises(EmbeddingError, match=said):
        list(VectorFile(path, key).chunks(D))


def test_vector_file_an_archive_of_several_arrays_needs_a_key(tmp_path):
    np.savez(tmp_path / "v.npz", one=VECTORS, two=VECTORS[:2])
    with pytest.raises(EmbeddingError, match=r"one array in .*found one, two"):
        len(VectorFile(tmp_path / "v.npz"))
    assert len(VectorFile(tmp_path / "v.npz", "two")) == 2


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, D), (10, 5)])
@pytest.mark.parametrize("name", ["v.npy", "v.npz"])
def test_vector_file_another_shape_is_refused(tmp_path, shape, name):
    path = write(tmp_path / name, np.ones(shape, dtype=np.float32))
    assert len(VectorFile(path)) >= 1
    with pytest.raises(EmbeddingError, match=r"embeddings of 4 dimensions, \[4\] or \[N, 4\]"):
        list(VectorFile(path).chunks(D))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, 0.5, 0.9])
def test_vector_file_a_damaged_file_is_refused(tmp_path, name, keep):
    path = write(tmp_path / name, np.random.default_rng(0).random((200, D)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises((EmbeddingError, DataError), match=name.replace(".", r"\.")):
        len(VectorFile(path))
        list(VectorFile(path).chunks(D))


@pytest.mark.parametrize("name", NAMES)
def test_vector_file_a_file_without_a_usable_vector_is_refused(tmp_path, name):
    path = write(tmp_path / name, np.empty((0, D), dtype=np.float32))
    with pytest.raises(EmbeddingError, match=r"one vector that can be inverted in .*none at all"):
        list(VectorFile(path).chunks(D))
    path = write(tmp_path / name, np.zeros((13, D), dtype=np.float32))
    rows = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"
    with pytest.raises(EmbeddingError, match=rf"13 left out: 13 × only zeros \(row {rows}\)"):
        list(VectorFile(path, skip_bad=True).chunks(D))


@pytest.mark.parametrize("line", ['{"id": 3}', "{oops", "[" * 100_000, "[" + " " * 2000])
def test_vector_file_lines_without_a_vector_are_refused_or_counted(tmp_path, monkeypatch, line):
    monkeypatch.setattr(
        "unembed.vectors.records.LINE_BYTES", 200_000 if line.startswith("[[") else 1000
    )
    path = tmp_path / "v.jsonl"
    path.write_text(f"[1, 2, 3, 4]\n{line}\n[5, 6, 7, 8]\n", encoding="utf-8")
    with pytest.raises(EmbeddingError, match=r"line 2 of .*v\.jsonl"):
        list(VectorFile(path).chunks(D))
    file = VectorFile(path, skip_bad=True)
    assert [chunk.rows for chunk in file.chunks(D)] == [[0, 2]]
    said = "no JSON with the key that was asked for"
    assert (file.left_out, file.rows_left_out) == ({said: 1}, {said: [1]})
    assert file.describe_left_out() == [f"1 × {said} (row 1)"]


def test_vector_file_damaged_compressed_data_is_refused(tmp_path):
    path = write(tmp_path / "v.npz", np.random.default_rng(0).random((500, D)))
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(EmbeddingError, match=r"a NumPy array at .*v\.npz"):
        list(VectorFile(path).chunks(D))


def test_vector_file_a_pickle_is_refused_without_advice_to_load_it(tmp_path):
    (tmp_path / "v.npy").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(EmbeddingError, match="magic string is not correct") as caught:
        list(VectorFile(tmp_path / "v.npy").chunks(D))
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize("name", ["v.csv", "v.gz", "v", "missing.npy"])
def test_vector_file_other_files_are_refused(tmp_path, name):
    with pytest.raises(EmbeddingError, match=name):
        list(VectorFile(tmp_path / name).chunks(D))


def test_vector_file_text_in_an_array_is_refused(tmp_path):
    np.save(tmp_path / "v.npy", np.full((2, D), "a"))
    with pytest.raises(EmbeddingError, match=r"numbers in .*v\.npy"):
        list(VectorFile(tmp_path / "v.npy").chunks(D))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v.npy", "v.npz"])
def test_vector_file_memory_does_not_grow_with_the_file(tmp_path, name):
    peaks = []
    for count in (4_000, 40_000):
        vectors = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32)
        path = write(tmp_path / f"{count}{name}", vectors)
        tracemalloc.start()
        for _ in VectorFile(path).chunks(64):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.slow
def test_no_damaged_table_ends_the_process(tmp_path):
    """Arrow aborts at Parquet whose sizes contradict each other, so a process of its own reads."""
    command = [sys.executable, "-m", "tests.vectors.damage", str(tmp_path), "420"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert outcomes["answers"] > 100
    assert outcomes["refusals"] > 1000


def bomb(path):
    """Write a file that holds far more than its size."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4_000_000, np.float32)), D)
    if path.suffix == ".arrow":
        batch = pa.record_batch({"embedding": zeros})
        codec = path.stem if path.stem != "nulls" else None
        if codec is None:
            batch = pa.record_batch({"embedding": pa.nulls(1 << 26)})
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(str(path), batch.schema, options=options) as writer:
            writer.write_batch(batch)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"embedding": pa.nulls(9_000_000, pa.list_(pa.float32()))}), path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, np.zeros((2_500_000, D), np.float32))
    else:
        line = {"blank": b"\n", "values": b"0\n", "objects": b"{}\n", "open": b"[\n"}
        data = line.get(path.stem.split(".")[0], b"[0,0,0,0]\n") * 4_500_000
        codec = "zstd" if path.suffix == ".zst" else "gzip"
        with pa.output_stream(path, compression=codec) as sink:
            sink.write(data)
    return path


BOMBS = ["zstd.arrow", "lz4.arrow", "nulls.arrow", "nulls.parquet", "zeros.npz",
         "blank.jsonl.zst", "blank.csv.zst", "blank.json.gz", "values.jsonl.zst",
         "objects.ndjson.zst", "open.json.zst", "rows.csv.zst"]  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_vector_file_decompresses_no_more_than_vectors_fill(tmp_path, monkeypatch, name):
    path = bomb(tmp_path / name)
    assert path.stat().st_size < 400_000
    monkeypatch.setattr(files, "_FREE_BYTES", 100_000)
    monkeypatch.setattr(files, "_MOST_RATIO", 1)
    tracemalloc.start()
    refused = pytest.raises(UnembedError, match=r"bytes to be decompressed from .*if you trust it")
    with arrow_memory() as pool, refused:
        list(VectorFile(path, skip_bad=True).chunks(D))
    most = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    tracemalloc.stop()
    assert most < 18 << 20


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
def test_vector_file_reads_compressed_batches(tmp_path, codec, write):
    vectors = np.random.default_rng(0).normal(size=(50, D)).astype(np.float32)
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), D)
    table = pa.table({"id": pa.array(["a", "b"] * 25).dictionary_encode(), "embedding": rows})
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with write(str(tmp_path / "v.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=20)
    file = VectorFile(tmp_path / "v.arrow", keep=["id"])
    assert len(file) == 50
    chunks = list(file.chunks(D))
    assert np.array_equal(np.concatenate([chunk.vectors for chunk in chunks]), vectors)
    assert [value for chunk in chunks for value in chunk.columns["id"]] == ["a", "b"] * 25


def test_vector_file_a_long_list_that_rows_share_stays_one(tmp_path):
    lists = pa.array([VECTORS[0].tolist(), [0.0] * 1_000_000], pa.list_(pa.float32()))
    codes = pa.array([0, None] + [1] * 1000, pa.int32())
    batch = pa.record_batch({"embedding": pa.DictionaryArray.from_arrays(codes, lists)})
    with pa.ipc.new_file(str(tmp_path / "v.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    file = VectorFile(tmp_path / "v.arrow", skip_bad=True)
    with arrow_memory() as pool:
        [chunk] = file.chunks(D)
        assert module.vector_size(file) in (D, 1_000_000)
    assert np.array_equal(chunk.vectors, VECTORS[:1])
    assert file.left_out == {"no vector": 1, "1000000 dimensions instead of 4": 1000}
    assert pool.max_memory() < 50 << 20  # 4 GB as lists of their own


@contextmanager
def arrow_memory():
    """A pool of Arrow's that knows the most memory that was taken from it."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        yield pool
    finally:
        pa.set_memory_pool(default)


@pytest.mark.slow
def test_read_texts_a_long_text_that_a_table_repeats_takes_its_room_once(tmp_path):
    codes = pa.array(np.zeros(4000, np.int32))
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["word " * 100_000]))
    vectors = pa.array([[1.0, 2.0, 3.0, 4.0]] * 4000)
    pq.write_table(pa.table({"text": column, "embedding": vectors}), tmp_path / "t.parquet")
    tracemalloc.start()
    with arrow_memory() as pool:
        texts = read_texts(tmp_path / "t.parquet")
        assert sum(1 for text in texts if len(text) == 500_000) == 4000
        chunks = VectorFile(tmp_path / "t.parquet", keep=["text"]).chunks(D)
        assert sum(len(chunk.columns["text"]) for chunk in chunks) == 4000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(most, pool.max_memory()) < 100 << 20  # 2 GB as texts of their own


@pytest.mark.slow
def test_vector_size_reads_no_more_rows_than_it_needs(tmp_path):
    numbers = pa.array(np.zeros(12_000_000))
    rows = pa.ListArray.from_arrays(pa.array(range(0, 12_000_001, 600_000), pa.int32()), numbers)
    pq.write_table(pa.table({"embedding": rows}), tmp_path / "wide.parquet")
    with arrow_memory() as pool:
        assert module.vector_size(VectorFile(tmp_path / "wide.parquet")) == 600_000
    assert pool.max_memory() < 60 << 20  # 96 MB of numbers
