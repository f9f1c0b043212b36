"""Residual steering: decode again from a vector moved by what the last text is short of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.best_of import best_so_far, keep_better
from unembed.decoding.sequential import Sequential
from unembed.decoding.strategy import (
    Decoded,
    OnStep,
    Oracle,
    SequenceSpec,
    check_options,
    option,
    require_oracle,
)
from unembed.diffusion import DenoiserFn

_PATIENCE = 3  # rounds in a row without a new text


class SteeredVectors:
    """The vectors e' of a batch that texts are decoded from: e' ← e' + gamma (e - ê).

    ê is the embedding of the text decoded last. What the decoder leaves out adds up in e' until
    it is written (the integral part of a controller). docs/method.md has when this is stable.

    Args:
        embedding: Targets e, unit vectors [B, D].
        gamma: Step, from 0.
    """

    def __init__(self, embedding: Tensor, gamma: float) -> None:
        self._target, self._gamma = embedding, gamma
        self._steered = embedding.clone()

    def decode(
        self, rows: Sequence[int], denoiser: DenoiserFn, spec: SequenceSpec, steps: int
    ) -> Decoded:
        """Decode some of them greedily, from unit vectors."""
        vectors = F.normalize(self._steered[list(rows)], dim=1)
        return Sequential()(denoiser, vectors, spec, steps=steps)

    def update(self, rows: Sequence[int], vectors: NDArray[np.float32]) -> None:
        """Move some of them, given the embeddings ê [N, D] of the texts decoded last."""
        at = list(rows)
        residual = self._target[at] - torch.from_numpy(vectors).to(self._target)
        self._steered[at] += self._gamma * residual


@dataclass(frozen=True)
class Residual:
    """`Sequential` decoding from the vector, then from the vector moved by the residual.

    Each round costs a call and the passes of greedy decoding. The nearest text stays, since the
    rounds end in a cycle rather than in a point: texts are discrete. It stops when the calls are
    used up, or when three rounds in a row bring no new text.

    Attributes:
        gamma: See below.
        stop_cosine: See below.
    """

    gamma: float = option(0.5, "Share of the residual added in each round.", low=0.0, high=10.0)
    stop_cosine: float = option(
        0.9999, "Cosine from which on a text is left alone.", low=-1.0, high=1.0
    )
    needs_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        *,
        steps: int,
        generators: Sequence[torch.Generator] = (),
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`; ``steps`` are those of each round.

        Raises:
            ConfigError: There is no oracle.
        """
        oracle = require_oracle(oracle, "residual")
        steered = SteeredVectors(embedding, self.gamma)
        rows = list(range(len(embedding)))
        idle, index = [0] * len(rows), 0
        best: Decoded | None = None
        cosines = torch.full((len(rows),), -torch.inf)
        previous = spec.masked(len(rows), torch.device("cpu"))
        while True:
            # Decode from the steered vectors, embed
            texts = steered.decode(rows, denoiser, spec, steps)
            before = oracle.calls.tolist()
            scores = oracle(rows, texts.tokens)
            where = torch.tensor(rows)
            if best is None:
                best, cosines = texts, scores
            else:
                best, cosines = keep_better(best, cosines, texts, scores, where)
            steered.update(rows, oracle.vectors(rows, texts.tokens))
            # Leave those alone that are right, have no calls left or bring nothing new
            for row in rows:
                idle[row] = idle[row] + 1 if int(oracle.calls[row]) == before[row] else 0
            rows = [
                row
                for row in rows
                if cosines[row] < self.stop_cosine
                and oracle.remaining(row) > 0
                and idle[row] < _PATIENCE
            ]
            index += 1
            if on_step is not None:
                budget = max((oracle.remaining(row) for row in rows), default=0)
                step = best_so_far(best, previous, (index, index + budget), cosines, oracle.calls)
                previous = step.tokens
                on_step(step)
            if not rows:
                calls, cosines = (x.to(embedding.device) for x in (oracle.calls, cosines))
                return replace(best, encoder_calls=calls, cosines=cosines)
