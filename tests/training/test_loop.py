import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unembed.config import Config, validate_config
from unembed.data.encode import prepare_pairs
from unembed.device import choose_compute
from unembed.encoders.base import FakeEncoder
from unembed.errors import CheckpointError, TrainingError
from unembed.training import checkpoint, loop
from unembed.training.checkpoint import BEST, LATEST, read_state
from unembed.training.export import inverter_from_run

CPU = choose_compute("cpu")


def make_config(**training) -> Config:
    values = {
        "steps": 12,
        "batch_size": 8,
        "lr": 1e-2,
        "warmup_steps": 2,
        "eval_every": 4,
        "save_every": 4,
        "log_every": 2,
        "validation_pairs": 16,
        **training,
    }
    return validate_config(
        {
            "data": {"length": 12, "min_tokens": 2, "passages_per_shard": 64},
            "denoiser": {
                "hidden": 32,
                "layers": 2,
                "heads": 2,
                "feed_forward": 64,
                "token_table": "random",
            },
            "training": values,
        },
        where="test",
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    words = "cat dog bird fish house river city runs walks eats sleeps red blue green".split()
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, size=generator.integers(3, 9))) for _ in range(2000)]
    folder = tmp_path_factory.mktemp("pairs")
    source = folder / "texts.txt"
    source.write_text("\n".join(lines) + "\n")
    prepare_pairs(source, folder / "data", make_config(), FakeEncoder())
    return folder / "data"


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / loop.METRICS).read_text().splitlines()]


