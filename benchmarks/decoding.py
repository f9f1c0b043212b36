"""Decoding: the plain sampler against ours with the same result, and passes against accuracy.

    python -m benchmarks.decoding --texts dev.parquet [--only speed,strategies]

The plain side does what the published sampler does: one text at a time, as many passes as there
are positions, every position projected and every probability worked out in every pass, in float32.
Ours has the same weights, in float32 (the same tokens) and, on a processor that is quicker with
bfloat16, with its layers in that (nearly the same tokens, which is counted). What counts are the
ratios, medians of rounds in which the sides take turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from unembed.decoding.lazy import LazyDenoiser
from unembed.evaluation.attacks import parse_attack

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.backends.cpu import PackedLinear, Vocabulary
from unembed.backends.onnx import FILE
from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.decoding import STRATEGIES, SequenceSpec, find_strategy
from unembed.decoding.logits import DEFAULT as REPETITION
from unembed.decoding.logits import Repetition
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import choose_compute
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.metrics import token_accuracy, token_set_f1
from unembed.files import read_texts
from unembed.inverter import Inverter, as_unit_vectors, export_folder

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
    settled end token is padding, and each occurrence of a token costs the same penalty.
    """
    special = (spec.mask_id, spec.end_id, spec.pad_id)
    tokens = torch.full((1, spec.length), spec.mask_id)
    for _ in range(spec.length):
        masked = tokens == spec.mask_id
        t = spec.schedule.timestep(masked.float().mean(dim=1))
        logits = denoiser(tokens, vector[None], t)  # [1, L, V]
        for token in tokens[0].tolist():
            if token not in special:
                logits[..., token] -= REPETITION
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


def decoding_operations(sizes: DenoiserSizes, passes: int, positions: int, made: int) -> int:
    """Operations of the matrix products of decoding, two for each multiplication.

    Args:
        sizes: Of the denoiser.
        passes: Over a sequence, of all sequences together.
        positions: Those asked for, over all passes.
        made: Those of which all logits were made.
    """
    hidden, length, layers = sizes.hidden, sizes.length, sizes.layers
    attention = 3 * hidden**2 + 2 * length * hidden  # projections, scores and mixing
    rest = hidden**2 + 2 * hidden * sizes.feed_forward  # of the last layer where it is asked for
    text = (6 * layers + 2) * hidden**2  # modulation
    whole = length * (layers * attention + (layers - 1) * rest) + text
    return 2 * (passes * whole + positions * rest + made * hidden * sizes.vocab_size)


def with_onnx(inverter: Inverter, folder: Path) -> Inverter:
    """The same inverter, decoding with ONNX Runtime."""
    inverter.save_pretrained(folder)
    export_folder(folder, folder / FILE)
    return Inverter.from_pretrained(folder)


@dataclass
class Asked:
    """What a network was asked in decoding: see `decoding_operations`."""

    passes: int = 0
    positions: int = 0
    made: int = 0


class CountingVocabulary(Vocabulary):
    """Counts the positions of which all logits are made."""

    def __init__(self, denoiser: Denoiser, asked: Asked) -> None:
        super().__init__(denoiser, torch.float32)
        self._asked = asked

    def logits(self, h: Tensor) -> Tensor:
        """See `Vocabulary`."""
        self._asked.made += len(h)
        return super().logits(h)


