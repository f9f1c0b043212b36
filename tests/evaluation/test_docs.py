import re
from pathlib import Path

import pytest

from unembed.evaluation.metrics import METRICS

TEXT = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(minilm, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.setattr("unembed.encoders.sentence.load_encoder", lambda *args: minilm)
    monkeypatch.delitem(__import__("unembed").__dict__, "load_encoder", raising=False)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("greedy:steps=4 ")
    assert len(lines) == 5 + 3  # two strategies, three baselines without pairs


def test_every_metric_and_control_is_defined():
    tables = [line for line in TEXT.splitlines() if line.startswith("| ")]
    defined = {name.strip() for line in tables for name in line.split("|")[1].split(",")}
    baselines = {"shuffled embedding", "no embedding", "nearest training text", "random tokens"}
    assert {*METRICS, *baselines} <= defined
