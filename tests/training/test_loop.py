import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom

from unembed.data.pairs import Pairs
from unembed.diffusion import diffusion_loss
from unembed.encoders.base import FakeEncoder
from unembed.errors import CheckpointError, TrainingError
from unembed.inverter import Inverter
from unembed.training import loop
from unembed.training import step as step_module
from unembed.training.checkpoint import BEST, LATEST, read_state
from unembed.training.export import inverter_from_run

from .helpers import CPU, make_config, records, same_tensors, stop_after, with_prefix


def test_train_a_resumed_run_equals_an_uninterrupted_one_exactly(pairs, tmp_path):
    config = make_config(accumulate=2)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    first = loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=stop_after(5))
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


@pytest.mark.slow
def test_train_a_killed_process_loses_at_most_the_steps_since_the_last_save(pairs, tmp_path):
    """SIGKILL in the middle of a run, then --resume: the same weights as without the kill."""
    config = make_config(steps=10, save_every=3, eval_every=5)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    script = f"""
import os, signal
from pathlib import Path
from tests.training.helpers import make_config, CPU
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
    progress = read_state(tmp_path / "killed" / LATEST).progress
    assert progress.step == 6
    loop.train(config, pairs, tmp_path / "killed", CPU, resume=True)
    whole, again = (load_file(tmp_path / name / LATEST) for name in ("whole", "killed"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    steps = [r["step"] for r in records(tmp_path / "killed")]
    assert steps == sorted(steps)


def test_train_a_frozen_table_stays_and_can_be_thawed_on_resuming(pairs, tmp_path):
    frozen = make_config(table_lr=0.0, steps=4)
    loop.train(frozen, pairs, tmp_path, CPU)
    torch.manual_seed(0)
    tensors = read_state(tmp_path / LATEST).tensors
    start = loop.Denoiser(
        loop.DenoiserSizes.from_dict(read_state(tmp_path / LATEST).facts["sizes"])
    )
    assert torch.equal(tensors["model.token_table.weight"], start.token_table.weight)
    assert "optimizer.exp_avg.token_table.weight" not in tensors
    loop.train(make_config(table_lr=0.5, steps=8), pairs, tmp_path, CPU, resume=True)
    thawed = read_state(tmp_path / LATEST).tensors
    assert not torch.equal(thawed["model.token_table.weight"], start.token_table.weight)


def test_train_accumulation_sees_the_samples_of_one_large_batch(pairs, tmp_path, monkeypatch):
    """The same samples reach the optimiser in the same order."""
    seen: list[np.ndarray] = []
    original = step_module.training_rows

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(step_module, "training_rows", spy)
    orders = []
    for batch, accumulate in ((16, 1), (8, 2)):
        seen.clear()
        config = make_config(batch_size=batch, accumulate=accumulate, steps=3)
        loop.train(config, pairs, tmp_path / str(batch), CPU)
        orders.append(np.concatenate(seen))
    assert len(orders[0]) == 48 and np.array_equal(*orders)


@pytest.mark.slow
def test_train_it_learns(pairs, tmp_path):
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


def test_train_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    pairs, tmp_path, monkeypatch
):
    calls = []
    original = step_module.diffusion_loss

    def spoilt(*args):
        calls.append(1)
        loss, losses = original(*args)
        return (loss * float("nan"), losses) if len(calls) == 7 else (loss, losses)

    monkeypatch.setattr(step_module, "diffusion_loss", spoilt)
    with pytest.raises(TrainingError, match=r"finite loss.*last good state"):
        loop.train(make_config(), pairs, tmp_path, CPU)
    saved = read_state(tmp_path / LATEST)
    tensors, progress = saved.tensors, saved.progress
    assert progress.step == 4
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_train_too_few_pairs_is_refused(pairs, tmp_path):
    with pytest.raises(TrainingError, match="validation_pairs"):
        loop.train(make_config(validation_pairs=4096), pairs, tmp_path, CPU)


def test_train_export_takes_the_averaged_weights(pairs, tmp_path):
    loop.train(make_config(), pairs, tmp_path, CPU)
    inverter = inverter_from_run(tmp_path)
    saved = read_state(tmp_path / BEST)
    tensors, facts = saved.tensors, saved.facts
    for name, parameter in inverter.denoiser.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
    assert inverter.encoder.name == "fake"
    assert inverter.trained["config"] == facts["config"]
    with pytest.raises(CheckpointError):
        inverter_from_run(tmp_path / "nowhere")


def test_train_the_seed_decides_the_run(pairs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop.train(make_config(steps=4, seed=seed), pairs, tmp_path / name, CPU)
    a, b, c = (load_file(tmp_path / name / LATEST) for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert not all(torch.equal(tensor, c[name]) for name, tensor in a.items())


def test_train_condition_dropout_and_noise_change_the_run_and_resume_exactly(pairs, tmp_path):
    plain, config = make_config(), make_config(condition_dropout=0.3, embedding_noise=0.05)
    loop.train(plain, pairs, tmp_path / "plain", CPU)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=stop_after(5))
    loop.train(config, pairs, tmp_path / "cut", CPU, resume=True)
    other, whole, cut = (load_file(tmp_path / n / LATEST) for n in ("plain", "whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert not torch.equal(other["ema.positions"], whole["ema.positions"])


def spoil(monkeypatch, calls, factor=float("nan")):
    """Make the loss of some calls bad, counted over all runs since."""
    made = []
    original = diffusion_loss

    def spoilt(*args):
        made.append(1)
        loss, losses = original(*args)
        return (loss * factor, losses) if len(made) in calls else (loss, losses)

    monkeypatch.setattr(step_module, "diffusion_loss", spoilt)


def test_train_a_bad_step_can_be_skipped_and_leaves_weights_and_moments_alone(
    pairs, tmp_path, monkeypatch
):
    config = make_config(on_bad_loss="skip", log_every=1)
    loop.train(config, pairs, tmp_path / "six", CPU, should_stop=stop_after(6))
    spoil(monkeypatch, {7})
    progress = loop.train(config, pairs, tmp_path / "seven", CPU, should_stop=stop_after(7))
    assert (progress.step, progress.skipped) == (7, 1)
    for names in ("model", "optimizer"):
        assert same_tensors(tmp_path / "six" / LATEST, tmp_path / "seven" / LATEST, names)
    logged = [r["step"] for r in records(tmp_path / "seven") if "loss" in r]
    assert logged == [1, 2, 3, 4, 5, 6]  # there was no loss to log in the seventh


def test_train_a_skipped_step_is_counted_and_survives_resuming(pairs, tmp_path, monkeypatch):
    config = make_config(on_bad_loss="skip")
    for name in ("whole", "cut"):
        spoil(monkeypatch, {5})
        if name == "cut":
            loop.train(config, pairs, tmp_path / name, CPU, should_stop=stop_after(6))
        loop.train(config, pairs, tmp_path / name, CPU, resume=True)
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)
    last = [r for r in records(tmp_path / "cut") if "loss" in r][-1]
    assert (last["step"], last["skipped_steps"]) == (12, 1)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "cut" / LATEST).values())


def test_train_an_exploding_loss_stops_too(pairs, tmp_path, monkeypatch):
    spoil(monkeypatch, {25}, factor=1e4)
    config = make_config(steps=30, eval_every=30, save_every=10)
    with pytest.raises(TrainingError, match=r"at most 10 times its running average.*by step 26"):
        loop.train(config, pairs, tmp_path, CPU)
    assert read_state(tmp_path / LATEST).progress.step == 20


def test_train_bad_steps_without_end_stop_even_a_run_that_skips(pairs, tmp_path, monkeypatch):
    spoil(monkeypatch, set(range(3, 1000)))
    config = make_config(
        steps=110, eval_every=110, log_every=105, on_bad_loss="skip", save_every=95
    )
    with pytest.raises(TrainingError, match="103 bad steps"):
        loop.train(config, pairs, tmp_path, CPU)
    assert read_state(tmp_path / LATEST).progress.skipped == 93


def test_train_milestones_are_kept_as_averaged_weights(pairs, tmp_path):
    config = make_config(milestones=[3, 8])
    loop.train(config, pairs, tmp_path / "whole", CPU)
    found = sorted(path.name for path in (tmp_path / "whole").glob("milestone*"))
    assert found == ["milestone-3.safetensors", "milestone-8.safetensors"]
    loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=stop_after(3))
    kept, latest = load_file(tmp_path / "cut" / found[0]), load_file(tmp_path / "cut" / LATEST)
    assert kept and all(torch.equal(tensor, latest[name]) for name, tensor in kept.items())
    inverter = inverter_from_run(tmp_path / "whole", "milestone-3")
    assert inverter.trained["step"] == 3
    assert torch.equal(inverter.denoiser.positions, kept["ema.positions"])
    with pytest.raises(CheckpointError, match="milestone-5"):
        inverter_from_run(tmp_path / "whole", "milestone-5")


def test_train_validation_sees_the_averaged_weights_and_training_goes_on_with_its_own(
    pairs, tmp_path, monkeypatch
):
    seen = {}

    def spy(measure, denoiser, *rest):
        seen[measure.__name__] = denoiser.positions.detach().clone()
        return measure(denoiser, *rest)

    for measure in (loop.validate, loop.decode_held_out):
        monkeypatch.setattr(loop, measure.__name__, partial(spy, measure))
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    kept = load_file(tmp_path / LATEST)
    assert all(torch.equal(positions, kept["ema.positions"]) for positions in seen.values())
    assert len(seen) == 2 and not torch.equal(kept["model.positions"], kept["ema.positions"])


def test_train_patience_ends_a_run_for_good(pairs, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 9.0])
    monkeypatch.setattr(loop, "validate", lambda *_: {"validation_loss": next(losses)})
    config = make_config(steps=40, patience=2, save_every=40)
    progress = loop.train(config, pairs, tmp_path, CPU)
    assert (progress.step, progress.best_loss, progress.stale) == (16, 2.0, 2)
    assert read_state(tmp_path / BEST).progress.step == 8
    assert loop.train(config, pairs, tmp_path, CPU, resume=True).step == 16


@pytest.mark.parametrize("name", ["log-linear", "linear"])
def test_train_the_mask_ratios_of_a_run_are_those_of_its_schedule(
    name, pairs, tmp_path, monkeypatch
):
    """Every batch the network was trained on; L = 12, t uniform, ratios binomial around 1 - alpha.

    The distance between the two distribution functions is that of Kolmogorov and Smirnov, whose
    bound at 1% is 1.63 / sqrt(n). Masking a fixed share of every text is at a distance near 1.
    """
    mask_id, seen = loop.Pairs.open(pairs).tokenizer.mask_id, []

    def spy(objective, batch, embedding):
        assert torch.equal(batch.xt == mask_id, batch.masked)
        seen.append(batch.masked.sum(dim=1).numpy())
        return diffusion_loss(objective, batch, embedding)

    monkeypatch.setattr(step_module, "diffusion_loss", spy)
    plain = make_config(steps=8, batch_size=512, validation_pairs=8, eval_every=8)
    diffusion = plain.diffusion.model_copy(update={"schedule": name})
    loop.train(plain.model_copy(update={"diffusion": diffusion}), pairs, tmp_path, CPU)

    counts = np.concatenate(seen)
    assert len(counts) == 8 * 512
    t = np.linspace(0.001, 1.0, 2001)
    ratio = 1.0 - np.exp(-5.0 * t) if name == "log-linear" else t
    wanted = binom.cdf(np.arange(13)[:, None], 12, ratio).mean(axis=1)
    occurring = np.bincount(counts, minlength=13)
    assert np.abs(np.cumsum(occurring) / len(counts) - wanted).max() < 1.63 / len(counts) ** 0.5
    assert (occurring > 0).all()  # from none of a text to all of it


@pytest.mark.slow
def test_train_self_generated_contexts_change_the_run_and_resume_exactly(pairs, tmp_path):
    config = make_config(self_context=0.5)
    loop.train(make_config(), pairs, tmp_path / "plain", CPU)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=stop_after(5))
    loop.train(config, pairs, tmp_path / "cut", CPU, resume=True)
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)
    assert not same_tensors(tmp_path / "whole" / LATEST, tmp_path / "plain" / LATEST, "ema.pos")


def test_train_feedback_resumes_exactly_and_is_used_by_guided_search(pairs, tmp_path):
    config = make_config(feedback=0.5)
    encoder = FakeEncoder(dimension=Pairs.open(pairs).encoder.dimension)
    with pytest.raises(TrainingError, match=r"hypotheses of training\.feedback"):
        loop.train(config, pairs, tmp_path / "without", CPU)
    loop.train(config, pairs, tmp_path / "whole", CPU, encoder=encoder)
    loop.train(config, pairs, tmp_path / "cut", CPU, encoder=encoder, should_stop=stop_after(5))
    loop.train(config, pairs, tmp_path / "cut", CPU, encoder=encoder, resume=True)
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)

    inverter = inverter_from_run(tmp_path / "whole")
    assert inverter.denoiser.feedback.weight.any()
    widths, forward = [], inverter.denoiser.hidden_states

    def watched(tokens, embedding, *rest):
        widths.append(embedding.shape[1])
        return forward(tokens, embedding, *rest)

    inverter.denoiser.hidden_states = watched
    inverter._fast_denoiser = lambda compute: inverter.denoiser  # not its copy
    vectors = encoder.encode(["two words"])
    inverter.invert(vectors, decoding="guided-search:encoder_calls=20", encoder=encoder)
    assert set(widths) == {encoder.identity.dimension, 2 * encoder.identity.dimension}


def test_the_fast_path_of_a_gpu_trains_as_the_plain_one(pairs, tmp_path):
    """Pairs resident and a constant number of masked positions, both on the CPU: same losses."""
    fast = make_config(resident="always", static_shapes=True, log_every=1, lr=1e-3)
    plain = make_config(resident="never", log_every=1, lr=1e-3)
    for name, config in (("fast", fast), ("plain", plain)):
        loop.train(config, pairs, tmp_path / name, CPU)
    losses = [[r["loss"] for r in records(tmp_path / n) if "loss" in r] for n in ("fast", "plain")]
    assert len(losses[0]) == 12 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_train_what_is_logged_has_names_that_say_what_it_is(pairs, tmp_path, monkeypatch):
    encoder, handed, original = FakeEncoder(), [], loop.decode_held_out

    def spy(*args):
        handed.append(args[-1])
        return original(*args)

    monkeypatch.setattr(loop, "decode_held_out", spy)
    loop.train(make_config(), pairs, tmp_path, CPU, encoder=encoder)
    assert handed == [encoder] * 3
    lines = records(tmp_path)
    training = next(r for r in lines if "loss" in r)
    assert set(training) == {
        *("step", "samples", "loss", "masked_accuracy", "lr", "gradient_norm"),
        *("samples_per_second", "share_of_peak", "seconds"),
    }
    assert 0.0 < training["share_of_peak"] < 1.0
    assert 0.0 < training["masked_accuracy"] < 1.0
    validation = next(r for r in lines if "validation_loss" in r)
    assert set(validation) - {"decoded_cosine"} == {  # there is none while every text is empty
        *("step", "samples", "validation_loss", "masked_accuracy", "full_mask_cross_entropy"),
        *("decoded_token_accuracy", "decoded_exact_match"),
    }


def test_train_nothing_of_tensorboard_outlives_a_run(pairs, tmp_path, monkeypatch):
    """Its writer has a thread, whether the run ends well or not."""
    pytest.importorskip("tensorboard")
    before = set(threading.enumerate())
    loop.train(make_config(steps=3, tensorboard=True), pairs, tmp_path / "good", CPU)
    spoil(monkeypatch, {3})
    with pytest.raises(TrainingError):
        loop.train(make_config(tensorboard=True), pairs, tmp_path / "bad", CPU)
    assert set(threading.enumerate()) <= before
    assert all(list((tmp_path / name / "tensorboard").iterdir()) for name in ("good", "bad"))


def test_train_between_logs_the_host_never_asks_the_device(pairs, monkeypatch):
    """No reading of a tensor's value in a step: on a GPU each would wait for all that is queued."""
    config, opened, processes = make_config(), loop.Pairs.open(pairs), loop.Processes(CPU)
    this = loop.initial_state(config, opened, processes, None)
    loop.train_step(this, 0)  # the optimiser makes its state
    asked = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, original=original, name=name):
            asked.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    loss = loop.train_step(this, 1)
    assert asked == []
    assert float(loss) > 0.0 and asked  # the spies do see a question


def test_train_with_a_prefix_resumes_exactly_and_exports_it(pairs, tmp_path):
    config = with_prefix(5)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=stop_after(5))
    loop.train(config, pairs, tmp_path / "cut", CPU, resume=True)
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)
    inverter = inverter_from_run(tmp_path / "whole", "latest")
    assert inverter.spec.prefix == 5 and inverter.length == 12
    inverter.save_pretrained(tmp_path / "saved")
    assert Inverter.from_pretrained(tmp_path / "saved").spec.prefix == 5
