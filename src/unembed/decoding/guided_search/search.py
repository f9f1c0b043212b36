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

from unembed.decoding.best_of import require_scorer
from unembed.decoding.guided_search.cosine_model import CosineModel
from unembed.decoding.guided_search.edits import (
    NOTHING,
    MaskedScores,
    Rows,
    Tokens,
    apply_edits,
    combined_edits,
    crossover,
    single_edits,
    to_rows,
)
from unembed.decoding.guided_search.proposals import (
    Words,
    content_of,
    infill,
    likely_words,
    make_hole,
    masked_scores,
    row_of,
)
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

_COMBINATIONS, _CROSSOVERS = 80, 12
_GAIN_LIMITS = (-12.0, 6.0)  # nats beyond which an edit is not judged by the denoiser's word
_PATIENCE = 5  # rounds in a row without a new text to embed
_FAVOUR, _FAVOURERS = 3.0, 8  # nats for a word that all of so many nearest hypotheses have
_HARM = 0.02  # of cosine, by which a token's doubt is multiplied by e
_INFILLS_KEPT = 64
_PASSES = 2
_DOUBTS = True


@dataclass(frozen=True)
class GuidedSearch:
    """Start from `Greedy`, then rounds of: score, edit, predict, embed the best, keep the nearest.

    In each round the denoiser scores the nearest hypotheses of a text with some tokens masked;
    some hundred edited copies are ranked by their predicted cosine, what is unknown about it, and
    the denoiser's likelihood; the first few are embedded. It stops at ``stop_cosine``, or when the
    calls of the text are used up. A text depends on its own vector, generator and calls alone.

    Attributes:
        beam: Hypotheses that are edited in each round, from 1.
        proposals: Texts embedded in each round, from 1: fewer use each call better and take
            longer.
        gain: Weight of an edit's gain in log-likelihood (nats) beside its predicted cosine,
            from 0.
        infills: Copies of the nearest hypotheses with a span masked that the denoiser fills in each
            round, from 0; they cost passes, no calls.
        probes: Single words embedded at the start to learn what they are worth, the most probable
            by the denoiser, from 0; at most a sixth of the calls.
        exploration: Weight of a prediction's standard deviation, from 0; it sinks to 0 as the calls
            are used up.
        stop_cosine: Cosine from which on a text is left alone.
    """

    beam: int = 4
    proposals: int = 8
    gain: float = 0.001
    infills: int = 8
    probes: int = 48
    exploration: float = 0.1
    stop_cosine: float = 0.9999
    needs_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("beam", "proposals"):
            require_between(name, getattr(self, name), 1)
        for name in ("gain", "infills", "probes", "exploration"):
            require_between(name, getattr(self, name), 0.0)
        require_between("stop_cosine", self.stop_cosine, -1.0, 1.0)

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
        """See `Strategy`; ``steps`` are those of the greedy start.

        Raises:
            ConfigError: There is no scorer.
        """
        scorer = require_scorer(scorer, "guided-search")
        start = Greedy()(denoiser, embedding, canvas, steps=steps)
        words = likely_words(denoiser, embedding, canvas)
        texts = [
            _Text(row, content_of(ids, canvas), spent + 1, words[row], generators[row], canvas)
            for row, (ids, spent) in enumerate(
                zip(start.tokens.tolist(), start.passes.tolist(), strict=True)
            )
        ]
        _embed(texts, [[text.start] for text in texts], canvas, scorer)
        shown, index = canvas.blank(len(texts), torch.device("cpu")), 0
        while True:
            self._score(texts, denoiser, embedding, canvas)
            left = [scorer.remaining(text.row) for text in texts]
            for text in texts:
                text.finished |= text.cosine >= self.stop_cosine or left[text.row] < 1
            searching = [text for text in texts if not text.finished]
            index += 1
            if on_step is not None:
                rounds = max(
                    (-(-left[text.row] // self.proposals) for text in searching), default=0
                )
                step = _step(texts, shown, (index, index + rounds), scorer.calls, canvas)
                shown = step.tokens.clone()
                on_step(step)
            if not searching:
                return _decoded(texts, scorer.calls, canvas, embedding)
            for text in searching:
                text.fit()
            self._infill(texts, denoiser, embedding, canvas)
            batches = [self._propose(text, left[text.row], canvas) for text in searching]
            _embed(searching, batches, canvas, scorer)

    def _score(
        self, texts: Sequence[_Text], denoiser: DenoiserFn, embedding: Tensor, canvas: Canvas
    ) -> None:
        """Have the denoiser score the nearest hypotheses it has not seen."""
        new = [
            (text.row, tokens)
            for text in texts
            for tokens in text.nearest(1 if text.finished else self.beam)
            if tokens and tokens not in text.scores
        ]
        if not new:
            return
        rngs = [text.rng for text in texts]
        scores, passes = masked_scores(denoiser, embedding, canvas, new, rngs)
        for (row, tokens), one, spent in zip(new, scores, passes, strict=True):
            texts[row].scores[tokens] = one
            texts[row].passes += spent

    def _infill(
        self, texts: Sequence[_Text], denoiser: DenoiserFn, embedding: Tensor, canvas: Canvas
    ) -> None:
        """Have the denoiser fill holes in the hypotheses to edit."""
        holes = []
        ids = torch.zeros(len(texts), _FAVOURERS * canvas.length, dtype=torch.long)
        nats = torch.zeros(ids.shape)
        for text in texts:
            parents = [tokens for tokens in text.nearest(self.beam) if tokens]
            if text.finished or len(text.known) < 2 or not parents or not self.infills:  # noqa: PLR2004 - the start and an answer
                continue
            best = text.nearest(_FAVOURERS)
            counts = Counter(token for tokens in best for token in set(tokens))
            ids[text.row, : len(counts)] = torch.tensor(list(counts))
            nats[text.row, : len(counts)] = torch.tensor(list(counts.values())) / len(best)
            doubts = _doubts(text, parents)
            for k in range(self.infills):
                tokens, doubt = parents[k % len(parents)], doubts[k % len(parents)]
                own = text.scores[tokens].own
                holes.append(make_hole(text.row, tokens, own, doubt, canvas, text.rng))
        if not holes:
            return
        favoured = ids.to(embedding.device), _FAVOUR * nats.to(embedding.device)
        rngs = [text.rng for text in texts]
        filled, passes = infill(denoiser, embedding, canvas, holes, favoured, rngs, _PASSES)
        for hole, (tokens, gain), spent in zip(holes, filled, passes, strict=True):
            text = texts[hole.row]
            text.passes += spent
            text.infills[tokens] = gain
        for text in texts:
            text.infills = dict(list(text.infills.items())[-_INFILLS_KEPT:])

    def _propose(self, text: _Text, left: int, canvas: Canvas) -> list[Tokens]:
        """Choose the edited copies most worth a call; at first the single words."""
        if len(text.known) == 1 and canvas.end_id is not None:
            likely: list[int] = text.words[0][: min(self.probes, left // 6)].tolist()
            probes: list[Tokens] = [(word,) for word in likely if (word,) != text.start]
            if probes:
                return probes
        rows, gains = _candidates(text, text.nearest(self.beam), canvas)
        if not len(rows):
            return []
        mean, deviation = text.model.predict(rows)
        share = left / (left + text.calls)
        worth = mean + self.exploration * share * deviation
        worth += self.gain * np.clip(gains, *_GAIN_LIMITS)
        best = np.argsort(-worth.round(6), kind="stable")[: min(self.proposals, left)]
        return [tuple(row[row != NOTHING].tolist()) for row in rows[best]]


class _Text:
    """The search for one text: what was embedded, and what is known about it."""

    def __init__(
        self,
        row: int,
        start: Tokens,
        passes: int,
        words: Words,
        generator: torch.Generator,
        canvas: Canvas,
    ) -> None:
        self.row, self.start, self.passes, self.words = row, start, passes, words
        self.rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        self.length = canvas.length
        self.known: dict[Tokens, int] = {}  # hypotheses embedded, numbered
        self.cosines: list[float] = []
        self.vectors: list[NDArray[np.float32]] = []
        self.made: list[int] = []  # passes spent when a hypothesis was made
        self.scores: dict[Tokens, MaskedScores] = {}
        self.infills: dict[Tokens, float] = {}  # with the gain in nats, the latest last
        self.idle, self.calls, self.finished = 0, 0, False
        self.model: CosineModel

    @property
    def cosine(self) -> float:
        """Of the nearest hypothesis."""
        return max(self.cosines, default=-1.0)

    def nearest(self, count: int) -> list[Tokens]:
        """Find the hypotheses with the highest cosines, the first made before its equals."""
        return sorted(self.known, key=lambda tokens: -self.cosines[self.known[tokens]])[:count]

    def learn(self, tokens: Tokens, cosine: float, vector: NDArray[np.float32]) -> None:
        """Remember what the encoder said."""
        self.known[tokens] = len(self.known)
        self.cosines.append(cosine)
        self.vectors.append(vector)
        self.made.append(self.passes)

    def fit(self) -> None:
        """Learn from what was embedded."""
        rows = to_rows(list(self.known), self.length)
        self.model = CosineModel(rows, np.stack(self.vectors), np.array(self.cosines))


def _doubts(text: _Text, parents: Sequence[Tokens]) -> list[NDArray[np.float64]]:
    """Estimate how much each token of each parent is in question.

    What the denoiser doubts, and what the encoder's answers so far say is better left out.
    """
    if not _DOUBTS:
        return [np.ones(len(parent)) for parent in parents]
    shorter = [parent[:j] + parent[j + 1 :] for parent in parents for j in range(len(parent))]
    mean, _ = text.model.predict(to_rows(shorter, text.length))
    doubts, start = [], 0
    for parent in parents:
        harm = mean[start : start + len(parent)] - text.cosines[text.known[parent]]
        start += len(parent)
        unlikely = 1.0 - np.exp(text.scores[parent].own)
        doubts.append(unlikely * np.exp(np.clip(harm / _HARM, -4.0, 4.0)))
    return doubts


def _candidates(
    text: _Text, parents: Sequence[Tokens], canvas: Canvas
) -> tuple[Rows, NDArray[np.float64]]:
    """Make edited copies of the parents that were not embedded yet.

    Returns:
        Each once [M, L], and the largest gain in nats that it was made with [M].
    """
    fixed = canvas.end_id is None or canvas.pad_id is None
    shortest, longest = (canvas.length,) * 2 if fixed else (1, max(canvas.length - 1, 1))
    rows, gains = [], []
    for parent in parents:
        if not parent:
            rows.append(to_rows(text.words[0][:, None].tolist(), canvas.length))
            gains.append(np.zeros(len(rows[-1])))
            continue
        singles = single_edits(parent, text.scores[parent], text.words, text.rng)
        several = combined_edits(singles, _COMBINATIONS, text.rng)
        rows += [apply_edits(parent, edits, canvas.length) for edits in (singles, several)]
        gains += [singles.gains, several.gains - 1.0]
    rows.append(to_rows(list(text.infills), canvas.length))
    gains.append(np.array(list(text.infills.values())))
    rows.append(crossover(parents, _CROSSOVERS, canvas.length, text.rng))
    gains.append(np.full(len(rows[-1]), -2.0))
    every, gain = np.concatenate(rows), np.concatenate(gains)
    order = np.argsort(-gain, kind="stable")
    every, gain = every[order], gain[order]
    # Rows are told apart by a hash, known ones first
    known = to_rows(list(text.known), canvas.length)
    factors = np.random.default_rng(0).integers(2**63, size=canvas.length) * 2 + 1
    hashes = np.concatenate([known, every]) @ factors
    first = np.unique(hashes, return_index=True)[1]
    first = np.sort(first[first >= len(known)]) - len(known)
    sizes = (every[first] != NOTHING).sum(axis=1)
    first = first[(sizes >= shortest) & (sizes <= longest)]
    return every[first], gain[first]


def _embed(
    texts: Sequence[_Text], batches: Sequence[list[Tokens]], canvas: Canvas, scorer: Scorer
) -> None:
    """Embed the new hypotheses of all texts together."""
    batch = [(text, tokens) for text, some in zip(texts, batches, strict=True) for tokens in some]
    if batch:
        which = [text.row for text, _ in batch]
        rows = [row_of(tokens, canvas) for _, tokens in batch]
        cosines = scorer(which, rows).double().tolist()
        vectors = scorer.vectors(which, rows)
        for (text, tokens), cosine, vector in zip(batch, cosines, vectors, strict=True):
            text.learn(tokens, cosine, vector)
    calls = scorer.calls.tolist()
    for text in texts:
        text.idle = text.idle + 1 if calls[text.row] == text.calls else 0
        text.calls = calls[text.row]
        text.finished |= text.idle >= _PATIENCE


def _step(
    texts: Sequence[_Text], shown: Tensor, place: tuple[int, int], calls: Tensor, canvas: Canvas
) -> DecodingStep:
    """Show the nearest hypothesis of every text to a live display."""
    rows, confidences, _ = zip(*(_best(text, canvas) for text in texts), strict=True)
    tokens = torch.tensor(rows)
    cosines = torch.tensor([text.cosine for text in texts])
    nothing = torch.zeros(len(texts))  # is masked
    return DecodingStep(
        *place, tokens, torch.tensor(confidences), tokens != shown, nothing, cosines, calls.clone()
    )


def _best(text: _Text, canvas: Canvas) -> tuple[list[int], list[float], int]:
    """Sequence, confidences and passes of the nearest hypothesis.

    The confidence of a token is its probability where it was masked with some of the others. The
    end and what follows it were not asked about; their confidence is 1.
    """
    tokens = text.nearest(1)[0]
    own = text.scores[tokens].own if tokens else np.zeros(0)
    confidences = [*np.exp(own).tolist(), *[1.0] * (canvas.length - len(tokens))]
    return row_of(tokens, canvas), confidences, text.made[text.known[tokens]]


def _decoded(texts: Sequence[_Text], calls: Tensor, canvas: Canvas, to: Tensor) -> Decoded:
    rows, confidences, made = zip(*(_best(text, canvas) for text in texts), strict=True)
    passes = [text.passes for text in texts]
    order = torch.tensor(made)[:, None].expand(-1, canvas.length)
    results = torch.tensor(rows), torch.tensor(confidences), order, torch.tensor(passes), calls
    return Decoded(*(x.to(to.device) for x in results))
