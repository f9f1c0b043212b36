"""A tiny configuration, how to stop a run and look at it; the pairs are a fixture."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from unembed.config import Config, validate_config
from unembed.device import choose_compute
from unembed.training import loop

CPU = choose_compute("cpu", "float32")
# Of runs that two processes share: 4 and 5 pairs each, two batches a step, and what is drawn for a
# pair switched on
SHARED = {
    "batch_size": 9,
    "accumulate": 2,
    "lr": 1e-3,
    "log_every": 1,
    "condition_dropout": 0.2,
    "embedding_noise": 0.05,
    "self_context": 0.3,
    "milestones": [8],
}


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
        "tensorboard": False,
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


def with_prefix(prefix: int, **training) -> Config:
    config = make_config(**training)
    denoiser = config.denoiser.model_copy(update={"prefix": prefix})
    return config.model_copy(update={"denoiser": denoiser})


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / loop.METRICS).read_text().splitlines()]


def stop_after(calls):
    """Make a ``should_stop`` that says yes after so many steps, once."""
    left = [calls]

    def stop():
        left[0] -= 1
        return left[0] == 0

    return stop


def same_tensors(one: Path, other: Path, names: str = "") -> bool:
    """Whether two states hold the same tensors, or the same of those whose names start so."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    return all(torch.equal(t, second[n]) for n, t in first.items() if n.startswith(names))


def start_two(script: str, *arguments: Path) -> list[subprocess.Popen[str]]:
    """Two processes of a script, started as `torchrun --nproc-per-node 2` starts them."""
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}:{root}",
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=root,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(started: list[subprocess.Popen[str]]) -> list[str]:
    """What each wrote on its standard output, once all have ended well."""
    written = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], written
    return [output for output, _ in written]
