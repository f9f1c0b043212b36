"""Vec2Text's loop: a corrector applied to its own texts, with sequence beams.

Morris et al., 2023, arXiv 2310.06816, section 4; the two networks are those of `left_to_right`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.baselines.left_to_right import LeftToRight, write_texts
from unembed.encoders.base import Encoder
from unembed.encoders.oracle import EncoderOracle
from unembed.tokenizer import TextTokenizer


def calls_at_most(steps: int, beams: int) -> int:
    """Count the encoder calls of a text: the first hypothesis, then b, then b² a step."""
    return 1 + (beams + (steps - 1) * beams**2 if steps else 0)


@dataclass(frozen=True)
class Recovered:
    """Nearest texts of a batch after some steps.

    Attributes:
        tokens: Target sequences [B, L].
        cosines: With the target vectors [B].
        calls: Calls made for each [B]; fewer than `calls_at_most` where texts came twice.
        passes: Texts that a network wrote for each, each one token after the other.
    """

    tokens: Tensor
    cosines: Tensor
    calls: Tensor
    passes: int


@dataclass(frozen=True)
class Vec2Text:
    """Inverter and corrector of one encoder.

    Attributes:
        inverter: p(x | e).
        corrector: p(x | e, x̂, ê).
        ids: Tokens of both.
        encoder: The one that made the vectors.
    """

    inverter: LeftToRight
    corrector: LeftToRight
    ids: TextTokenizer
    encoder: Encoder

    def correct(self, vectors: NDArray[np.float32], steps: int, beams: int) -> list[Recovered]:
        """Invert unit vectors [B, D], then correct the texts so many times.

        Args:
            vectors: Of the encoder.
            steps: Corrections s, from 0.
            beams: Texts b that go on from each step, and that each of them yields in the next.

        Returns:
            The nearest texts so far after 0 to s steps.
        """
        e, rows = torch.from_numpy(vectors), list(range(len(vectors)))
        oracle = EncoderOracle(self.encoder, self.ids, vectors, calls_at_most(steps, beams))
        survivors = write_texts(self.inverter, self.ids, e)[0]  # [B, 1, L]
        best, cosines = survivors[:, 0], oracle(rows, survivors[:, 0])
        passes, results = 1, [Recovered(best, cosines, oracle.calls, 1)]
        for _ in range(steps):
            # Each survivor yields as many texts as there are beams
            count = survivors.shape[1]
            owners = [row for row in rows for _ in range(count)]
            hypotheses = survivors.flatten(0, 1)  # [B S, L]
            estimates = torch.from_numpy(oracle.vectors(owners, hypotheses))
            condition = torch.cat([e[owners], estimates], dim=1)
            texts, _ = write_texts(self.corrector, self.ids, condition, hypotheses, beams)
            texts = texts.view(len(rows), count * beams, -1)
            passes += count
            # The nearest of them go on, the nearest of all so far is the result
            owners = [row for row in rows for _ in range(texts.shape[1])]
            scores = oracle(owners, texts.flatten(0, 1)).view(texts.shape[:2])
            picks = torch.stack([_nearest(t, s, beams) for t, s in zip(texts, scores, strict=True)])
            at = torch.arange(len(rows))
            top = scores[at, picks[:, 0]]
            best = torch.where((top > cosines)[:, None], texts[at, picks[:, 0]], best)
            cosines = torch.maximum(cosines, top)
            survivors = texts[at[:, None], picks]
            results.append(Recovered(best, cosines, oracle.calls, passes))
        return results


def _nearest(texts: Tensor, scores: Tensor, count: int) -> Tensor:
    """Places [count] of the different texts [N, L] with the highest scores [N].

    Where fewer are different the nearest stands for the missing ones.
    """
    picks: dict[tuple[int, ...], int] = {}
    for place in scores.argsort(descending=True, stable=True).tolist():
        picks.setdefault(tuple(texts[place].tolist()), place)
        if len(picks) == count:
            break
    places = list(picks.values())
    return torch.tensor(places + places[:1] * (count - len(places)))
