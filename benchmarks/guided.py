"""What encoder calls are worth: ``python -m benchmarks.guided TEXTS.parquet --calls 300``.

Guided search and best-of-N on held-out pieces, with the shipped weights: exact match, token
accuracy, token-set F1 and cosine when each text has had so many calls. One search gives the whole
curve of its strategy; the row of 1 call is greedy decoding, which both start from.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import print_table
from unembed.config import DataSection
from unembed.data.pieces import Piece, cut_pieces
from unembed.decoding import DecodingStep
from unembed.device import choose_compute
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.bootstrap import summarise
from unembed.evaluation.metrics import exact_match, token_accuracy, token_set_f1
from unembed.files import read_texts
from unembed.inverter import Inverter

_METRICS = ("exact match", "token accuracy", "token-set F1", "cosine")


@dataclass
class Found:
    """The nearest hypothesis of one text after some calls."""

    calls: int
    tokens: list[int]
    cosine: float


class Curve:
    """Listens to a search and remembers the nearest hypothesis at each number of calls."""

    def __init__(self, marks: Sequence[int], count: int) -> None:
        self.at: dict[int, list[Found | None]] = {mark: [None] * count for mark in marks}

    def __call__(self, step: DecodingStep) -> None:
        """The state after a round counts for every mark it has not passed."""
        assert step.cosines is not None
        assert step.encoder_calls is not None
        rows = zip(
            step.encoder_calls.tolist(), step.tokens.tolist(), step.cosines.tolist(), strict=True
        )
        for row, (calls, tokens, cosine) in enumerate(rows):
            for mark, found in self.at.items():
                if calls <= mark:
                    found[row] = Found(calls, tokens, cosine)
        most = int(step.encoder_calls.max())
        print(f"\r{most} calls, mean cosine {step.cosines.mean():.3f}", end="", file=sys.stderr)


def held_out(texts: Path, inverter: Inverter, first: int, count: int) -> list[Piece]:
    """Pieces first..first+count of those drawn with seed 5, cut as in training."""
    settings = DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )
    pieces = cut_pieces(list(read_texts(texts, "text")), inverter.tokenizer, settings)
    order = np.random.default_rng(5).permutation(len(pieces))
    return [pieces[k] for k in order[first : first + count]]


def figures(pieces: Sequence[Piece], found: Sequence[Found | None], inverter: Inverter) -> Any:
    """Mean and interval of each metric, and the mean number of calls."""
    columns: list[list[float]] = [[] for _ in _METRICS]
    for piece, one in zip(pieces, found, strict=True):
        assert one is not None
        ids = [one.tokens[k] for k in inverter.tokenizer.content_positions(one.tokens)]
        for column, metric in zip(
            columns, (exact_match, token_accuracy, token_set_f1), strict=False
        ):
            column.append(metric(piece.token_ids, ids))
        columns[3].append(one.cosine)
    rows = {name: summarise(column) for name, column in zip(_METRICS, columns, strict=True)}
    return rows, float(np.mean([one.calls for one in found if one is not None]))


def measure(
    name: str,
    options: dict[str, Any],
    pieces: Sequence[Piece],
    inverter: Inverter,
    encoder: Encoder,
    marks: Sequence[int],
) -> tuple[list[list[str]], float]:
    """The table rows of one strategy, and its seconds a text."""
    vectors = encoder.encode([piece.text for piece in pieces])
    curve = Curve(marks, len(pieces))
    began = time.process_time()
    inverter.invert(
        vectors,
        strategy=name,
        options=options,
        encoder=encoder,
        encoder_calls=max(marks),
        batch_size=len(pieces),
        on_step=curve,
    )
    seconds = (time.process_time() - began) / len(pieces)
    table = []
    for mark, found in curve.at.items():
        rows, calls = figures(pieces, found, inverter)
        cells = [f"{f.mean:.3f} [{f.low:.3f}, {f.high:.3f}]" for f in rows.values()]
        table.append([name, str(mark), f"{calls:.1f}", *cells])
    return table, seconds


def main() -> None:
    """Print the curve of each strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--count", type=int, default=32, help="pieces")
    parser.add_argument("--first", type=int, default=64, help="pieces to leave out before them")
    parser.add_argument("--best-of", type=int, default=50, help="samples; 0: leave it out")
    parser.add_argument("--options", type=json.loads, default={}, help="of guided search, as JSON")
    arguments = parser.parse_args()
    inverter = Inverter.from_pretrained(arguments.checkpoint)
    encoder = load_encoder(inverter.encoder.name, compute=choose_compute("cpu", "float32"))
    pieces = held_out(arguments.texts, inverter, arguments.first, arguments.count)
    plans: list[tuple[str, dict[str, Any], int]] = [
        ("guided-search", arguments.options, arguments.calls)
    ]
    if arguments.best_of:
        plans.append(("best-of", {"samples": arguments.best_of}, arguments.best_of))
    table, notes = [], []
    for name, options, calls in plans:
        marks = [m for m in (1, 50, 100, 300, 1000, 3000) if m < calls] + [calls]
        rows, seconds = measure(name, options, pieces, inverter, encoder, marks)
        table += rows
        notes.append(f"{name}: {seconds:.2f} s of processor time a text, {calls} calls")
    print(f"n = {len(pieces)} pieces; mean [95% bootstrap interval]\n")
    print_table(["strategy", "calls at most", "calls made", *_METRICS], table)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
