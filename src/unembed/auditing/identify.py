"""Which encoder made some vectors: lengths, spread, dimension, and texts embedded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.auditing.scoring import TEXT_CHARS
from unembed.encoders.base import Encoder
from unembed.encoders.pipeline import variant
from unembed.encoders.sentence import SentenceEncoder
from unembed.encoders.vectors import as_unit_vectors
from unembed.inverter import Inverter

SAME = 0.99  # cosine from which a vector is taken for the encoder's own
_COMPARISONS = 32
_ENOUGH, _GAIN = 0.9995, 0.002  # cosine at which nothing more is tried; what a trial must add
_TRIAL_TEXTS = 8  # texts that the trials are made with
_POOLINGS = ("mean", "cls", "lasttoken", "max", "weightedmean")
_CUTS = (32, 64, 128, 256, 512)  # tokens
_UNIT = 1e-3
# Dimension → encoders that many stores hold; a hint, never a proof
_CANDIDATES = {
    256: "text-embedding-3 shortened, potion-base-8M",
    384: "all-MiniLM-L6-v2, bge-small, e5-small, gte-small, multilingual-e5-small",
    512: "text-embedding-3-small shortened, jina-embeddings-v2-small, distiluse",
    768: "all-mpnet-base-v2, bge-base, e5-base, gte-base, gtr-t5-base, nomic-embed-text, "
    "embeddinggemma, text-embedding-004",
    1024: "bge-large, bge-m3, e5-large, gte-large, mxbai-embed-large, jina-embeddings-v3, "
    "Qwen3-Embedding-0.6B, Cohere embed-v3, Titan v2",
    1536: "text-embedding-ada-002, text-embedding-3-small",
    2560: "Qwen3-Embedding-4B",
    3072: "text-embedding-3-large, gemini-embedding-001",
    4096: "Qwen3-Embedding-8B, e5-mistral, NV-Embed, SFR-Embedding",
}
_PROMPTS = (
    "passage: ",
    "query: ",
    "search_document: ",
    "search_query: ",
    "Document: ",
    "Represent this sentence for searching relevant passages: ",
)


@dataclass(frozen=True)
class Identity:
    """What some vectors look like, and whose they are as far as it can be told.

    Attributes:
        dimension: D.
        norms: Least, mean and largest length.
        unit: All have length 1: the encoder or the store normalises.
        mean_length: Length of the mean of the unit vectors, 0 to 1; near 0 they point everywhere.
        candidates: Encoders of this dimension that many stores hold.
        encoder: The encoder they were compared with.
        verdict: ``same``, ``different`` or ``unknown``.
        cosine: Median cosine of the vectors with those of their texts, embedded again.
        compared: Texts that were embedded again.
        differs: What explains the difference: a prompt, a pooling, a cut of texts or dimensions;
            None where nothing that was tried does.
        notes: What else was seen.
    """

    dimension: int
    norms: tuple[float, float, float]
    unit: bool
    mean_length: float
    candidates: str
    encoder: str | None = None
    verdict: str = "unknown"
    cosine: float | None = None
    compared: int = 0
    differs: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def identify(
    vectors: NDArray[np.float32],
    texts: Sequence[str | None] | None,
    inverter: Inverter,
    encoder: Encoder | None,
) -> Identity:
    """Say what some vectors look like and whether an encoder made them.

    Where texts are stored, up to 32 of them are embedded again. A median cosine above .99 says
    that it is the encoder; below, and for texts that differ beside others that agree, usual
    prompts, other poolings, and cuts of the text and of the dimensions are tried, together too,
    and what brings the cosine there is named. Without texts the statistics of the inverter's
    fingerprint can only refuse.

    Args:
        vectors: [N, D], finite and not zero.
        texts: Beside them; None where there are none.
        inverter: Whose encoder is the guess.
        encoder: That encoder, or the one that was named; None where it cannot be run.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    unit = as_unit_vectors(vectors, vectors.shape[1])
    facts: dict[str, Any] = {
        "dimension": vectors.shape[1],
        "norms": tuple(round(float(x), 4) for x in (lengths.min(), lengths.mean(), lengths.max())),
        "unit": bool(np.abs(lengths - 1).max() < _UNIT),
        "mean_length": round(float(np.linalg.norm(unit.mean(axis=0))), 4),
        "candidates": _CANDIDATES.get(vectors.shape[1], "none that is widely used"),
    }
    guess = inverter.encoder if encoder is None else encoder.identity
    shorter = encoder is not None and texts and vectors.shape[1] < guess.dimension
    if vectors.shape[1] != guess.dimension and not shorter:
        note = f"{guess.name} writes {guess.dimension} dimensions, the store holds others"
        return Identity(**facts, encoder=guess.describe(), verdict="different", notes=[note])
    if encoder is None or not texts:
        return _by_statistics(facts, unit, inverter)
    return _by_texts(facts, unit, texts, encoder)


