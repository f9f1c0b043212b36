"""Texts that end within a prefix and texts that go on behind it, each on as many positions.

A denoiser for long texts that was also trained on their first P positions alone
(`DenoiserSizes.prefix`) decodes a short text there, as one for short texts does. All L positions,
which cost twice the time and more, are for texts that do not end in the prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unembed.decoding.strategy import DecodingStep, OnStep, SequenceSpec
from unembed.diffusion import DenoiserFn


@dataclass(frozen=True)
class Part:
    """Rows of a batch that are decoded on the same number of positions.

    Attributes:
        rows: Their indices in the batch.
        spec: With that number as its length.
        on_step: Takes their steps and shows them as steps of the whole batch; None if none wants.
        passes: Denoiser passes spent on each to tell.
    """

    rows: list[int]
    spec: SequenceSpec
    on_step: OnStep | None
    passes: int


def split_by_prefix(
    denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec, on_step: OnStep | None = None
) -> Iterator[Part]:
    """Split a batch [B, D] into the texts that end in the prefix and those that go on behind it.

    A text goes on where that is more likely than not, which takes one pass over the prefix with
    the logits of its last position; none where the number of tokens is given. Without a prefix
    there is one part.
    """
    batch = len(embedding)
    if not spec.prefix:
        yield Part(list(range(batch)), spec, on_step, 0)
        return
    if spec.content is not None:
        goes_on, passes = torch.full((batch,), spec.content >= spec.prefix), 0
    else:
        goes_on, passes = _end_probability(denoiser, embedding, spec).cpu() < 0.5, 1  # noqa: PLR2004
    display = None if on_step is None else _Steps(on_step, spec, batch)
    for is_long, length in ((False, spec.prefix), (True, spec.length)):
        rows = (goes_on == is_long).nonzero()[:, 0]
        if len(rows):
            own = None if display is None else display.of(rows)
            yield Part(rows.tolist(), replace(spec, length=length, prefix=0), own, passes)


def _end_probability(denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec) -> Tensor:
    """Predict how probable it is that each text ends within the prefix [B]."""
    tokens = torch.full((len(embedding), spec.prefix), spec.mask_id, device=embedding.device)
    last = torch.zeros_like(tokens, dtype=torch.bool)
    last[:, -1] = True
    t = spec.schedule.timestep(torch.ones(len(tokens), device=embedding.device))
    logits = denoiser(tokens, embedding, t, last).float()  # [B, V]
    logits[:, spec.mask_id] = -torch.inf
    over = [token for token in (spec.end_id, spec.pad_id) if token is not None]
    return logits.softmax(dim=1)[:, over].sum(dim=1)


class _Steps:
    """Shows the steps of a part of a batch as steps of all of it."""

    def __init__(self, on_step: OnStep, spec: SequenceSpec, batch: int) -> None:
        self._on_step, self._pad_id, self._done = on_step, spec.pad_id or 0, 0
        self._blank = spec.masked(batch, torch.device("cpu"))
        self._tensors = {"tokens": self._blank.clone(), "mask_ratio": torch.ones(batch)}

    def of(self, rows: Tensor) -> OnStep:
        """Make what takes the steps of some rows, after those of the rows before."""
        before = self._done

        def show(step: DecodingStep) -> None:
            width = step.tokens.shape[1]
            self._tensors["changed"] = torch.zeros_like(self._blank, dtype=torch.bool)
            for field in dataclasses.fields(step):
                part = getattr(step, field.name)
                if isinstance(part, Tensor):  # [b] or [b, P]
                    shape = self._blank.shape[: part.ndim]
                    blank = torch.zeros(shape, dtype=part.dtype)
                    whole = self._tensors.setdefault(field.name, blank)
                    whole[(rows, slice(width))[: part.ndim]] = part
            self._tensors["tokens"][rows, width:] = self._pad_id
            self._done = before + step.index
            tensors = {name: tensor.clone() for name, tensor in self._tensors.items()}
            self._on_step(DecodingStep(self._done, before + step.total, **tensors))

        return show
