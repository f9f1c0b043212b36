"""Decode held-out texts from a fully masked start and say how much came back, beside controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.config import DataSection
from unembed.data.pairs import Pairs
from unembed.data.pieces import Piece, cut_pieces
from unembed.encoders.base import Encoder
from unembed.errors import DataError
from unembed.evaluation.metrics import (
    Figure,
    exact_match,
    summarise,
    token_accuracy,
    token_set_f1,
)
from unembed.inverter import Inversion, Inverter

METRICS = ("token accuracy", "exact match", "token-set F1", "cosine")
_BATCH = 64
_CHUNK_ROWS = 65_536

ProgressFn = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Example:
    """An original beside its recovery."""

    original: str
    recovered: str
    cosine: float | None


@dataclass(frozen=True)
class Evaluation:
    """The table of one evaluation.

    Attributes:
        rows: What was decoded (the inverter, the controls) → metric → figure; a metric that could
            not be computed is None.
        examples: Every text with its recovery.
        settings: How it was made: inverter, encoder, strategy, steps, seed, number of texts.
        notes: What is missing, and why.
    """

    rows: dict[str, dict[str, Figure | None]]
    examples: list[Example]
    settings: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate(
    inverter: Inverter,
    encoder: Encoder,
    texts: Sequence[str],
    *,
    train_pairs: Pairs | None = None,
    limit: int | None = 1000,
    strategy: str = "greedy",
    steps: int | None = None,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> Evaluation:
    """Measure what vectors of held-out texts give away.

    The texts are cut into pieces as in training. Each piece is embedded, decoded from the vector
    alone, and compared; the recovered text is embedded again for the cosine. Two controls go
    through the same metrics: the model given another text's embedding (what fluent guessing is
    worth), and the nearest training text by cosine (what retrieval alone is worth).

    Args:
        inverter: Under test.
        encoder: The encoder it was trained for.
        texts: Held out: never trained on.
        train_pairs: The training pairs, for the nearest-text control.
        limit: Pieces to evaluate, drawn with the seed; all when None.
        strategy: Decoding strategy.
        steps: Denoiser passes per text; one per position when not given.
        seed: Of the draw, of the strategies that sample and of the bootstrap.
        progress: Called with (stage, done, total).

    Raises:
        DataError: The texts yield fewer than two pieces.
        EncoderError: The inverter or the pairs belong to another encoder.
    """
    inverter.require_encoder(encoder)
    if train_pairs is not None:
        inverter.encoder.require_same(train_pairs.encoder, "training pairs")
    pieces = _sample_pieces(texts, inverter, limit, seed)
    report = progress or (lambda stage, done, total: None)
    ids = [piece.token_ids for piece in pieces]
    vectors = encoder.encode([piece.text for piece in pieces])
    options = {"strategy": strategy, "steps": steps, "seed": seed}
    rows: dict[str, dict[str, Figure | None]] = {}

    found = _decode(inverter, vectors, options, "inverting", report)
    cosines = _cosines(encoder, [item.text for item in found], vectors)
    rows["inverter"] = _table_row(ids, [item.token_ids for item in found], cosines, seed)

    others = np.roll(vectors, 1, axis=0)
    control = _decode(inverter, others, options, "inverting shuffled embeddings", report)
    similarity = _cosines(encoder, [item.text for item in control], vectors)
    tokens = [item.token_ids for item in control]
    rows["shuffled embedding"] = _table_row(ids, tokens, similarity, seed)

    notes = []
    if train_pairs is None:
        notes.append("nearest training text: not measured, no training pairs were given")
    else:
        nearest, similar = nearest_pairs(train_pairs, vectors, report)
        rows["nearest training text"] = _table_row(ids, nearest, similar, seed)
    settings = {
        "texts": len(pieces),
        "encoder": encoder.identity.to_dict(),
        "strategy": strategy,
        "passes": found[0].passes,
        "seed": seed,
        "threat_model": "vector only",
        "encoder_calls": 0,
    }
    examples = [
        Example(piece.text, item.text, cosine)
        for piece, item, cosine in zip(pieces, found, cosines, strict=True)
    ]
    return Evaluation(rows, examples, settings, notes)


def _decode(
    inverter: Inverter,
    vectors: NDArray[np.float32],
    options: dict[str, Any],
    stage: str,
    report: ProgressFn,
) -> list[Inversion]:
    found: list[Inversion] = []
    for start in range(0, len(vectors), _BATCH):
        part = vectors[start : start + _BATCH]
        found.extend(inverter.invert(part, first_index=start, **options))
        report(stage, len(found), len(vectors))
    return found


def _sample_pieces(
    texts: Sequence[str], inverter: Inverter, limit: int | None, seed: int
) -> list[Piece]:
    settings = DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )
    pieces = cut_pieces(texts, inverter.tokenizer, settings)
    if len(pieces) < 2:  # noqa: PLR2004 - the shuffled control needs another text
        raise DataError(
            f"texts that yield at least 2 pieces of {settings.min_tokens} tokens or more",
            str(len(pieces)),
            "Choose another file",
        )
    if limit is None or limit >= len(pieces):
        return pieces
    chosen = np.random.default_rng(seed).choice(len(pieces), size=max(limit, 2), replace=False)
    return [pieces[index] for index in sorted(chosen)]


def _table_row(
    originals: Sequence[Sequence[int]],
    recovered: Sequence[Sequence[int]],
    cosines: Sequence[float | None],
    seed: int,
) -> dict[str, Figure | None]:
    both = list(zip(originals, recovered, strict=True))
    columns: list[list[float | None]] = [
        [metric(a, b) for a, b in both] for metric in (token_accuracy, exact_match, token_set_f1)
    ]
    columns.append(list(cosines))
    return {name: summarise(column, seed) for name, column in zip(METRICS, columns, strict=True)}


def _cosines(
    encoder: Encoder, texts: Sequence[str], vectors: NDArray[np.float32]
) -> list[float | None]:
    """Cosine of each re-encoded text with its target; None where there is no text to encode."""
    result: list[float | None] = [None] * len(texts)
    rows = [index for index, text in enumerate(texts) if text.strip()]
    if rows:
        again = encoder.encode([texts[row] for row in rows])
        for row, cosine in zip(rows, np.sum(again * vectors[rows], axis=1), strict=True):
            result[row] = float(cosine)
    return result


def nearest_pairs(
    pairs: Pairs, vectors: NDArray[np.float32], report: ProgressFn
) -> tuple[list[list[int]], list[float]]:
    """Content tokens and cosine of the nearest prepared pair to each vector [N, D]."""
    best = np.full(len(vectors), -np.inf, dtype=np.float32)
    rows = np.zeros(len(vectors), dtype=np.int64)
    for start in range(0, len(pairs), _CHUNK_ROWS):
        index = np.arange(start, min(start + _CHUNK_ROWS, len(pairs)))
        _, embeddings = pairs.rows(index)
        similarity = vectors @ embeddings.T  # [N, rows]
        winner = similarity.argmax(axis=1)
        value = similarity[np.arange(len(vectors)), winner]
        better = value > best
        best[better], rows[better] = value[better], index[winner[better]]
        report("searching the training texts", int(index[-1]) + 1, len(pairs))
    tokens, _ = pairs.rows(rows)
    found = []
    for row in tokens.tolist():
        found.append([row[i] for i in pairs.tokenizer.content_positions(row)])
    return found, [float(value) for value in best]
