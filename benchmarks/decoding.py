"""Decoding: the default against the plain sampler, and passes against accuracy.

    python -m benchmarks.decoding --texts dev.parquet [--only speed,strategies]

The plain side does what the published sampler does: one text at a time, as many passes as there
are positions, every position projected and every probability computed in every pass, in float32.
Ours is what `Inverter.invert` does by default, 8 passes in float32; beside it stand the plain
side's number of passes, which must give the plain side's tokens, and, on a processor that is
quicker with it, bfloat16. What counts are the ratios, medians of rounds in which the sides take
turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.machine import alternate, median_ratio, print_table
from unembed.backends.cpu import PackedLinear
from unembed.backends.onnx import FILE
from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import read_texts
from unembed.decoding import STRATEGIES, Decoding, SequenceSpec
from unembed.decoding.logits import REPETITION_PENALTY
from unembed.denoiser import Denoiser
from unembed.device import choose_compute
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.encoders.vectors import as_unit_vectors
from unembed.evaluation.metrics import token_accuracy, token_set_f1
from unembed.inverter import Inverter, export_folder

PLAIN_TEXTS = 4  # and as many of ours at batch 1: how soon a text is done differs
STRATEGIES_TABLE = (
    "greedy",
    "greedy:repetition=0",
    "greedy:order=margin",
    "greedy:order=left-to-right",
    "greedy:lengths=3",
    "entropy-bounded",
    "euler:temperature=0.5",
    "euler:temperature=1:repetition=0",
    "euler-remask:temperature=0.5",
    "euler-remask:temperature=0.5:threshold=0.3:probability=1",
    "two-stage:temperature=0.5",
    "greedy:guidance=0/1",
    "greedy:guidance=0.5/0.5",
    "best-of:samples=4:encoder_calls=4",
)


def plain_greedy(denoiser: Denoiser, vector: Tensor, spec: SequenceSpec) -> Tensor:
    """Ids [L] of one vector [D], in the plainest way.

    It shares two rules with ours, without which the results could not be compared: what follows a
    unmasked end token is padding, and each occurrence of a token costs the same penalty.
    """
    special = (spec.mask_id, spec.end_id, spec.pad_id)
    tokens = torch.full((1, spec.length), spec.mask_id)
    for _ in range(spec.length):
        masked = tokens == spec.mask_id
        t = spec.schedule.timestep(masked.float().mean(dim=1))
        logits = denoiser(tokens, vector[None], t)  # [1, L, V]
        for token in tokens[0].tolist():
            if token not in special:
                logits[..., token] -= REPETITION_PENALTY
        logits[..., spec.mask_id] = -torch.inf
        probabilities = logits.softmax(dim=-1)  # [1, L, V]
        best, guesses = probabilities.max(dim=-1)
        best = torch.where(masked, best, -1.0)
        place = int(best.argmax(dim=-1))
        if masked[0, place]:
            tokens[0, place] = guesses[0, place]
        ids = tokens[0].tolist()
        if spec.end_id in ids:
            rest = tokens[0, ids.index(spec.end_id) + 1 :]
            rest[rest == spec.mask_id] = spec.pad_id or 0
    return tokens[0]


def with_onnx(inverter: Inverter, folder: Path) -> Inverter:
    """The same inverter, decoding with ONNX Runtime."""
    inverter.save_pretrained(folder)
    export_folder(folder, folder / FILE)
    return Inverter.from_pretrained(folder)


Side = tuple[Inverter, Decoding]


def compare_speed(sides: dict[str, Side], vectors: NDArray[np.float32], rounds: int) -> None:
    """Print texts a second at batch 1 and 64 beside the plain side's.

    Args:
        sides: Name → how it decodes; the default first, the plain side's passes second.
        vectors: Unit vectors [64, D].
        rounds: In which the sides take turns.
    """
    inverter, rows = sides["default"][0], []
    spec, denoiser = inverter.spec, inverter.denoiser
    tensors = torch.from_numpy(vectors)
    with torch.inference_mode():
        for batch in (1, 64):
            count = max(batch, PLAIN_TEXTS)

            def plain() -> None:
                for row in range(PLAIN_TEXTS):
                    plain_greedy(denoiser, tensors[row], spec)

            def ours(side: Side, count: int = count, batch: int = batch) -> None:
                side[0].invert(vectors[:count], decoding=side[1], batch_size=batch)

            work: dict[str, Callable[[], object]] = {"plain sampler, 32 passes": plain}
            work |= {name: partial(ours, side) for name, side in sides.items()}
            seconds = alternate(work, rounds)
            times = seconds["plain sampler, 32 passes"]
            seconds["plain sampler, 32 passes"] = [s * count / PLAIN_TEXTS for s in times]
            base = seconds["plain sampler, 32 passes"]
            for name, times in seconds.items():
                speed = count / statistics.median(times)
                rows.append(
                    [str(batch), name, f"{speed:.1f}", f"{median_ratio(base, times):.2f} x"]
                )
    print(f"\n{torch.get_num_threads()} threads\n")
    print_table(["batch", "side", "texts/s", "against plain"], rows)


def compare_quality(
    sides: dict[str, Side],
    encoder: Encoder,
    vectors: NDArray[np.float32],
    originals: list[list[int]],
) -> None:
    """Print token-set F1 and cosine of each side, and how many have the plain tokens."""
    inverter, rows = sides["default"][0], []
    plain = []
    with torch.inference_mode():
        for vector in torch.from_numpy(vectors):
            ids = plain_greedy(inverter.denoiser, vector, inverter.spec).tolist()
            plain.append([ids[i] for i in inverter.tokenizer.content_positions(ids)])
    tokens = {"plain sampler, 32 passes": plain}
    for name, (side, decoding) in sides.items():
        tokens[name] = [item.token_ids for item in side.invert(vectors, decoding=decoding)]
    scores = {}
    for name, recovered in tokens.items():
        f1 = [token_set_f1(a, b) for a, b in zip(originals, recovered, strict=True)]
        again = encoder.encode([text or "." for text in inverter.tokenizer.decode(recovered)])
        scores[name] = np.stack([np.array(f1), (again * vectors).sum(axis=1)], axis=1)  # [N, 2]
        same = sum(a == b for a, b in zip(plain, recovered, strict=True))
        gain = " / ".join(in_points(scores[name] - scores["plain sampler, 32 passes"]))
        mean = scores[name].mean(axis=0)
        rows.append([name, f"{mean[0]:.3f}", f"{mean[1]:.3f}", gain, f"{same} of {len(plain)}"])
    print()
    heads = ["side", "token-set F1", "cosine", "points against plain", "same tokens"]
    print_table(heads, rows)


def compare_products(denoiser: Denoiser, rounds: int) -> None:
    """`F.linear` beside packed weights, by rows: a feed-forward layer and the vocabulary."""
    rows = []
    parameters = dict(denoiser.named_parameters())
    sides = {
        "feed-forward": (parameters["blocks.0.up.weight"], parameters["blocks.0.up.bias"]),
        "vocabulary": (parameters["token_table.weight"], parameters["output_bias"]),
    }
    with torch.inference_mode():
        for name, (weight, bias) in sides.items():
            packed = PackedLinear(weight, bias, most=2048)
            for count in (1, 16, 32, 256, 2048):
                x = torch.randn(count, weight.shape[1])
                again = max(1, 2**22 // (count * weight.shape[0]))
                seconds = alternate(
                    {
                        "F.linear": partial(repeat, again, F.linear, x, weight, bias),
                        "packed": partial(repeat, again, packed, x),
                    },
                    4 * rounds,
                )
                times = [f"{1e3 * statistics.median(s) / again:.2f}" for s in seconds.values()]
                ratio = f"{median_ratio(*seconds.values()):.2f} x"
                rows.append([name, str(count), *times, ratio])
    print("\nproducts in float32, milliseconds\n")
    print_table(["product", "rows", "F.linear", "packed", ""], rows)


def repeat(times: int, work: Callable[..., object], *arguments: object) -> None:
    """The same call, often enough to be timed."""
    for _ in range(times):
        work(*arguments)


def compare_strategies(
    inverter: Inverter,
    encoder: Encoder,
    vectors: NDArray[np.float32],
    originals: list[list[int]],
    seed: int,
) -> None:
    """Token accuracy and token-set F1 of every strategy with 4, 8, 16, ... steps."""
    budgets = [n for n in (4, 8, 16, 32, 64) if n < 2 * inverter.length]
    few, many = min(8, budgets[-1]), budgets[-1]
    rows: list[list[str]] = []
    for name in STRATEGIES_TABLE:
        rows.append([name])
        scores: dict[int, NDArray[np.float64]] = {}
        for steps in budgets:
            decoding = Decoding.parse(name, steps)
            inversions = inverter.invert(vectors, seed=seed, decoding=decoding, encoder=encoder)
            scores[steps] = np.array(
                [
                    [metric(a, b.token_ids) for metric in (token_accuracy, token_set_f1)]
                    for a, b in zip(originals, inversions, strict=True)
                ]
            )  # [N, 2]
            passes = statistics.mean(item.passes for item in inversions)
            accuracy, f1 = scores[steps].mean(axis=0)
            rows[-1].append(f"{accuracy:.3f} / {f1:.3f} ({passes:.1f})")
        rows[-1].append(" / ".join(in_points(scores[few] - scores[many])))
        print(" ".join(rows[-1]), flush=True)
    print(
        f"\ntoken accuracy / token-set F1 (passes made) of {len(originals)} texts, seed {seed}; "
        "last, points gained, text by text, and 1.96 standard errors\n"
    )
    heads = [*(f"{n} steps" for n in budgets), f"{few} against {many}"]
    print_table(["strategy", *heads], rows)
    absent = STRATEGIES.keys() - {name.partition(":")[0] for name in STRATEGIES_TABLE}
    print(f"not in the table (python -m benchmarks.guided): {', '.join(absent) or 'none'}")


def in_points(differences: NDArray[np.float64]) -> list[str]:
    """Mean and 1.96 standard errors of each column of differences [N, K], in hundredths."""
    errors = 196 * differences.std(axis=0, ddof=1) / len(differences) ** 0.5
    return [
        f"{m:+.1f} ± {e:.1f}" for m, e in zip(100 * differences.mean(axis=0), errors, strict=True)
    ]


def pieces_of(inverter: Inverter, texts: Path, limit: int) -> tuple[list[str], list[list[int]]]:
    """The first pieces of held-out texts, cut as in training."""
    settings = DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )
    passages = [text for text, _ in zip(read_texts(texts, "text"), range(4 * limit), strict=False)]
    pieces = cut_pieces(passages, inverter.tokenizer, settings)
    indices = np.random.default_rng(0).permutation(len(pieces))[:limit]
    return [pieces[i].text for i in indices], [list(pieces[i].token_ids) for i in indices]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--texts", type=Path, help="held-out texts, for the table of strategies")
    parser.add_argument("--limit", type=int, default=128, help="texts of that table")
    parser.add_argument("--only", default="speed,strategies", help="parts to run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx", action="store_true", help="time ONNX Runtime as well")
    parser.add_argument("--quick", action="store_true", help="bfloat16 for the table of strategies")
    options = parser.parse_args()
    inverter = Inverter.from_pretrained(options.checkpoint)
    generator = np.random.default_rng(0)
    vectors = as_unit_vectors(
        generator.standard_normal((64, inverter.encoder.dimension)), inverter.encoder.dimension
    )
    steps: list[Callable[[], None]] = []
    if options.texts is not None:
        texts, originals = pieces_of(inverter, options.texts, options.limit)
        encoder = load_encoder(inverter.encoder.name, compute=choose_compute("cpu", "float32"))
        vectors = encoder.encode(texts)
        if "strategies" in options.only:
            steps.append(lambda: compare_strategies(inverter, encoder, vectors, originals, 0))
    if "speed" in options.only:
        with TemporaryDirectory() as folder:
            plain_steps = Decoding(steps=inverter.length)
            sides = {"default": (inverter, Decoding()), "32 passes": (inverter, plain_steps)}
            quickest = choose_compute("cpu")
            if quickest.dtype != torch.float32:
                name = f"default, {str(quickest.dtype).removeprefix('torch.')}"
                other = Inverter.from_pretrained(options.checkpoint).to(quickest)
                sides[name] = other, Decoding()
            if options.onnx:
                sides["default, ONNX Runtime"] = with_onnx(inverter, Path(folder)), Decoding()
            timed = np.resize(vectors, (64, vectors.shape[1]))  # repeated where they are fewer
            compare_speed(sides, timed, options.rounds)
            if options.texts is not None:
                compare_quality(sides, encoder, vectors, originals)
            compare_products(inverter.denoiser, options.rounds)
    if options.quick:
        inverter.to(choose_compute("cpu", "bfloat16"))
    for step in steps:
        step()


if __name__ == "__main__":
    main()
