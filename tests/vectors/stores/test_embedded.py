"""Stores that live in a file or folder, each written by its own client and read by our reader."""

import sqlite3

import numpy as np
import pyarrow as pa
import pytest

from unembed.errors import StoreError
from unembed.vectors.stores.address import open_store

from .conftest import (
    TENANTS,
    TEXTS,
    VECTORS,
    D,
    check_contract,
    counting,
    digest,
    package,
    read_all,
)

IDS = [str(row) for row in range(len(VECTORS))]


# Chroma


def write_chroma(folder, vectors=VECTORS, name="docs", texts=TEXTS):
    chromadb = package("chromadb")
    client = chromadb.PersistentClient(str(folder))
    collection = client.create_collection(
        name, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )
    if len(vectors):
        collection.add(
            ids=[f"id {row}" for row in range(len(vectors))],
            embeddings=list(vectors),
            documents=texts[: len(vectors)],
            metadatas=[{"tenant": TENANTS[row]} for row in range(len(vectors))],
        )
    chromadb.api.shared_system_client.SharedSystemClient.clear_system_cache()
    return folder


@pytest.mark.slow
def test_open_store_reads_a_folder_of_chroma_and_leaves_it_alone(tmp_path):
    folder = write_chroma(tmp_path / "chroma")
    before = digest(folder)
    check_contract(lambda: open_store(folder), [f"id {row}" for row in IDS])
    with open_store(folder, keep=["tenant"]) as store, counting(store) as reads:
        assert (store.facts.metric, store.facts.text) == ("cosine", "document")
        assert store.sample(4).payload["tenant"][0] in TENANTS
        assert reads.rows == 4
    assert digest(folder) == before


@pytest.mark.slow
def test_open_store_refuses_what_a_folder_of_chroma_lacks(tmp_path):
    folder = write_chroma(tmp_path / "chroma", VECTORS[:0], "empty")
    with open_store(folder) as store, pytest.raises(StoreError, match="an empty collection"):
        store.sample(3)
    with pytest.raises(StoreError, match=r"named 'other'.*'empty'"):
        open_store(folder, collection="other")
    (folder / "index_metadata.pickle").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(StoreError, match="never loaded"):
        open_store(folder)


# LanceDB


def write_lance(folder, vectors=VECTORS, kind=None, texts=TEXTS):
    lance = package("lance")
    kind = kind or pa.float32()
    flat = pa.array(vectors.ravel().astype(kind.to_pandas_dtype()))
    table = pa.table(
        {
            "vector": pa.FixedSizeListArray.from_arrays(flat, D),
            "text": texts[: len(vectors)],
            "tenant": [TENANTS[row % len(TENANTS)] for row in range(len(vectors))],
        }
    )
    return lance.write_dataset(table, str(folder / "docs.lance"))


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.float64()])
def test_open_store_reads_lancedb_and_leaves_it_alone(tmp_path, kind):
    write_lance(tmp_path / "db", kind=kind)
    before = digest(tmp_path / "db")
    check_contract(lambda: open_store(tmp_path / "db"), IDS, tolerance=2e-3)
    assert digest(tmp_path / "db") == before


def test_batches_asks_a_store_for_a_thousand_rows_at_most(tmp_path):
    many = np.random.default_rng(1).standard_normal((2500, D)).astype(np.float32)
    write_lance(tmp_path / "db", many, texts=["x"] * len(many))
    with open_store(tmp_path / "db") as store, counting(store) as reads:
        (batch, rest) = store.batches(size=2400)
        assert (len(batch), len(rest), reads.rows, reads.most) == (2400, 100, 2500, 1000)
        np.testing.assert_array_equal(np.concatenate([batch.vectors, rest.vectors]), many)


def test_open_store_finds_deleted_rows_of_lancedb(tmp_path):
    table = write_lance(tmp_path / "db")
    table.delete("tenant = 'north'")
    with open_store(tmp_path / "db" / "docs.lance") as store:
        assert store.facts.count == 15
        assert store.facts.deleted.startswith("at least 15 deleted rows that can be read in the 2")
        assert {text for _, text, _ in read_all(store).values()} == set(TEXTS[::2])


def test_open_store_says_that_an_index_of_lancedb_is_quantised_and_reads_exact_vectors(tmp_path):
    many = np.random.default_rng(1).standard_normal((300, D)).astype(np.float32)
    table = write_lance(tmp_path / "db", many, texts=[str(row) for row in range(300)])
    table.create_index("vector", "IVF_PQ", num_partitions=1, num_sub_vectors=4)
    with open_store(tmp_path / "db") as store:
        assert store.facts.index == "IVF_PQ: quantised; the table keeps the exact vectors"
        np.testing.assert_array_equal(store.fetch(["7", "299"]).vectors, many[[7, 299]])


