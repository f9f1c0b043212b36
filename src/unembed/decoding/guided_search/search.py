"""Guided search: edit hypotheses, ask the encoder which are nearer, go on from those.

The attacker may call the encoder, and every call counts. Vec2Text (Morris et al., 2023,
arXiv 2310.06816) trains a second model to correct a hypothesis from its embedding; here the
denoiser that inverts also proposes, and a small model of the answers so far chooses what to ask.
docs/guided-search.md describes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.cosine_model import Candidates, CosineModel, hash_rows
from unembed.decoding.guided_search.edits import (
    NOTHING,
    MaskedScores,
    Tokens,
    apply_edits,
    moves,
    single_edits,
    to_rows,
)
from unembed.decoding.guided_search.proposals import (
    content_of,
    draw_masks,
    infill,
    length_scores,
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

_GAIN_LIMITS = (-12.0, 6.0)  # nats beyond which an edit is not judged by the denoiser's word
_INFILLS, _MOVES = 2, 2  # of the proposals of a round; the others are single edits
_INFILL_STEPS = (0.4, 1.2)  # lengths of the steps along the residual that infills are made with
_LENGTH_WEIGHT = 1.0  # of a length's log-probability beside that of an edit
# Digits beyond which cosines, and predictions, are equal: rounding must not tell them apart
_DIGITS, _PREDICTED_DIGITS = 5, 4
_PATIENCE = 5  # rounds in a row without a new text to embed


@dataclass(frozen=True)
class GuidedSearch:
    """Start from `Sequential`, then rounds of: score, edit, predict, embed, keep the nearest.

    In each round the denoiser scores the nearest hypotheses of a text with some tokens masked, and
    writes parts of two of them again; some hundred edited copies are ranked by their predicted
    cosine and the denoiser's likelihood; the first few are embedded. It stops at ``stop_cosine``,
    or when the calls of the text are used up. A text depends on its own vector, generator and calls
    alone.

    Attributes:
        beam: See below.
        proposals: Fewer use each call better and take longer.
        gain: See below.
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
        texts = [_Text(row, generator, spec) for row, generator in enumerate(generators)]
        if spec.has_end and spec.content is None:
            for text, lengths in zip(texts, length_scores(denoiser, embedding, spec), strict=True):
                text.lengths = _LENGTH_WEIGHT * lengths
                text.passes += 1
        steered = SteeredVectors(embedding, self.gamma)
        searching, last, index = texts, spec.masked(len(texts), torch.device("cpu")), 0
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
                infills = self._infill(searching, denoiser, embedding, spec)
                batches = [
                    self._propose(text, oracle.remaining(text.row), new)
                    for text, new in zip(searching, infills, strict=True)
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
                budgets = [oracle.remaining(text.row) for text in searching]
                rounds = max((self._rounds_left(index, calls) for calls in budgets), default=0)
                step = _step(texts, last, (index, index + rounds), oracle.calls, spec)
                last = step.tokens.clone()
                on_step(step)
            if not searching:
                return _result(texts, oracle.calls, spec, embedding)

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
            for tokens in self._to_score(text, drafting)
            if tokens or spec.length > 1  # else there is no place to mask
        ]
        if not jobs:
            return
        which = [text.row for text, _, _ in jobs]
        hypotheses = [tokens for _, tokens, _ in jobs]
        vectors = np.stack([text.vector_of(tokens) for text, tokens, _ in jobs])
        target, lengths = embedding[which], torch.tensor([length for _, _, length in jobs])
        steered = steer(target, torch.from_numpy(vectors), lengths, spec.feedback)
        gains = None
        if self.open_weights and not drafting:
            open_rows = [k for k, (text, _, _) in enumerate(jobs) if not text.finished]
            rows = [row_of(hypotheses[k], spec) for k in open_rows]
            slopes = oracle.token_gains([which[k] for k in open_rows], rows)
            slope_of = dict(zip(open_rows, slopes, strict=True))
            gains = [slope_of.get(k) for k in range(len(jobs))]
        rngs = [text.rng for text, _, _ in jobs]
        likelier = [[] if text.finished else text.likelier for text, _, _ in jobs]
        scores, passes = masked_scores(denoiser, steered, spec, hypotheses, rngs, gains, likelier)
        for (text, tokens, _), one, cost in zip(jobs, scores, passes, strict=True):
            text.scores[tokens] = one
            text.passes += cost
            if not text.finished:
                text.make_candidates(tokens, one, spec)

    def _to_score(self, text: _Text, drafting: bool) -> list[Tokens]:
        if text.finished:
            return [tokens for tokens in [text.best] if tokens]
        beam = [] if drafting else text.nearest(self.beam, self.gain)
        return [tokens for tokens in beam if tokens not in text.scores]

    def _infill(
        self,
        texts: Sequence[_Text],
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
    ) -> list[list[Tokens]]:
        """Write parts of the nearest hypotheses again: for each text the new ones."""
        jobs = []
        for text in texts:
            beam = [tokens for tokens in text.nearest(self.beam, self.gain) if tokens]
            for _ in range(_INFILLS if beam else 0):
                tokens = beam[int(text.rng.integers(len(beam)))]
                masked, removed = draw_masks(tokens, spec, text.rng)
                step = text.rng.uniform(*_INFILL_STEPS)
                jobs.append((text, text.vector_of(tokens), masked, removed, step))
        new: dict[int, list[Tokens]] = {text.row: [] for text in texts}
        if jobs:
            owners, vectors, masked_texts, removals, lengths = zip(*jobs, strict=True)
            target = embedding[[text.row for text in owners]]
            estimates = torch.from_numpy(np.stack(vectors))
            steered = steer(target, estimates, torch.tensor(lengths), spec.feedback)
            results, passes = infill(denoiser, steered, spec, masked_texts, removals)
            for text, tokens, cost in zip(owners, results, passes, strict=True):
                text.passes += cost
                if tokens and tokens not in text.hypotheses and tokens not in new[text.row]:
                    new[text.row].append(tokens)
        return list(new.values())

    def _propose(self, text: _Text, calls: int, infills: list[Tokens]) -> list[Tokens]:
        """Choose the texts most worth a call: infills, moves, then single edits."""
        text.learn_new()
        beam = text.nearest(self.beam, self.gain)
        text.candidates = {t: text.candidates[t] for t in beam if t in text.candidates}
        count = min(self.proposals, calls)
        texts = infills[:count]
        moved, edited = text.best_candidates(self.gain, count)
        for some, most in ((moved, len(texts) + _MOVES), (edited, count)):
            new = [tokens for tokens in some if tokens not in texts]
            texts += new[: max(min(most, count) - len(texts), 0)]
        return texts


