"""What the denoiser proposes: scores of masked tokens, and spans masked and filled again.

Every fourth token is masked at once, so that four sequences look at every position of a hypothesis
with most of the others in view; a few more look into its gaps. The sequences of all hypotheses of
all texts go through the denoiser together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.edits import MaskedScores, Tokens
from unembed.decoding.logits import DenoiserInputs, with_processors
from unembed.decoding.sequential import Sequential
from unembed.decoding.state import DenoisingState
from unembed.decoding.strategy import SequenceSpec
from unembed.diffusion import DenoiserFn

_STRIDE, _GAPS, _GAPS_TOGETHER = 4, 6, 3
_FILLERS, _INSERTS = 12, 6  # tokens kept for each position and gap
_NATS_A_COSINE = 50.0  # what a first-order gain in cosine weighs beside log-probabilities
_NATS_A_CORPUS_WORD = 2.0  # what a corpus's words gain over the denoiser's log-probabilities
_SPANS = 0.5  # share of infills that are of neighbouring tokens
_NATS_REMOVED, _INFILL_PASSES = 3.0, 4  # added to the logits of what an infill took out
_RAREST = 1e-4  # probability of a length that the denoiser does not expect
_ROWS = 128  # sequences of a pass whose logits are held at once
_CACHED = 32  # rows of logits that a processor's cache holds


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


def steer(target: Tensor, vectors: Tensor, steps: Tensor, feedback: bool = False) -> Tensor:
    """Move targets e by steps of fixed lengths along the residuals e - ê: unit vectors [M, D].

    The denoiser then sees more of what the hypotheses lack than the target itself shows: its
    scores say which tokens are wrong and what would bring the hypothesis nearer.

    Args:
        target: Unit vectors e [M, D].
        vectors: Embeddings ê of hypotheses [M, D].
        steps: Length of each step, from 0 [M].
        feedback: Whether the denoiser takes ê beside them: [M, 2 D].
    """
    vectors, steps = vectors.to(target), steps.to(target)
    steered = F.normalize(target + steps[:, None] * F.normalize(target - vectors, dim=1), dim=1)
    return torch.cat([steered, vectors], dim=1) if feedback else steered


def masked_scores(
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    hypotheses: Sequence[Tokens],
    rngs: Sequence[np.random.Generator],
    gains: Sequence[NDArray[np.float32] | None] | None = None,
    likelier: Sequence[Sequence[int]] = (),
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
        likelier: For each, tokens of a corpus, taken for likelier than the denoiser says.

    Returns:
        The scores of each hypothesis, and how many sequences each took.
    """
    views = [_views(tokens, spec, rng) for tokens, rng in zip(hypotheses, rngs, strict=True)]
    counts = torch.tensor([len(sequences) for sequences, _ in views])
    which = torch.arange(len(views)).repeat_interleave(counts).to(embedding.device)
    sequences = torch.tensor(
        [ids for copies, _ in views for ids in copies], device=embedding.device
    )
    rows = torch.tensor([row_of(tokens, spec) for tokens in hypotheses], device=embedding.device)
    originals = rows[which]
    slots_of_all = np.concatenate([slots for _, slots in views])
    owners = np.repeat(np.arange(len(views)), [len(slots) for _, slots in views])
    parts, done = [], 0
    for start in range(0, len(which), _ROWS):
        part = sequences[start : start + _ROWS]
        scores = _log_probabilities(denoiser, part, embedding[which[start : start + _ROWS]], spec)
        here = slice(done, done + len(scores))
        if gains is not None:
            _add_gains(scores, gains, owners[here], slots_of_all[here])
        for owner, some in enumerate(likelier):
            if some:
                masks = torch.from_numpy(np.flatnonzero(owners[here] == owner))
                scores[masks[:, None], torch.tensor(some)] += _NATS_A_CORPUS_WORD
        done += len(scores)
        top = scores.topk(min(_FILLERS, scores.shape[1]), dim=-1)
        own = scores.gather(1, originals[start : start + _ROWS][part == spec.mask_id][:, None])
        parts.append([top.indices, top.values, own[:, 0]])
    ids, best, own_scores = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    results, first = [], 0
    for _, slots in views:
        here = slice(first, first + len(slots))
        first = here.stop
        at, gap = slots // 2, slots % 2 == 0
        order = np.argsort(at[~gap])
        places = [x[here][~gap][order] for x in (ids, best, own_scores)]
        results.append(
            MaskedScores(
                np.maximum(places[2].astype(np.float64), -20.0),
                places[0],
                places[1].astype(np.float64),
                at[gap],
                ids[here][gap][:, :_INSERTS],
                best[here][gap][:, :_INSERTS].astype(np.float64),
            )
        )
    return results, [len(copies) for copies, _ in views]


