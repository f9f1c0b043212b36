"""The best of several samples: what the encoder's judgement alone is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.euler import Euler
from unembed.decoding.sequential import Greedy
from unembed.decoding.strategy import (
    Canvas,
    Decoded,
    DecodingStep,
    OnStep,
    Scorer,
    require_between,
)
from unembed.diffusion import DenoiserFn
from unembed.errors import ConfigError

_TOGETHER = 8  # samples of a text that are decoded at once


@dataclass(frozen=True)
class BestOf:
    """`Greedy` and independent samples of `Euler`; the one whose embedding is nearest stays.

    Each different text costs an encoder call; no more samples are drawn than there are calls, nor
    after one that is as good as equal. One sample is greedy decoding with its cosine.

    Attributes:
        samples: Hypotheses N, from 1; the first of them is greedy.
        temperature: Of the draws, from 0; see `Euler`.
        top_p: Draw among the likeliest tokens with this probability together, above 0 to 1.
        enough: Cosine from which on a text is left alone.
    """

    samples: int = 16
    temperature: float = 0.7
    top_p: float = 1.0
    enough: float = 0.9999
    needs_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_between("samples", self.samples, 1)
        require_between("enough", self.enough, -1.0, 1.0)
        Euler(self.temperature, self.top_p)

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        canvas: Canvas,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        scorer: Scorer | None = None,
    ) -> Decoded:
        """See `Strategy`.

        Raises:
            ConfigError: There is no scorer.
        """
        scorer = require_scorer(scorer, "best-of")
        best = Greedy()(denoiser, embedding, canvas, steps=steps)
        rows = list(range(len(embedding)))
        cosines = scorer(rows, best.tokens).to(embedding.device)
        drawn, shown = 1, canvas.blank(len(rows), torch.device("cpu"))
        sampler = Euler(self.temperature, self.top_p)
        index = 0
        while True:
            open_rows = [
                row for row in rows if cosines[row] < self.enough and scorer.remaining(row) > 0
            ]
            count = min(_TOGETHER, self.samples - drawn)
            finished = not open_rows or count < 1
            index += 1
            if on_step is not None:
                total = index if finished else index - (drawn - self.samples) // _TOGETHER
                on_step(_step(best, shown, (index, total), cosines, scorer.calls))
                shown = best.tokens.cpu().clone()
            if finished:
                return replace(best, encoder_calls=scorer.calls.to(embedding.device))
            counts = torch.tensor([min(count, scorer.remaining(row)) for row in open_rows])
            where = torch.tensor(open_rows).repeat_interleave(counts).to(embedding.device)
            found = sampler(
                denoiser,
                embedding[where],
                canvas,
                steps=steps,
                generators=[_child(generators[row]) for row in where.tolist()],
            )
            scores = scorer(where.tolist(), found.tokens).to(embedding.device)
            best, cosines = _keep_better(best, cosines, found, scores, where)
            drawn += count


def require_scorer(scorer: Scorer | None, strategy: str) -> Scorer:
    """The scorer of a strategy that cannot do without.

    Raises:
        ConfigError: There is none.
    """
    if scorer is None:
        raise ConfigError(
            f"an encoder for the strategy {strategy}",
            "none",
            "Pass the encoder and --encoder-calls, or choose a strategy that needs the vector only",
        )
    return scorer


def _child(generator: torch.Generator) -> torch.Generator:
    """A generator of its own for one sample of a sequence."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(seed)


def _keep_better(
    best: Decoded, cosines: Tensor, found: Decoded, scores: Tensor, where: Tensor
) -> tuple[Decoded, Tensor]:
    """The better of the best so far and of the samples of each row; passes are added up."""
    tokens, sure, order = best.tokens.clone(), best.confidences.clone(), best.order.clone()
    passes, cosines = best.passes.clone(), cosines.clone()
    for sample, row in enumerate(where.tolist()):
        if scores[sample] > cosines[row]:
            cosines[row] = scores[sample]
            tokens[row], sure[row] = found.tokens[sample], found.confidences[sample]
            order[row] = found.order[sample] + passes[row]
        passes[row] += found.passes[sample]
    return Decoded(tokens, sure, order, passes), cosines


def _step(
    best: Decoded, shown: Tensor, place: tuple[int, int], cosines: Tensor, calls: Tensor
) -> DecodingStep:
    tokens = best.tokens.cpu().clone()
    return DecodingStep(
        place[0],
        place[1],
        tokens,
        best.confidences.cpu().clone(),
        tokens != shown,
        torch.zeros(len(tokens)),
        cosines.cpu().clone(),
        calls.clone(),
    )
