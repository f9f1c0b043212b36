"""A tiny configuration and how to look at a run; the pairs are a fixture."""

import json
from pathlib import Path

from unembed.config import Config, validate_config
from unembed.device import choose_compute
from unembed.training import loop

CPU = choose_compute("cpu", "float32")


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


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / loop.METRICS).read_text().splitlines()]
