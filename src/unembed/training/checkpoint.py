"""The training state on disk: safetensors files, each replaced in one step; starting and resuming.

Tensors are named ``model.*``, ``ema.*``, ``optimizer.exp_avg.*`` and ``guard``; the rest (step,
best loss, settings, digest of the pairs) is JSON in the file's metadata, beside a SHA-256 of all.
Randomness needs no state: every step draws from a generator seeded by (seed, step). The latest
state but one is kept: a run whose latest file is damaged goes on from there, and never anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unembed.checkpoints import write_tensors
from unembed.data.pairs import MANIFEST, TOKENIZER, Pairs
from unembed.denoiser import Denoiser
from unembed.encoders.base import EncoderIdentity
from unembed.errors import CheckpointError, TrainingError
from unembed.files import atomic, is_file, remove_unfinished
from unembed.inverter import Inverter
from unembed.training.distributed import Processes, distribute_like, full_tensor
from unembed.training.metrics_log import METRICS, read_records
from unembed.training.step import TrainState

if TYPE_CHECKING:
    from unembed.config import Config

LATEST = "latest.safetensors"
PREVIOUS = "previous.safetensors"
BEST = "best.safetensors"
MILESTONE = "milestone-{}.safetensors"
_LOCK = ".lock"
_DAMAGED = ".damaged"
_GUARD = "guard"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UPDATES = "step"  # of a table frozen at first fewer than of the rest
_FIXED = ("seed", "validation_pairs")  # of training: which pairs a step sees, and which none does
_POSITIONS = "positions"


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

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

    def out_of_patience(self, patience: int | None) -> bool:
        """Check whether there were as many validations since the best one as are allowed."""
        return patience is not None and self.stale >= patience


# Writing


def save_state(state: TrainState, progress: Progress, path: Path) -> None:
    """Write a state under a temporary name and rename it over the old one.

    The latest state has everything, and the one before it is kept; others have the averaged
    weights. All processes call this; where each holds a share of the weights, all are needed to
    put a tensor together, and the main one writes.

    Args:
        state: The run.
        progress: Step, best loss and times.
        path: ``latest.safetensors``, ``best.safetensors`` or a milestone of a run.

    Raises:
        TrainingError: The disk refused; the old state is still there.
    """
    processes, ema = state.processes, state.ema
    if not (processes.is_main or processes.sharded):
        return
    tensors = {f"ema.{n}": a for n, a in zip(ema.names, ema.averages, strict=True)}
    if path.name == LATEST:
        for name, parameter in state.denoiser.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            moments = state.optimizer.state.get(parameter, {})  # none of a frozen one
            for part in (*_MOMENTS, _UPDATES) if moments else ():
                tensors[f"optimizer.{part}.{name}"] = moments[part]
        tensors[_GUARD] = state.guard.state
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor)
        # Other processes drop what they helped to put together
        tensors[name] = gathered.contiguous().cpu() if processes.is_main else gathered.new_empty(0)
    if processes.is_main:
        _write(tensors, progress, state.facts, path)


def _write(
    tensors: dict[str, Tensor], progress: Progress, facts: Mapping[str, Any], path: Path
) -> None:
    metadata = {"progress": json.dumps(asdict(progress)), "facts": json.dumps(dict(facts))}
    metadata["digest"] = _digest(tensors, metadata)
    with guard_write(path), atomic(path) as temporary:
        write_tensors(tensors, temporary, metadata)
        if path.name == LATEST and path.exists():
            path.replace(path.with_name(PREVIOUS))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute the SHA-256 of a state: names, shapes and bytes of its tensors, and its metadata."""
    digest = hashlib.sha256(f"{metadata['progress']}\n{metadata['facts']}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def guard_write(path: Path) -> Iterator[None]:
    """Surround whatever writes ``path``: a disk that refuses ends the run with a message.

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


# Reading


@dataclass(frozen=True)
class SavedState:
    """A state as it was read.

    Attributes:
        tensors: By name, in the host's memory.
        progress: Where the run stood.
        facts: What must match: configuration, sizes, encoder, tokenizer, pairs.
        path: The file.
    """

    tensors: dict[str, Tensor]
    progress: Progress
    facts: dict[str, Any]
    path: Path


def read_state(path: Path) -> SavedState:
    """Read a saved state and compare it with its digest; files of older versions have none.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if not is_file(path):
        raise CheckpointError(f"a training state at {path}", "nothing", "Start without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(metadata["progress"]))
        facts: dict[str, Any] = json.loads(metadata["facts"])
        if "digest" in metadata and metadata["digest"] != _digest(tensors, metadata):
            raise ValueError("its bytes do not match its digest")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a whole training state at {path}",
            f"{type(error).__name__}: {error}",
            "Put back a copy of it, or choose another folder",
        ) from error
    return SavedState(tensors, progress, facts, path)


def saved_state(run: Path, resume: bool) -> SavedState | None:
    """Read the state that a run goes on from; None where the folder has no run yet.

    That is the latest one, or where it is damaged or missing the one before it, with a warning.

    Raises:
        CheckpointError: There is a run and ``resume`` is false, the folder holds other things, or
            what is left of a run there cannot be gone on with.
    """
    require_run_folder(run)
    paths = [path for path in (run / LATEST, run / PREVIOUS) if path.exists()]
    if paths and not resume:
        raise CheckpointError(
            f"an empty run folder at {run}", "a training state", "Pass --resume or another --out"
        )
    damage = f"there is no {LATEST}"
    for path in paths:
        try:
            saved = read_state(path)
        except CheckpointError as error:
            if path == paths[-1]:
                raise
            damage = str(error)
            continue
        if path.name == PREVIOUS:
            logging.getLogger(__name__).warning(
                "note: going on from step %d, in %s: %s", saved.progress.step, path, damage
            )
        return saved
    _require_nothing_to_lose(run)
    return None


def _require_nothing_to_lose(run: Path) -> None:
    """Refuse to begin anew over what is left of a run that lost its states.

    Killed before its first validation, which comes with a save, it has some lines of log at most.
    """
    remains = [
        path.name for path in (run / BEST, *run.glob(MILESTONE.format("*"))) if path.exists()
    ]
    log = run / METRICS
    if log.is_file() and any("validation_loss" in record for record in read_records(log)[0]):
        remains.append(METRICS)
    if remains:
        raise CheckpointError(
            f"{LATEST} or {PREVIOUS} in {run}, or an empty folder",
            f"{', '.join(remains)} of a run, and no state to go on from",
            f"Put {LATEST} back, or choose another --out",
        )


def require_run_folder(run: Path) -> None:
    """Refuse a folder of prepared pairs or texts.

    Raises:
        CheckpointError: It is one.
    """
    if (run / MANIFEST).exists():
        raise CheckpointError(
            f"an empty run folder at {run}", "prepared pairs or texts", "Choose another --out"
        )


@contextmanager
def locked(run: Path, processes: Processes) -> Iterator[None]:
    """Keep the folder of a run for this run alone, made where it is not there yet.

    Raises:
        CheckpointError: Another run is writing to it, or it holds other things.
        TrainingError: It cannot be made.
    """
    require_run_folder(run)
    lock, free = FileLock(run / _LOCK, timeout=0), True
    if processes.is_main:
        with guard_write(run):
            run.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
                remove_unfinished(run)
            except Timeout:
                free = False
    if not processes.broadcast(free):
        raise CheckpointError(
            f"{run} to be free", "another training writing to it", "Wait for it, or choose --out"
        )
    try:
        yield
    finally:
        lock.release()


# Starting and resuming


def open_pairs(data: Path, config: Config, saved: SavedState | None) -> Pairs:
    """Open the pairs of a run: of one that goes on the shards it began with, whatever came since.

    Raises:
        DataError: The pairs cannot be read.
        TrainingError: They are of another length than the configuration says.
    """
    pairs = Pairs.open(data, None if saved is None else saved.facts.get("shards"))
    length = int(pairs.manifest["pieces"]["length"])
    if config.data.length != length:
        raise TrainingError(
            f"pairs of data.length {config.data.length}",
            f"pairs of {length} tokens",
            f"Pass --set data.length={length}, or prepare pairs with this configuration",
        )
    return pairs


def start_or_resume(run: Path, state: TrainState, saved: SavedState | None) -> Progress:
    """Put the saved state into a run at step 0, where there is one.

    Raises:
        CheckpointError: The state is of another run, or some processes do not see it.
    """
    processes, pairs = state.processes, state.pairs
    progress = Progress(pairs=len(pairs) - state.config.training.validation_pairs)
    if saved is not None:
        _require_same_run(saved, state)
        restore(state, saved)
        progress = replace(saved.progress, pairs=progress.pairs)
    lowest, highest = processes.min(progress.step), -processes.min(-progress.step)
    if lowest != highest:
        raise CheckpointError(
            f"the same state at {run / LATEST} for every process",
            f"steps {lowest} to {highest}",
            "Put --out and --data where all machines see them",
        )
    if processes.is_main:
        with guard_write(run / TOKENIZER):
            if saved is not None and saved.path.name == PREVIOUS and (run / LATEST).exists():
                # The next save must not put it in the place of the good one
                (run / LATEST).replace(run / (LATEST + _DAMAGED))
            if saved is None or not (run / TOKENIZER).exists():
                pairs.tokenizer.save(run / TOKENIZER)
    return progress


def restore(state: TrainState, saved: SavedState) -> None:
    """Put saved tensors into a freshly built run: weights, averages, moments, guard.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    tensors, ema, optimizer = saved.tensors, state.ema, state.optimizer
    # Of a version that did not keep the number of updates for each tensor
    updates = torch.tensor(float(saved.progress.step - saved.progress.skipped))
    try:
        with torch.no_grad():
            for name, average in zip(ema.names, ema.averages, strict=True):
                average.copy_(distribute_like(tensors[f"ema.{name}"], average))
            for name, parameter in state.denoiser.named_parameters():
                parameter.copy_(distribute_like(tensors[f"model.{name}"], parameter))
                if f"optimizer.{_MOMENTS[0]}.{name}" not in tensors:
                    continue  # frozen so far: the optimiser starts it afresh
                count = tensors.get(f"optimizer.{_UPDATES}.{name}", updates)
                optimizer.state[parameter] = {_UPDATES: count.to(parameter.device).clone()}
                for moment in _MOMENTS:
                    tensor = tensors[f"optimizer.{moment}.{name}"]
                    optimizer.state[parameter][moment] = distribute_like(tensor, parameter)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            "a state of this configuration", str(error), "Use the configuration of the run"
        ) from error
    if _GUARD in tensors:  # not in a file of a version that had no guard
        state.guard.restore(tensors[_GUARD])


def _require_same_run(saved: SavedState, state: TrainState) -> None:
    """Refuse a state of other data, of another network, or of other settings that must stay."""
    facts = dict(saved.facts)
    if EncoderIdentity.from_dict(facts["encoder"]).key == state.pairs.encoder.key:
        facts["encoder"] = state.facts["encoder"]  # wherever it was
    facts.setdefault("pairs_digest", state.facts["pairs_digest"])  # not in files of older versions
    for key in ("sizes", "encoder", "tokenizer_digest", "pairs_digest"):
        if facts.get(key) != state.facts[key]:
            raise CheckpointError(
                f"a run with {key} {state.facts[key]}",
                f"{facts.get(key)} in {saved.path}",
                "Use the data and configuration of that run, or another --out",
            )
    _require_same_settings(facts["config"], state.config, saved.path)


def _require_same_settings(saved: dict[str, Any], config: Config, latest: Path) -> None:
    """Refuse settings that would make the log and the best loss speak of two different runs."""
    now = config.model_dump()
    fixed = [("diffusion", key) for key in now["diffusion"]]
    fixed += [("training", key) for key in _FIXED]
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


def start_from(name: str, denoiser: Denoiser, pairs: Pairs) -> None:
    """Copy an inverter's weights into a denoiser of the same widths and tokenizer.

    The run may be of longer texts and of more blocks than the inverter: positions it lacks start as
    its last one, and blocks it lacks as the identity. Feedback that it lacks says nothing at first.
    Its guidance is left out: that is fitted to trained weights. The prefix is the run's.

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
    enlarged = replace(
        theirs,
        length=max(theirs.length, ours.length),
        layers=max(theirs.layers, ours.layers),
        feedback=ours.feedback or theirs.feedback,
        guidance=0.0,
        prefix=ours.prefix,
    )
    for what, expected, actual in (
        ("sizes", ours, enlarged),
        ("a tokenizer with digest", pairs.tokenizer.digest, inverter.tokenizer.digest),
    ):
        if expected != actual:
            raise CheckpointError(
                f"training.start_from {name} to have {what} {expected}",
                str(theirs if what == "sizes" else actual),
                "Match its data and denoiser settings (length and layers may be larger than "
                "its), or drop training.start_from",
            )
    weights = inverter.denoiser.state_dict()
    positions = weights[_POSITIONS]  # [L', H]
    repeats = positions[-1:].expand(ours.length - len(positions), -1)
    weights[_POSITIONS] = torch.cat([positions, repeats])
    weights = {name: x for name, x in weights.items() if not name.startswith("unconditional.")}
    denoiser.load_state_dict({**denoiser.state_dict(), **weights})