def asked_of(inverter: Inverter, vectors: Tensor) -> Asked:
    """What vectors [N, D] decoded together in float32 ask for, one position a pass."""
    spec, denoiser, asked = inverter.spec, inverter.denoiser, Asked()

    def counted(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
        asked.positions += int(where.sum())
        asked.passes += len(tokens)
        return denoiser.hidden_states(tokens, embedding, t, where)

    lazy = LazyDenoiser(counted, CountingVocabulary(denoiser, asked))
    penalised = Repetition().wrap(lazy, spec)
    find_strategy("greedy")(penalised, vectors, spec, steps=spec.length, generators=[])
    return asked


def compare_texts(sides: dict[str, Inverter], vectors: Tensor) -> None:
    """How many texts have the same tokens: ours beside the plain side's, the others beside ours."""
    inverter = sides["ours"]
    texts = {name: side.invert(vectors) for name, side in sides.items()}
    same = []
    for row in range(16):
        ids = plain_greedy(inverter.denoiser, vectors[row], inverter.spec).tolist()
        plainly = [ids[i] for i in inverter.tokenizer.content_positions(ids)]
        same.append(texts["ours"][row].token_ids == plainly)
    print(f"\n{torch.get_num_threads()} threads; texts with the same tokens:")
    print(f"ours beside plain: {sum(same)} of {len(same)}")
    for name in list(sides)[1:]:
        pairs = zip(texts["ours"], texts[name], strict=True)
        alike = [a.token_ids == b.token_ids for a, b in pairs]
        print(f"{name} beside ours: {sum(alike)} of {len(alike)}")


def compare_speed(sides: dict[str, Inverter], vectors: NDArray[np.float32], rounds: int) -> None:
    """Texts a second at batch 1 and 64 beside the plain side, and the share of the rate."""
    inverter = sides["ours"]
    spec, denoiser = inverter.spec, inverter.denoiser
    whole, rows = torch.from_numpy(vectors[:64]), []
    with torch.inference_mode():
        compare_texts(sides, whole)
        for batch in (1, 64):
            count = max(batch, PLAIN_TEXTS)

            def plain() -> None:
                for row in range(PLAIN_TEXTS):
                    plain_greedy(denoiser, whole[row], spec)

            def ours(side: Inverter, count: int = count, batch: int = batch) -> None:
                side.invert(vectors[:count], batch_size=batch)

            work: dict[str, Callable[[], object]] = {"plain": plain}
            work |= {name: partial(ours, side) for name, side in sides.items()}
            seconds = alternate(work, rounds)
            seconds["plain"] = [s * count / PLAIN_TEXTS for s in seconds["plain"]]
            for name, times in seconds.items():
                ratio = median_ratio(seconds["plain"], times)
                speed = count / statistics.median(times)
                rows.append([str(batch), name, f"{speed:.1f}", f"{ratio:.2f} x"])
        print()
        print_table(["batch", "side", "texts/s", "against plain"], rows)
        asked, rate = asked_of(inverter, whole), matmul_rate(torch.float32)
    for name, side in sides.items():
        if side.compute.dtype == torch.float32:
            made = asked.positions if side.onnx else asked.made
            work_done = decoding_operations(denoiser.sizes, asked.passes, asked.positions, made)
            share = work_done / statistics.median(seconds[name]) / rate
            print(
                f"\n{name}, batch 64: logits made of {made / asked.positions:.0%} of the positions "
                f"asked for; {share:.0%} of the rate of products ({rate / 1e9:.0f} GFLOP/s)"
            )


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


def repeat(times: int, work: Callable[..., object], *given: object) -> None:
    """The same call, often enough to be timed."""
    for _ in range(times):
        work(*given)


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
            attack = parse_attack(name, steps)
            found = inverter.invert(vectors, seed=seed, **attack.arguments(encoder))
            scores[steps] = np.array(
                [
                    [metric(a, b.token_ids) for metric in (token_accuracy, token_set_f1)]
                    for a, b in zip(originals, found, strict=True)
                ]
            )  # [N, 2]
            passes = statistics.mean(item.passes for item in found)
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
    chosen = np.random.default_rng(0).permutation(len(pieces))[:limit]
    return [pieces[i].text for i in chosen], [list(pieces[i].token_ids) for i in chosen]


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
            sides = {"ours": inverter}
            quickest = choose_compute("cpu")
            if quickest.dtype != torch.float32:
                name = str(quickest.dtype).removeprefix("torch.")
                sides[f"ours, {name}"] = Inverter.from_pretrained(options.checkpoint).to(quickest)
            if options.onnx:
                sides["ours, ONNX Runtime"] = with_onnx(inverter, Path(folder))
            timed = np.resize(vectors, (64, vectors.shape[1]))  # repeated where they are fewer
            compare_speed(sides, timed, options.rounds)
            compare_products(inverter.denoiser, options.rounds)
    if options.quick:
        inverter.to(choose_compute("cpu", "bfloat16"))
    for step in steps:
        step()


if __name__ == "__main__":
    main()
