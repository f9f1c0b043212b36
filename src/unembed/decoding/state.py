"""The sequences of a batch in the middle of decoding, and the passes over those unfinished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from unembed.decoding.strategy import Decoded, DecodingStep, OnStep, SequenceSpec
from unembed.diffusion import DenoiserFn

DEMOTION = 1e6  # taken off the score of a position to be unmasked after all others

# Positions whose logits exist at a time: few for a CPU's allocator, enough to fill a GPU
_TOGETHER = {"cpu": 256, "cuda": 4096}

# Float32 logits [R, V], its to spend, and which of the M positions they are of → figures [R, ...]
Reader = Callable[[Tensor, slice], tuple[Tensor, ...]]


class DenoisingState:
    """Tokens, confidences and order of unmasking of B sequences, changed in place by a strategy.

    What follows an unmasked end token is padding and is unmasked with it: a trained denoiser says
    so anyway, nothing there is ever read, and no pass is spent on it.

    Args:
        embedding: Unit vectors [B, D].
        spec: Length, special tokens and schedule.
        tokens: Ids to start from [B, L], the mask token where masked; all masked when not given.
        end_given: The end is in ``tokens``: none is put before it, and it stays. So it is too
            where the spec says how long texts are.

    Attributes:
        tokens: Ids [B, L].
        confidences: Probability of each unmasked token [B, L], 1 for implied padding; 0 where
            masked.
        order: Pass in which each position was unmasked [B, L]; 0 where masked or given.
        passes: Denoiser passes spent on each sequence [B].
        forbidden: Ids of the tokens that are never put anywhere.
        rows: Indices of the sequences that are being predicted, for a logits processor that knows
            something of each.
    """

    def __init__(
        self,
        embedding: Tensor,
        spec: SequenceSpec,
        tokens: Tensor | None = None,
        end_given: bool = False,
    ) -> None:
        self.embedding, self.spec = embedding, spec
        blank = spec.masked(len(embedding), embedding.device)
        self.tokens = blank if tokens is None else tokens.clone()
        self.confidences = (self.tokens != spec.mask_id).float()
        self.order = torch.zeros_like(self.tokens)
        self.passes = torch.zeros(len(self.tokens), dtype=torch.long, device=embedding.device)
        self.end_given = end_given or spec.content is not None
        self.forbidden = spec.special_ids if self.end_given else [spec.mask_id]
        self.rows = torch.arange(len(embedding), device=embedding.device)
        self._guesses: tuple[Tensor, Tensor] | None = None
        self._previous = blank.cpu()

    @property
    def masked(self) -> Tensor:
        """Masked positions, boolean [B, L]."""
        return self.tokens == self.spec.mask_id

    def predict(
        self, denoiser: DenoiserFn, positions: Tensor, reader: Reader, t: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Make one denoiser pass over the sequences with a position to predict.

        The logits of all sequences, [M, V], would be the largest tensor of decoding, so they are
        predicted and read for some sequences at a time.

        Args:
            denoiser: See `Strategy`.
            positions: Masked positions to predict, boolean [B, L].
            reader: What is wanted of the logits; those of forbidden tokens are -infinity.
            t: Timesteps [B]; those of each sequence's share of masked positions when not given.

        Returns:
            The reader's figures [M, ...] for the M positions in row-major order.
        """
        if t is None:
            t = self.spec.schedule.timestep(self.masked.float().mean(dim=1))
        self.passes += positions.any(dim=1)
        figures, first = [], 0
        for rows in _groups(positions):
            self.rows = rows
            logits = denoiser(self.tokens[rows], self.embedding[rows], t[rows], positions[rows])
            logits = logits.float()
            logits[:, self.forbidden] = -torch.inf
            part = slice(first, first + len(logits))
            figures.append(reader(logits, part))
            first = part.stop
        return tuple(torch.cat(parts) for parts in zip(*figures, strict=True))

    def fix_length(self, content: Tensor, confidences: Tensor) -> None:
        """Put the end behind so many tokens [B]; no other end comes before it, and it stays.

        Args:
            content: Tokens before the end, from 1 to L - 1.
            confidences: Probability of the end token at each position [B, L].
        """
        tokens, end_id = self.spec.with_end(self.tokens, content), self.spec.end_id
        assert end_id is not None
        confidences = torch.where(tokens == end_id, confidences, 1.0)
        self.unmask(tokens != self.tokens, tokens, confidences)
        self.end_given, self.forbidden = True, self.spec.special_ids

    def guess(self, tokens: Tensor, confidences: Tensor) -> None:
        """Remember what this pass predicts, [B, L] each, for the next `show`."""
        self._guesses = tokens, confidences

    def unmask(self, positions: Tensor, tokens: Tensor, confidences: Tensor) -> None:
        """Write the tokens and confidences [B, L] of the chosen positions, boolean [B, L]."""
        self.tokens = torch.where(positions, tokens, self.tokens)
        self.confidences = torch.where(positions, confidences, self.confidences)
        self.order = torch.where(positions, self.passes[:, None], self.order)
        if self.spec.end_id is not None and self.spec.pad_id is not None:
            late = after_end(self.tokens, self.spec.end_id) & self.masked
            self.tokens = self.tokens.masked_fill(late, self.spec.pad_id)
            self.confidences = self.confidences.masked_fill(late, 1.0)
            self.order = torch.where(late, self.passes[:, None], self.order)

    def remask(self, positions: Tensor) -> None:
        """Mask the positions positions again, and what follows an end token among them.

        An end that was given stays.
        """
        if self.end_given:
            over = (self.tokens == self.spec.end_id) | (self.tokens == self.spec.pad_id)
            positions = positions & ~over
        elif self.spec.end_id is not None:
            ends = positions & (self.tokens == self.spec.end_id)
            positions = positions | (ends.cumsum(dim=1) > 0)
        self.tokens = self.tokens.masked_fill(positions, self.spec.mask_id)
        self.confidences = self.confidences.masked_fill(positions, 0.0)

    def show(self, on_step: OnStep | None, index: int, total: int, every: int = 1) -> None:
        """Hand the state to a live display, if there is one: one of every so many sequences."""
        if on_step is None:
            return
        tokens = self.tokens[::every].cpu().clone()
        ratio = self.masked[::every].float().mean(dim=1).cpu()
        confidences = self.confidences[::every].cpu().clone()
        changed = tokens != self._previous[::every]
        step = DecodingStep(index, total, tokens, confidences, changed, ratio)
        if self._guesses is not None:
            guesses, scores = (x[::every].cpu().clone() for x in self._guesses)
            step = replace(step, guesses=guesses, guess_confidences=scores)
        on_step(step)
        self._guesses = None
        self._previous = self.tokens.cpu().clone()

    def decoded(self) -> Decoded:
        """Return the result."""
        return Decoded(self.tokens, self.confidences, self.order, self.passes)


