"""`defend` in process with the fake encoder: the report, the copy, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.defences.conftest import texts_of

pytestmark = pytest.mark.usefixtures("with_fake_encoder")


@pytest.fixture
def vectors(encoder, tmp_path):
    texts = texts_of(80)
    table = {"id": list(range(80)), "text": texts, "embedding": encoder.encode(texts).tolist()}
    pq.write_table(pa.table(table), tmp_path / "vectors.parquet")
    return tmp_path / "vectors.parquet"


@pytest.mark.slow
def test_defend_writes_a_report(run, vectors, inverter_folder, tmp_path):
    lines = [{"text": text, "relevant": i} for i, text in enumerate(texts_of(80)[:20])]
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    code, out, err = run(
        *("defend", vectors, "--checkpoint", inverter_folder, "--queries", queries),
        *("--defences", "rotation,int8", "--held-out", 20, "--pairs", "10,40", "--out", "report"),
    )
    assert code == 0, err
    assert "Within 2% of nDCG@10" in out and "the report: report/report.html" in out
    report = json.loads((tmp_path / "here" / "report" / "report.json").read_text())
    assert [row["defence"] for row in report["rows"]] == ["none", "rotation", "int8"]
    assert report["metric"] == "nDCG@10"
    names = sorted(p.name for p in (tmp_path / "here" / "report").iterdir())
    assert names == ["report.html", "report.json", "report.md"]


def test_defend_writes_a_copy_and_says_where_the_key_is(run, vectors, tmp_path):
    code, out, err = run(
        "defend", vectors, "--write", "rotation", "--keep", "id", "--out", "copy.parquet"
    )
    assert code == 0, err
    assert "written: copy.parquet, " in out
    assert "copy.parquet.secret.safetensors is the key: keep it apart" in err
    assert pq.read_table(tmp_path / "here" / "copy.parquet").column_names[-1] == "embedding"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defences", "armour"], "a defence (none, gaussian"),
        (["--attackers", "Z"], "attackers of U, A1, A2, R, L or all"),
        (["--pairs", "0"], "numbers of pairs"),
        (["--write", "rotation", "--budget", "0.1"], "--budget without --write"),
        (["--write", "rotation", "--out", "copy"], "ends in .parquet"),
        (["--keep", "id"], "--keep with --write only"),
        (["--text-column", "body"], "a text column 'body'"),
        (["--queries", "none.parquet"], "a file of queries; found nothing"),
        (["--corpus", "none.txt"], "nothing at none.txt"),
    ],
)
def test_defend_refuses_in_one_line(refused, vectors, inverter_folder, arguments, message):
    more = [] if "--write" in arguments else ["--checkpoint", inverter_folder]
    assert message in refused("defend", vectors, *more, *arguments)


def test_defend_refuses_vectors_that_are_not_there(refused, tmp_path):
    assert "nothing at " in refused("defend", tmp_path / "none.parquet")
