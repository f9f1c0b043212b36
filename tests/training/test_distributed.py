import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unembed.errors import TrainingError
from unembed.training import distributed as module
from unembed.training import loop
from unembed.training.checkpoint import BEST, LATEST, read_state
from unembed.training.distributed import Processes

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


def test_a_run_of_two_resumes_exactly_and_any_of_them_can_end_it(two_processes):
    for name in (LATEST, BEST):
        whole, cut = (load_file(two_processes / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(tensor, cut[n]) for n, tensor in whole.items())


def test_a_batch_size_found_for_two_is_shared_by_both(two_processes):
    facts = read_state(two_processes / "auto" / LATEST)[2]
    assert facts["config"]["training"]["batch_size"] == 1024  # 512 of the pairs there are for each


def test_alone_nothing_is_wrapped_or_asked():
    processes, layer = Processes(CPU), torch.nn.Linear(2, 2)
    assert (processes.count, processes.rank, processes.compute) == (1, 0, CPU)
    assert processes.wrap(layer) is layer
    value = torch.ones(3)
    assert processes.total(value) is value
    assert processes.share(10) == slice(0, 10)
    assert processes.asked(lambda: True, now=False)


def test_shares_cover_a_batch_once():
    processes = Processes(CPU)
    processes.count = 4
    parts = []
    for processes.rank in range(4):
        parts += range(11)[processes.share(11)]
    assert parts == list(range(11))


def test_other_ways_of_sharing_a_network_are_refused(monkeypatch):
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
    _, progress, _ = read_state(run / LATEST)
    assert progress.step == records(run)[-1]["step"] > 2, output
