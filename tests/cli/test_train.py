"""`unembed train` and the signals that end it."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml

from unembed.cli import main as cli
from unembed.cli import train as train_module
from unembed.cli.display import TrainingDisplay
from unembed.cli.train import StopSignal
from unembed.training import loop
from unembed.training.checkpoint import LATEST, Progress, read_state
from unembed.training.metrics_log import METRICS

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture
def train(pairs_folder, tiny_config, tmp_path, monkeypatch, capfd):
    """Run the command with another `loop.train`; returns exit code, output and errors."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config.model_dump()), encoding="utf-8")

    def command(run_training):
        monkeypatch.setattr(loop, "train", run_training)
        given = ("train", "--data", pairs_folder, "--out", tmp_path / "run", "-c", path)
        monkeypatch.setattr(sys, "argv", ["unembed", *map(str, given), "--device", "cpu"])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    return command


@pytest.mark.parametrize("name", CODES)
def test_train_stopped_by_a_signal_says_how_to_go_on_and_exits_with_its_code(train, name):
    def stopped(*_, should_stop, **__):
        assert not should_stop()
        os.kill(os.getpid(), getattr(signal, name))
        assert should_stop()
        return Progress(step=2, best_loss=3.5)

    code, out, err = train(stopped)
    assert (code, out) == (CODES[name], "")
    assert f"unfinished: {name} at step 2, best validation loss 3.5000" in err
    assert "4 steps are left: the same command with --resume goes on" in " ".join(err.split())


def test_train_that_a_signal_reached_at_its_end_is_finished(train):
    def finished(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return Progress(step=6, best_loss=3.5)

    code, out, _ = train(finished)
    assert code == 0 and out.startswith("step 6, best validation loss 3.5000")


def test_stop_signal_stops_at_once_the_second_time_unless_it_is_an_echo(monkeypatch, request):
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    now = [100.0]
    monkeypatch.setattr(train_module.time, "monotonic", lambda: now[0])
    with StopSignal() as stop:
        assert not stop.requested()
        for now[0] in (100.0, 101.0):  # a batch system's, and the launcher's that follows it
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested()
        now[0] = 103.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_signal_leaves_an_ignored_hangup_alone():
    """As `nohup` hands it on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_display_outlives_its_terminal(monkeypatch):
    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    with TrainingDisplay(10) as display:
        monkeypatch.setattr(display.bar.console, "print", gone)
        monkeypatch.setattr(display.bar, "stop", gone)
        display.log({"step": 1, "validation_loss": 1.0})
    monkeypatch.undo()
    display.bar.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_train_saves_when_it_really_gets_a_signal(name, pairs_folder, tiny_config, tmp_path):
    settings, run = tiny_config.model_dump(), tmp_path / "run"
    every = {"save_every": 10**6, "eval_every": 10**6, "log_every": 1}
    settings["training"] |= {"steps": 10**6, "tensorboard": False, **every}
    (tmp_path / "endless.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    given = ("--config", tmp_path / "endless.yaml", "--data", pairs_folder, "--out", run)
    process = subprocess.Popen(
        [sys.executable, *"-m unembed train --device cpu".split(), *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and not (run / METRICS).exists():
            time.sleep(0.1)
        while process.poll() is None and len((run / METRICS).read_text().splitlines()) < 3:
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (CODES[name], ""), err
    assert f"unfinished: {name}" in err
    assert read_state(run / LATEST).progress.step >= 3
