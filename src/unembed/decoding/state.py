"""The sequences of a batch in the middle of decoding, and the passes over those unfinished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from unembed.decoding.memory import Memory
from unembed.decoding.strategy import Canvas, Decoded, DecodingStep, OnStep
from unembed.diffusion import DenoiserFn

DOUBTED = -1e9  # sureness below every other one

# Positions whose logits are held at a time: few for a CPU's allocator, enough to fill a GPU
_TOGETHER = {"cpu": 256, "cuda": 4096}

# Float32 logits [R, V], its to spend, and which of the M positions they are of → figures [R, ...]
Reader = Callable[[Tensor, slice], tuple[Tensor, ...]]


class State:
    """Tokens, confidences and order of unmasking of B sequences, changed in place by a strategy.

    What follows a settled end token is padding and is settled with it: a trained denoiser says so
    anyway, nothing there is ever read, and no pass is spent on it.

    Args:
        embedding: Unit vectors [B, D].
        canvas: Length, special tokens and schedule.
        tokens: Ids to start from [B, L], the mask token where undecided; all masked when not given.
        content_only: The end is given: no end token or padding is put before it.

    Attributes:
        tokens: Ids [B, L].
        confidences: Probability of each settled token [B, L], 1 for implied padding; 0 where
            undecided.
        order: Pass in which each position was settled [B, L]; 0 where undecided or given.
        passes: Denoiser passes spent on each sequence [B].
        forbidden: Ids of the tokens that are never put anywhere.
        memory: What earlier passes said of the positions.
    """

    def __init__(
        self,
        embedding: Tensor,
        canvas: Canvas,
        tokens: Tensor | None = None,
        content_only: bool = False,
    ) -> None:
        self.embedding, self.canvas = embedding, canvas
        blank = canvas.blank(len(embedding), embedding.device)
        self.tokens = blank if tokens is None else tokens.clone()
        self.confidences = (self.tokens != canvas.mask_id).float()
        self.order = torch.zeros_like(self.tokens)
        self.passes = torch.zeros(len(self.tokens), dtype=torch.long, device=embedding.device)
        self.forbidden = [canvas.mask_id]
        if content_only:
            self.forbidden += [i for i in (canvas.end_id, canvas.pad_id) if i is not None]
        self.memory = Memory(len(self.tokens), canvas.length, self.forbidden)
        self._guesses: tuple[Tensor, Tensor] | None = None
        self._shown = blank.cpu()

    @property
    def masked(self) -> Tensor:
        """Undecided positions, boolean [B, L]."""
        return self.tokens == self.canvas.mask_id

    def read(
        self, denoiser: DenoiserFn, where: Tensor, reader: Reader, t: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One denoiser pass over the sequences that have a position in question.

        Args:
            denoiser: See `Strategy`.
            where: Masked positions in question, boolean [B, L].
            reader: What is wanted of the logits; those of the mask token are -infinity.
            t: Timesteps [B]; those of each sequence's share of masked positions when not given.

        Returns:
            The reader's figures [M, ...] for the M positions in row-major order.
        """
        found, first = [], 0
        for _, given in self.asked(where, t):
            logits = denoiser(*given).float()
            logits[:, self.forbidden] = -torch.inf
            part = slice(first, first + len(logits))
            found.append(reader(logits, part))
            first = part.stop
        return tuple(torch.cat(figures) for figures in zip(*found, strict=True))

    def asked(
        self, where: Tensor, t: Tensor | None = None, together: int | None = None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """What a denoiser is given in one pass, and which rows [b] of the batch that is about.

        The logits of all sequences, [M, V], would be the largest tensor of decoding, so they are to
        be made and read for some sequences at a time: those with ``together`` positions in
        question, or as many as suit the device. Other arguments as in `read`.
        """
        if t is None:
            t = self.canvas.schedule.timestep(self.masked.float().mean(dim=1))
        self.passes += where.any(dim=1)
        for rows in _together(where, together):
            yield rows, (self.tokens[rows], self.embedding[rows], t[rows], where[rows])

    def guess(self, tokens: Tensor, confidences: Tensor) -> None:
        """Keep what this pass finds likeliest, [B, L] each, for the next `show`."""
        self._guesses = tokens, confidences

    def settle(self, chosen: Tensor, tokens: Tensor, confidences: Tensor) -> None:
        """Write the tokens and confidences [B, L] of the chosen positions, boolean [B, L]."""
        self.tokens = torch.where(chosen, tokens, self.tokens)
        self.confidences = torch.where(chosen, confidences, self.confidences)
        self.order = torch.where(chosen, self.passes[:, None], self.order)
        if self.canvas.end_id is not None and self.canvas.pad_id is not None:
            late = after_end(self.tokens, self.canvas.end_id) & self.masked
            self.tokens = self.tokens.masked_fill(late, self.canvas.pad_id)
            self.confidences = self.confidences.masked_fill(late, 1.0)
            self.order = torch.where(late, self.passes[:, None], self.order)

    def remask(self, chosen: Tensor) -> None:
        """Make the chosen positions undecided, and what follows an end token among them."""
        if self.canvas.end_id is not None:
            ends = chosen & (self.tokens == self.canvas.end_id)
            chosen = chosen | (ends.cumsum(dim=1) > 0)
        self.tokens = self.tokens.masked_fill(chosen, self.canvas.mask_id)
        self.confidences = self.confidences.masked_fill(chosen, 0.0)

    def show(self, on_step: OnStep | None, index: int, total: int, every: int = 1) -> None:
        """Hand the state to a live display, if there is one: one of every so many sequences."""
        if on_step is None:
            return
        tokens = self.tokens[::every].cpu().clone()
        ratio = self.masked[::every].float().mean(dim=1).cpu()
        confidences = self.confidences[::every].cpu().clone()
        changed = tokens != self._shown[::every]
        step = DecodingStep(index, total, tokens, confidences, changed, ratio)
        if self._guesses is not None:
            guesses, sure = (x[::every].cpu().clone() for x in self._guesses)
            step = replace(step, guesses=guesses, guess_confidences=sure)
        on_step(step)
        self._guesses = None
        self._shown = self.tokens.cpu().clone()

    def decoded(self) -> Decoded:
        """The result."""
        return Decoded(self.tokens, self.confidences, self.order, self.passes)


def _together(where: Tensor, most: int | None = None) -> tuple[Tensor, ...]:
    """Rows of the sequences with a position in question, those whose logits are made at once."""
    counts = where.sum(dim=1)
    rows = counts.nonzero()[:, 0]
    most = most or _TOGETHER.get(where.device.type, _TOGETHER["cpu"])
    part = (counts[rows].cumsum(dim=0) - 1) // most
    _, sizes = torch.unique_consecutive(part, return_counts=True)
    return torch.split(rows, sizes.tolist() or [0])


def after_end(tokens: Tensor, end_id: int) -> Tensor:
    """Positions behind the first end token of each sequence, boolean [B, L]."""
    ends = (tokens == end_id).long()
    return ends.cumsum(dim=1) - ends > 0


def mask_surest(sureness: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [B] surest masked positions of each sequence, boolean [B, L].

    Args:
        sureness: Any order [B, L]; the first of equals wins.
        masked: Positions to choose from, boolean [B, L].
        count: How many of each row.
    """
    sureness = sureness.masked_fill(~masked, -torch.inf)
    ranking = sureness.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(masked.shape[1], device=masked.device).expand_as(ranking)
    rank = torch.empty_like(ranking).scatter_(1, ranking, places)
    return masked & (rank < count[:, None])


def said_before(tokens: Tensor, sureness: Tensor, masked: Tensor) -> Tensor:
    """Masked positions whose token is also that of a surer masked one, boolean [B, L].

    Places that would get the same word in the same pass rarely mean it twice: the denoiser has not
    seen yet that the word has found its place.

    Args:
        tokens: Likeliest token of each position [B, L].
        sureness: The order they are settled in [B, L]; the first of equals comes first.
        masked: Positions to choose from, boolean [B, L].
    """
    ranking = sureness.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranked = tokens.gather(1, ranking)  # [B, L], the surest first
    same = ranked[:, :, None] == ranked[:, None, :]  # [B, L, L]
    again = torch.zeros_like(masked).scatter_(1, ranking, same.tril(-1).any(dim=2))
    return again & masked


def even_share(masked: Tensor, passes: int) -> Tensor:
    """Positions to settle now [B] so that as many again in each of the passes left suffice."""
    return (masked.sum(dim=1) + passes - 1) // passes


def spread(values: Tensor, where: Tensor, fill: float) -> Tensor:
    """Values [M] at the M true positions of ``where`` [B, L] in row-major order, else ``fill``."""
    whole = torch.full(where.shape, fill, dtype=values.dtype, device=values.device)
    whole[where] = values
    return whole
