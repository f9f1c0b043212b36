"""What exports look like, and what must not be taken for vectors."""

import base64
import json
import os
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from unembed.errors import EmbeddingError
from unembed.vectors import numbers
from unembed.vectors.numbers import Ranges
from unembed.vectors.read import VectorFile

D = 16
VECTORS = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
VECTORS /= np.linalg.norm(VECTORS, axis=1, keepdims=True)
LISTS = VECTORS.tolist()
SCALARS = [f"[{', '.join(f'np.float32({x})' for x in row)}]" for row in LISTS]
RECORDS = [{"index": i, "embedding": row} for i, row in enumerate(LISTS)]
TEXTS = ["[" + ",".join(map(repr, row)) + "]" for row in LISTS]


def read(path, key=None, **settings):
    file = VectorFile(path, key, **settings)
    chunks = list(file.chunks(D))
    columns = {name: [v for c in chunks for v in c.columns[name]] for name in file.keep}
    vectors = np.concatenate([chunk.vectors for chunk in chunks])
    assert len(file) == len(vectors)
    return vectors, columns, file


DOCUMENTS = {
    "lists": LISTS,
    "records": RECORDS,
    "openai": {"object": "list", "data": RECORDS, "model": "m"},
    "chroma": {"ids": list("abcde"), "embeddings": LISTS, "documents": None},
    "cohere": {"embeddings": {"float": LISTS}},
    "gemini": {"embeddings": [{"values": row} for row in LISTS]},
    "pinecone": {"vectors": {f"id{i}": {"values": row} for i, row in enumerate(LISTS)}},
    "gemini, batch": {"predictions": [{"embeddings": {"values": row}} for row in LISTS]},
    "vespa": [
        {"fields": {"title": {"values": row}, "embedding": {"values": row}}} for row in LISTS
    ],
    "pandas": {
        "id": {str(i): i for i in range(5)},
        "embedding": {str(i): LISTS[i] for i in range(5)},
    },
    "pandas, split": {
        "columns": ["id", "embedding"],
        "index": list(range(5)),
        "data": [[i, row] for i, row in enumerate(LISTS)],
    },
    "weaviate": [{"id": 1, "vector": {"default": row}} for row in LISTS],
    "milvus": {"rows": [{"id": 1, "vector": row} for row in LISTS]},
    "redis": [{"key": "a", "value": {"embedding": row}} for row in LISTS],
    "elasticsearch": {"hits": {"hits": [{"_source": {"embedding": row}} for row in LISTS]}},
    "qdrant": {"result": {"points": [{"id": 1, "vector": row} for row in LISTS]}},
    "pandas, text index": {
        "id": dict(zip("abcde", range(5), strict=True)),
        "embedding": dict(zip("abcde", LISTS, strict=True)),
    },
    "Float32Array": [{"embedding": {str(i): x for i, x in enumerate(row)}} for row in LISTS],
    "Float32Array, bare": [{str(i): x for i, x in enumerate(row)} for row in LISTS],
    "Buffer": [{"vector": {"type": "Buffer", "data": list(row.tobytes())}} for row in VECTORS],
    "cohere, several types": {
        "embeddings": {"float": LISTS, "int8": [[1] * D] * 5, "base64": ["AAAA"] * 5}
    },
    "qdrant, hybrid": [
        {"id": 1, "vector": {"dense": row, "sparse": {"indices": [1], "values": [1.0]}}}
        for row in LISTS
    ],
    "numbers as text": [{"embedding": list(map(repr, row))} for row in LISTS],
    "bedrock": [{"recordId": "a", "modelOutput": {"embedding": row}} for row in LISTS],
    "weaviate, objects": {"objects": [{"id": "a", "vector": row} for row in LISTS]},
    "base64": {
        "data": [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in VECTORS]
    },
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_chunks_read_json_documents(tmp_path, name, indent):
    path = tmp_path / "v.json"
    path.write_text(json.dumps(DOCUMENTS[name], indent=indent), encoding="utf-8")
    assert np.allclose(read(path)[0], VECTORS, atol=1e-7)


def test_chunks_read_tables_of_pandas_by_key_and_keep_columns(tmp_path):
    for name in ("pandas", "pandas, split"):
        (tmp_path / "v.json").write_text(json.dumps(DOCUMENTS[name]))
        vectors, columns, _ = read(tmp_path / "v.json", "embedding", keep=["id"])
        assert np.allclose(vectors, VECTORS)
        assert columns == {"id": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("name", ["vector", "vectors"])
def test_chunks_read_refuses_to_choose_among_named_vectors(tmp_path, name, lines):
    rows = [{"id": i, name: {"title": row, "body": row[::-1]}} for i, row in enumerate(LISTS)]
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1))
    path = path if lines else path.rename(tmp_path / "v.json")
    said = rf"one vector at '{name}' of each record; found 'title', 'body'.*--key .*{name}.title"
    with pytest.raises(EmbeddingError, match=said):
        read(path)
    assert np.allclose(read(path, f"{name}.title")[0], VECTORS)
    assert np.allclose(read(path, f"{name}.body")[0], VECTORS[:, ::-1])


