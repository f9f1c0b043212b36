"""Asking the denoiser about hypotheses: which tokens it doubts, and what it sees in their place.

Every fourth token is masked at once, so that four sequences look at every position of a hypothesis
with most of the others in view; a few more look into its gaps. The sequences of all hypotheses of
all texts go through the denoiser together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.edits import Outlook, Tokens
from unembed.decoding.strategy import SequenceSpec
from unembed.diffusion import DenoiserFn

_STRIDE, _GAPS, _GAPS_TOGETHER = 4, 6, 3
_LIKELIEST = 12  # tokens kept for each position
_WORDS = 200  # tokens kept for a text as a whole
_ROWS = 128  # sequences of a pass whose logits are held at once

Words = tuple[NDArray[np.int64], NDArray[np.float64]]


def content_of(row: Sequence[int], spec: SequenceSpec) -> Tokens:
    """The tokens of a sequence before its end that hold text."""
    ids = list(row)
    if spec.end_id in ids:
        ids = ids[: ids.index(spec.end_id)]
    return tuple(t for t in ids if t not in (spec.mask_id, spec.pad_id))


def row_of(tokens: Tokens, spec: SequenceSpec) -> list[int]:
    """A sequence of L ids: content, end and padding where there is room for them."""
    row = list(tokens[: spec.length])
    if len(row) < spec.length and spec.end_id is not None and spec.pad_id is not None:
        row.append(spec.end_id)
        row += [spec.pad_id] * (spec.length - len(row))
    return row


def likely_words(denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec) -> list[Words]:
    """For each vector [B, D] the tokens likeliest at any position of the fully masked sequence.

    Returns:
        For each vector the ids [W], likeliest first, and weights [W] that sum to 1, in proportion
        to the root of the probabilities: the denoiser is surer of itself than it should be.
    """
    found: list[Words] = []
    for part in torch.split(embedding, max(_ROWS // spec.length, 1)):
        tokens = spec.masked(len(part), part.device)
        logits = _ask(denoiser, tokens, part, spec).log_softmax(dim=-1)
        anywhere = logits.view(len(part), spec.length, -1).logsumexp(dim=1)  # [B, V]
        top = anywhere.topk(min(_WORDS, anywhere.shape[1]), dim=1)
        for ids, values in zip(top.indices.cpu(), top.values.double().cpu(), strict=True):
            known = values > -torch.inf
            weights = (0.5 * values[known]).softmax(dim=0)
            found.append((np.array(ids[known].tolist()), np.array(weights.tolist())))
    return found


def look_at(
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    hypotheses: Sequence[tuple[int, Tokens]],
    words: Sequence[Words],
    rngs: Sequence[np.random.Generator],
) -> tuple[list[Outlook], list[int]]:
    """One denoiser pass over masked copies of hypotheses.

    Args:
        denoiser: See `Strategy`.
        embedding: Unit vectors [B, D].
        spec: Length and special tokens.
        hypotheses: Which vector, and the tokens.
        words: `likely_words` of each vector.
        rngs: For each vector, which gaps are looked into.

    Returns:
        What it says of each hypothesis, and how many sequences each took.
    """
    views = [_views(tokens, spec, rngs[row]) for row, tokens in hypotheses]
    rows = [row for (row, _), mine in zip(hypotheses, views, strict=True) for _ in mine]
    flat = torch.tensor([ids for mine in views for ids, _ in mine], dtype=torch.long)
    own = torch.tensor(
        [row_of(h, spec) for (_, h), mine in zip(hypotheses, views, strict=True) for _ in mine]
    )
    ids, sure, kept = [], [], []
    for start in range(0, len(flat), _ROWS):
        part = flat[start : start + _ROWS].to(embedding.device)
        logits = _ask(denoiser, part, embedding[rows[start : start + _ROWS]], spec)
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        top = logits.topk(min(_LIKELIEST, logits.shape[1]), dim=-1)
        asked = own[start : start + _ROWS].to(embedding.device)[part == spec.mask_id]
        ids += top.indices.tolist()
        sure += (top.values - normaliser).tolist()
        kept += (logits.gather(1, asked[:, None]) - normaliser)[:, 0].tolist()
    answers = iter(zip(ids, sure, kept, strict=True))
    outlooks = []
    for (row, tokens), mine in zip(hypotheses, views, strict=True):
        told = np.zeros(len(tokens))
        fillers, insertions = {}, {}
        for _, places in mine:
            for kind, j in places:
                best, values, mine_there = next(answers)
                if kind == "gap":
                    insertions[j] = (best, values)
                else:
                    fillers[j], told[j] = (best, values), max(mine_there, -20.0)
        outlooks.append(Outlook(told, fillers, insertions, *words[row]))
    return outlooks, [len(mine) for mine in views]


def _views(
    tokens: Tokens, spec: SequenceSpec, rng: np.random.Generator
) -> list[tuple[list[int], list[tuple[str, int]]]]:
    """Masked copies of a hypothesis, each with what its masks stand for, in order."""
    n, views = len(tokens), []
    for first in range(min(_STRIDE, n)):
        places = range(first, n, _STRIDE)
        masked = tuple(spec.mask_id if j in places else t for j, t in enumerate(tokens))
        views.append((row_of(masked, spec), [("token", j) for j in places]))
    room = spec.length - 1 - n  # the end needs a place
    gaps = rng.permutation(n + 1)[:_GAPS].tolist() if room > 0 and spec.end_id is not None else []
    together = min(room, _GAPS_TOGETHER)
    for start in range(0, len(gaps), max(together, 1)):
        some = sorted(gaps[start : start + together])
        longer = list(tokens)
        for j in reversed(some):
            longer.insert(j, spec.mask_id)
        views.append((row_of(tuple(longer), spec), [("gap", j) for j in some]))
    return views


def _ask(denoiser: DenoiserFn, tokens: Tensor, embedding: Tensor, spec: SequenceSpec) -> Tensor:
    """Float32 logits [M, V] at the masked positions, with no special token among them."""
    masked = tokens == spec.mask_id
    t = spec.schedule.timestep(masked.float().mean(dim=1))
    logits = denoiser(tokens, embedding, t, masked).float()
    for special in (spec.mask_id, spec.end_id, spec.pad_id):
        if special is not None:
            logits[:, special] = -torch.inf
    return logits
