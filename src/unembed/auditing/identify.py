"""Which encoder made some vectors: lengths, spread, dimension, and texts embedded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.base import Encoder
from unembed.encoders.vectors import as_unit_vectors
from unembed.inverter import Inverter

SAME = 0.99  # cosine from which a vector is taken for the encoder's own
_COMPARED = 32
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
        differs: What would explain the difference: a prompt, a cut; None where nothing does.
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
    that it is the encoder; below, usual prompts and a cut of the text are tried, and what brings
    the cosine there is named. Without texts the statistics of the inverter's fingerprint can only
    refuse.

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
    if vectors.shape[1] != guess.dimension:
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
    rows = [row for row, text in enumerate(texts) if text and text.strip()][:_COMPARED]
    name = encoder.identity.describe()
    if not rows:
        return Identity(**facts, encoder=name, notes=["no row has a text"])
    originals = [texts[row] or "" for row in rows]

    def agreement(variant: Sequence[str]) -> float:
        return float(np.median((encoder.encode(list(variant)) * unit[rows]).sum(axis=1)))

    cosine = agreement(originals)
    differs = None
    if cosine < SAME:
        tried = {f"the prompt {p!r} before each text": [p + t for t in originals] for p in _PROMPTS}
        tried["text cut to its first half"] = [t[: max(1, len(t) // 2)] for t in originals]
        tried["lower-cased text"] = [text.lower() for text in originals]
        scores = {what: agreement(variant) for what, variant in tried.items()}
        best = max(scores, key=scores.__getitem__)
        if scores[best] > max(cosine, SAME):
            differs = f"{best} (cosine {scores[best]:.3f})"
    verdict = "same" if cosine >= SAME else "different"
    return Identity(
        **facts,
        encoder=name,
        verdict=verdict,
        cosine=round(cosine, 4),
        compared=len(rows),
        differs=differs,
    )
