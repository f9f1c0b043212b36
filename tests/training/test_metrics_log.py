import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.fakes import preset
from unembed.denoiser import Denoiser
from unembed.diffusion import WEIGHTS, LogLinear, corrupt_batch, cross_entropy_of, diffusion_loss
from unembed.training import metrics_log as speed
from unembed.training.metrics_log import (
    EVENTS,
    METRICS,
    TABLE,
    Clock,
    MetricsLog,
    read_records,
    step_operations,
)


def training(step, **more):
    return {"step": step, "loss": 5.0 - step / 100, "lr": 1e-3, **more}


def validation(step, **more):
    return {"step": step, "validation_loss": 4.0 - step / 100, "masked_accuracy": 0.25, **more}


def table(folder) -> list[dict[str, str]]:
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def same(folder):
    """The table says what the lines say: a cell for every figure, and nothing else."""
    rows = [{k: float(v) for k, v in row.items() if v != ""} for row in table(folder)]
    assert rows == lines(folder)
    return rows


def test_metrics_log_the_table_has_a_column_for_whatever_comes(tmp_path):
    log = MetricsLog(tmp_path / METRICS, 0)
    for record in (
        training(2),
        training(4),
        validation(4),
        training(6, grad=0.1 + 0.2),
        validation(8, decoded_token_accuracy=0.125),
    ):
        log.write(record)
    assert len(same(tmp_path)) == 5
    assert table(tmp_path)[3]["grad"] == "0.30000000000000004", "exact"
    assert list(table(tmp_path)[0])[:3] == ["step", "loss", "lr"]
    assert table(tmp_path)[0]["decoded_token_accuracy"] == ""


def test_metrics_log_resuming_cuts_both_alike(tmp_path):
    log = MetricsLog(tmp_path / METRICS, 0)
    for record in (training(2), validation(2), training(4), training(6, late=1.0)):
        log.write(record)
    MetricsLog(tmp_path / METRICS, 4)
    assert [row["step"] for row in same(tmp_path)] == [2, 2, 4]
    assert "late" not in table(tmp_path)[0]
    log = MetricsLog(tmp_path / METRICS, 4)
    log.write(training(6, other=2.0))
    assert [row["step"] for row in same(tmp_path)] == [2, 2, 4, 6]


def test_metrics_log_a_new_run_starts_both_anew(tmp_path):
    MetricsLog(tmp_path / METRICS, 0).write(training(2))
    MetricsLog(tmp_path / METRICS, 0)
    assert (tmp_path / METRICS).read_text() == (tmp_path / TABLE).read_text() == ""


def test_metrics_log_a_line_that_a_kill_cut_short_does_not_stop_the_resuming(tmp_path):
    log = MetricsLog(tmp_path / METRICS, 0)
    log.write(training(2))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path / METRICS, 2)
    log.write(training(4))
    assert [row["step"] for row in same(tmp_path)] == [2, 4]


def test_metrics_log_samples_are_counted_in_the_file_and_not_in_what_is_shown(tmp_path):
    shown = []
    log = MetricsLog(tmp_path / METRICS, 0, shown.append, samples_per_step=96)
    log.write(training(5))
    assert lines(tmp_path)[0]["samples"] == 480
    assert shown == [training(5)]


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", "7", '{"loss": 1}', '{"step": "2"}', '{"step": NaN}', "\x00\x00"]
)
def test_read_records_what_is_no_record_is_counted(tmp_path, line):
    path = tmp_path / METRICS
    path.write_text(f'{{"step": 1, "loss": NaN}}\n{line}\n{{"step": 2, "loss": 3}}\n')
    records, damaged = read_records(path)
    assert [record["step"] for record in records] == [1, 2]
    assert damaged == 1


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / EVENTS))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_records_and_forgets_what_was_cut(tmp_path, monkeypatch):
    # Files of one second are read in the order of this number, as text: 9 behind 10
    writer = "tensorboard.summary.writer.event_file_writer"
    counter = importlib.import_module(writer).AtomicCounter(0)
    monkeypatch.setattr(f"{writer}._global_uid", counter)
    log = MetricsLog(tmp_path / METRICS, 0, tensorboard=True)
    for record in (training(2), validation(2), training(4), training(6)):
        log.write(record)
    assert scalars(tmp_path)["validation/loss"] == [(2, pytest.approx(3.98))]
    log = MetricsLog(tmp_path / METRICS, 4, tensorboard=True)
    log.write(training(6, loss=1.0))
    found = scalars(tmp_path)
    assert found["training/loss"] == [
        (2, pytest.approx(4.98)),
        (4, pytest.approx(4.96)),
        (6, pytest.approx(1.0)),
    ]
    assert set(found) == {"training/loss", "training/lr", "validation/loss"} | {
        "validation/masked_accuracy"
    }


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    log = MetricsLog(tmp_path / METRICS, 0, tensorboard=True)
    log.write(training(2))
    (message,) = caplog.messages
    assert "pip install" in message and "[tensorboard]" in message and "\n" not in message
    assert len(same(tmp_path)) == 1 and not (tmp_path / EVENTS).exists()


@pytest.mark.slow
def test_importing_and_a_log_without_it_load_no_tensorboard(tmp_path):
    code = f"""
import sys
from pathlib import Path
from unembed.training.metrics_log import MetricsLog
MetricsLog(Path({str(tmp_path)!r}) / "metrics.jsonl", 0).write({{"step": 1}})
print([name for name in sys.modules if "tensorboard" in name])
"""
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(src)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


# Speed


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_step_operations_operations_are_those_that_pytorch_counts(frozen):
    sizes = preset("small", vocab_size=500, embedding_dim=48, length=16)
    denoiser = Denoiser(sizes)
    denoiser.token_table.weight.requires_grad_(not frozen)

    def everywhere(xt, embedding, t, index):  # as the trainer runs the network
        h = denoiser.hidden_states(xt, embedding, t).flatten(0, 1)[index]
        return F.linear(h, denoiser.token_table.weight, denoiser.output_bias)

    x0 = torch.randint(0, 499, (4, 16))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], 499, torch.Generator())
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(cross_entropy_of(everywhere), batch, torch.randn(4, 48))[0].backward()
    ours = step_operations(sizes, 4, len(batch.index), not frozen)
    # What needs no gradient (the inputs of the first layers) makes the count a little smaller
    assert 0.97 * ours < counter.get_total_flops() <= ours


def test_a_clock_leaves_pauses_out_and_goes_on_where_a_run_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    clock = Clock(step=10, seconds=7.0, samples=32, operations=1e9, rate=4e9)
    now[0] += 2.0
    with clock.paused():
        now[0] += 50.0
    figures = clock.speed(step=14)
    assert figures == {"samples_per_second": 64.0, "share_of_peak": 0.5}
    assert clock.total() == 59.0