def test_chunks_read_vectors_by_their_names_with_a_star(tmp_path):
    rows = {"embeddings": dict(zip("abcde", LISTS, strict=True))}
    (tmp_path / "v.json").write_text(json.dumps(rows))
    with pytest.raises(EmbeddingError, match=r"found 'a', 'b', 'c', 'd', 'e'.*embeddings\.\* for"):
        read(tmp_path / "v.json")
    assert np.allclose(read(tmp_path / "v.json", "embeddings.*")[0], VECTORS)
    (tmp_path / "v.json").write_text(json.dumps(rows["embeddings"]))
    assert np.allclose(read(tmp_path / "v.json", "*")[0], VECTORS)
    (tmp_path / "v.json").write_text(json.dumps([{"a": {"b": row}} for row in LISTS]))
    assert np.allclose(read(tmp_path / "v.json", "*.a.b")[0], VECTORS)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_chunks_read_bits_in_json_as_those_of_arrays(tmp_path, kind):
    signs = VECTORS > 0
    signs[:, 0] = False  # so that a byte of each row is negative where they have a sign
    bits = np.packbits(signs, axis=1)
    bits = bits if kind == np.uint8 else (bits.astype(np.int16) - 128).astype(np.int8)
    (tmp_path / "v.json").write_text(
        json.dumps({"data": [{"embedding": r.tolist()} for r in bits]})
    )
    vectors, _, file = read(tmp_path / "v.json")
    assert np.array_equal(vectors, np.where(signs, 1, -1))
    assert "taken as the signs of 16 numbers" in file.notes[0]


def test_chunks_read_bits_as_text(tmp_path):
    bits = ["".join(str(int(x > 0)) for x in row) for row in LISTS]
    (tmp_path / "v.csv").write_text("id,embedding\n" + "".join(f"0,{row}\n" for row in bits))
    vectors, _, file = read(tmp_path / "v.csv")
    assert np.array_equal(vectors, np.where(VECTORS > 0, 1, -1))
    assert "taken as the signs of 16 numbers" in file.notes[0]


def test_chunks_read_an_array_of_a_usual_name_among_others(tmp_path):
    np.savez(tmp_path / "v.npz", ids=np.arange(5), embeddings=VECTORS)
    save_file({"ids": np.arange(5), "vectors": VECTORS}, tmp_path / "v.safetensors")
    for name in ("v.npz", "v.safetensors"):
        assert np.array_equal(read(tmp_path / name)[0], VECTORS)


def test_records_one_line_without_a_vector_is_to_be_left_out_or_skipped(tmp_path):
    lines = [{"response": {"body": {"data": [RECORDS[0]]}}}, {"response": None, "error": "late"}]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(EmbeddingError, match=r"line 2 of .*Leave it out, or pass --skip-bad"):
        read(tmp_path / "v.jsonl")
    file = VectorFile(tmp_path / "v.jsonl", skip_bad=True)
    assert [chunk.rows for chunk in file.chunks(D)] == [[0]]


