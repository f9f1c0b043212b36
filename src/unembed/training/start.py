"""Weights of an inverter as the start of a run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.errors import CheckpointError
from unembed.inverter import Inverter

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
