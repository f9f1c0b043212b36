"""A training run → the folder an `Inverter` loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from unembed.data.encode import TOKENIZER
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.preflight import Fingerprint
from unembed.encoders.tokenizer import TextTokenizer
from unembed.errors import CheckpointError
from unembed.inverter import Inverter
from unembed.training.checkpoint import BEST, LATEST, read_state


def inverter_from_run(run: Path, which: str = "best", card: str | None = None) -> Inverter:
    """The averaged weights of a run, as an inverter.

    Args:
        run: Folder of `unembed train`.
        which: ``best`` (lowest validation loss) or ``latest``.
        card: Model card to save beside the weights.

    Raises:
        CheckpointError: There is no such state, or it is damaged.
    """
    states = {"best": BEST, "latest": LATEST}
    if which not in states:
        raise CheckpointError("a state named best or latest", repr(which), "Correct --which")
    tensors, progress, facts = read_state(run / states[which])
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
        trained={"config": facts["config"], **asdict(progress)},
        card=card,
        fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
    )