@pytest.mark.parametrize("key", [None, "response.body.data.0.embedding"])
def test_chunks_read_a_batch_file_and_keep_its_ids(tmp_path, key):
    path = tmp_path / "batch.jsonl"
    lines = [
        json.dumps({"custom_id": f"c{i}", "response": {"body": {"data": [row]}}})
        for i, row in enumerate(RECORDS)
    ]
    path.write_text("\n" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    vectors, columns, _ = read(path, key, keep=["custom_id"])
    assert np.allclose(vectors, VECTORS, atol=1e-7)
    assert columns == {"custom_id": ["c0", "c1", "c2", "c3", "c4"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.csv", "id,embedding\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS))),
        ("v.tsv", "id\tembedding\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(TEXTS))),
        ("v.csv", "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS))),
        ("v.csv", "".join(t.strip("[]") + "\n" for t in TEXTS)),
        ("v.csv", "id,vector\n" + "".join(f'0,"{t}"\n' for t in SCALARS)),
        ("v.csv", "id,vector\n" + "".join(f'0,"{row!r}"\n' for row in VECTORS)),
        ("v.csv", "id,vector\n" + "".join(f'0,"tensor({t})"\n' for t in TEXTS)),
        ("v.tsv", "id\tvector\n" + "".join(f"0\t{t.strip('[]')}\n" for t in TEXTS)),
        ("v.csv", "".join(t.strip("[]").replace(",", " ") + "\n" for t in TEXTS)),
    ],
    ids=["header", "tabs", "no header", "a number a column", "np.float32(x)", "array([x])",
         "tensor([x])", "no brackets", "savetxt"],
)  # fmt: skip
def test_chunks_read_tables_of_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert np.allclose(read(tmp_path / name)[0], VECTORS, atol=1e-7)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array([row.tobytes() for row in VECTORS]),
        pa.array(LISTS, pa.large_list(pa.float64())),
        pa.array(LISTS, pa.list_(pa.float32(), D)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(VECTORS),
        pa.array(list(VECTORS.astype(np.float16)), pa.list_(pa.float16())),
    ],
    ids=["text", "bytes", "large", "fixed", "tensor", "float16"],
)
def test_chunks_read_columns_of_every_kind(tmp_path, column):
    pq.write_table(pa.table({"id": list("abcde"), "embedding": column}), tmp_path / "v.pq")
    vectors, columns, _ = read(tmp_path / "v.pq", keep=["id"])
    assert np.allclose(vectors, VECTORS, atol=1e-3)
    assert columns["id"] == list("abcde")


@pytest.mark.parametrize("name", ["v.parquet", "v.arrow"])
def test_chunks_read_a_number_a_column(tmp_path, name):
    columns = {f"{i}": column for i, column in enumerate(VECTORS.T)}
    columns |= {"__index_level_0__": np.arange(5), "id": list("abcde"), "score": np.arange(5.0)}
    table = pa.table(columns)
    if name == "v.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=2)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    vectors, kept, _ = read(tmp_path / name, keep=["id", "score"])
    assert np.array_equal(vectors, VECTORS)
    assert kept == {"id": list("abcde"), "score": [0.0, 1.0, 2.0, 3.0, 4.0]}
    assert np.array_equal(read(tmp_path / name)[0], VECTORS)