@dataclass(frozen=True)
class Removed:
    """Makes tokens that were taken out likelier, until they stand in the sequence again.

    Attributes:
        state: Says which of the sequences are being predicted.
        ids: Of each sequence [B, S]; any special token where there are fewer.
        nats: Added to their logits.
    """

    state: DenoisingState
    ids: Tensor
    nats: float

    def __call__(self, logits: Tensor, inputs: DenoiserInputs) -> Tensor:
        """Raise logits [M, V], in place."""
        ids = self.ids[self.state.rows][inputs.rows]  # [M, S]
        there = (inputs.tokens[inputs.rows][:, None, :] == ids[:, :, None]).any(dim=2)
        raised = logits.gather(1, ids) + self.nats * ~there
        return logits.scatter_(1, ids, raised)


def infill(
    denoiser: DenoiserFn,
    embedding: Tensor,
    spec: SequenceSpec,
    masked: Sequence[Tokens],
    removed: Sequence[Sequence[int]],
) -> tuple[list[Tokens], list[int]]:
    """Fill the masks of M texts, with the tokens that were removed where they fit.

    Returns:
        The texts, and the passes that each took.
    """
    rows = [row_of(tokens, spec) for tokens in masked]
    width = max(len(some) for some in removed)
    longest = max(tokens.count(spec.mask_id) for tokens in masked)
    ids = torch.tensor(
        [[*some, *[spec.mask_id] * (width - len(some))] for some in removed],
        device=embedding.device,
    )
    state = DenoisingState(embedding, spec, torch.tensor(rows, device=embedding.device), True)
    raised = with_processors(denoiser, [Removed(state, ids, _NATS_REMOVED)])
    for passes in range(min(_INFILL_PASSES, longest), 0, -1):
        Sequential().step(state, raised, passes)
    return [content_of(row, spec) for row in state.tokens.tolist()], state.passes.tolist()


def length_scores(
    denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec
) -> list[NDArray[np.float64]]:
    """Log-probability of each number of tokens, 0 to L, for each vector [B, D]: [L + 1] each."""
    state = DenoisingState(embedding, spec)
    over = [spec.end_id, spec.pad_id]
    (ends,) = state.predict(
        denoiser, state.masked, lambda x, _: (x.detach().softmax(dim=-1)[:, over].sum(dim=1),)
    )
    goes_on = 1.0 - ends.view(len(embedding), -1).double().cpu().numpy()  # more than l tokens
    goes_on = np.minimum.accumulate(goes_on, axis=1)
    edge = np.ones((len(goes_on), 1))
    steps = np.concatenate([edge, goes_on, 0 * edge], axis=1)
    return list(np.log(np.maximum(steps[:, :-1] - steps[:, 1:], _RAREST)))


def draw_masks(
    tokens: Tokens, spec: SequenceSpec, rng: np.random.Generator
) -> tuple[Tokens, list[int]]:
    """Mask a span of a text or some tokens here and there, from two to all of them.

    Returns:
        The text with masks, and the tokens that were removed.
    """
    n = len(tokens)
    count = int(rng.integers(min(2, n), n + 1))
    if rng.random() < _SPANS:
        start = int(rng.integers(0, n - count + 1))
        places = set(range(start, start + count))
    else:
        places = set(rng.permutation(n)[:count].tolist())
    masked = tuple(spec.mask_id if j in places else token for j, token in enumerate(tokens))
    return masked, [tokens[j] for j in sorted(places)]


def _add_gains(
    scores: Tensor,
    gains: Sequence[NDArray[np.float32] | None],
    owners: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> None:
    """Add what tokens would gain in cosine to the scores [M, V] of masks in tokens' places.

    Args:
        scores: Changed in place.
        gains: See `masked_scores`.
        owners: The hypothesis that each mask is of [M].
        slots: And its slot [M].
    """
    for owner in np.unique(owners).tolist():
        of_text = gains[owner]
        if of_text is not None:
            at = np.flatnonzero((owners == owner) & (slots % 2 == 1))
            bonus = _NATS_A_COSINE * of_text[slots[at] // 2]
            scores[torch.from_numpy(at)] += torch.from_numpy(bonus).to(scores)


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


def _log_probabilities(
    denoiser: DenoiserFn, tokens: Tensor, embedding: Tensor, spec: SequenceSpec
) -> Tensor:
    """Score the tokens at the masked positions, float32 [M, V]; no special token is among them."""
    masked = tokens == spec.mask_id
    t = spec.schedule.timestep(masked.float().mean(dim=1))
    logits = denoiser(tokens, embedding, t, masked).detach().float()
    for special in (spec.mask_id, spec.end_id, spec.pad_id):
        if special is not None:
            logits[:, special] = -torch.inf
    for rows in torch.split(logits, _CACHED):  # in place: two thirds of the time
        torch.log_softmax(rows, dim=-1, out=rows)
    return logits
