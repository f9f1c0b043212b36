"""A defended copy searches as the vectors do, and its key lies apart from it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.defences.conftest import like_an_encoder
from unembed.defences.attackers import mean_cosine
from unembed.defences.defence import load_defence, parse_defence
from unembed.defences.write import write_copy
from unembed.errors import ConfigError, DataError
from unembed.vectors.stores.address import open_store

VECTORS = like_an_encoder(300)


@pytest.fixture
def source(tmp_path):
    table = {"embedding": VECTORS.tolist(), "id": list(range(300)), "note": ["x"] * 300}
    pq.write_table(pa.table(table), tmp_path / "vectors.parquet")
    return open_store(tmp_path / "vectors.parquet", keep=["id"])


def stored(path):
    return np.array(pq.read_table(path)["embedding"].to_pylist(), dtype=np.float32)


def test_write_copy_ranks_as_before_with_the_key(source, tmp_path):
    out = tmp_path / "copy.parquet"
    paths = write_copy(source, parse_defence("rotation"), out)
    assert [p.name for p in paths] == [
        "copy.parquet",
        "copy.parquet.defence.json",
        "copy.parquet.secret.safetensors",
    ]
    assert paths[2].stat().st_mode & 0o777 == 0o600
    table = pq.read_table(out)
    assert table.column_names == ["id", "embedding"]
    assert table["id"].to_pylist() == list(map(str, range(300)))
    queries = like_an_encoder(20, seed=3)
    after = load_defence(out).query(queries) @ stored(out).T
    assert np.allclose(after, queries @ VECTORS.T, atol=2e-6)
    assert abs(mean_cosine(stored(out), VECTORS)) < 0.5


def test_write_copy_keeps_no_text_unless_it_is_named(tmp_path):
    table = {"embedding": VECTORS.tolist(), "text": ["a secret"] * 300}
    pq.write_table(pa.table(table), tmp_path / "vectors.parquet")
    for keep, names in (([], ["id", "embedding"]), (["text"], ["id", "text", "embedding"])):
        out = tmp_path / f"{len(keep)}.parquet"
        with open_store(tmp_path / "vectors.parquet", keep=keep) as store:
            write_copy(store, parse_defence("int8"), out)
        assert pq.read_table(out).column_names == names
        assert (b"a secret" in out.read_bytes()) == bool(keep)


def test_write_copy_leaves_a_key_that_is_there(source, tmp_path):
    key = tmp_path / "copy.parquet.secret.safetensors"
    key.write_bytes(b"opens another copy")
    with pytest.raises(ConfigError, match=r"found copy\.parquet\.secret\.safetensors there"):
        write_copy(source, parse_defence("rotation"), tmp_path / "copy.parquet")
    assert key.read_bytes() == b"opens another copy"


def test_write_copy_draws_another_key_each_time(source, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_copy(source, parse_defence("rotation"), tmp_path / name)
    assert not np.allclose(stored(tmp_path / "a.parquet"), stored(tmp_path / "b.parquet"))


def test_write_copy_gives_each_row_noise_of_its_own(source, tmp_path):
    pq.write_table(pa.table({"embedding": [VECTORS[0].tolist()] * 50}), tmp_path / "same.parquet")
    write_copy(
        open_store(tmp_path / "same.parquet"), parse_defence("gaussian"), tmp_path / "c.parquet"
    )
    rows = stored(tmp_path / "c.parquet")
    assert mean_cosine(rows, np.repeat(VECTORS[:1], 50, axis=0)) == pytest.approx(0.96, abs=0.02)
    assert len(np.unique(rows.round(6), axis=0)) == 50


@pytest.mark.parametrize(("name", "kind", "size"), [("int8", "int8", 48), ("binary", "uint8", 6)])
def test_write_copy_writes_the_codes_of_a_quantiser(source, tmp_path, name, kind, size):
    write_copy(source, parse_defence(name), tmp_path / "copy.parquet")
    column = pq.read_schema(tmp_path / "copy.parquet").field("embedding").type
    assert (str(column.value_type), column.list_size) == (kind, size)


def test_write_copy_refuses_what_cannot_be_written(source, tmp_path):
    rotation = parse_defence("rotation")
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        write_copy(source, rotation, tmp_path / "copy.jsonl")
    with pytest.raises(ConfigError, match=r"a folder for .*none there"):
        write_copy(source, rotation, tmp_path / "none" / "copy.parquet")
    with pytest.raises(ConfigError, match=r"a new file at .*; found vectors\.parquet there"):
        write_copy(source, rotation, tmp_path / "vectors.parquet")
    with pytest.raises(ConfigError, match="pii, which changes texts"):
        write_copy(source, parse_defence("pii"), tmp_path / "copy.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vectors.parquet"]


def test_write_copy_leaves_nothing_when_it_is_stopped(source, tmp_path):
    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_copy(source, parse_defence("rotation"), tmp_path / "copy.parquet", stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vectors.parquet"]


def test_write_copy_leaves_nothing_when_the_key_cannot_be_saved(source, tmp_path, monkeypatch):
    rotation = parse_defence("rotation")

    def full(path):
        raise DataError("room", "none", "Free some")

    monkeypatch.setattr(rotation, "save", full)
    with pytest.raises(DataError, match="room"):
        write_copy(source, rotation, tmp_path / "copy.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vectors.parquet"]
