"""The best of several samples: what the encoder's judgement alone is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from unembed.decoding.euler import HOTTEST, Euler
from unembed.decoding.sequential import Sequential
from unembed.decoding.strategy import (
    Decoded,
    DecodingStep,
    OnStep,
    Oracle,
    SequenceSpec,
    check_options,
    option,
    require_oracle,
)
from unembed.diffusion import DenoiserFn

_TOGETHER = 8  # samples of a text that are decoded at once


@dataclass(frozen=True)
class BestOf:
    """`Sequential` and independent samples of `Euler`; the one whose embedding is nearest stays.

    Each different text costs an encoder call; no more samples are drawn than there are calls, nor
    after one that is as good as equal. One sample is greedy decoding with its cosine.

    Attributes:
        samples: See below.
        temperature: See below.
        top_p: See below.
        stop_cosine: See below.
    """

    samples: int = option(16, "Hypotheses; the first is sequential.", low=1, high=100_000)
    temperature: float = option(0.7, "Of the draws.", low=0.0, high=HOTTEST)
    top_p: float = option(
        1.0,
        "Draw among the most probable tokens with this probability together.",
        above=0.0,
        high=1.0,
    )
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
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`.

        Raises:
            ConfigError: There is no oracle.
        """
        oracle = require_oracle(oracle, "best-of")
        best = Sequential()(denoiser, embedding, spec, steps=steps)
        rows = list(range(len(embedding)))
        cosines = oracle(rows, best.tokens).to(embedding.device)
        sample_count, previous = 1, spec.masked(len(rows), torch.device("cpu"))
        sampler = Euler(self.temperature, self.top_p)
        index = 0
        while True:
            open_rows = [
                row for row in rows if cosines[row] < self.stop_cosine and oracle.remaining(row) > 0
            ]
            count = min(_TOGETHER, self.samples - sample_count)
            finished = not open_rows or count < 1
            index += 1
            if on_step is not None:
                total = index if finished else index - (sample_count - self.samples) // _TOGETHER
                on_step(best_so_far(best, previous, (index, total), cosines, oracle.calls))
                previous = best.tokens.cpu().clone()
            if finished:
                calls = oracle.calls.to(embedding.device)
                return replace(best, encoder_calls=calls, cosines=cosines)
            counts = torch.tensor([min(count, oracle.remaining(row)) for row in open_rows])
            where = torch.tensor(open_rows).repeat_interleave(counts).to(embedding.device)
            samples = sampler(
                denoiser,
                embedding[where],
                spec,
                steps=steps,
                generators=[_child(generators[row]) for row in where.tolist()],
            )
            scores = oracle(where.tolist(), samples.tokens).to(embedding.device)
            best, cosines = keep_better(best, cosines, samples, scores, where)
            sample_count += count


def _child(generator: torch.Generator) -> torch.Generator:
    """A generator of its own for one sample of a sequence."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(seed)


def keep_better(
    best: Decoded, cosines: Tensor, samples: Decoded, scores: Tensor, where: Tensor
) -> tuple[Decoded, Tensor]:
    """Keep the better of the best so far and of other texts of each row.

    Args:
        best: Best texts so far of all B rows.
        cosines: Theirs [B].
        samples: N other texts.
        scores: Cosines of those [N].
        where: The row that each is of [N].

    Returns:
        The better texts, passes added up, and their cosines.
    """
    tokens, sure, order = best.tokens.clone(), best.confidences.clone(), best.order.clone()
    passes, cosines = best.passes.clone(), cosines.clone()
    for sample, row in enumerate(where.tolist()):
        if scores[sample] > cosines[row]:
            cosines[row] = scores[sample]
            tokens[row], sure[row] = samples.tokens[sample], samples.confidences[sample]
            order[row] = samples.order[sample] + passes[row]
        passes[row] += samples.passes[sample]
    return Decoded(tokens, sure, order, passes), cosines


def best_so_far(
    best: Decoded, previous: Tensor, place: tuple[int, int], cosines: Tensor, calls: Tensor
) -> DecodingStep:
    """Show the best text of each row so far, at a place (index, total), to a live display."""
    tokens = best.tokens.cpu().clone()
    return DecodingStep(
        place[0],
        place[1],
        tokens,
        best.confidences.cpu().clone(),
        tokens != previous,
        torch.zeros(len(tokens)),
        cosines.cpu().clone(),
        calls.clone(),
    )
