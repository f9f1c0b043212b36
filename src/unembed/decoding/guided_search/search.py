"""Guided search: edit hypotheses, ask the encoder which are nearer, go on from those.

The attacker may call the encoder, and every call counts. Vec2Text (Morris et al., 2023,
arXiv 2310.06816) trains a second model to correct a hypothesis from its embedding; here the
denoiser that inverts also proposes, and a small model of the answers so far chooses what to ask.
docs/decoding.md describes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.cosine_model import CosineModel
from unembed.decoding.guided_search.edits import (
    NOTHING,
    MaskedScores,
    Rows,
    Tokens,
    apply_edits,
    crossover,
    single_edits,
    to_rows,
)
from unembed.decoding.guided_search.proposals import (
    Words,
    content_of,
    likely_words,
    masked_scores,
    row_of,
    steer,
)
from unembed.decoding.residual import SteeredVectors
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

_CROSSOVERS = 12
_GAIN_LIMITS = (-12.0, 6.0)  # nats beyond which an edit is not judged by the denoiser's word
_CURIOUS = 50  # calls after which exploration weighs half
_PATIENCE = 5  # rounds in a row without a new text to embed


@dataclass(frozen=True)
class GuidedSearch:
    """Start from `Sequential`, then rounds of: score, edit, predict, embed, keep the nearest.

    In each round the denoiser scores the nearest hypotheses of a text with some tokens masked;
    some hundred edited copies are ranked by their predicted cosine, what is unknown about it, and
    the denoiser's likelihood; the first few are embedded. It stops at ``stop_cosine``, or when the
    calls of the text are used up. A text depends on its own vector, generator and calls alone.

    Attributes:
        beam: See below.
        proposals: Fewer use each call better and take longer.
        gain: See below.
        exploration: It sinks to 0 as the calls are used up.
        stop_cosine: See below.
    """

    beam: int = option(4, "Hypotheses that are edited in each round.", low=1, high=64)
    proposals: int = option(8, "Texts embedded in each round.", low=1, high=1024)
    rounds: int = option(6, "Rounds of residual steering before the first edit.", low=0, high=1024)
    gamma: float = option(0.5, "Share of the residual added in each of them.", low=0.0, high=10.0)
    steering: float = option(
        0.8,
        "Length of the step along the residual that proposals are made with.",
        low=0.0,
        high=10.0,
    )
    gain: float = option(
        0.005,
        "Weight of an edit's gain in log-likelihood (nats) beside its predicted cosine.",
        low=0.0,
        high=1000.0,
    )
    exploration: float = option(
        0.1, "Weight of a prediction's standard deviation.", low=0.0, high=1000.0
    )
    open_weights: bool = option(
        False,
        "Use the encoder's gradient, which takes its weights; each counts as two calls.",
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
        words = likely_words(denoiser, embedding, spec)
        texts = [
            _Text(row, words[row], generator, spec) for row, generator in enumerate(generators)
        ]
        steered = SteeredVectors(embedding, self.gamma)
        searching, shown, index = texts, spec.masked(len(texts), torch.device("cpu")), 0
        while True:
            # A round: texts decoded from steered vectors first, then edits
            if index <= self.rounds:
                decoded = steered.decode([t.row for t in searching], denoiser, spec, steps)
                batches = _drafts(searching, decoded, spec)
                if index == 0:
                    for text, batch in zip(searching, batches, strict=True):
                        batch.extend(text.read_corpus(oracle.starts(text.row)))
                _embed(searching, batches, spec, oracle)
                latest = [
                    text.vector_of(batch[0]) for text, batch in zip(searching, batches, strict=True)
                ]
                steered.update([text.row for text in searching], np.stack(latest))
            else:
                for text in searching:
                    text.fit()
                batches = [
                    self._propose(text, oracle.remaining(text.row), spec) for text in searching
                ]
                _embed(searching, batches, spec, oracle)
            index += 1
            # Who goes on, and what the next round needs
            drafting = index <= self.rounds
            for text in searching:
                right, spent = text.cosine >= self.stop_cosine, oracle.remaining(text.row) < 1
                text.finished = right or spent or (text.idle >= _PATIENCE and not drafting)
            self._score(searching, denoiser, embedding, spec, oracle, drafting)
            searching = [text for text in searching if not text.finished]
            if on_step is not None:
                left = [oracle.remaining(text.row) for text in searching]
                rounds = max((self._rounds_left(index, calls) for calls in left), default=0)
                step = _step(texts, shown, (index, index + rounds), oracle.calls, spec)
                shown = step.tokens.clone()
                on_step(step)
            if not searching:
                return _decoded(texts, oracle.calls, spec, embedding)

    def _rounds_left(self, index: int, calls: int) -> int:
        """Rounds at most after so many, with so many calls left."""
        drafts = min(max(self.rounds + 1 - index, 0), calls)
        return drafts - (drafts - calls) // self.proposals

    def _score(
        self,
        texts: Sequence[_Text],
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        oracle: Oracle,
        drafting: bool,
    ) -> None:
        """Have the denoiser score what the next round edits and what is finished.

        The nearest hypotheses are scored by steered vectors, which tell what is wrong with them;
        the result of a text by its vector itself, which tells the confidences.
        """
        jobs = [
            (text, tokens, 0.0 if text.finished else self.steering)
            for text in texts
            for tokens in text.nearest(1 if text.finished else 0 if drafting else self.beam)
            if tokens and (text.finished or tokens not in text.scores)
        ]
        if not jobs:
            return
        which = [text.row for text, _, _ in jobs]
        hypotheses = [tokens for _, tokens, _ in jobs]
        vectors = np.stack([text.vector_of(tokens) for text, tokens, _ in jobs])
        target, lengths = embedding[which], torch.tensor([length for _, _, length in jobs])
        steered = steer(target, torch.from_numpy(vectors).to(target), lengths.to(target))
        gains = None
        if self.open_weights and not drafting:
            open_rows = [k for k, (text, _, _) in enumerate(jobs) if not text.finished]
            rows = [row_of(hypotheses[k], spec) for k in open_rows]
            slopes = oracle.token_gains([which[k] for k in open_rows], rows)
            known = dict(zip(open_rows, slopes, strict=True))
            gains = [known.get(k) for k in range(len(jobs))]
        rngs = [text.rng for text, _, _ in jobs]
        scores, passes = masked_scores(denoiser, steered, spec, hypotheses, rngs, gains)
        for (text, tokens, _), one, spent in zip(jobs, scores, passes, strict=True):
            text.scores[tokens] = one
            text.passes += spent

    def _propose(self, text: _Text, left: int, spec: SequenceSpec) -> list[Tokens]:
        """Choose the edited copies most worth a call."""
        rows, gains = _candidates(text, text.nearest(self.beam), spec)
        if not len(rows):
            return []
        mean, deviation = text.model.predict(rows)
        share = 1.0 / (1.0 + text.calls / _CURIOUS)
        worth = mean + self.exploration * share * deviation
        worth += self.gain * np.clip(gains, *_GAIN_LIMITS)
        best = np.argsort(-worth.round(6), kind="stable")[: min(self.proposals, left)]
        return [tuple(row[row != NOTHING].tolist()) for row in rows[best]]


class _Text:
    """The search for one text: what was embedded, and what is known about it."""

    def __init__(
        self,
        row: int,
        words: Words,
        generator: torch.Generator,
        spec: SequenceSpec,
    ) -> None:
        self.row, self.words = row, words
        self.passes = 1  # for the words
        self.rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        self.length = spec.length
        self.known: dict[Tokens, int] = {}  # hypotheses embedded, numbered
        self.cosines: list[float] = []
        self.vectors: list[NDArray[np.float32]] = []
        self.made: list[int] = []  # passes spent when a hypothesis was made
        self.drafts: dict[Tokens, list[float]] = {}  # confidences of what was decoded whole
        self.scores: dict[Tokens, MaskedScores] = {}
        self.idle, self.calls, self.finished = 0, 0, False
        self.model: CosineModel

    @property
    def cosine(self) -> float:
        """Of the nearest hypothesis."""
        return max(self.cosines, default=-1.0)

    def nearest(self, count: int) -> list[Tokens]:
        """Find the hypotheses with the highest cosines, the first made before its equals."""
        return sorted(self.known, key=lambda tokens: -self.cosines[self.known[tokens]])[:count]

    def vector_of(self, tokens: Tokens) -> NDArray[np.float32]:
        """The embedding [D] of a hypothesis."""
        return self.vectors[self.known[tokens]]

    def read_corpus(self, texts: Sequence[Sequence[int]]) -> list[Tokens]:
        """Take texts of a corpus for hypotheses, and their words for words of the text."""
        if not texts:
            return []
        ids, weights = self.words
        own = np.unique(np.concatenate([np.array(text, dtype=np.int64) for text in texts]))
        shares = np.concatenate([weights, np.full(len(own), 1.0 / len(own))])  # half of the draws
        self.words = np.concatenate([ids, own]), shares / shares.sum()
        return [tuple(text[: self.length - 1]) for text in texts]

    def learn(self, tokens: Tokens, cosine: float, vector: NDArray[np.float32]) -> None:
        """Remember what the encoder said of a new text."""
        if tokens in self.known:
            return
        self.known[tokens] = len(self.known)
        self.cosines.append(cosine)
        self.vectors.append(vector)
        self.made.append(self.passes)

    def fit(self) -> None:
        """Learn from what was embedded."""
        rows = to_rows(list(self.known), self.length)
        self.model = CosineModel(rows, np.stack(self.vectors), np.array(self.cosines))


def _candidates(
    text: _Text, parents: Sequence[Tokens], spec: SequenceSpec
) -> tuple[Rows, NDArray[np.float64]]:
    """Make edited copies of the parents that were not embedded yet.

    Returns:
        Each once [M, L], and the largest gain in nats that it was made with [M].
    """
    fixed = spec.content if spec.has_end else spec.length
    shortest, longest = (1, max(spec.length - 1, 1)) if fixed is None else (fixed, fixed)
    rows, gains = [], []
    for parent in parents:
        if not parent:
            rows.append(to_rows(text.words[0][:, None].tolist(), spec.length))
            gains.append(np.zeros(len(rows[-1])))
            continue
        singles = single_edits(parent, text.scores[parent], text.words, text.rng)
        rows.append(apply_edits(parent, singles, spec.length))
        gains.append(singles.gains)
    rows.append(crossover(parents, _CROSSOVERS, spec.length, text.rng))
    gains.append(np.full(len(rows[-1]), -2.0))
    every, gain = np.concatenate(rows), np.concatenate(gains)
    order = np.argsort(-gain, kind="stable")
    every, gain = every[order], gain[order]
    # Rows are told apart by a hash, known ones first
    known = to_rows(list(text.known), spec.length)
    factors = np.random.default_rng(0).integers(2**63, size=spec.length) * 2 + 1
    hashes = np.concatenate([known, every]) @ factors
    first = np.unique(hashes, return_index=True)[1]
    first = np.sort(first[first >= len(known)]) - len(known)
    sizes = (every[first] != NOTHING).sum(axis=1)
    first = first[(sizes >= shortest) & (sizes <= longest)]
    return every[first], gain[first]


def _drafts(texts: Sequence[_Text], decoded: Decoded, spec: SequenceSpec) -> list[list[Tokens]]:
    """The texts that were decoded whole, one for each; their passes are counted."""
    batches = []
    for text, ids, sure, passes in zip(
        texts,
        decoded.tokens.tolist(),
        decoded.confidences.tolist(),
        decoded.passes.tolist(),
        strict=True,
    ):
        tokens = content_of(ids, spec)
        text.drafts.setdefault(tokens, sure[: len(tokens)])
        text.idle = 0  # the next round starts from another vector
        text.passes += passes
        batches.append([tokens])
    return batches


def _embed(
    texts: Sequence[_Text], batches: Sequence[list[Tokens]], spec: SequenceSpec, oracle: Oracle
) -> None:
    """Embed the new hypotheses of all texts together."""
    batch = [(text, tokens) for text, some in zip(texts, batches, strict=True) for tokens in some]
    if batch:
        which = [text.row for text, _ in batch]
        rows = [row_of(tokens, spec) for _, tokens in batch]
        cosines = oracle(which, rows).double().tolist()
        vectors = oracle.vectors(which, rows)
        for (text, tokens), cosine, vector in zip(batch, cosines, vectors, strict=True):
            text.learn(tokens, cosine, vector)
    calls = oracle.calls.tolist()
    for text in texts:
        text.idle = text.idle + 1 if calls[text.row] == text.calls else 0
        text.calls = calls[text.row]


def _step(
    texts: Sequence[_Text], shown: Tensor, place: tuple[int, int], calls: Tensor, spec: SequenceSpec
) -> DecodingStep:
    """Show the nearest hypothesis of every text to a live display."""
    rows, confidences, _ = zip(*(_best(text, spec) for text in texts), strict=True)
    tokens = torch.tensor(rows)
    cosines = torch.tensor([text.cosine for text in texts])
    nothing = torch.zeros(len(texts))  # is masked
    return DecodingStep(
        *place, tokens, torch.tensor(confidences), tokens != shown, nothing, cosines, calls.clone()
    )


def _best(text: _Text, spec: SequenceSpec) -> tuple[list[int], list[float], int]:
    """Sequence, confidences and passes of the nearest hypothesis.

    The confidence of a token is its probability where it was masked with some of the others, given
    the vector in the result and the steered vector on the way. The end and what follows it were not
    asked about; their confidence is 1.
    """
    tokens = text.nearest(1)[0]
    confidences = text.drafts.get(tokens, [])
    if tokens in text.scores:
        confidences = np.exp(text.scores[tokens].own).tolist()
    confidences = [*confidences, *[1.0] * (spec.length - len(confidences))]
    return row_of(tokens, spec), confidences, text.made[text.known[tokens]]


def _decoded(texts: Sequence[_Text], calls: Tensor, spec: SequenceSpec, to: Tensor) -> Decoded:
    rows, confidences, made = zip(*(_best(text, spec) for text in texts), strict=True)
    results = Decoded(
        tokens=torch.tensor(rows),
        confidences=torch.tensor(confidences),
        order=torch.tensor(made)[:, None].expand(-1, spec.length),
        passes=torch.tensor([text.passes for text in texts]),
        encoder_calls=calls,
        cosines=torch.tensor([text.cosine for text in texts]),
    )
    return Decoded(**{name: value.to(to.device) for name, value in vars(results).items()})
