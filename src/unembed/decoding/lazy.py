"""The surest positions, without the logits of all.

Half of greedy decoding on a CPU is logits [M, V], of which a pass settles a position or a few.
Those of a position are made only where it could be among the surest by what is known of it from
earlier passes (`Memory`). What is chosen, and how sure it is, are as if all had been made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from unembed.decoding.memory import Vocabulary
from unembed.decoding.state import DOUBTED, State, said_before, spread

# Positions worked on together: in the network, and in a product with the vocabulary
_POSITIONS, _ROWS = 4096, 256
_ROUNDING = 1e-3  # of a bound, relative; far above that of a float32 logit

# Ids [B, L], embeddings [B, D], timesteps [B] and positions wanted [B, L] → [M, H]
FeaturesFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Penalty(Protocol):
    """Takes something off logits, by the tokens around a position, [M, L]."""

    def of_all(self, around: Tensor, logits: Tensor) -> Tensor:
        """Lower [M, V], in place."""
        ...

    def of_some(self, around: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """Lower [M, K] of K tokens [M, K]."""
        ...


class NoPenalty:
    """Leaves logits as they are."""

    def of_all(self, around: Tensor, logits: Tensor) -> Tensor:
        """See `Penalty`."""
        return logits

    def of_some(self, around: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """See `Penalty`."""
        return logits


@dataclass(frozen=True)
class LazyDenoiser:
    """A denoiser, for every strategy, whose logits need not all be made, for those that can wait.

    Attributes:
        features: What the vocabulary is multiplied with.
        vocabulary: Makes logits of it.
        penalty: What is taken off them.
    """

    features: FeaturesFn
    vocabulary: Vocabulary
    penalty: Penalty = field(default_factory=NoPenalty)

    def __call__(self, tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
        """Logits [M, V]."""
        logits = self.vocabulary(self.features(tokens, embedding, t, where).float())
        return self.penalty.of_all(tokens[where.nonzero()[:, 0]], logits)


def survey(
    state: State, denoiser: LazyDenoiser, where: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass: the probability and id of the likeliest token of each position in question.

    Those of the surest positions, as many as are to be settled, and of any surer one, are exact.
    The others may be out of date, but do not seem surer than those.

    Args:
        state: The sequences.
        denoiser: Asked.
        where: Masked positions in question, boolean [B, L].
        count: How many of them are to be settled, the surest first [B].

    Returns:
        [M] and [M].
    """
    found = []
    for rows, given in state.asked(where, together=_POSITIONS):
        h = denoiser.features(*given).float()  # [M, H]
        with torch.autocast(h.device.type, enabled=False):
            found.append(_survey(state, denoiser, rows, given, h, count[rows]))
    probabilities, tokens = zip(*found, strict=True)
    return torch.cat(probabilities), torch.cat(tokens)


def _survey(
    state: State,
    denoiser: LazyDenoiser,
    rows: Tensor,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    h: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor]:
    (ids, _, _, where), vocabulary, penalty = given, denoiser.vocabulary, denoiser.penalty
    sequence, place = where.nonzero(as_tuple=True)
    spot, around = (rows[sequence], place), ids[sequence]
    probabilities, tokens, most = state.memory.recall(
        spot, h, vocabulary, partial(penalty.of_some, around)
    )
    unknown = torch.ones_like(most, dtype=torch.bool)
    while True:
        needed = _surest(probabilities, tokens, where, count)[sequence]
        below = most * (1 + _ROUNDING) < needed  # never where either is not a number
        again = (unknown & ~below).nonzero()[:, 0]
        if not len(again):
            return probabilities, tokens
        for part in torch.split(again, _ROWS):
            logits = vocabulary.logits(h[part])
            lower = partial(penalty.of_all, around[part])
            probabilities[part], tokens[part] = state.memory.renew(
                (spot[0][part], spot[1][part]), h[part], logits, lower
            )
        unknown[again] = False


def _surest(probabilities: Tensor, tokens: Tensor, where: Tensor, count: Tensor) -> Tensor:
    """The sureness of the last of the ``count`` surest positions of each sequence [B]."""
    sureness = spread(probabilities, where, 0.0)
    again = said_before(spread(tokens, where, 0), sureness, where)
    sureness = sureness.masked_fill(again, DOUBTED).masked_fill(~where, -torch.inf)
    ranked = sureness.sort(dim=1, descending=True).values
    last = count.clamp(1, where.shape[1]) - 1
    return ranked.gather(1, last[:, None])[:, 0]
