"""The examples run as their first lines say, and do what the package does."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unembed
from unembed.inverter import Inverter

EXAMPLES = Path(__file__).parents[2] / "examples"
SENTENCES = [
    "How do I reset the password of my email account?",
    "What are the side effects of this drug?",
    "The court ruled that the contract was not valid.",
]


@pytest.mark.slow
def test_sample_recovers_what_the_inverter_recovers(minilm):
    sample = runpy.run_path(str(EXAMPLES / "sample.py"))["sample"]
    vectors = minilm.encode(SENTENCES)
    expected = Inverter.from_pretrained("minilm").invert(vectors, steps=8)
    texts = [sample(torch.from_numpy(vectors[row : row + 1])) for row in range(len(SENTENCES))]
    assert texts == [inversion.text for inversion in expected]


def test_sample_is_run_as_a_script(minilm, monkeypatch, capsys):
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name: minilm)
    monkeypatch.setattr("sys.argv", ["sample.py", "What are the side effects of this drug?"])
    runpy.run_path(str(EXAMPLES / "sample.py"), run_name="__main__")
    assert {"what", "side", "effects"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_train_tiny_inverts_held_out_sentences():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_tiny.py"],
        env={**os.environ, "PYTHONPATH": str(Path(unembed.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (exact, count) = re.search(r"(\d+) of (\d+) held-out sentences", done.stdout).groups()
    assert int(exact) > 0.5 * int(count)


@pytest.mark.slow
def test_audit_store_builds_a_store_that_an_audit_reads(minilm, monkeypatch, tmp_path):
    pytest.importorskip("lance")
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name: minilm)
    runpy.run_path(str(EXAMPLES / "audit_store.py"))["build"](tmp_path, count=60)
    report = unembed.audit(tmp_path, sample=24, group_by="tenant", encoder=minilm)
    assert report.identity.verdict == "same"
    assert "deleted-rows-readable" in [finding.id for finding in report.findings]
    leak = report.attacks["inverter"]["figures"]["token F1"]
    assert leak.low > max(floor["token F1"].high for floor in report.floors.values())