def test_open_store_reads_what_lancedb_itself_wrote(tmp_path):
    lancedb = package("lancedb")
    rows = [{"vector": v.tolist(), "text": t} for v, t in zip(VECTORS, TEXTS, strict=True)]
    lancedb.connect(str(tmp_path / "db")).create_table("docs", rows)
    check_contract(lambda: open_store(tmp_path / "db", collection="docs"), IDS)


# FAISS


def write_faiss(path, recipe, ids=False, vectors=VECTORS):
    faiss = package("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(D, recipe)
    many = np.random.default_rng(1).standard_normal((600, D)).astype(np.float32)
    index.train(many)
    if ids:
        index.add_with_ids(vectors, 10 + 3 * np.arange(len(vectors)))
    else:
        index.add(vectors)
    faiss.write_index(index, str(path))
    return path


@pytest.mark.parametrize(
    ("recipe", "ids"),
    [("Flat", False), ("HNSW8", False), ("IVF4,Flat", False), ("IVF4,Flat", True),
     ("IDMap,Flat", True), ("IDMap2,Flat", True)],
)  # fmt: skip
def test_open_store_reads_exact_indexes_of_faiss(tmp_path, recipe, ids):
    path = write_faiss(tmp_path / "index.faiss", recipe, ids)
    before = digest(path)
    names = [str(10 + 3 * row) for row in range(len(VECTORS))] if ids else IDS
    check_contract(lambda: open_store(path), names, texts=None)
    with open_store(path) as store:
        assert store.facts.lossy is None
    assert digest(path) == before


@pytest.mark.parametrize(
    ("recipe", "why"),
    [("PQ4x4", "product"), ("SQ8", "scalar"), ("SQfp16", "scalar"), ("LSH", "hashing"),
     ("IVF4,PQ4x4", "product"), ("PCA4,Flat", "fewer dimensions"), ("OPQ4,PQ4x4", "product")],
)  # fmt: skip
def test_open_store_says_that_an_index_of_faiss_is_lossy(tmp_path, recipe, why):
    path = write_faiss(tmp_path / "index.faiss", recipe)
    with open_store(path) as store:
        assert why in store.facts.lossy
        rows = read_all(store)
        assert len(rows) == len(VECTORS)
        cosines = [
            float(vector @ VECTORS[int(name)])
            / np.linalg.norm(vector) / np.linalg.norm(VECTORS[int(name)])
            for name, (vector, _, _) in rows.items()
        ]  # fmt: skip
        assert 0.4 < np.mean(cosines) < 1.000001
        assert any((rows[n][0] != VECTORS[int(n)]).any() for n in rows)


def test_open_store_never_loads_the_pickle_of_langchain(tmp_path):
    write_faiss(tmp_path / "index.faiss", "Flat")
    (tmp_path / "index.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with open_store(tmp_path) as store:
        assert "never loaded" in " ".join(store.facts.notes)
        assert len(read_all(store)) == len(VECTORS)


def test_open_store_refuses_bits_and_damage_of_faiss(tmp_path):
    faiss = package("faiss")
    bits = faiss.index_binary_factory(32, "BFlat")
    faiss.write_index_binary(bits, str(tmp_path / "bits.faiss"))
    with pytest.raises(StoreError, match="one of bits"):
        open_store(tmp_path / "bits.faiss")
    path = write_faiss(tmp_path / "cut.faiss", "Flat")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="a readable index of FAISS"):
        open_store(path)


# sqlite-vec


def write_sqlite(path, columns, names, rows):
    """By the extension itself, loaded by APSW: many builds of Python load none."""
    sqlite_vec, apsw = package("sqlite_vec"), package("apsw")
    connection = apsw.Connection(str(path))
    connection.enable_load_extension(True)
    connection.load_extension(sqlite_vec.loadable_path())
    connection.execute(f"CREATE VIRTUAL TABLE docs USING vec0({columns})")
    with connection:
        marks = ", ".join("?" * len(names.split()))
        into = ", ".join(names.split())
        connection.executemany(f"INSERT INTO docs ({into}) VALUES ({marks})", rows)
    connection.close()
    return path


@pytest.mark.parametrize("metric", ["", " distance_metric=cosine"])
def test_open_store_reads_sqlite_vec_and_leaves_it_alone(tmp_path, metric):
    path = write_sqlite(
        tmp_path / "docs.db",
        f"owner text partition key, tenant text, embedding float[{D}]{metric}, +content text",
        "owner tenant embedding content",
        [
            (u, f"the tenant of the {u}" if u == "north" else u, v.tobytes(), t)
            for u, v, t in zip(TENANTS, VECTORS, TEXTS, strict=True)
        ],
    )
    before = digest(tmp_path)
    names = [str(row + 1) for row in range(len(VECTORS))]
    check_contract(lambda: open_store(path), names)
    with open_store(path, keep=["tenant", "owner"]) as store:
        rows = read_all(store)
        for place, name in enumerate(names):
            owner = TENANTS[place]  # short texts and those of over twelve bytes lie apart
            tenant = "the tenant of the north" if owner == "north" else owner
            assert rows[name][2] == {"tenant": tenant, "owner": owner}
        assert store.facts.metric == ("cosine" if metric else "l2")
    assert digest(tmp_path) == before


def test_open_store_reads_text_keys_of_sqlite_vec(tmp_path):
    rows = [(f"key {row:02}", v.tobytes()) for row, v in enumerate(VECTORS)]
    path = write_sqlite(
        tmp_path / "docs.db", f"id text primary key, embedding float[{D}]", "id embedding", rows
    )
    check_contract(lambda: open_store(path), [name for name, _ in rows], texts=None)


def test_open_store_refuses_bits_of_sqlite_vec(tmp_path):
    path = write_sqlite(tmp_path / "docs.db", "embedding bit[8]", "embedding", [])
    with pytest.raises(StoreError, match=r"bit\[8\]"):
        open_store(path)


def test_open_store_reads_blobs_of_a_plain_table_and_its_log(tmp_path):
    path = tmp_path / "plain.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute("CREATE TABLE notes (embedding BLOB, body TEXT)")
    rows = [(v.tobytes(), t) for v, t in zip(VECTORS, TEXTS, strict=True)]
    connection.executemany("INSERT INTO notes VALUES (?, ?)", rows)
    connection.commit()  # still in the log
    before = digest(path), digest(tmp_path / "plain.db-wal")
    names = [str(row + 1) for row in range(len(VECTORS))]
    check_contract(lambda: open_store(path, collection="notes"), names)
    assert (digest(path), digest(tmp_path / "plain.db-wal")) == before
    connection.close()


# DuckDB


def write_duckdb(path, kind, vectors):
    duckdb = package("duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute(f'CREATE TABLE "my docs" (embedding {kind}, content VARCHAR)')
        rows = [(None if v is None else [float(x) for x in v], t)
                for v, t in zip(vectors, TEXTS, strict=False)]  # fmt: skip
        connection.executemany('INSERT INTO "my docs" VALUES (?, ?)', rows)
    return path


@pytest.mark.parametrize("kind", [f"FLOAT[{D}]", "FLOAT[]", "DOUBLE[]"])
def test_open_store_reads_duckdb_and_leaves_it_alone(tmp_path, kind):
    path = write_duckdb(tmp_path / "docs.duckdb", kind, VECTORS)
    before = digest(path)
    check_contract(lambda: open_store(path), IDS)
    assert digest(path) == before


def test_batches_leaves_out_nulls_and_other_dimensions_of_duckdb(tmp_path):
    path = write_duckdb(tmp_path / "d.duckdb", "FLOAT[]", [VECTORS[0], None, [1.0], VECTORS[1]])
    with open_store(path) as store:
        assert list(read_all(store)) == ["0", "3"]
        assert store.left_out == {"no vector": 1, "1 dimensions instead of 8": 1}
        assert "several dimensions" in store.facts.notes[0]


# Milvus Lite


def write_milvus(path, kind="FLOAT_VECTOR", vectors=None):
    package("milvus_lite")
    from milvus_lite.server_manager import server_manager_instance

    pymilvus = package("pymilvus")
    client = pymilvus.MilvusClient(str(path))
    fill_milvus(client, kind, vectors)
    client.close()
    server_manager_instance.release_server(str(path))  # which goes on writing its index
    return path


def fill_milvus(client, kind="FLOAT_VECTOR", vectors=None):
    import pymilvus

    schema = client.create_schema(auto_id=False)
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType[kind], dim=D)
    schema.add_field("text", pymilvus.DataType.VARCHAR, max_length=200)
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    rows = [{"id": row, "embedding": v, "text": TEXTS[row]}
            for row, v in enumerate(VECTORS.tolist() if vectors is None else vectors)]  # fmt: skip
    client.insert("docs", rows)
    client.flush("docs")


@pytest.mark.slow
def test_open_store_reads_milvus_lite_and_leaves_it_alone(tmp_path):
    path = write_milvus(tmp_path / "milvus.db")
    before = digest(path)
    check_contract(lambda: open_store(path), IDS)
    with open_store(path) as store:
        assert (store.facts.metric, store.facts.text) == ("cosine", "text")
    assert digest(path) == before


def test_open_store_says_that_a_file_of_milvus_is_old(tmp_path):
    package("pymilvus")
    from unembed.vectors.stores.address import Address
    from unembed.vectors.stores.milvus import open_store as open_milvus

    (tmp_path / "old.db").write_bytes(b"SQLite format 3\0")
    with pytest.raises(StoreError, match="versions before 3"):
        open_milvus(Address("milvus", str(tmp_path / "old.db")))
