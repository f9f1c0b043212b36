"""Guided search: edit hypotheses, ask the encoder which are nearer, go on from those.

The attacker may call the encoder, and every call counts. Vec2Text (Morris et al., 2023,
arXiv 2310.06816) trains a second model to correct a hypothesis from its embedding; here the
denoiser that inverts also proposes, and a small model of the answers so far chooses what to ask.
docs/decoding.md describes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.cosine_model import predict_cosines
from unembed.decoding.guided_search.edits import (
    Outlook,
    Tokens,
    apply_edits,
    combined_edits,
    crossings,
    single_edits,
)
from unembed.decoding.guided_search.infill import fill_holes, make_hole
from unembed.decoding.guided_search.proposals import (
    Words,
    content_of,
    likely_words,
    look_at,
    row_of,
)
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

_COMBINATIONS, _CROSSINGS = 80, 12
_GAIN_LIMITS = (-12.0, 6.0)  # nats beyond which an edit is not judged by the denoiser's word
_PATIENCE = 5  # rounds in a row without a new text to embed
_FAVOUR, _FAVOURERS = 3.0, 8  # nats for a word that all of so many nearest hypotheses have
_HARM = 0.02  # of cosine, by which a token's doubt is multiplied by e
_REFILLS_KEPT = 64


@dataclass(frozen=True)
class GuidedSearch:
    """Start from `Sequential`, then rounds of: look, edit, predict, embed, keep the nearest.

    In each round the denoiser looks at the nearest hypotheses of a text with some tokens masked;
    some hundred edited copies are ranked by their predicted cosine, what is unknown about it, and
    the denoiser's likelihood; the first few are embedded. It stops at
    ``stop_cosine``, or when the
    calls of the text are used up. A text depends on its own vector, generator and calls alone.

    Attributes:
        beam: Hypotheses that are edited in each round, from 1.
        proposals: Texts embedded in each round, from 1: fewer use each call better and take
            longer.
        likelihood: Weight of the denoiser's log-likelihood (nats a token) beside the cosine in the
            choice of the hypotheses to edit, from 0.
        gain: Weight of an edit's gain in log-likelihood (nats) beside its predicted cosine,
            from 0.
        refills: Copies of the nearest hypotheses with a span masked that the denoiser fills in each
            round, from 0; they cost passes, no calls.
        probes: Single words embedded at the start to learn what they are worth, the likeliest by
            the denoiser, from 0; at most a sixth of the calls.
        exploration: Weight of a prediction's standard deviation, from 0; it sinks to 0 as the calls
            are used up.
        stop_cosine: Cosine from which on a text is left alone.
    """

    beam: int = option(4, "Hypotheses that are edited in each round.", low=1, high=64)
    proposals: int = option(8, "Texts embedded in each round.", low=1, high=1024)
    likelihood: float = option(
        0.0,
        "Weight of the denoiser's log-likelihood in the choice of hypotheses.",
        low=0.0,
        high=1000.0,
    )
    gain: float = option(
        0.001,
        "Weight of an edit's gain in log-likelihood beside its cosine.",
        low=0.0,
        high=1000.0,
    )
    refills: int = option(
        8, "Copies a round with a span masked that the denoiser fills.", low=0, high=64
    )
    probes: int = option(48, "Single words embedded at the start.", low=0, high=1024)
    exploration: float = option(
        0.1, "Weight of a prediction's standard deviation.", low=0.0, high=1000.0
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
        """See `Strategy`; ``steps`` are those of the greedy start.

        Raises:
            ConfigError: There is no oracle.
        """
        oracle = require_oracle(oracle, "guided-search")
        start = Sequential()(denoiser, embedding, spec, steps=steps)
        words = likely_words(denoiser, embedding, spec)
        texts = [
            _Text(row, content_of(ids, spec), spent + 1, words[row], generators[row])
            for row, (ids, spent) in enumerate(
                zip(start.tokens.tolist(), start.passes.tolist(), strict=True)
            )
        ]
        _embed(texts, [[text.start] for text in texts], spec, oracle)
        display = _Display(on_step, spec)
        while True:
            self._look(texts, denoiser, embedding, spec)
            for text in texts:
                text.finished |= text.cosine >= self.stop_cosine or oracle.remaining(text.row) < 1
            display.show(texts, oracle, self.proposals)
            searching = [text for text in texts if not text.finished]
            if not searching:
                return _decoded(texts, oracle, spec, embedding.device)
            self._refill(searching, denoiser, embedding, spec)
            batches = [self._propose(text, spec, oracle) for text in searching]
            _embed(searching, batches, spec, oracle)

    def _look(
        self, texts: Sequence[_Text], denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec
    ) -> None:
        """Have the denoiser look at the nearest hypotheses it has not seen."""
        count = self.beam * (2 if self.likelihood else 1)
        new = [
            (text.row, tokens)
            for text in texts
            for tokens in text.nearest(1 if text.finished else count)
            if tokens and tokens not in text.outlooks
        ]
        if not new:
            return
        words, rngs = [text.words for text in texts], [text.rng for text in texts]
        outlooks, passes = look_at(denoiser, embedding, spec, new, words, rngs)
        for (row, tokens), outlook, spent in zip(new, outlooks, passes, strict=True):
            texts[row].outlooks[tokens] = outlook
            texts[row].passes += spent

    def _refill(
        self, texts: Sequence[_Text], denoiser: DenoiserFn, embedding: Tensor, spec: SequenceSpec
    ) -> None:
        """Have the denoiser fill holes in the hypotheses to edit."""
        holes, favoured, rngs = [], {}, {}
        for text in texts:
            parents = [tokens for tokens in self._parents(text) if tokens]
            if len(text.known) < 2 or not parents:  # noqa: PLR2004 - the start and an answer
                continue
            doubts = _doubts(text, parents)
            favoured[text.row], rngs[text.row] = _favoured(text), text.rng
            for k in range(self.refills):
                tokens, doubt = parents[k % len(parents)], doubts[k % len(parents)]
                own = text.outlooks[tokens].own
                holes.append(make_hole(text.row, tokens, own, doubt, spec, text.rng))
        if not holes:
            return
        filled, passes = fill_holes(denoiser, embedding, spec, holes, favoured, rngs)
        by_row = {text.row: text for text in texts}
        for hole, (tokens, gain), spent in zip(holes, filled, passes, strict=True):
            text = by_row[hole.row]
            text.passes += spent
            text.refilled[tokens] = gain
        for text in texts:
            text.refilled = dict(list(text.refilled.items())[-_REFILLS_KEPT:])

    def _propose(self, text: _Text, spec: SequenceSpec, oracle: Oracle) -> list[Tokens]:
        """The edited copies most worth a call; at first the single words."""
        if len(text.known) == 1 and spec.end_id is not None:
            count = min(self.probes, oracle.remaining(text.row) // 6)
            likely: list[int] = text.words[0][:count].tolist()
            probes: list[Tokens] = [(word,) for word in likely if (word,) != text.start]
            if probes:
                return probes
        parents = self._parents(text)
        candidates = _candidates(text, parents, spec)
        left = oracle.remaining(text.row)
        if not candidates:
            return []
        ids, gains = list(candidates), np.array(list(candidates.values()))
        mean, spread = predict_cosines(text.known, text.vectors, text.cosines, ids)
        share = left / (left + float(oracle.calls[text.row]))
        worth = mean + self.exploration * share * spread + self.gain * np.clip(gains, *_GAIN_LIMITS)
        order = np.argsort(-worth.round(6), kind="stable")
        return [ids[k] for k in order[: min(self.proposals, left)]]

    def _parents(self, text: _Text) -> list[Tokens]:
        """The hypotheses to edit: nearest by cosine and likelihood together."""
        if not self.likelihood:
            return text.nearest(self.beam)

        def worth(tokens: Tokens) -> float:
            own = text.outlooks[tokens].own if tokens else np.zeros(1)
            return text.cosines[text.place[tokens]] + self.likelihood * float(own.mean())

        return sorted(text.nearest(2 * self.beam), key=worth, reverse=True)[: self.beam]


class _Text:
    """The search for one text: what was embedded, and what is known about it."""

    def __init__(
        self,
        row: int,
        start: Tokens,
        passes: int,
        words: Words,
        generator: torch.Generator,
    ) -> None:
        self.row, self.start, self.passes, self.words = row, start, passes, words
        self.rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        self.known: list[Tokens] = []
        self.cosines: list[float] = []
        self.vectors: list[NDArray[np.float32]] = []
        self.made: list[int] = []  # passes spent when a hypothesis was made
        self.place: dict[Tokens, int] = {}
        self.outlooks: dict[Tokens, Outlook] = {}
        self.refilled: dict[Tokens, float] = {}  # with the gain in nats, the latest last
        self.idle, self.calls, self.finished = 0, 0, False

    @property
    def cosine(self) -> float:
        """Of the nearest hypothesis."""
        return max(self.cosines, default=-1.0)

    def nearest(self, count: int) -> list[Tokens]:
        """The hypotheses with the highest cosines, the first found before its equals."""
        order = sorted(range(len(self.known)), key=lambda k: -self.cosines[k])
        return [self.known[k] for k in order[:count]]

    def learn(self, tokens: Tokens, cosine: float, vector: NDArray[np.float32]) -> None:
        """Remember what the encoder said."""
        self.place[tokens] = len(self.known)
        self.known.append(tokens)
        self.cosines.append(cosine)
        self.vectors.append(vector)
        self.made.append(self.passes)


def _doubts(text: _Text, parents: Sequence[Tokens]) -> list[NDArray[np.float64]]:
    """How much each token of each parent is in question.

    What the denoiser doubts, and what the encoder's answers so far say is better left out.
    """
    shorter = [parent[:j] + parent[j + 1 :] for parent in parents for j in range(len(parent))]
    mean, _ = predict_cosines(text.known, text.vectors, text.cosines, shorter)
    doubts, start = [], 0
    for parent in parents:
        harm = mean[start : start + len(parent)] - text.cosines[text.place[parent]]
        start += len(parent)
        unlikely = 1.0 - np.exp(text.outlooks[parent].own)
        doubts.append(unlikely * np.exp(np.clip(harm / _HARM, -4.0, 4.0)))
    return doubts


def _favoured(text: _Text) -> dict[int, float]:
    """The words of the nearest hypotheses, and the nats they are favoured by."""
    best = text.nearest(_FAVOURERS)
    counts = Counter(token for tokens in best for token in set(tokens))
    return {token: _FAVOUR * count / len(best) for token, count in counts.items()}


def _candidates(text: _Text, parents: Sequence[Tokens], spec: SequenceSpec) -> dict[Tokens, float]:
    """Edited copies of the parents that were not embedded yet, with their best gains in nats."""
    found: dict[Tokens, float] = {}
    fixed = spec.end_id is None or spec.pad_id is None
    shortest, longest = (spec.length,) * 2 if fixed else (1, max(spec.length - 1, 1))

    def add(tokens: Tokens | None, gain: float) -> None:
        if tokens is not None and shortest <= len(tokens) <= longest and tokens not in text.place:
            found[tokens] = max(gain, found.get(tokens, gain))

    for parent in parents:
        if not parent:
            for word in text.words[0].tolist():
                add((word,), 0.0)
            continue
        singles = single_edits(parent, text.outlooks[parent], text.rng)
        for edit in singles:
            add(apply_edits(parent, [edit]), edit.gain)
        for several in combined_edits(singles, _COMBINATIONS, text.rng) if singles else ():
            add(apply_edits(parent, several), sum(e.gain for e in several) - 1.0)
    for tokens, gain in text.refilled.items():
        add(tokens, gain)
    for tokens, gain in crossings(parents, _CROSSINGS, text.rng):
        add(tokens, gain)
    return found


def _embed(
    texts: Sequence[_Text], batches: Sequence[list[Tokens]], spec: SequenceSpec, oracle: Oracle
) -> None:
    """Ask the encoder about the new hypotheses of all texts at once."""
    asked = [(text, tokens) for text, batch in zip(texts, batches, strict=True) for tokens in batch]
    if asked:
        which = [text.row for text, _ in asked]
        rows = [row_of(tokens, spec) for _, tokens in asked]
        cosines = oracle(which, rows).double().tolist()
        vectors = oracle.vectors(which, rows)
        for (text, tokens), cosine, vector in zip(asked, cosines, vectors, strict=True):
            text.learn(tokens, cosine, vector)
    calls = oracle.calls.tolist()
    for text in texts:
        text.idle = text.idle + 1 if calls[text.row] == text.calls else 0
        text.calls = calls[text.row]
        text.finished |= text.idle >= _PATIENCE


class _Display:
    """Steps for live displays, one after every look of the denoiser."""

    def __init__(self, on_step: OnStep | None, spec: SequenceSpec) -> None:
        self.on_step, self.spec, self.index = on_step, spec, 0
        self.shown: Tensor | None = None

    def show(self, texts: Sequence[_Text], oracle: Oracle, proposals: int) -> None:
        """The nearest hypothesis of every text."""
        self.index += 1
        if self.on_step is None:
            return
        rounds = [-(-oracle.remaining(t.row) // proposals) for t in texts if not t.finished]
        best = [_best(text, self.spec) for text in texts]
        tokens = torch.tensor([row for row, _, _ in best])
        before = torch.full_like(tokens, self.spec.mask_id) if self.shown is None else self.shown
        step = DecodingStep(
            self.index,
            self.index + max(rounds, default=0),
            tokens,
            torch.tensor([sure for _, sure, _ in best]),
            tokens != before,
            torch.zeros(len(texts)),
            torch.tensor([text.cosine for text in texts]),
            oracle.calls.clone(),
        )
        self.shown = tokens.clone()
        self.on_step(step)


def _best(text: _Text, spec: SequenceSpec) -> tuple[list[int], list[float], int]:
    """Sequence, confidences and passes of the nearest hypothesis.

    The confidence of a token is its probability where it was masked with some of the others. The
    end and what follows it were not asked about; their confidence is 1.
    """
    tokens = text.nearest(1)[0]
    own = text.outlooks[tokens].own if tokens else np.zeros(0)
    sure = [*np.exp(own).tolist(), *[1.0] * (spec.length - len(tokens))]
    return row_of(tokens, spec), sure, text.made[text.place[tokens]]


def _decoded(
    texts: Sequence[_Text], oracle: Oracle, spec: SequenceSpec, device: torch.device
) -> Decoded:
    best = [_best(text, spec) for text in texts]
    order = [[made] * spec.length for _, _, made in best]
    return Decoded(
        torch.tensor([row for row, _, _ in best], device=device),
        torch.tensor([sure for _, sure, _ in best], device=device),
        torch.tensor(order, device=device),
        torch.tensor([text.passes for text in texts], device=device),
        oracle.calls.to(device),
        torch.tensor([text.cosine for text in texts], device=device),
    )
