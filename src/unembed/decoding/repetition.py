"""A denoiser that is slower to say again what the text says already."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from unembed.decoding.lazy import LazyDenoiser, NoPenalty, Penalty
from unembed.decoding.strategy import Canvas, require_between
from unembed.diffusion import DenoiserFn

DEFAULT = 2.0


@dataclass(frozen=True)
class Repetition:
    """Takes ``penalty`` nats off a token's logit for each time it stands in the sequence.

    A vector says which words a text has better than where they are. A denoiser that knows so puts
    the likeliest word at every place it may have, and takes too little back once it is settled
    somewhere. The penalty is that of Keskar et al. (2019, arXiv 1909.05858), subtracted for each
    occurrence, so that a word the denoiser is sure of can be said again.

    Attributes:
        penalty: Nats for each occurrence, from 0; 0 is the plain denoiser.
    """

    penalty: float = DEFAULT

    def __post_init__(self) -> None:
        require_between("repetition", self.penalty, 0.0)

    def wrap(self, denoiser: DenoiserFn, canvas: Canvas) -> DenoiserFn:
        """The denoiser with the penalty, usable with every strategy; no pass more."""
        if self.penalty == 0.0:
            return denoiser
        special = [i for i in (canvas.mask_id, canvas.end_id, canvas.pad_id) if i is not None]
        costs = _Costs(self.penalty, tuple(special))
        if isinstance(denoiser, LazyDenoiser):
            return replace(denoiser, penalty=replace(costs, others=denoiser.penalty))

        def penalised(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
            logits = denoiser(tokens, embedding, t, where).float()  # [M, V]
            return costs.of_all(tokens[where.nonzero()[:, 0]], logits)

        return penalised


@dataclass(frozen=True)
class _Costs:
    """Of the tokens around a position, but for the special ones, on top of others; a `Penalty`."""

    each: float
    special: tuple[int, ...]
    others: Penalty = field(default_factory=NoPenalty)

    def _said(self, around: Tensor) -> Tensor:
        said = around != self.special[0]
        for token in self.special[1:]:
            said &= around != token
        return said

    def of_all(self, around: Tensor, logits: Tensor) -> Tensor:
        """See `Penalty`."""
        logits = self.others.of_all(around, logits)
        return logits.scatter_add_(1, around, -self.each * self._said(around).float())

    def of_some(self, around: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """See `Penalty`."""
        logits = self.others.of_some(around, logits, tokens)
        said = around.masked_fill(~self._said(around), -1).sort(dim=1).values  # [M, L]
        times = torch.searchsorted(said, tokens, right=True) - torch.searchsorted(said, tokens)
        return logits - self.each * times
