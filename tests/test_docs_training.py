"""The commands of docs/training.md, typed in order on tiny data."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import unembed
from unembed.cli.main import main
from unembed.encoders.base import FakeEncoder
from unembed.inverter import Inverter, shipped_inverters

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_the_page_s_commands_run(tiny_config, passages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name, **settings: FakeEncoder())
    config = tmp_path / "tiny.yaml"
    settings = tiny_config.model_dump()
    settings["training"]["condition_dropout"] = 0.1  # as in minilm: guidance takes it
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    for name in ("texts.txt", "held-out.txt"):
        (tmp_path / name).write_text("\n".join(passages[:20]), encoding="utf-8")
    commands = [line for block in blocks("") for line in block.splitlines()]
    assert {line.split()[1] for line in commands} == {
        *("prepare", "train", "plot", "export", "evaluate", "invert")
    }
    for line in commands:
        small = re.sub(r"--config minilm\w*", "--config tiny.yaml", line).replace(
            ".parquet", ".txt"
        )
        small = small.replace("--limit 300", "--limit 4")
        monkeypatch.setattr("sys.argv", shlex.split(small))
        try:
            main()
        except SystemExit as end:
            assert not end.code, f"{line}\n{capsys.readouterr().err}"
    for name in ("curves.png", "compare.svg", "runs/minilm/metrics.csv", "my-inverter/curves.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert list((tmp_path / "runs" / "minilm" / "tensorboard").iterdir())
    inverter = Inverter.from_pretrained(tmp_path / "my-inverter")
    assert inverter.storage.number_format == "int8" and inverter.denoiser.sizes.guidance
    assert "## Figures\n\n| |" in (tmp_path / "my-inverter" / "README.md").read_text("utf-8")


def test_the_page_s_python_runs(inverter_folder, tmp_path, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    shipped = shipped_inverters()
    assert "minilm" in shipped
    monkeypatch.setattr("unembed.inverter.shipped_inverters", lambda: {"minilm": inverter_folder})
    exec(code, {})
    assert Inverter.from_pretrained(tmp_path / "minilm-int8").storage.number_format == "int8"