def _by_statistics(
    facts: dict[str, Any], unit: NDArray[np.float32], inverter: Inverter
) -> Identity:
    fingerprint = inverter.fingerprint
    statistics = None if fingerprint is None else fingerprint.statistics
    doubt = None if statistics is None else statistics.doubt(unit, inverter.encoder.name)
    notes = [doubt] if doubt else ["no text to embed again: the encoder is assumed, not proved"]
    verdict = "different" if doubt else "unknown"
    return Identity(**facts, encoder=inverter.encoder.describe(), verdict=verdict, notes=notes)


def _by_texts(
    facts: dict[str, Any], unit: NDArray[np.float32], texts: Sequence[str | None], encoder: Encoder
) -> Identity:
    """Compare the vectors with those of their texts; where they differ, say in what."""
    size = facts["dimension"]
    rows = _choose_rows(texts)
    name = encoder.identity.describe()
    if not rows:
        verdict = "unknown" if size == encoder.identity.dimension else "different"
        return Identity(**facts, encoder=name, verdict=verdict, notes=["no row has a text"])
    trials = _Trials(encoder, [_readable(texts[row]) for row in rows], unit[rows])
    cosines = trials.cosines(_Recipe())
    cosine = float(np.sort(cosines)[len(rows) // 2])  # of an even number the upper median
    low = np.flatnonzero(cosines < SAME)
    same = cosine >= SAME and size == encoder.identity.dimension
    differs, notes = None, []
    if len(low) or not same:
        # Where most agree, it is the others that need an explanation
        recipe, reached = trials.of(low.tolist() if same else range(len(rows))).explain()
        what = recipe.describe(encoder)
        if size != encoder.identity.dimension:
            what.append(f"the first {size} of {encoder.identity.dimension} dimensions")
        if reached >= SAME and what:
            some = f"for {len(low)} of {len(rows)} texts: " if same else ""
            differs = f"{some}{', '.join(what)} (cosine {reached:.3f})"
        else:
            nearest = f"; the nearest, {', '.join(what)}, has a cosine of {reached:.3f}"
            notes.append(
                f"{'some' if same else 'the'} vectors are not those of {encoder.identity.name}; "
                f"tried: {trials.summary}{nearest if what else ''}"
            )
    return Identity(
        **facts,
        encoder=name,
        verdict="same" if same else "different",
        cosine=round(cosine, 4),
        compared=len(rows),
        differs=differs,
        notes=notes,
    )


def _readable(text: str | None) -> str:
    """A text as it can be embedded, without what no encoder reads of ten million characters."""
    return (text or "")[:TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")


def _choose_rows(texts: Sequence[str | None]) -> list[int]:
    """Rows to embed again: half of them the first ones, half the longest, which may be cut."""
    rows = [row for row, text in enumerate(texts) if _readable(text).strip()]
    longest = sorted(rows, key=lambda row: (-len(texts[row] or ""), row))
    selection = dict.fromkeys([*rows[: _COMPARISONS // 2], *longest[: _COMPARISONS // 2], *rows])
    return sorted(list(selection)[:_COMPARISONS])


@dataclass(frozen=True)
class _Recipe:
    """How somebody may have made vectors of texts with an encoder; as the encoder does if empty."""

    prompt: str | None = None
    pooling: str | None = None
    tokens: int | None = None
    lower: bool = False

    def describe(self, encoder: Encoder) -> list[str]:
        """What differs from the encoder as it is."""
        own = encoder.identity.prompt
        parts = []
        if self.prompt is not None:
            instead = f" instead of {own!r}" if own else ""
            parts.append(
                f"prompt {self.prompt!r}{instead}" if self.prompt else f"no prompt{instead}"
            )
        if self.pooling is not None:
            parts.append(f"pooling {self.pooling}")
        if self.tokens is not None:
            parts.append(f"texts read up to {self.tokens} tokens")
        if self.lower:
            parts.append("lower-cased texts")
        return parts


class _Trials:
    """Texts embedded again in ways that are usual, one difference at a time and then together."""

    def __init__(self, encoder: Encoder, texts: list[str], vectors: NDArray[np.float32]) -> None:
        self._encoder, self._texts, self._vectors = encoder, texts, vectors
        prompts = [p for p in ("", *_PROMPTS) if p != encoder.identity.prompt]
        self._axes: dict[str, list[Any]] = {"prompt": prompts, "tokens": list(_CUTS)}
        if isinstance(encoder, SentenceEncoder):
            own = dict(encoder.pipeline).get("pooling")
            self._axes["pooling"] = [name for name in _POOLINGS if name != own]
        self._axes["lower"] = [True]

    @property
    def summary(self) -> str:
        """For the report."""
        return f"{len(self._axes['prompt'])} prompts, {', '.join(list(self._axes)[1:])}"

    def of(self, places: Sequence[int]) -> _Trials:
        """The same of eight of some texts, half of them the longest."""
        longest = sorted(places, key=lambda i: -len(self._texts[i]))[: _TRIAL_TEXTS // 2]
        few = sorted(list(dict.fromkeys([*longest, *places]))[:_TRIAL_TEXTS])
        return _Trials(self._encoder, [self._texts[i] for i in few], self._vectors[few])

    def cosines(self, recipe: _Recipe) -> NDArray[np.float64]:
        """Of each vector with its text embedded so; -1 where it cannot be."""
        try:
            again = _embed(self._encoder, recipe, self._texts)
        except ValueError:  # no such pooling or positions
            return np.full(len(self._texts), -1.0)
        rows = again[:, : self._vectors.shape[1]].astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        result: NDArray[np.float64] = (rows * self._vectors).sum(axis=1)
        return result

    def explain(self) -> tuple[_Recipe, float]:
        """The recipe that comes nearest, and its median cosine: the best of each axis in turn.

        A difference counts only if it brings the cosine up by .002, above what rounding does.
        """
        best = _Recipe()
        reached = float(np.median(self.cosines(best)))
        free = set(self._axes)
        while free and reached < _ENOUGH:
            trials = {
                (axis, value): float(np.median(self.cosines(replace(best, **{axis: value}))))
                for axis in sorted(free)
                for value in self._axes[axis]
            }
            (axis, value), cosine = max(trials.items(), key=lambda item: item[1])
            if cosine < reached + _GAIN:
                break
            best, reached = replace(best, **{axis: value}), cosine
            free.discard(axis)
        return best, reached


def _embed(encoder: Encoder, recipe: _Recipe, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors [n, D] of texts by a recipe.

    Raises:
        ValueError: The encoder has no such pooling, or reads fewer tokens.
    """
    texts = [text.lower() for text in texts] if recipe.lower else list(texts)
    if isinstance(encoder, SentenceEncoder):
        model = encoder.differentiable
        if recipe.pooling is not None or recipe.tokens is not None:
            model = variant(model, recipe.pooling, recipe.tokens)
        prompt = encoder.identity.prompt if recipe.prompt is None else recipe.prompt
        encoder = SentenceEncoder(
            model, replace(encoder.identity, prompt=prompt), encoder.tokenizer
        )
        return encoder.encode(texts)
    if recipe.tokens is not None:
        ids = encoder.tokenizer.encode(texts)
        starts = encoder.tokenizer.decode([tokens[: recipe.tokens] for tokens in ids])
        texts = [
            short if short.strip() else text for short, text in zip(starts, texts, strict=True)
        ]
    return encoder.encode([(recipe.prompt or "") + text for text in texts])
