"""Weights of an inverter as the start of a run."""

from __future__ import annotations

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.errors import CheckpointError
from unembed.inverter import Inverter


def start_from(name: str, denoiser: Denoiser, pairs: Pairs) -> None:
    """Copy an inverter's weights into a denoiser, if both speak of the same things.

    Args:
        name: Shipped name, folder or Hub repository.
        denoiser: Of the run.
        pairs: Of the run.

    Raises:
        CheckpointError: There is no such inverter, or its sizes or tokenizer are others.
        EncoderError: It inverts another encoder.
    """
    inverter = Inverter.from_pretrained(name)
    pairs.encoder.require_same(inverter.encoder, "training.start_from")
    for what, ours, theirs in (
        ("sizes", denoiser.sizes, inverter.denoiser.sizes),
        ("a tokenizer with digest", pairs.tokenizer.digest, inverter.tokenizer.digest),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"training.start_from {name} to have {what} {ours}",
                str(theirs),
                "Match its data and denoiser settings, or drop training.start_from",
            )
    denoiser.load_state_dict(inverter.denoiser.state_dict())
