"""The training state on disk: one safetensors file, replaced in one step.

Tensors are named ``model.*``, ``ema.*``, ``optimizer.exp_avg.*`` and ``guard``; what is not a
tensor (step, best loss, configuration, digest of the pairs) is JSON in the file's own metadata.
Randomness needs no state: every step draws from a generator seeded by (seed, step).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unembed.denoiser import Denoiser
from unembed.errors import CheckpointError, TrainingError
from unembed.training.ema import EMA
from unembed.training.sharding import like, whole
from unembed.weights import write_tensors

LATEST = "latest.safetensors"
BEST = "best.safetensors"
MILESTONE = "milestone-{}.safetensors"
_GUARD = "guard"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UPDATES = "step"  # of a table frozen at first fewer than of the rest


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Optimiser steps done.
        best_loss: Lowest validation loss so far.
        pairs: Pairs the data order was drawn over.
        seconds: Time spent training, over all starts.
        skipped: Steps not applied because their loss was bad.
        stale: Validations since the best one.
    """

    step: int = 0
    best_loss: float = float("inf")
    pairs: int = 0
    seconds: float = 0.0
    skipped: int = 0
    stale: int = 0


def save_state(
    path: Path | None,
    denoiser: Denoiser,
    ema: EMA,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    facts: Mapping[str, Any],
    guard: Tensor | None = None,
) -> None:
    """Write a state under a temporary name and rename it over the old one.

    Of a sharded denoiser all processes must call this: they put each tensor together.

    Args:
        path: ``latest.safetensors``, ``best.safetensors`` or a milestone of a run; with none
            nothing is kept or written, as it is in all processes but one.
        denoiser: The live weights.
        ema: The averaged weights.
        optimizer: Its moments are saved when given; ``best`` and milestones go
            without.
        progress: Step, best loss and times.
        facts: What must match when loading: configuration, sizes, encoder, tokenizer.
        guard: The state of the guard against bad steps.

    Raises:
        TrainingError: The disk refused; the old state is still there.
    """
    tensors = {f"ema.{n}": a for n, a in zip(ema.names, ema.averages, strict=True)}
    if optimizer is not None:
        for name, parameter in denoiser.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for part in (*_MOMENTS, _UPDATES) if parameter in optimizer.state else ():
                tensors[f"optimizer.{part}.{name}"] = optimizer.state[parameter][part]
    if guard is not None:
        tensors[_GUARD] = guard
    tensors = {name: _kept(tensor, path is not None) for name, tensor in tensors.items()}
    if path is None:
        return
    metadata = {"progress": json.dumps(asdict(progress)), "facts": json.dumps(dict(facts))}
    temporary = path.with_name(path.name + ".tmp")
    with written(path):
        try:
            write_tensors(tensors, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)
            raise


def _kept(tensor: Tensor, here: bool) -> Tensor:
    """The whole tensor in the host's memory; put together and dropped where it is not kept."""
    together = whole(tensor)
    return together.contiguous().cpu() if here else together.new_empty(0)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around whatever writes ``path``: a disk that refuses ends the run with a message.

    Raises:
        TrainingError: In place of the disk's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"room to save {path}",
            str(error),
            "Free some space and start again with --resume, or choose another --out",
        ) from error


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a saved state, without its tensors.

    Raises:
        CheckpointError: It is damaged.
    """
    with _readable(path), safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads((file.metadata() or {})["facts"])
    return facts


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Around whatever reads a state: damage is told with a message."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"a whole training state at {path}", str(error), f"Use {BEST} or an older copy"
        ) from error


def read_state(path: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]]:
    """Tensors, progress and facts of a saved state.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"a training state at {path}", "nothing", "Start without --resume")
    with _readable(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(metadata["progress"]))
        facts: dict[str, Any] = json.loads(metadata["facts"])
    return tensors, progress, facts


def restore(
    tensors: Mapping[str, Tensor],
    denoiser: Denoiser,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> Tensor | None:
    """Put saved tensors back into a freshly built run.

    Args:
        tensors: From `read_state`.
        denoiser: Gets the live weights.
        ema: Gets the averages.
        optimizer: Gets the moments.
        steps: Updates the optimiser has made (the run's steps less those skipped), for a file of a
            version that did not keep their number for each tensor.

    Returns:
        The state of the guard; none in a file of a version that had no guard.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    try:
        with torch.no_grad():
            for name, average in zip(ema.names, ema.averages, strict=True):
                average.copy_(like(tensors[f"ema.{name}"], average))
            for name, parameter in denoiser.named_parameters():
                parameter.copy_(like(tensors[f"model.{name}"], parameter))
                if f"optimizer.{_MOMENTS[0]}.{name}" not in tensors:
                    continue  # frozen so far: the optimiser starts it afresh
                made = tensors.get(f"optimizer.{_UPDATES}.{name}", torch.tensor(float(steps)))
                optimizer.state[parameter] = {
                    _UPDATES: made.to(parameter.device),
                    **{m: like(tensors[f"optimizer.{m}.{name}"], parameter) for m in _MOMENTS},
                }
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            "a state of this configuration", str(error), "Use the configuration of the run"
        ) from error
    return tensors.get(_GUARD)
