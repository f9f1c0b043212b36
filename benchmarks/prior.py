"""A language model's likelihood in guided search: an experiment, for `benchmarks.guided`.

The search judges a substitution by what the denoiser finds likelier, which saw 1.0 M samples;
SmolLM2 saw trillions of words, but only what stands to the left of a place. It weighs what the
denoiser proposes, and may propose words of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from unembed.baselines.language_model import LanguageModel
from unembed.decoding.guided_search import proposals, search
from unembed.decoding.guided_search.edits import MaskedScores, Tokens
from unembed.tokenizer import TextTokenizer

_INSIDE = "##"  # begins a WordPiece that goes on with a word


class LanguagePrior:
    """Adds to the scores of what may stand in a place how likely a language model finds it there.

    Args:
        model: The language model.
        ids: The inverter's tokens, WordPieces.
        weight: Of a nat of the language model beside one of the denoiser.
        proposals: Words of its own for each place, as likely for the denoiser as its last one.
    """

    def __init__(
        self, model: LanguageModel, ids: TextTokenizer, weight: float, proposals: int
    ) -> None:
        self._model, self._weight, self._proposals = model, weight, proposals
        self._names = ids.token_strings(range(ids.size))
        spellings = [self._spell(name) for name in self._names]
        # Of a word's first piece the language model's first token; -1 for what is inside a word
        self._first = np.array(
            [
                -1 if name.startswith(_INSIDE) or k in ids.special_ids else tokens[0]
                for k, (name, tokens) in enumerate(zip(self._names, spellings, strict=True))
            ]
        )
        # The language model's tokens that are whole words of ours
        self._ours = {
            tokens[0]: k
            for k, tokens in enumerate(spellings)
            if len(tokens) == 1 and self._first[k] >= 0
        }

    def _spell(self, word: str) -> list[int]:
        tokens: list[int] = self._model.tokenizer(f" {word}", add_special_tokens=False).input_ids
        return tokens

    def word_log_p(self, tokens: Tokens) -> tuple[list[int], NDArray[np.float64]]:
        """Places where a word begins [W], and log-probabilities of its first token [W, V']."""
        starts = [k for k, t in enumerate(tokens) if not self._names[t].startswith(_INSIDE)]
        line, at = [self._model.start], []
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            pieces = [self._names[token].removeprefix(_INSIDE) for token in tokens[start:stop]]
            at.append(len(line) - 1)  # the place that predicts the word's first token
            line += self._spell("".join(pieces))
        with torch.no_grad():
            logits = self._model.network(torch.tensor([line])).logits[0, at].float()
        return starts, logits.log_softmax(dim=-1).double().numpy()

    def __call__(self, tokens: Tokens, scores: MaskedScores) -> MaskedScores:
        """Scores of a hypothesis with the language model's word in them."""
        if not tokens:
            return scores
        starts, log_p = self.word_log_p(tokens)
        fillers, values = scores.fillers, scores.filler_scores.copy()
        extra = np.repeat(fillers[:, -1:], self._proposals, axis=1)  # its own again: no new edit
        extra_values = np.full(extra.shape, -np.inf)
        for place, line in zip(starts, log_p, strict=True):
            own = self._first[tokens[place]]
            if own < 0:
                continue
            first = self._first[fillers[place]]
            gains = np.where(first >= 0, line[first] - line[own], 0.0)
            values[place] += self._weight * gains
            lowest, filler_ids = scores.filler_scores[place].min(), set(fillers[place].tolist())
            column = 0
            for token in np.argsort(-line)[: 4 * self._proposals].tolist():
                word = self._ours.get(token)
                if word is None or word in filler_ids or column == self._proposals:
                    continue
                extra[place, column] = word
                extra_values[place, column] = lowest + self._weight * (line[token] - line[own])
                column += 1
        return replace(
            scores,
            fillers=np.concatenate([fillers, extra], axis=1),
            filler_scores=np.concatenate([values, extra_values], axis=1),
        )


@contextmanager
def language_prior(prior: LanguagePrior) -> Iterator[None]:
    """Let guided search use a prior within the block."""
    plain: Callable[..., Any] = proposals.masked_scores

    def masked_scores(
        denoiser: Any, steered: Any, spec: Any, hypotheses: list[Tokens], *rest: Any
    ) -> tuple[list[MaskedScores], Any]:
        scores, passes = plain(denoiser, steered, spec, hypotheses, *rest)
        pairs = zip(hypotheses, scores, strict=True)
        with torch.autocast("cpu", enabled=False):
            return [prior(tokens, one) for tokens, one in pairs], passes

    with patch.object(search, "masked_scores", masked_scores):
        yield
