"""What encoder calls are worth: ``python -m benchmarks.guided TEXTS.parquet --calls 300``.

Guided search and best-of-N on held-out pieces, with the shipped weights: exact match, token
accuracy, token-set F1 and cosine when each text has had so many calls. One search gives the whole
curve of its strategy; the row of 1 call is greedy decoding, which both start from. ``--without``
leaves parts of guided search out, one at a time, and prints the paired differences;
``--language-model WEIGHT/PROPOSALS`` lets SmolLM2 judge and propose words (extra ``lm``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import print_table
from benchmarks.prior import LanguagePrior, language_prior
from unembed.baselines.language_model import load_language_model
from unembed.config import DataSection
from unembed.data.pieces import Piece, cut_pieces
from unembed.data.readers import read_texts
from unembed.decoding.guided_search import edits, search
from unembed.device import choose_compute
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.bootstrap import summarise
from unembed.evaluation.metrics import exact_match, token_accuracy, token_set_f1
from unembed.inverter import Inverter

_METRICS = ("exact match", "token accuracy", "token-set F1", "cosine")

_TEXT_METRICS = (exact_match, token_accuracy, token_set_f1)
STEPS = 8  # denoiser passes of the start

# Parts of guided search: the option or the constant that leaves each out
PARTS: dict[str, tuple[ModuleType | None, str, Any]] = {
    "gain": (None, "gain", 0.0),
    "infills": (search, "_INFILLS", 0),
    "moves": (search, "_MOVES", 0),
    "lengths": (search, "_LENGTH_WEIGHT", 0.0),
    "substitutions": (edits, "_SUBSTITUTION", -math.inf),
    "insertions": (edits, "_INSERTION", -math.inf),
    "deletions": (edits, "_DELETION", -math.inf),
    "residual": (None, "rounds", 0),
    "steering": (None, "steering", 0.0),
}


@dataclass
class Hypothesis:
    """The nearest hypothesis of one text after some calls."""

    calls: int
    tokens: list[int]
    cosine: float


class Curve:
    """Listens to a search and remembers the nearest hypothesis at each number of calls."""

    def __init__(self, marks: Sequence[int], count: int) -> None:
        self.at: dict[int, list[Hypothesis | None]] = {mark: [None] * count for mark in marks}

    def __call__(self, row: int, tokens: Sequence[int], cosine: float, calls: int) -> None:
        """A text that was embedded counts for every mark that it is within."""
        for mark, best in self.at.items():
            before = best[row]
            if calls > mark:
                continue
            if before is None or cosine > before.cosine:
                best[row] = Hypothesis(calls, list(tokens), cosine)
            else:
                best[row] = Hypothesis(calls, before.tokens, before.cosine)


def held_out(texts: Path, inverter: Inverter, first: int, count: int) -> list[Piece]:
    """Pieces first..first+count of those drawn with seed 5, cut as in training."""
    settings = DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )
    pieces = cut_pieces(list(read_texts(texts, "text")), inverter.tokenizer, settings)
    order = np.random.default_rng(5).permutation(len(pieces))
    return [pieces[k] for k in order[first : first + count]]


def values_of(
    pieces: Sequence[Piece], hypotheses: Sequence[Hypothesis | None], inverter: Inverter
) -> NDArray[np.float64]:
    """Metrics of each text [4, N], as in `_METRICS`."""
    columns = []
    for piece, one in zip(pieces, hypotheses, strict=True):
        assert one is not None
        ids = [one.tokens[k] for k in inverter.tokenizer.content_positions(one.tokens)]
        metrics = [metric(piece.token_ids, ids) for metric in _TEXT_METRICS]
        columns.append([*metrics, one.cosine])
    return np.array(columns).T


def measure(
    name: str,
    options: dict[str, Any],
    pieces: Sequence[Piece],
    inverter: Inverter,
    encoder: Encoder,
    marks: Sequence[int],
) -> tuple[dict[int, tuple[NDArray[np.float64], float]], str]:
    """Run one strategy.

    Returns:
        At each number of calls the metrics of each text [4, N] and the mean of the calls made;
        and a note of the time.
    """
    vectors = encoder.encode([piece.text for piece in pieces])
    curve = Curve(marks, len(pieces))
    began, began_wall = time.process_time(), time.perf_counter()
    inverter.invert(
        vectors,
        strategy=name,
        options=options,
        encoder=encoder,
        encoder_calls=max(marks),
        batch_size=16,
        steps=STEPS,
        on_call=curve,
    )
    seconds = [time.process_time() - began, time.perf_counter() - began_wall]
    results = {}
    for mark, hypotheses in curve.at.items():
        calls = float(np.mean([one.calls for one in hypotheses if one is not None]))
        results[mark] = values_of(pieces, hypotheses, inverter), calls
    processor, wall = (s / len(pieces) for s in seconds)
    return results, f"{processor:.2f} s of processor time and {wall:.2f} s a text"


def cells(values: NDArray[np.float64], sign: str = "") -> list[str]:
    """Mean and interval of each metric, [4, N] → 4."""
    figures = [summarise(row.tolist()) for row in values]
    return [f"{f.mean:{sign}.3f} [{f.low:{sign}.3f}, {f.high:{sign}.3f}]" for f in figures if f]


def without(
    part: str, options: dict[str, Any], pieces: Sequence[Piece], *rest: Any
) -> tuple[dict[int, tuple[NDArray[np.float64], float]], str]:
    """`measure` guided search without one of its parts."""
    module, name, value = PARTS[part]
    if module is None:
        return measure("guided-search", options | {name: value}, pieces, *rest)
    with patch.object(module, name, value):
        return measure("guided-search", options, pieces, *rest)


def main() -> None:
    """Print the curve of each strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--count", type=int, default=32, help="pieces")
    parser.add_argument("--first", type=int, default=64, help="pieces to leave out before them")
    parser.add_argument("--best-of", type=int, default=50, help="samples; 0: leave it out")
    parser.add_argument("--dtype", default="float32", help="of denoiser and encoder")
    parser.add_argument("--options", type=json.loads, default={}, help="of guided search, as JSON")
    parser.add_argument("--without", nargs="*", default=[], choices=PARTS, help="parts left out")
    parser.add_argument(
        "--language-model", nargs="*", default=[], metavar="WEIGHT/PROPOSALS", help="variants"
    )
    arguments = parser.parse_args()
    inverter = Inverter.from_pretrained(arguments.checkpoint)
    inverter.to("cpu", arguments.dtype)
    encoder = load_encoder(inverter.encoder.name, compute=choose_compute("cpu", arguments.dtype))
    pieces = held_out(arguments.texts, inverter, arguments.first, arguments.count)
    plans: list[tuple[str, dict[str, Any], int]] = [
        ("guided-search", arguments.options, arguments.calls)
    ]
    if arguments.best_of:
        plans.append(("best-of", {"samples": arguments.best_of}, arguments.best_of))
    table, notes = [], []
    for name, options, calls in plans:
        marks = [m for m in (1, 50, 100, 300, 1000, 3000) if m < calls] + [calls]
        results, note = measure(name, options, pieces, inverter, encoder, marks)
        table += [[name, str(m), f"{mean:.1f}", *cells(v)] for m, (v, mean) in results.items()]
        notes.append(f"{name}, {calls} calls: {note}")
        if name == "guided-search":
            for part in arguments.without:
                outcome, note = without(part, options, pieces, inverter, encoder, marks)
                table += [
                    [f"without {part}", str(m), f"{mean:.1f}", *cells(v - results[m][0], "+")]
                    for m, (v, mean) in outcome.items()
                    if m > 1
                ]
                notes.append(f"without {part}: {note}")
            for variant in arguments.language_model:
                weight, proposals = variant.split("/")
                model = load_language_model(inverter.compute.dtype)
                prior = LanguagePrior(model, inverter.tokenizer, float(weight), int(proposals))
                with language_prior(prior):
                    setup = pieces, inverter, encoder, marks
                    outcome, note = measure(name, options, *setup)
                table += [
                    [
                        f"with SmolLM2 {variant}",
                        str(m),
                        f"{mean:.1f}",
                        *cells(v - results[m][0], "+"),
                    ]
                    for m, (v, mean) in outcome.items()
                    if m > 1
                ]
                notes.append(f"with SmolLM2 {variant}: {note}")
    print(f"n = {len(pieces)} pieces; mean [95% bootstrap interval]; without a part: differences\n")
    print_table(["strategy", "calls at most", "calls made", *_METRICS], table)
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