class _Text:
    """The search for one text: what was embedded, and what is known about it."""

    def __init__(self, row: int, generator: torch.Generator, spec: SequenceSpec) -> None:
        self.row, self.length = row, spec.length
        self.rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        self.lengths = np.zeros(spec.length + 1)  # log-probability of each number of tokens
        self.likelier: list[int] = []  # tokens of a corpus
        # Hypotheses embedded, numbered, with the passes spent when each was made
        self.hypotheses: dict[Tokens, int] = {}
        self.cosines: list[float] = []
        self.vectors: list[NDArray[np.float32]] = []
        self.pass_counts: list[int] = []
        self.drafts: dict[Tokens, list[float]] = {}  # confidences of what was decoded whole
        # Of hypotheses scored, and of those that are edited now
        self.scores: dict[Tokens, MaskedScores] = {}
        self.candidates: dict[Tokens, Candidates] = {}
        self.model, self.hashes = CosineModel(), np.zeros(0, dtype=np.int64)
        self.passes, self.idle, self.calls, self.finished = 0, 0, 0, False

    @property
    def cosine(self) -> float:
        """Of the nearest hypothesis."""
        return max(self.cosines, default=-1.0)

    @property
    def best(self) -> Tokens:
        """The nearest hypothesis, the first made of equals."""
        return self.nearest(1, 0.0)[0]

    def nearest(self, count: int, weight: float) -> list[Tokens]:
        """Find the hypotheses with the highest cosines, given how likely their lengths are.

        Args:
            count: How many.
            weight: Of a nat of their length's log-probability.
        """
        texts = list(self.hypotheses)
        sizes = [len(tokens) for tokens in texts]
        worth = (np.array(self.cosines) + weight * self.lengths[sizes]).round(_DIGITS)
        order = np.argsort(-worth, kind="stable")[:count].tolist()
        return [texts[k] for k in order]

    def vector_of(self, tokens: Tokens) -> NDArray[np.float32]:
        """The embedding [D] of a hypothesis."""
        return self.vectors[self.hypotheses[tokens]]

    def read_corpus(self, texts: Sequence[Sequence[int]]) -> list[Tokens]:
        """Take texts of a corpus for hypotheses, and their words for likelier ones."""
        self.likelier = sorted({token for text in texts for token in text})
        return [tuple(text[: self.length - 1]) for text in texts]

    def learn(self, tokens: Tokens, cosine: float, vector: NDArray[np.float32]) -> None:
        """Remember what the encoder said of a new text."""
        if tokens in self.hypotheses:
            return
        self.hypotheses[tokens] = len(self.hypotheses)
        self.cosines.append(cosine)
        self.vectors.append(vector)
        self.pass_counts.append(self.passes)

    def learn_new(self) -> None:
        """Have the model learn from what was embedded since the last time."""
        done = len(self.hashes)
        rows = to_rows(list(self.hypotheses)[done:], self.length)
        if len(rows):
            self.model.learn(rows, np.stack(self.vectors[done:]), np.array(self.cosines[done:]))
            self.hashes = np.append(self.hashes, hash_rows(rows))

    def make_candidates(self, tokens: Tokens, scores: MaskedScores, spec: SequenceSpec) -> None:
        """Edit a hypothesis that was scored in every way."""
        edits = single_edits(scores)
        edited = apply_edits(tokens, edits, spec.length)
        others, gains_of_moves = moves(tokens, scores, spec.length, self.rng)
        rows, gains = np.concatenate([edited, others]), np.append(edits.gains, gains_of_moves)
        moved = np.arange(len(rows)) >= len(edited)
        # Those of a length that may be, with what their length gains
        fixed = spec.content if spec.has_end else spec.length
        shortest, longest = (1, max(spec.length - 1, 1)) if fixed is None else (fixed, fixed)
        sizes = (rows != NOTHING).sum(axis=1)
        fit = (sizes >= shortest) & (sizes <= longest)
        gains = np.clip(gains, *_GAIN_LIMITS)[fit] + self.lengths[sizes[fit]]
        self.candidates[tokens] = Candidates(rows[fit], gains, moved[fit])

    def best_candidates(self, weight: float, count: int) -> tuple[list[Tokens], list[Tokens]]:
        """Find those not embedded yet with the most predicted cosine and gain.

        Returns:
            The first ``count`` that a span moved in, and of the other edits.
        """
        groups = [one for one in self.candidates.values() if len(one.rows)]
        if not groups:
            return [], []
        gains, hashes, moved, rows = (
            np.concatenate([getattr(one, name) for one in groups])
            for name in ("gains", "hashes", "moved", "rows")
        )
        worth = self.model.predict(groups) + weight * gains
        ranks = np.argsort(-worth.round(_PREDICTED_DIGITS), kind="stable")
        ranks = ranks[~np.isin(hashes[ranks], self.hashes)]
        best = []
        for kind in (True, False):
            order = ranks[moved[ranks] == kind]
            order = order[np.sort(np.unique(hashes[order], return_index=True)[1])]  # each once
            best.append([tuple(row[row != NOTHING].tolist()) for row in rows[order[:count]]])
        return best[0], best[1]


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
    texts: Sequence[_Text], last: Tensor, place: tuple[int, int], calls: Tensor, spec: SequenceSpec
) -> DecodingStep:
    """Show the nearest hypothesis of every text to a live display."""
    rows, confidences, _ = zip(*(_best(text, spec) for text in texts), strict=True)
    tokens = torch.tensor(rows)
    cosines = torch.tensor([text.cosine for text in texts])
    nothing = torch.zeros(len(texts))  # is masked
    return DecodingStep(
        *place, tokens, torch.tensor(confidences), tokens != last, nothing, cosines, calls.clone()
    )