def _groups(positions: Tensor) -> tuple[Tensor, ...]:
    """Split the rows with a position to predict into groups whose logits exist together."""
    counts = positions.sum(dim=1)
    rows = counts.nonzero()[:, 0]
    most = _TOGETHER.get(positions.device.type, _TOGETHER["cpu"])
    group = (counts[rows].cumsum(dim=0) - 1) // most
    _, sizes = torch.unique_consecutive(group, return_counts=True)
    return torch.split(rows, sizes.tolist() or [0])


def after_end(tokens: Tensor, end_id: int) -> Tensor:
    """Find the positions behind the first end token of each sequence, boolean [B, L]."""
    ends = (tokens == end_id).long()
    return ends.cumsum(dim=1) - ends > 0


def topk_mask(scores: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """Mark the ``count`` [B] masked positions of each sequence with the highest scores [B, L].

    Args:
        scores: Any order [B, L]; the first of equals wins.
        masked: Positions to choose from, boolean [B, L].
        count: How many of each row.
    """
    rank = _ranking(scores, masked).argsort(dim=1)
    return masked & (rank < count[:, None])


def duplicate_tokens(tokens: Tensor, scores: Tensor, masked: Tensor) -> Tensor:
    """Mark masked positions whose token is also that of a higher-scored masked one, [B, L].

    Places that would get the same word in the same pass rarely mean it twice: the denoiser has not
    seen yet that the word is there already.

    Args:
        tokens: Most probable token of each position [B, L].
        scores: The order they are unmasked in [B, L]; the first of equals comes first.
        masked: Positions to choose from, boolean [B, L].
    """
    ranking = _ranking(scores, masked)
    ranked = tokens.gather(1, ranking)  # [B, L], the highest score first
    same = ranked[:, :, None] == ranked[:, None, :]  # [B, L, L]
    again = torch.zeros_like(masked).scatter_(1, ranking, same.tril(-1).any(dim=2))
    return again & masked


def duplicates_last(tokens: Tensor, scores: Tensor, masked: Tensor) -> Tensor:
    """Lower the scores [B, L] of `duplicate_tokens` below all others, in float64 to keep order."""
    return scores.double() - DEMOTION * duplicate_tokens(tokens, scores, masked)


def _ranking(scores: Tensor, masked: Tensor) -> Tensor:
    """Positions of each row, the masked one with the highest score first [B, L]."""
    return scores.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)


def tokens_per_step(masked: Tensor, passes: int) -> Tensor:
    """Count the positions to unmask now [B] so that as many in each of the passes left suffice."""
    return (masked.sum(dim=1) + passes - 1) // passes


def scatter_masked(values: Tensor, positions: Tensor, fill: float) -> Tensor:
    """Put values [M] at the M true ``positions`` [B, L] in row-major order, ``fill`` elsewhere."""
    full = torch.full(positions.shape, fill, dtype=values.dtype, device=values.device)
    full[positions] = values
    return full
