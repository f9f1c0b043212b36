"""Commands run where a user would run them, in process and with the fake encoder."""

import sys

import pytest
import yaml

import unembed
from unembed.cli import main as cli
from unembed.encoders.base import FakeEncoder
from unembed.errors import EncoderError


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run a command where a user would: returns exit code, standard output, standard error."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["unembed", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return command


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that must fail with one line, and leave no trace; returns the line."""

    def command(*arguments):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return lines[0]

    return command


@pytest.fixture
def with_fake_encoder(monkeypatch):
    """`load_encoder` knows one encoder, the fake one."""
    asked = []

    def load(name, **settings):
        asked.append({"name": name, **settings})
        if name != "fake":
            raise EncoderError("the encoder fake", name, "Use it")
        return FakeEncoder()

    monkeypatch.setitem(unembed.__dict__, "load_encoder", load)
    return asked


@pytest.fixture
def config_file(tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config.model_dump()), encoding="utf-8")
    return path
