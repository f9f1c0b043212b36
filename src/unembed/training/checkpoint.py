"""The training state on disk: one safetensors file, replaced in one step.

Tensors are named ``model.*``, ``ema.*``, ``optimizer.exp_avg.*`` and ``guard``; what is not a
tensor (step, best loss, configuration, digest of the pairs) is JSON in the file's own metadata.
Randomness needs no state: every step draws from a generator seeded by (seed, step).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unembed.checkpoints import write_tensors
from unembed.data.manifest import MANIFEST, TOKENIZER
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.encoders.base import EncoderIdentity
from unembed.errors import CheckpointError, TrainingError
from unembed.files import atomic
from unembed.inverter import Inverter
from unembed.training.distributed import like, whole
from unembed.training.step import EMA, TrainingRun

if TYPE_CHECKING:
    from unembed.config import Config

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
    with written(path), atomic(path) as temporary:
        write_tensors(tensors, temporary, metadata)


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


_SAME = ("seed", "validation_pairs")  # of training: which pairs a step sees, and which none does


def saved_facts(run: Path, resume: bool) -> dict[str, Any] | None:
    """What the latest state of a run says about it; None where there is no state yet.

    Raises:
        CheckpointError: There is a state and ``resume`` is false, or the folder holds other things.
    """
    latest = run / LATEST
    if latest.exists() and resume:
        return read_facts(latest)
    if latest.exists():
        raise CheckpointError(
            f"an empty run folder at {run}", "a training state", "Pass --resume or another --out"
        )
    if (run / MANIFEST).exists():
        raise CheckpointError(
            f"an empty run folder at {run}", "prepared pairs or texts", "Choose another --out"
        )
    return None


def open_pairs(data: Path, config: Config, saved: dict[str, Any] | None) -> Pairs:
    """The pairs of a run: of one that goes on the shards it began with, whatever came since.

    Raises:
        DataError: The pairs cannot be read.
        TrainingError: They are of another length than the configuration says.
    """
    pairs = Pairs.open(data, (saved or {}).get("shards"))
    length = int(pairs.manifest["pieces"]["length"])
    if config.data.length != length:
        raise TrainingError(
            f"pairs of data.length {config.data.length}",
            f"pairs of {length} tokens",
            f"Pass --set data.length={length}, or prepare pairs with this configuration",
        )
    return pairs


def start_or_resume(run: Path, this: TrainingRun) -> Progress:
    """Load the latest state where there is one (`saved_facts` has refused what must not be).

    Raises:
        CheckpointError: The state is of another run, or some processes do not see it.
    """
    latest = run / LATEST
    progress = Progress(pairs=len(this.pairs) - this.config.training.validation_pairs)
    if latest.exists():
        progress = replace(_resumed(latest, this), pairs=progress.pairs)
    elif this.processes.first:
        with written(run / TOKENIZER):
            run.mkdir(parents=True, exist_ok=True)
            this.pairs.tokenizer.save(run / TOKENIZER)
    steps = this.processes.smallest(progress.step), -this.processes.smallest(-progress.step)
    if steps[0] != steps[1]:
        raise CheckpointError(
            f"the same state at {latest} for every process",
            f"steps {steps[0]} to {steps[1]}",
            "Put --out and --data where all machines see them",
        )
    return progress


def _resumed(latest: Path, this: TrainingRun) -> Progress:
    """The state put into the run, and how far it had come."""
    tensors, progress, saved = read_state(latest)
    if EncoderIdentity.from_dict(saved["encoder"]).key == this.pairs.encoder.key:
        saved["encoder"] = this.facts["encoder"]  # wherever it was
    saved.setdefault("pairs_digest", this.facts["pairs_digest"])  # not in states of older versions
    for key in ("sizes", "encoder", "tokenizer_digest", "pairs_digest"):
        if saved.get(key) != this.facts[key]:
            raise CheckpointError(
                f"a run with {key} {this.facts[key]}",
                f"{saved.get(key)} in {latest}",
                "Use the data and configuration of that run, or another --out",
            )
    _require_same_settings(saved["config"], this.config, latest)
    updates = progress.step - progress.skipped
    guard = restore(tensors, this.denoiser, this.ema, this.optimizer, updates)
    if guard is not None:
        this.guard.restore(guard)
    return progress


def _require_same_settings(saved: dict[str, Any], config: Config, latest: Path) -> None:
    """Refuse settings that would make the log and the best loss speak of two different runs."""
    now = config.model_dump()
    fixed = [("diffusion", key) for key in now["diffusion"]] + [("training", key) for key in _SAME]
    for section, key in fixed:
        before = saved[section].get(key, now[section][key])
        if before != now[section][key]:
            raise CheckpointError(
                f"{section}.{key} {before}, as in {latest}",
                str(now[section][key]),
                f"Pass --set {section}.{key}={before}, or another --out",
            )
    samples = [c["training"]["batch_size"] * c["training"]["accumulate"] for c in (saved, now)]
    if samples[0] != samples[1]:
        raise CheckpointError(
            f"training.batch_size x training.accumulate = {samples[0]}, as in {latest}",
            str(samples[1]),
            "Set them to that product, or choose another --out",
        )


_POSITIONS = "positions"


def start_from(name: str, denoiser: Denoiser, pairs: Pairs) -> None:
    """Copy an inverter's weights into a denoiser, if both speak of the same things.

    The run may be of longer texts and of more blocks than the inverter: positions it lacks start as
    its last one, and blocks it lacks as the identity.

    Args:
        name: Shipped name, folder or Hub repository.
        denoiser: Of the run, with its random start.
        pairs: Of the run.

    Raises:
        CheckpointError: There is no such inverter, or its sizes or tokenizer do not fit.
        EncoderError: It inverts another encoder.
    """
    inverter = Inverter.from_pretrained(name)
    pairs.encoder.require_same(inverter.encoder, "training.start_from")
    ours, theirs = denoiser.sizes, inverter.denoiser.sizes
    grown = replace(
        theirs,
        length=max(theirs.length, ours.length),
        layers=max(theirs.layers, ours.layers),
    )
    for what, wanted, found in (
        ("sizes", ours, grown),
        ("a tokenizer with digest", pairs.tokenizer.digest, inverter.tokenizer.digest),
    ):
        if wanted != found:
            raise CheckpointError(
                f"training.start_from {name} to have {what} {wanted}",
                str(theirs if what == "sizes" else found),
                "Match its data and denoiser settings (length and layers may be larger than "
                "its), or drop training.start_from",
            )
    weights = inverter.denoiser.state_dict()
    weights[_POSITIONS] = _lengthened(weights[_POSITIONS], ours.length)
    denoiser.load_state_dict({**denoiser.state_dict(), **weights})


def _lengthened(positions: Tensor, length: int) -> Tensor:
    """Positions [L', H] → [L, H], the last one repeated."""
    missing = length - len(positions)
    return torch.cat([positions, positions[-1:].expand(missing, -1)])
