"""What the denoiser proposes: scores of masked tokens, and spans masked and filled again.

Every fourth token is masked at once, so that four sequences look at every position of a hypothesis
with most of the others in view; a few more look into its gaps. The sequences of all hypotheses of
all texts go through the denoiser together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.edits import MaskedScores, Tokens
from unembed.decoding.strategy import SequenceSpec
from unembed.diffusion import DenoiserFn

_STRIDE, _GAPS, _GAPS_TOGETHER = 4, 6, 3
_FILLERS, _INSERTS = 12, 6  # tokens kept for each position and gap
_NATS_A_COSINE = 50.0  # what a first-order gain in cosine weighs beside log-probabilities
_WORDS = 200  # tokens kept for a text as a whole
_ROWS = 128  # sequences of a pass whose logits are held at once

Words = tuple[NDArray[np.int64], NDArray[np.float64]]


def content_of(row: Sequence[int], spec: SequenceSpec) -> Tokens:
    """Cut a sequence to its tokens before the end that hold text."""
    ids = list(row)
    if spec.end_id in ids:
        ids = ids[: ids.index(spec.end_id)]
    return tuple(t for t in ids if t not in (spec.mask_id, spec.pad_id))


def row_of(tokens: Sequence[int], spec: SequenceSpec) -> list[int]:
    """Complete content to a sequence of L ids: end and padding where there is room for them."""
    row = list(tokens[: spec.length])
    if len(row) < spec.length and spec.end_id is not None and spec.pad_id is not None:
        row.append(spec.end_id)
        row += [spec.pad_id] * (spec.length - len(row))
    return row


def likely_words(denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec) -> list[Words]:
    """Find for each vector [B, D] the tokens most probable anywhere in a fully masked sequence.

    Returns:
        For each vector the ids [W], most probable first, and weights [W] that sum to 1, in
        proportion to the root of the probabilities: the denoiser is surer of itself than it should
        be.
    """
    words: list[Words] = []
    for part in torch.split(embedding, max(_ROWS // spec.length, 1)):
        logits = _logits(denoiser, spec.masked(len(part), part.device), part, spec)
        logits = logits.log_softmax(dim=-1).view(len(part), -1, logits.shape[-1])
        top = logits.logsumexp(dim=1).topk(min(_WORDS, logits.shape[2]), dim=1)  # [B, W]
        for ids, values in zip(top.indices.cpu(), top.values.double().cpu(), strict=True):
            known = values > -torch.inf
            words.append((ids[known].numpy(), (0.5 * values[known]).softmax(dim=0).numpy()))
    return words


def steer(target: Tensor, vectors: Tensor, steps: Tensor) -> Tensor:
    """Move targets e by steps of fixed lengths along the residuals e - ê: unit vectors [M, D].

    The denoiser then sees more of what the hypotheses lack than the target itself shows: its
    scores say which tokens are wrong and what would bring the hypothesis nearer.

    Args:
        target: Unit vectors e [M, D].
        vectors: Embeddings ê of hypotheses [M, D].
        steps: Length of each step, from 0 [M].
    """
    return F.normalize(target + steps[:, None] * F.normalize(target - vectors, dim=1), dim=1)


def masked_scores(
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    hypotheses: Sequence[Tokens],
    rngs: Sequence[np.random.Generator],
    gains: Sequence[NDArray[np.float32] | None] | None = None,
) -> tuple[list[MaskedScores], list[int]]:
    """Score the tokens of M hypotheses and what else could be there, in one denoiser pass.

    Args:
        denoiser: See `Strategy`.
        embedding: Unit vectors [M, D] to score them by.
        spec: Length and special tokens.
        hypotheses: Their tokens, from 1.
        rngs: For each, which gaps are looked into.
        gains: Of an encoder with open weights, for each what every token would gain in cosine at
            its n tokens [n, V], or None.

    Returns:
        The scores of each hypothesis, and how many sequences each took.
    """
    views = [_views(tokens, spec, rng) for tokens, rng in zip(hypotheses, rngs, strict=True)]
    counts = torch.tensor([len(sequences) for sequences, _ in views])
    which = torch.arange(len(views)).repeat_interleave(counts).to(embedding.device)
    sequences = torch.tensor([ids for seen, _ in views for ids in seen], device=embedding.device)
    rows = torch.tensor([row_of(tokens, spec) for tokens in hypotheses], device=embedding.device)
    wanted = rows[which]
    slots_of_all = np.concatenate([slots for _, slots in views])
    owners = np.repeat(np.arange(len(views)), [len(slots) for _, slots in views])
    parts, done = [], 0
    for start in range(0, len(which), _ROWS):
        part = sequences[start : start + _ROWS]
        logits = _logits(denoiser, part, embedding[which[start : start + _ROWS]], spec)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        if gains is not None:
            here = slice(done, done + len(logits))
            _add_gains(logits, gains, owners[here], slots_of_all[here])
        done += len(logits)
        top = logits.topk(min(_FILLERS, logits.shape[1]), dim=-1)
        there = logits.gather(1, wanted[start : start + _ROWS][part == spec.mask_id][:, None])
        parts.append([top.indices, top.values - normaliser, (there - normaliser)[:, 0]])
    ids, scores, own_scores = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    results, first = [], 0
    for _, slots in views:
        here = slice(first, first + len(slots))
        first = here.stop
        at, gap = slots // 2, slots % 2 == 0
        order = np.argsort(at[~gap])
        places = [x[here][~gap][order] for x in (ids, scores, own_scores)]
        results.append(
            MaskedScores(
                np.maximum(places[2].astype(np.float64), -20.0),
                places[0],
                places[1].astype(np.float64),
                at[gap],
                ids[here][gap][:, :_INSERTS],
                scores[here][gap][:, :_INSERTS].astype(np.float64),
            )
        )
    return results, [len(seen) for seen, _ in views]


def _add_gains(
    logits: Tensor,
    gains: Sequence[NDArray[np.float32] | None],
    owners: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> None:
    """Add what tokens would gain in cosine to the logits [M, V] of masks in tokens' places.

    Args:
        logits: Changed in place.
        gains: See `masked_scores`.
        owners: The hypothesis that each mask is of [M].
        slots: And its slot [M].
    """
    for owner in np.unique(owners).tolist():
        of_text = gains[owner]
        if of_text is not None:
            at = np.flatnonzero((owners == owner) & (slots % 2 == 1))
            added = _NATS_A_COSINE * of_text[slots[at] // 2]
            logits[torch.from_numpy(at)] += torch.from_numpy(added).to(logits)


def _views(
    tokens: Tokens, spec: SequenceSpec, rng: np.random.Generator
) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Mask copies of a hypothesis.

    Returns:
        The sequences, and the slot (see `edits`) that each of their masks stands for, in order.
    """
    n, sequences, slots = len(tokens), [], []
    for first in range(min(_STRIDE, n)):
        places = range(first, n, _STRIDE)
        sequences.append([spec.mask_id if j in places else t for j, t in enumerate(tokens)])
        slots += [2 * j + 1 for j in places]
    room = spec.length - 1 - n  # the end needs a place
    gaps = rng.permutation(n + 1)[:_GAPS].tolist() if room > 0 and spec.end_id is not None else []
    together = min(room, _GAPS_TOGETHER)
    for start in range(0, len(gaps), max(together, 1)):
        some = sorted(gaps[start : start + together])
        longer = list(tokens)
        for j in reversed(some):
            longer.insert(j, spec.mask_id)
        sequences.append(longer)
        slots += [2 * j for j in some]
    return [row_of(sequence, spec) for sequence in sequences], np.array(slots)


def _logits(denoiser: DenoiserFn, tokens: Tensor, embedding: Tensor, spec: SequenceSpec) -> Tensor:
    """Compute float32 logits [M, V] at the masked positions, with no special token among them."""
    masked = tokens == spec.mask_id
    t = spec.schedule.timestep(masked.float().mean(dim=1))
    logits = denoiser(tokens, embedding, t, masked).detach().float()
    for special in (spec.mask_id, spec.end_id, spec.pad_id):
        if special is not None:
            logits[:, special] = -torch.inf
    return logits