def _best(text: _Text, spec: SequenceSpec) -> tuple[list[int], list[float], int]:
    """Sequence, confidences and passes of the nearest hypothesis.

    The confidence of a token is its probability where it was masked with some of the others, given
    the vector in the result and the steered vector on the way. The end and what follows it were not
    asked about; their confidence is 1.
    """
    tokens = text.best
    confidences = text.drafts.get(tokens, [])
    if tokens in text.scores:
        confidences = np.exp(text.scores[tokens].own).tolist()
    confidences = [*confidences, *[1.0] * (spec.length - len(confidences))]
    return row_of(tokens, spec), confidences, text.pass_counts[text.hypotheses[tokens]]


def _result(texts: Sequence[_Text], calls: Tensor, spec: SequenceSpec, to: Tensor) -> Decoded:
    rows, confidences, passes = zip(*(_best(text, spec) for text in texts), strict=True)
    results = Decoded(
        tokens=torch.tensor(rows),
        confidences=torch.tensor(confidences),
        order=torch.tensor(passes)[:, None].expand(-1, spec.length),
        passes=torch.tensor([text.passes for text in texts]),
        encoder_calls=calls,
        cosines=torch.tensor([text.cosine for text in texts]),
    )
    return Decoded(**{name: value.to(to.device) for name, value in vars(results).items()})
