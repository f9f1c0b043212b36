"""The command line as a process: what the console cannot write does not end it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unembed
from unembed.cli.main import main


def unembed_with(encoding, *arguments):
    """Run a command whose standard output has an encoding."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(Path(unembed.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "unembed", *map(str, arguments)],
        env=environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("command", [(), ("prepare",), ("invert",)])
def test_help_is_written_in_any_encoding(encoding, command):
    done = unembed_with(encoding, *command, "--help")
    assert done.returncode == 0, done.stderr
    assert b"Usage" in done.stdout and done.stderr == b""


@pytest.mark.parametrize(
    "arguments",
    [("invert", "--embedding", ""), ("prepare", "--source", "", "--out", "x"), ("export", "", "x")],
)
def test_main_refuses_an_empty_argument_which_would_be_the_working_folder(
    monkeypatch, capsys, arguments
):
    monkeypatch.setattr(sys, "argv", ["unembed", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    before = arguments[arguments.index("") - 1]
    assert f"found an empty one after {before}. Fill it in" in capsys.readouterr().err


@pytest.mark.slow
def test_json_is_valid_in_an_encoding_without_the_letters():
    done = unembed_with("cp1252", "invert", "--text", "東京 → home", "--json", "--steps", 1)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("cp1252"))["original"] == "東京 → home"