def test_a_resumed_run_equals_an_uninterrupted_one_exactly(pairs, tmp_path):
    config = make_config(accumulate=2)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    stops = iter([False] * 4 + [True] + [False] * 100)
    first = loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=lambda: next(stops))
    assert first.step == 5
    second = loop.train(config, pairs, tmp_path / "cut", CPU, resume=True)
    assert second.step == 12

    whole, cut = (load_file(tmp_path / name / LATEST) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name
    best, other = (load_file(tmp_path / name / BEST) for name in ("whole", "cut"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in best.items())
    validations = [
        [r["validation_loss"] for r in records(tmp_path / name) if "validation_loss" in r]
        for name in ("whole", "cut")
    ]
    assert validations[0] == validations[1] and len(validations[0]) == 3


def test_a_killed_process_loses_at_most_the_steps_since_the_last_save(pairs, tmp_path):
    """SIGKILL in the middle of a run, then --resume: the same weights as without the kill."""
    config = make_config(steps=10, save_every=3, eval_every=5)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    script = f"""
import os, signal
from pathlib import Path
from tests.training.test_loop import make_config, CPU
from unembed.training import loop
calls = []
def stop():
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
config = make_config(steps=10, save_every=3, eval_every=5)
loop.train(config, Path({str(pairs)!r}), Path({str(tmp_path / "killed")!r}), CPU, should_stop=stop)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
    )
    assert killed.returncode == -signal.SIGKILL
    _, progress, _ = read_state(tmp_path / "killed" / LATEST)
    assert progress.step == 6
    loop.train(config, pairs, tmp_path / "killed", CPU, resume=True)
    whole, again = (load_file(tmp_path / name / LATEST) for name in ("whole", "killed"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    steps = [r["step"] for r in records(tmp_path / "killed")]
    assert steps == sorted(steps)


def test_a_frozen_table_stays_and_can_be_thawed_on_resuming(pairs, tmp_path):
    frozen = make_config(table_lr=0.0, steps=4)
    loop.train(frozen, pairs, tmp_path, CPU)
    torch.manual_seed(0)
    tensors, _, _ = read_state(tmp_path / LATEST)
    start = loop.Denoiser(loop.DenoiserSizes.from_dict(read_state(tmp_path / LATEST)[2]["sizes"]))
    assert torch.equal(tensors["model.token_table.weight"], start.token_table.weight)
    assert "optimizer.exp_avg.token_table.weight" not in tensors
    loop.train(make_config(table_lr=0.5, steps=8), pairs, tmp_path, CPU, resume=True)
    thawed, _, _ = read_state(tmp_path / LATEST)
    assert not torch.equal(thawed["model.token_table.weight"], start.token_table.weight)


def test_accumulation_sees_the_samples_of_one_large_batch(pairs, tmp_path, monkeypatch):
    """The same samples reach the optimiser in the same order."""
    seen: list[np.ndarray] = []
    original = loop.training_rows

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(loop, "training_rows", spy)
    orders = []
    for batch, accumulate in ((16, 1), (8, 2)):
        seen.clear()
        config = make_config(batch_size=batch, accumulate=accumulate, steps=3)
        loop.train(config, pairs, tmp_path / str(batch), CPU)
        orders.append(np.concatenate(seen))
    assert len(orders[0]) == 48 and np.array_equal(*orders)


def test_it_learns(pairs, tmp_path):
    """Far below the entropy of guessing words by frequency, with the embedding as the only hint."""
    config = make_config(steps=250, batch_size=32, eval_every=250, save_every=250, warmup_steps=10)
    loop.train(config, pairs, tmp_path, CPU)
    figures = next(r for r in records(tmp_path) if "validation_loss" in r)
    assert figures["full_mask_cross_entropy"] < 2.2  # guessing by frequency: 2.4
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    assert losses[-1] < losses[0]


def test_validation_pairs_are_never_trained_on(pairs, tmp_path, monkeypatch):
    asked: list[np.ndarray] = []
    original = loop.Pairs.rows

    def spy(self, indices):
        asked.append(indices)
        return original(self, indices)

    monkeypatch.setattr(loop.Pairs, "rows", spy)
    loop.train(make_config(eval_every=12), pairs, tmp_path, CPU)
    training = [rows for rows in asked if len(rows) == 8]
    assert training and all(rows.min() >= 16 for rows in training)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    pairs, tmp_path, monkeypatch
):
    calls = []
    original = loop.diffusion_loss

    def spoilt(*args):
        calls.append(1)
        loss, losses = original(*args)
        return (loss * float("nan"), losses) if len(calls) == 7 else (loss, losses)

    monkeypatch.setattr(loop, "diffusion_loss", spoilt)
    with pytest.raises(TrainingError, match=r"finite loss.*last good state"):
        loop.train(make_config(), pairs, tmp_path, CPU)
    tensors, progress, _ = read_state(tmp_path / LATEST)
    assert progress.step == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_a_full_disk_keeps_the_old_state(pairs, tmp_path, monkeypatch):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    before = (tmp_path / LATEST).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        loop.train(make_config(steps=8), pairs, tmp_path, CPU, resume=True)
    assert (tmp_path / LATEST).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_is_not_overwritten_nor_mixed_with_another(pairs, tmp_path):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    with pytest.raises(CheckpointError, match="--resume"):
        loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    wider = make_config(steps=8).model_dump()
    wider["denoiser"]["hidden"] = 64
    with pytest.raises(CheckpointError, match="sizes"):
        loop.train(validate_config(wider, "test"), pairs, tmp_path, CPU, resume=True)


def test_a_damaged_state_is_refused(pairs, tmp_path):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    state = (tmp_path / LATEST).read_bytes()
    (tmp_path / LATEST).write_bytes(state[: len(state) // 2])
    with pytest.raises(CheckpointError, match="whole training state"):
        loop.train(make_config(steps=8), pairs, tmp_path, CPU, resume=True)


def test_too_few_pairs_is_refused(pairs, tmp_path):
    with pytest.raises(TrainingError, match="validation_pairs"):
        loop.train(make_config(validation_pairs=4096), pairs, tmp_path, CPU)


def test_export_takes_the_averaged_weights(pairs, tmp_path):
    loop.train(make_config(), pairs, tmp_path, CPU)
    inverter = inverter_from_run(tmp_path)
    tensors, _, facts = read_state(tmp_path / BEST)
    for name, parameter in inverter.denoiser.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
    assert inverter.encoder.name == "fake"
    assert inverter.trained["config"] == facts["config"]
    with pytest.raises(CheckpointError):
        inverter_from_run(tmp_path / "nowhere")


def test_the_seed_decides_the_run(pairs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(make_config(steps=4, seed=seed), pairs, tmp_path / name, CPU)
    a, b, c = (load_file(tmp_path / name / LATEST) for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert not all(torch.equal(tensor, c[name]) for name, tensor in a.items())
