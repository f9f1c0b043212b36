"""A training run → the folder an `Inverter` loads."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch

from unembed.data.manifest import TOKENIZER
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.preflight import Fingerprint
from unembed.encoders.tokenizer import TextTokenizer
from unembed.errors import CheckpointError, DataError, TrainingError
from unembed.inverter import CURVES, Inverter, is_inverter
from unembed.training.card import make_card, read_evaluation
from unembed.training.checkpoint import read_state
from unembed.training.curves import draw_curves, read_run
from unembed.weights import Storage

_STATES = re.compile(r"best|latest|milestone-\d+")
# What an export that was cut short may have left, and hidden files
_OURS = re.compile(r"\..*|model.*|tokenizer\.json")


def export_run(
    run: Path,
    out: Path,
    *,
    which: str = "best",
    storage: Storage | None = None,
    card: str | None = None,
    evaluation: Path | None = None,
) -> list[str]:
    """Write the inverter's folder of a run: averaged weights, tokenizer, card and curves.

    Args:
        run: Folder of `unembed train`.
        out: Folder to write, new or of an earlier export, whose files are replaced.
        which: ``best`` (lowest validation loss), ``latest`` or ``milestone-N``.
        storage: Number format and shard size; float16 if not given.
        card: Model card (Markdown) in place of the one made from the run.
        evaluation: What `unembed evaluate --out` wrote, for the card's table of figures.

    Returns:
        Notes on what is missing, and why.

    Raises:
        CheckpointError: There is no such state, it is damaged, or its weights do not fit the
            number format.
        DataError: The evaluation is none, or is about another encoder; or ``out`` holds something
            else than an inverter.
    """
    _require_own_folder(out)
    inverter = inverter_from_run(run, which)
    inverter.storage = storage or Storage()
    figures = None if evaluation is None else read_evaluation(evaluation, inverter.encoder)
    notes: list[str] = []
    try:
        found, notes = read_run(run)
        inverter.curves, _ = draw_curves([found])
    except (TrainingError, DataError) as error:
        notes.append(f"no curves in the card: {error}")
    inverter.card = make_card(inverter, figures) if card is None else card
    inverter.save_pretrained(out)
    if inverter.curves is None:
        (out / CURVES).unlink(missing_ok=True)  # of an earlier export
    return notes


def _require_own_folder(out: Path) -> None:
    """Refuse a folder in which a README.md, a config.json or a tokenizer.json may be another's."""
    found = [path.name for path in out.iterdir()] if out.is_dir() else []
    others = sorted(name for name in found if not _OURS.fullmatch(name))
    if (others and not is_inverter(out)) or (out.exists() and not out.is_dir()):
        raise DataError(
            f"a new folder at {out}, or an inverter's",
            f"other files there, such as {others[0]}" if others else "a file",
            "Choose another OUT",
        )


def inverter_from_run(run: Path, which: str = "best") -> Inverter:
    """The averaged weights of a run, as an inverter.

    Args:
        run: Folder of `unembed train`.
        which: ``best`` (lowest validation loss), ``latest`` or ``milestone-N``.

    Raises:
        CheckpointError: There is no such state, or it is damaged.
    """
    if not _STATES.fullmatch(which):
        raise CheckpointError(
            "a state named best, latest or milestone-N", repr(which), "Correct --which"
        )
    state = run / f"{which}.safetensors"
    if not state.is_file():
        raise CheckpointError(
            f"a run of `unembed train` at {run}",
            f"no {state.name} there",
            "Correct the folder, or train until the first validation",
        )
    tensors, progress, facts = read_state(state)
    tokenizer = TextTokenizer.load(run / TOKENIZER, facts["tokenizer"])
    if tokenizer.digest != facts["tokenizer_digest"]:
        raise CheckpointError(
            f"the tokenizer of the run in {run / TOKENIZER}", "another one", "Restore the file"
        )
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserSizes.from_dict(facts["sizes"]))
    prefix = "ema."
    averages = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    denoiser.load_state_dict(averages, assign=True)
    diffusion, fingerprint = facts["config"]["diffusion"], facts.get("fingerprint")
    return Inverter(
        denoiser,
        tokenizer,
        EncoderIdentity.from_dict(facts["encoder"]),
        {"schedule": diffusion["schedule"], "rate": diffusion["rate"]},
        trained={
            "config": facts["config"],
            **asdict(progress),
            **({"device": facts["device"]} if "device" in facts else {}),
        },
        fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
    )
