"""Going on from a saved state: the same pairs in the same order, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unembed.data.manifest import MANIFEST, TOKENIZER
from unembed.data.pairs import Pairs
from unembed.encoders.base import EncoderIdentity
from unembed.errors import CheckpointError, TrainingError
from unembed.training.checkpoint import LATEST, Progress, read_facts, read_state, restore, written
from unembed.training.step import TrainingRun

if TYPE_CHECKING:
    from unembed.config import Config

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