DIMS, LETTERS = [f"dim_{i}" for i in range(D)], [chr(97 + i) for i in range(D)]
NUMBERS = [f"e1_{i}_x" for i in range(D)]
WIDE = {  # names of the vector's columns, and of all as they stand in the file
    "label last": (DIMS, [*DIMS, "label"]),
    "label first": (DIMS, ["label", *DIMS]),
    "several beside": (NUMBERS, ["id", *NUMBERS, "label", "year2020"]),
    "in order of text": (DIMS, sorted(DIMS)),
    "unnamed index": (LETTERS, ["", *LETTERS]),
    "index of pandas": (LETTERS, ["Unnamed: 0", *LETTERS]),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(("own", "names"), WIDE.values(), ids=WIDE)
def test_number_columns_knows_them_among_others(tmp_path, own, names, suffix):
    columns = {name: np.arange(5) for name in names}
    columns |= dict(zip(own, VECTORS.T, strict=True))
    path = tmp_path / f"v{suffix}"
    if suffix == ".csv":
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        lines = [",".join(names), *(",".join(map(repr, row)) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.table(columns), path)
    assert np.allclose(read(path)[0], VECTORS)


@pytest.mark.parametrize(
    "names", [[*LETTERS, "z"], [*DIMS, f"dim_{D}"]], ids=["letters", "numbers"]
)
def test_number_columns_refuses_one_too_many(tmp_path, names):
    rows = "".join(",".join(map(str, [*row, 1.0])) + "\n" for row in LISTS)
    (tmp_path / "v.csv").write_text(",".join(names) + "\n" + rows)
    with pytest.raises(EmbeddingError, match="a column 'embedding' in"):
        read(tmp_path / "v.csv")
    vectors, columns, _ = read(tmp_path / "v.csv", keep=[names[-1]])
    assert np.allclose(vectors, VECTORS)
    assert columns == {names[-1]: ["1.0"] * 5}


def test_number_columns_refuses_two_rows_of_names(tmp_path):
    rows = [
        ["", *["emb"] * D],
        ["", *map(str, range(D))],
        *([i, *row] for i, row in enumerate(LISTS)),
    ]
    (tmp_path / "v.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    with pytest.raises(EmbeddingError, match="a column 'embedding' in"):
        read(tmp_path / "v.csv")  # the second row was read as a vector


@pytest.mark.parametrize("place", [0, D])
def test_number_columns_without_names_leave_a_whole_number_out(tmp_path, place):
    rows = [[*map(str, row[:place]), str(i), *map(str, row[place:])] for i, row in enumerate(LISTS)]
    (tmp_path / "v.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    assert np.allclose(read(tmp_path / "v.csv")[0], VECTORS)
    rows[0][D - place] = "1"
    (tmp_path / "v.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    with pytest.raises(EmbeddingError, match="a column 'embedding' in"):
        read(tmp_path / "v.csv")  # an index and a label, or a number of the vector


@pytest.mark.parametrize("kind", ["list", "list_view"])
def test_chunks_read_arrow_and_fields_of_structs(tmp_path, kind):
    lists = pa.array(LISTS, getattr(pa, f"{kind}_" if kind == "list" else kind)(pa.float32()))
    table = pa.table({"doc": pa.StructArray.from_arrays([lists], ["vec"]), "vector": lists})
    with (
        pa.OSFile(str(tmp_path / "v.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert np.allclose(read(tmp_path / "v.arrow")[0], VECTORS)
    assert np.allclose(read(tmp_path / "v.arrow", "doc.vec")[0], VECTORS)


def test_read_a_folder_of_parts_in_order(tmp_path):
    for name, part in (("b", LISTS[3:]), ("a", LISTS[:3])):
        pq.write_table(pa.table({"embedding": part}), tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_delta_log").mkdir()
    for name in ("_delta_log/0.json", "state.json", "dataset_info.json", "cache-1.arrow"):
        (tmp_path / name).write_text('{"_fingerprint": "a"}')  # as HF's save_to_disk
    (tmp_path / "c.json").write_text(json.dumps({"model": "m", "count": 5}))
    vectors, _, file = read(tmp_path)
    assert np.allclose(vectors, VECTORS)
    assert file.notes == [f"{tmp_path / 'c.json'} has no vectors and is passed over"]
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    with pytest.raises(EmbeddingError, match="found the keys 'model', 'count'"):
        read(tmp_path)  # alone it is what was meant


@pytest.mark.parametrize(
    "array",
    [np.asfortranarray(VECTORS), VECTORS[:, None], VECTORS[None], VECTORS[..., None],
     VECTORS.astype(">f4")],
)  # fmt: skip
@pytest.mark.parametrize("save", [np.save, np.savez])
def test_chunks_read_arrays_of_any_order_and_with_axes_of_one(tmp_path, array, save):
    path = tmp_path / ("v.npy" if save is np.save else "v.npz")
    save(path, array)
    assert np.allclose(read(path)[0], VECTORS)


HALVES = (VECTORS.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("array", "least", "said"),
    [
        (HALVES, 0.999, "uint16 taken as the bits of bfloat16"),
        (HALVES.view(np.int16), 0.999, "int16 taken as the bits of bfloat16"),
        (VECTORS.astype(np.float16).view(np.uint16), 0.999, "taken as the bits of float16"),
        (np.round(VECTORS * 127).astype(np.int8), 0.999, "int8 taken as even steps"),
        (VECTORS > 0, 0.6, "bool taken as the signs of 16 numbers"),
        (np.packbits(VECTORS > 0, axis=1), 0.6, "uint8 taken as the signs of 16 numbers"),
    ],
)
def test_chunks_read_undoes_number_formats_and_says_so(tmp_path, array, least, said):
    np.save(tmp_path / "v.npy", array)
    vectors, _, file = read(tmp_path / "v.npy")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit * VECTORS).sum(axis=1).min() > least
    assert [said in note for note in file.notes] == [True]


@pytest.mark.parametrize("signed", [False, True])
def test_ranges_undo_a_quantisation(tmp_path, signed):
    low, high = VECTORS.min(axis=0), VECTORS.max(axis=0)
    levels = np.floor((VECTORS - low) / ((high - low) / 255)) - 128 * signed
    np.save(tmp_path / "v.npy", levels.astype(np.int8 if signed else np.uint8))
    np.save(tmp_path / "ranges.npy", np.stack([low, high]))
    np.save(tmp_path / "calibration.npy", VECTORS)
    for name in ("ranges.npy", "calibration.npy"):
        ranges = Ranges.parse(str(tmp_path / name))
        vectors = read(tmp_path / "v.npy", ranges=ranges)[0]
        assert np.abs(vectors - VECTORS).max() <= (high - low).max() / 255
    with pytest.raises(EmbeddingError, match="--ranges as LOW,HIGH"):
        Ranges.parse("low")


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.round(VECTORS * 50 + 128).astype(np.uint8), "uint8: a quantisation.*--ranges"),
        (VECTORS.astype(complex), "complex128"),
        ((VECTORS * 50 + 128).astype(np.uint32), "uint32"),
        ((VECTORS * 50 + 128).astype(np.uint16), "uint16"),
    ],
)
def test_chunks_read_refuses_what_holds_no_embedding(tmp_path, array, said):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(EmbeddingError, match=said):
        read(tmp_path / "v.npy")


def npy(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


@pytest.mark.parametrize(
    "shape", ["(-1, 16)", "(True, 16)", f"({2**64}, 16)", "-----1", "((((((", "(16,", "()" * 9000]
)
def test_chunks_read_refuses_hostile_headers_in_one_line(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    (tmp_path / "v.npy").write_bytes(npy(header) + bytes(64))
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("a.npy", npy(header) + bytes(64))
    for name in ("v.npy", "v.npz"):
        with pytest.raises(EmbeddingError, match=name):
            read(tmp_path / name)


def test_chunks_read_refuses_long_rows_without_reading_them(tmp_path):
    rows = pa.array([np.zeros(3_000_000, np.float32)] * 4, pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": rows}), tmp_path / "v.parquet")
    with pytest.raises(EmbeddingError, match="3,000,000 values a row"):
        next(VectorFile(tmp_path / "v.parquet", skip_bad=True).chunks(D))


def test_chunks_read_refuses_pipes_and_pickles(tmp_path):
    os.mkfifo(tmp_path / "v.npy")
    with pytest.raises(EmbeddingError, match="found a pipe or a device"):
        read(tmp_path / "v.npy")
    (tmp_path / "v.pkl").write_bytes(b"")
    with pytest.raises(EmbeddingError, match="pickled data, which is never loaded"):
        read(tmp_path / "v.pkl")


def test_chunks_read_refuses_damaged_offsets_of_arrow(tmp_path):
    path = tmp_path / "v.arrow"
    table = pa.table({"embedding": pa.array(LISTS[:2], pa.list_(pa.float32()))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    right, wrong = (np.array([0, D, end], np.int32).tobytes() for end in (2 * D, 4000))
    content = path.read_bytes()
    assert content.count(right) == 1
    path.write_bytes(content.replace(right, wrong))
    with pytest.raises(EmbeddingError, match=r"readable rows in .*v\.arrow"):
        read(path)


@pytest.mark.parametrize("shape", [[True, 4], [3.9, 4], ["3", 4], [-1, 4], {"a": 1}, [1e400, 4]])
def test_chunks_read_refuses_shapes_that_are_no_whole_numbers(tmp_path, shape):
    header = json.dumps({"embedding": {"dtype": "F32", "shape": shape, "data_offsets": [0, 64]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(64)
    (tmp_path / "v.safetensors").write_bytes(data)
    with pytest.raises(EmbeddingError, match="a NumPy array at"):
        read(tmp_path / "v.safetensors")


@pytest.mark.parametrize("spelling", ["[" + "1," * 1000 + "1]", "A" * 4000, "\\x" + "00" * 2000])
def test_row_of_does_not_parse_a_text_far_too_long(monkeypatch, spelling):
    monkeypatch.setattr(numbers, "_parse", lambda *arguments: pytest.fail("parsed"))
    assert "too long for 4 numbers" in numbers.row_of(spelling, 4)
