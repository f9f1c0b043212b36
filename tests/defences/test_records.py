"""Records and queries are read as they are meant, and what is wrong with them is said."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.defences.conftest import texts_of
from tests.vectors.stores.conftest import package
from unembed.defences.defence import NoDefence
from unembed.defences.quantise import Binary
from unembed.defences.records import Queries, read_queries, read_records
from unembed.defences.utility import OVERLAP, labelled, overlap, rank, utilities
from unembed.errors import DataError, StoreError, UnembedError
from unembed.vectors.stores.address import open_store


def write(path, **columns):
    pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), path)
    return path


@pytest.fixture
def file(encoder, tmp_path):
    texts = texts_of(60)
    vectors = encoder.encode(texts)
    return write(
        tmp_path / "vectors.parquet", id=range(100, 160), text=texts, embedding=vectors.tolist()
    )


def test_read_records_draws_the_same_for_the_same_seed(file, encoder):
    one, again, other = (read_records(file, 20, seed) for seed in (0, 0, 1))
    assert one.ids == again.ids != other.ids
    assert len(one) == 20
    assert np.allclose(one.vectors, encoder.encode(one.texts), atol=1e-6)


def test_read_records_holds_what_queries_should_find(file):
    wanted = {"103", "140", "159"}
    for seed in range(5):
        records = read_records(file, 5, seed, relevant=wanted)
        assert wanted <= set(records.ids) and len(records) == 5
    assert wanted <= set(read_records(file, 2, 0, relevant=wanted).ids)


def test_read_records_leaves_out_what_cannot_be_used_and_counts_it(tmp_path, encoder):
    texts = texts_of(10)
    vectors = encoder.encode(texts).tolist()
    vectors[3] = [0.0] * 32
    texts[5], texts[6] = texts[4], ""
    path = write(tmp_path / "v.parquet", text=texts, embedding=vectors)
    records = read_records(path, 100, 0)
    assert len(records) == 7 and set(records.ids) - {"4", "5"} == set("012789")
    assert records.left_out == {"text of a row before": 1, "no text": 1, "only zeros": 1}


def test_read_records_replaces_rows_that_are_left_out(tmp_path, encoder):
    texts = texts_of(30)
    vectors = encoder.encode(texts).tolist()
    path = write(tmp_path / "v.parquet", text=[*texts[:20], *[""] * 10], embedding=vectors)
    for seed in range(4):
        assert len(read_records(path, 15, seed)) == 15


def test_read_records_names_records_by_the_column_that_is_given(tmp_path, encoder):
    texts = texts_of(10)
    names = [f"k{i}" for i in range(9)] + [None]
    path = write(
        tmp_path / "v.parquet", key=names, text=texts, embedding=encoder.encode(texts).tolist()
    )
    ids = read_records(path, 10, 0, id_column="key", relevant={"k3"}).ids
    assert sorted(ids) == sorted([*names[:9], "9"])
    with pytest.raises(StoreError, match="a field 'name'; found 'key'"):
        read_records(path, 10, 0, id_column="name")


def test_read_records_reads_a_store_by_its_own_ids(tmp_path, encoder):
    duckdb = package("duckdb")
    texts = texts_of(30)
    with duckdb.connect(str(tmp_path / "docs.duckdb")) as connection:
        connection.execute("CREATE TABLE docs (embedding FLOAT[32], content VARCHAR)")
        rows = list(zip(encoder.encode(texts).tolist(), texts, strict=True))
        connection.executemany("INSERT INTO docs VALUES (?, ?)", rows)
    records = read_records(tmp_path / "docs.duckdb", 12, 0, relevant={"29", "3", "none such"})
    assert len(records) == 12 and {"29", "3"} <= set(records.ids)
    assert [texts[int(name)] for name in records.ids] == records.texts
    assert np.allclose(records.vectors, encoder.encode(records.texts), atol=1e-6)


def test_read_records_needs_texts(tmp_path, encoder):
    path = write(tmp_path / "v.parquet", embedding=encoder.encode(texts_of(10)).tolist())
    with pytest.raises(StoreError, match="Name their column with --text-column"):
        read_records(path, 10, 0)
    np.save(tmp_path / "v.npy", encoder.encode(texts_of(10)))
    with pytest.raises(StoreError, match=r"texts beside the vectors of v\.npy"):
        read_records(tmp_path / "v.npy", 10, 0)


def test_read_queries_embeds_texts_and_reads_labels(tmp_path, encoder):
    lines = [
        {"text": "the cat runs", "relevant": ["a", "b"]},
        {"text": "the dog eats", "relevant": 7},
        {"text": "the bird", "relevant": []},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    queries = read_queries(path, encoder, 32)
    assert queries.relevant == [{"a", "b"}, {"7"}]
    assert np.allclose(queries.vectors, encoder.encode(["the cat runs", "the dog eats"]))


def test_read_queries_takes_vectors_and_no_labels(tmp_path, encoder):
    vectors = 3.0 * encoder.encode(texts_of(4))
    queries = read_queries(write(tmp_path / "q.parquet", vector=vectors.tolist()), None, 32)
    assert queries.relevant is None
    assert np.allclose(queries.vectors, vectors / 3.0, atol=1e-6)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": [[1.0, 2.0]]}, "finite vectors of 32 dimensions"),
        ({"vector": [[0.0] * 32]}, "found NaN or zeros"),
        ({"vector": [[1.0] * 32, None]}, "found rows that have none, or one of another length"),
        ({"question": ["why"]}, "a column 'text' or 'embedding' in every row"),
        ({"text": []}, "queries in"),
    ],
)
def test_read_queries_says_what_is_wrong(tmp_path, encoder, columns, message):
    with pytest.raises(DataError) as caught:
        read_queries(write(tmp_path / "q.parquet", **columns), encoder, 32)
    assert message in str(caught.value)


def test_read_queries_refuses_what_is_not_there(tmp_path, encoder):
    with pytest.raises(DataError, match="a file of queries; found nothing at"):
        read_queries(tmp_path / "none.parquet", encoder, 32)


# Utility


def test_rank_leaves_out_the_record_that_asks(records):
    queries = Queries(records.vectors[:3], None, [0, 1, 2])
    ranking = rank(NoDefence(), queries, records.vectors, records.vectors)
    assert ranking.rows.shape == (3, 10)
    assert all(i not in rows for i, rows in enumerate(ranking.rows.tolist()))
    scores = records.vectors[1] @ records.vectors.T
    scores[1] = -1
    assert ranking.rows[1, 0] == scores.argmax()


def test_rank_with_rerank_orders_the_candidates_by_exact_vectors(records):
    queries = Queries(records.vectors[:20])
    binary, all_again = Binary(), Binary(rerank=len(records))
    stored = binary.apply(records.vectors, np.random.default_rng(0))
    plain = rank(NoDefence(), queries, records.vectors, records.vectors)
    alone = rank(binary, queries, stored, records.vectors)
    again = rank(all_again, queries, stored, records.vectors)
    assert np.mean(overlap(alone, plain)) < 1.0
    assert (again.rows[:, 0] == plain.rows[:, 0]).all()
    assert overlap(again, plain) == [1.0] * 20


def test_labelled_gives_the_ndcg_of_one_relevant_record(records):
    pytest.importorskip("ir_measures")
    plain = rank(NoDefence(), Queries(records.vectors[:2]), records.vectors, records.vectors)
    ids = records.ids
    third = ids[plain.rows[0, 2]]
    queries = Queries(records.vectors[:2], [frozenset([third]), frozenset(["nowhere"])])
    values = labelled(plain, queries, ids)
    assert values["nDCG@10"] == pytest.approx([1 / np.log2(4), 0.0])
    assert values["recall@10"] == [1.0, 0.0]
    assert list(utilities(ids, queries, plain)(plain)) == ["nDCG@10", "recall@10", OVERLAP]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "4"}, "sample as a whole number of at least 1"),
        ({"sample": 0}, "sample as a whole number of at least 1"),
        ({"seed": None}, "seed as a whole number"),
        ({"relevant": "r1"}, "relevant as ids in a set; found 'r1'"),
        ({"relevant": None}, "relevant as ids in a set"),
        ({"id_column": 3}, "as text; found 3"),
    ],
)
def test_read_records_refuses_settings_of_another_kind(file, options, message):
    with pytest.raises(UnembedError, match=message):
        read_records(file, **options)


def test_read_records_of_an_open_store_needs_the_field_of_the_ids(file):
    with open_store(file) as store, pytest.raises(UnembedError, match="opened with the field 'id'"):
        read_records(store, id_column="id")
    assert len(read_records(file, np.int64(4), np.int64(2), relevant=[101])) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": None}, "a path; found NoneType"),
        ({"dimension": "32"}, "dimension as a whole number"),
        ({"most": 0}, "most as a whole number of at least 1"),
        ({"column": 3}, "column as text"),
        ({"column": "vectors"}, "a column 'vectors' in .*found 'id', 'text', 'embedding'"),
    ],
)
def test_read_queries_refuses_settings_of_another_kind(file, encoder, change, message):
    values = {"path": str(file), "encoder": encoder, "dimension": 32}
    assert len(read_queries(**values).vectors) == 60
    with pytest.raises(UnembedError, match=message):
        read_queries(**{**values, **change})
