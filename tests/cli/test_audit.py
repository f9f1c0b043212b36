"""`audit` and `read` as commands: exit codes, one line for each fault, nothing written."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.auditing import audit as module
from unembed.encoders.base import FakeEncoder

TEXTS = [
    f"{a} {b} {c}."
    for a in ("cat", "dog", "bird")
    for b in ("house", "river")
    for c in ("sun", "moon", "star", "rain")
]


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run a command in the folder of the test, where the fake encoder is found by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_encoder", lambda name, **options: FakeEncoder())
    return run


@pytest.fixture
def store(encoder, tmp_path):
    columns = {"embedding": list(encoder.encode(TEXTS)), "text": TEXTS}
    columns["tenant"] = ["a", "b"] * 12
    pq.write_table(pa.table(columns), tmp_path / "store.parquet")
    return tmp_path / "store.parquet"


def test_audit_writes_its_reports_and_says_the_gist(run, store, inverter_folder, tmp_path):
    code, out, _ = run("audit", store, "--checkpoint", inverter_folder, "--group-by", "tenant")
    assert code == 0
    assert "With the vectors, and knowledge of which encoder made them, an attacker recovers" in out
    assert "report/report.html" in out
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["settings"]["store"] == str(store)
    assert set(data["by_group"]) == {"a", "b"}
    again = f"unembed audit {store} --checkpoint {inverter_folder} --group-by tenant"
    assert {finding["reproduce"] for finding in data["findings"]} == {again}


@pytest.mark.parametrize(("limit", "code"), [(0.05, 1), (0.99, 0)])
def test_audit_fails_over_a_limit(run, store, inverter_folder, limit, code):
    got, _, err = run("audit", store, "--checkpoint", inverter_folder, "--fail-over", limit)
    assert got == code
    assert ("is over 0.05" in err) is (code == 1)


def test_audit_that_could_not_measure_has_code_2_under_a_limit(run, encoder, inverter_folder):
    np.save("bare.npy", encoder.encode(TEXTS))
    assert run("audit", "bare.npy", "--checkpoint", inverter_folder)[0] == 0
    code, _, err = run("audit", "bare.npy", "--checkpoint", inverter_folder, "--fail-over", 0.3)
    assert code == 2
    assert "nothing can be measured" in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["audit", "read"])
def test_dry_run_says_what_would_be_read_and_writes_nothing(run, store, tmp_path, command):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run(command, store, "--dry-run")
    assert code == 0
    assert "count: 24" in out
    assert "text: text" in out
    assert "nothing is written to the store" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_read_writes_parquet(run, store, tmp_path):
    code, out, _ = run("read", store, "--out", "vectors.parquet", "--keep", "tenant")
    assert code == 0
    assert out == "24 vectors in vectors.parquet\n"
    assert pq.read_table(tmp_path / "vectors.parquet").column_names == [
        "id",
        "embedding",
        "text",
        "tenant",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "gone.parquet"], "nothing at gone.parquet"),
        (["audit", "mysql://host/db"], "mysql://"),
        (["audit", "postgresql://me:hunter2@host/db"], "PGPASSWORD"),
        (["read", "store.parquet"], "--out or --dry-run"),
        (["read", "store.parquet", "--out", "x.csv"], "ending in .parquet"),
        (["audit", "store.parquet", "--text-column", "body"], "a text column 'body'"),
        (["audit", "store.parquet", "--group-by", "owner"], "Correct --group-by"),
        (["read", "store.parquet", "--keep", "owner", "--out", "x.parquet"], "a field 'owner'"),
        (["audit", "store.parquet", "--to", "minilm", "--checkpoint", "x"], "--to without"),
    ],
)
def test_faults_are_one_line_and_code_2(run, store, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert "hunter2" not in err
