import subprocess
import sys
import time

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from unembed.config import TrainingSection
from unembed.errors import TrainingError
from unembed.training import distributed as module
from unembed.training import loop
from unembed.training.checkpoint import BEST, LATEST, read_state
from unembed.training.distributed import Processes, distribute_like, full_tensor
from unembed.training.export import inverter_from_run

from .helpers import CPU, SHARED, finish, make_config, records, start_two

SCRIPT = """
import os, sys
from pathlib import Path
from tests.training.helpers import CPU, SHARED, make_config
from unembed.training import loop
pairs, out, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
config = make_config(**SHARED)
seen = []
loop.train(config, pairs, out / "whole", CPU, on_log=seen.append)
assert bool(seen) == (rank == 0), "the first process alone logs"
calls = []
def asked():  # only the second process gets the signal
    calls.append(1)
    return rank == 1 and len(calls) == 5
assert loop.train(config, pairs, out / "cut", CPU, should_stop=asked).step == 5
assert loop.train(config, pairs, out / "cut", CPU, resume=True).step == 12
auto = make_config(steps=3, batch_size="auto")
loop.train(auto, pairs, out / "auto", CPU)
"""


@pytest.fixture(scope="module")
def two_processes(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    finish(start_two(SCRIPT, pairs, out))
    return out


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(two_processes, pairs, tmp_path):
    loop.train(make_config(**SHARED), pairs, tmp_path, CPU)
    one, two = records(tmp_path), records(two_processes / "whole")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for key in ("loss", "masked_accuracy", "gradient_norm", "validation_loss"):
        alone, shared = ([r[key] for r in lines if key in r] for lines in (one, two))
        assert alone and shared == pytest.approx(alone, rel=1e-5)
    alone, shared = (load_file(folder / LATEST) for folder in (tmp_path, two_processes / "whole"))
    for name, tensor in alone.items():
        parts = 3 if name.endswith("qkv.bias") else 1
        for part, (a, b) in enumerate(
            zip(shared[name].flatten().chunk(parts), tensor.flatten().chunk(parts), strict=True)
        ):
            # Attention does not see the keys' bias: its gradient is rounding, which Adam scales up
            atol = 1e-4 if part == 1 else 1e-5
            torch.testing.assert_close(a, b, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.slow
def test_a_run_of_two_resumes_exactly_and_any_of_them_can_end_it(two_processes):
    for name in (LATEST, BEST):
        whole, cut = (load_file(two_processes / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(tensor, cut[n]) for n, tensor in whole.items())


@pytest.mark.slow
def test_find_batch_size_a_batch_size_found_for_two_is_shared_by_both(two_processes):
    facts = read_state(two_processes / "auto" / LATEST).facts
    assert facts["config"]["training"]["batch_size"] == 1024  # 512 of the pairs there are for each


def test_processes_alone_nothing_is_wrapped_or_asked():
    processes, layer = Processes(CPU), torch.nn.Linear(2, 2)
    assert (processes.count, processes.rank, processes.compute) == (1, 0, CPU)
    assert processes.wrap(layer) is layer
    value = torch.ones(3)
    assert processes.all_reduce(value) is value
    assert processes.local_slice(10) == slice(0, 10)
    assert processes.any(True) and not processes.any(False)


def test_processes_shares_cover_a_batch_once():
    processes = Processes(CPU)
    processes.count = 4
    parts = []
    for processes.rank in range(4):
        parts += range(11)[processes.local_slice(11)]
    assert parts == list(range(11))


def test_processes_other_ways_of_sharing_a_network_are_refused(monkeypatch):
    class Sharded:
        num_processes, process_index, distributed_type = 2, 0, "FSDP"

    monkeypatch.setattr(module, "Accelerator", lambda **_: Sharded())
    with pytest.raises(TrainingError, match=r"\(DDP\); found FSDP.*--set training\.shard=true"):
        Processes(CPU)


def test_a_batch_smaller_than_the_processes_is_refused(pairs, tmp_path, monkeypatch):
    def crowd(compute, shard):
        processes = Processes(compute, shard)
        processes.count = 16
        return processes

    monkeypatch.setattr(loop, "Processes", crowd)
    with pytest.raises(TrainingError, match="at least 16, one pair a process"):
        loop.train(make_config(), pairs, tmp_path, CPU)


@pytest.mark.slow
def test_a_launcher_that_is_terminated_lets_its_processes_save(pairs, tmp_path):
    """`torchrun … -m unembed train`, and SIGTERM to torchrun, as a batch system sends it."""
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    endless = make_config(steps=1_000_000, log_every=1, save_every=1_000_000, eval_every=1_000_000)
    config.write_text(yaml.safe_dump(endless.model_dump()), encoding="utf-8")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    train = "-m unembed train --device cpu --config".split()
    launcher = subprocess.Popen(
        [sys.executable, *launch, *train, config, "--data", pairs, "--out", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while launcher.poll() is None and not (
            (run / loop.METRICS).exists() and len(records(run)) > 2
        ):
            time.sleep(0.2)
        assert launcher.poll() is None and not (run / LATEST).exists()
        launcher.terminate()
        output = launcher.communicate(timeout=300)[0]
    finally:
        launcher.kill()
    progress = read_state(run / LATEST).progress
    assert progress.step == records(run)[-1]["step"] > 2, output


# Sharding: two processes that hold a share of the weights train as one that holds all

SHARDED_SCRIPT = """
import shutil, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from tests.training.helpers import CPU, SHARED, make_config
from unembed.training import loop
from unembed.training import step as step_module
pairs, out = map(Path, sys.argv[1:])
config = make_config(**SHARED, shard=True)
built, make_state = [], loop.make_state
loop.make_state = lambda *given: built.append(make_state(*given)) or built[-1]
loop.train(config, pairs, out / "whole", CPU)
this = built[0]
held = [*this.denoiser.parameters(), *this.ema.averages]
held += [s[m] for s in this.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
assert all(isinstance(tensor, DTensor) for tensor in held)
print(sum(tensor.to_local().numel() for tensor in held) / sum(tensor.numel() for tensor in held))

compile_ = torch.compile
torch.compile = lambda function: compile_(function, backend="eager")  # graphs, no kernels
loop.train(make_config(**SHARED, shard=True, compile=True), pairs, out / "compiled", CPU)

asked = iter([False] * 4 + [True] + [False] * 100)
assert loop.train(config, pairs, out / "cut", CPU, should_stop=lambda: next(asked)).step == 5
if this.processes.is_main:
    shutil.copytree(out / "cut", out / "moved")
torch.distributed.barrier()
assert loop.train(config, pairs, out / "cut", CPU, resume=True).step == 12

skipping = make_config(**SHARED, shard=True, on_bad_loss="skip")
original, losses = step_module.diffusion_loss, []
def spoilt(*given):  # in the second process alone, from the third step on
    losses.append(1)
    loss, each = original(*given)
    return loss * (float("nan") if this.processes.rank and len(losses) > 4 else 1.0), each
for steps, broken in ((2, original), (4, spoilt)):
    step_module.diffusion_loss = broken
    asked = iter([False] * (steps - 1) + [True])
    progress = loop.train(
        skipping, pairs, out / str(steps), CPU, should_stop=lambda: next(asked)
    )
    assert (progress.step, progress.skipped) == (steps, steps - 2)
"""


@pytest.fixture(scope="module")
def sharded(pairs, tmp_path_factory):
    """Runs of two processes, and the share of all tensors that each held."""
    out = tmp_path_factory.mktemp("sharded")
    return out, [float(text) for text in finish(start_two(SHARDED_SCRIPT, pairs, out))]


def without_key_biases(tensors):
    """All but the biases of attention's keys: their gradient is zero but for rounding.

    A score moves by the same amount for every key, and Adam makes full steps out of the rounding.
    """
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias") and tensor.ndim:
            hidden = len(tensor) // 3
            tensors[name] = torch.cat([tensor[:hidden], tensor[2 * hidden :]])
    return tensors


def assert_same_run(one, other):
    """Logged figures and states to rounding."""
    first, second = records(one), records(other)
    assert [r["step"] for r in first] == [r["step"] for r in second]
    figures = "loss masked_accuracy gradient_norm validation_loss decoded_token_accuracy".split()
    for key in figures:
        here, there = ([r[key] for r in lines if key in r] for lines in (first, second))
        assert here and there == pytest.approx(here, rel=1e-5)
    for file in (LATEST, BEST):
        here, there = (without_key_biases(load_file(folder / file)) for folder in (one, other))
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def one_process(pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    loop.train(make_config(**SHARED), pairs, run, CPU)
    return run


@pytest.mark.slow
def test_two_shares_train_as_one_whole(sharded, one_process):
    for run in ("whole", "compiled"):
        assert_same_run(one_process, sharded[0] / run)
    milestones = [f / "milestone-8.safetensors" for f in (one_process, sharded[0] / "whole")]
    assert load_file(milestones[0]).keys() == load_file(milestones[1]).keys()


@pytest.mark.slow
def test_each_process_holds_half_of_everything(sharded):
    assert sharded[1] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(sharded):
    for name in (LATEST, BEST):
        whole, cut = (load_file(sharded[0] / run / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(tensor, cut[n]) for n, tensor in whole.items())


@pytest.mark.slow
def test_a_sharded_run_can_go_on_in_one_process_and_be_exported(sharded, one_process, pairs):
    """Its files are those of any run."""
    moved = sharded[0] / "moved"
    assert loop.train(make_config(**SHARED), pairs, moved, CPU, resume=True).step == 12
    assert_same_run(one_process, moved)
    inverter = inverter_from_run(sharded[0] / "whole")
    averages = load_file(sharded[0] / "whole" / BEST)
    for name, parameter in inverter.denoiser.named_parameters():
        assert torch.equal(parameter, averages[f"ema.{name}"])


@pytest.mark.slow
def test_a_step_that_is_bad_for_one_is_skipped_by_all(sharded):
    good, after = (load_file(sharded[0] / steps / LATEST) for steps in ("2", "4"))
    same = [name for name in good if name.startswith(("model.", "optimizer."))]
    assert same and all(torch.equal(good[name], after[name]) for name in same)


def test_full_tensor_alone_there_is_nothing_to_share_out():
    assert not Processes(CPU, shard=True).sharded
    tensor = torch.ones(3)
    assert full_tensor(tensor) is tensor
    assert torch.equal(distribute_like(tensor, torch.zeros(3)), tensor)


def test_training_section_a_batch_size_that_is_tried_out_with_a_whole_copy_is_refused():
    with pytest.raises(ValidationError, match="batch_size must be a number with shard"):
        TrainingSection(shard=True, batch_size="auto")
