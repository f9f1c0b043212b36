"""What an earlier pass said of each position, and how much that can have changed since.

The logits at a position are W h + b, a row w_v of W for each token v, and from pass to pass its
features h hardly move. So each position keeps the h0 that its logits were last made from and the K
tokens that were likeliest then. With features h now

- the logits of those K tokens are cheap: K products of length H instead of V;
- any other token had at most the least of their logits, so that where all rows of W lie within r of
  a centre c, it has (by Cauchy-Schwarz)

      w_v h + b_v <= least + c (h - h0) + r |h - h0|;

- the sum of the exponentials of all logits is at least that of the K.

Together they bound the probability of the position's likeliest token from above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from unembed.decoding.likeliest import most_probable

Spot = tuple[Tensor, Tensor]  # which sequences, and which of their positions, [M] each
_TOKENS = 32  # K


class Vocabulary(Protocol):
    """The product of features with a denoiser's token table W [V, H], and its bias b [V]."""

    @property
    def size(self) -> int:
        """V."""
        ...

    @property
    def ball(self) -> tuple[Tensor, float]:
        """Centre c [H] and radius r of a ball that holds every row of W."""
        ...

    def logits(self, h: Tensor) -> Tensor:
        """Of all tokens at each h [M, H]: float32 [M, V], the caller's to spend."""
        ...

    def of(self, tokens: Tensor, h: Tensor) -> Tensor:
        """Of K tokens [M, K] at each h [M, H]: float32 [M, K]."""
        ...

    def __call__(self, h: Tensor) -> Tensor:
        """`logits`, as exact as the number format asked for requires."""
        ...


class Memory:
    """What was seen of each position when all its logits were last made.

    Penalties may lower logits besides; it need not have seen those. It holds the features of all
    positions, as large as one layer's, and 32 ids of each.

    Args:
        batch: Sequences B.
        length: Positions L.
        forbidden: Ids of tokens that are never put anywhere.
    """

    def __init__(self, batch: int, length: int, forbidden: Sequence[int] = ()) -> None:
        self._forbidden = list(forbidden)
        self._features = self._tokens = torch.empty(0)  # [B, L, H], [B, L, K] when needed
        self._least = torch.full((batch, length), torch.inf)  # any token may have any logit
        self._rest = torch.full((batch, length), -torch.inf)  # log-sum-exp of the others

    def recall(
        self,
        spot: Spot,
        h: Tensor,
        vocabulary: Vocabulary,
        lower: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What can be said of positions without making all their logits.

        Args:
            spot: Which positions.
            h: Their features [M, H].
            vocabulary: What those are multiplied with.
            lower: Takes the penalties off logits [M, K] of tokens [M, K].

        Returns:
            Of the likeliest token: its probability as far as one can tell, its id, and how
            probable it can be at most, which is infinite where nothing is known; [M] each.
        """
        if not len(self._features):
            batch, length = self._least.shape
            count = min(_TOKENS, vocabulary.size - len(self._forbidden))
            self._features = h.new_zeros(batch, length, h.shape[1])
            self._tokens = torch.zeros(batch, length, count, dtype=torch.long)
        centre, radius = vocabulary.ball
        tokens, moved = self._tokens[spot], h - self._features[spot]  # [M, K], [M, H]
        shift = (moved * centre).sum(dim=1)
        others = self._least[spot] + shift + radius * moved.norm(dim=1)
        logits = lower(vocabulary.of(tokens, h), tokens)  # [M, K]
        best, at = logits.max(dim=1, keepdim=True)
        total = logits.logsumexp(dim=1)
        seems = best[:, 0] - torch.logaddexp(total, self._rest[spot] + shift)
        most = torch.maximum(best[:, 0], others) - total
        return seems.exp(), tokens.gather(1, at)[:, 0], most.exp()

    def renew(
        self, spot: Spot, h: Tensor, logits: Tensor, lower: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keep what all logits say of positions.

        Args:
            spot: Which positions.
            h: Their features [M, H].
            logits: Without penalties [M, V]; spent.
            lower: Takes the penalties off them.

        Returns:
            Probability and id of the likeliest token, [M] each.
        """
        logits[:, self._forbidden] = -torch.inf
        least, tokens = logits.topk(self._tokens.shape[2], dim=1)
        self._features[spot], self._tokens[spot], self._least[spot] = h, tokens, least[:, -1]
        logits = lower(logits)
        best = logits.gather(1, tokens).amax(dim=1)
        probabilities, likeliest = most_probable(logits)
        others = (1 - logits.gather(1, tokens).sum(dim=1)).clamp_min(0.0)
        self._rest[spot] = best - probabilities.log() + others.log()
        return probabilities, likeliest
