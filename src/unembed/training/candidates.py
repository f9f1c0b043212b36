"""A softmax over part of the vocabulary: what a training step scores in place of all tokens.

Sampled softmax with the log-Q correction (Jean et al., 2015, arXiv 1412.2007, section 3.2): the
logit of each candidate is lowered by the logarithm of its probability of being one, so that a sum
over the candidates estimates the sum over the vocabulary. At a small hidden size the vocabulary
product is more than half of a training step.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.diffusion import Candidates


class CandidateSampler:
    """Draws the candidates of a batch: its targets, the most frequent tokens, and random others.

    Args:
        counts: How often each token of the vocabulary is a target [V]; proportional is enough.
        size: Candidates beside the targets, half of them the most frequent tokens; at least 2.
    """

    def __init__(self, counts: NDArray[np.float64], size: int) -> None:
        order = torch.from_numpy(np.argsort(-counts, kind="stable"))
        self._frequent, self._others = order[: size // 2], order[size // 2 :]
        self._random = min(size - size // 2, len(self._others))
        self._shares = torch.from_numpy(counts / counts.sum())  # [V]

    def draw(self, targets: Tensor, generator: torch.Generator) -> Candidates:
        """The candidates for a batch's targets [M], on their device; a GPU is waited for."""
        picked = torch.randperm(len(self._others), generator=generator)[: self._random]
        chosen = torch.zeros(len(self._shares), dtype=torch.bool)
        for ids in (self._frequent, self._others[picked], targets.cpu()):
            chosen[ids] = True
        # A token is left out when neither the draw nor any of the M targets is it
        drawn = self._random / max(len(self._others), 1)
        inclusion = 1.0 - (1.0 - self._shares) ** len(targets) * (1.0 - drawn)
        inclusion[self._frequent] = 1.0
        ids = chosen.nonzero()[:, 0]
        log_inclusion = inclusion[ids].log().float()
        return Candidates(ids, log_inclusion).to(targets.device)
