"""Other systems and ours on the same texts: ``python -m benchmarks.peers TEXTS PAIRS --work DIR``.

Each row of docs/peers.md is a plan below. What a plan has recovered is written batch by batch under
``DIR/rows``, so the same command goes on after a kill; ``--only`` runs some plans, ``--table``
none. DIR also holds what `benchmarks.vec2text` and `unembed train` made: ``vec2text/`` and
``denoiser/``; a plan whose networks are not there is left out, and said so.

The texts are those of `unembed evaluate --frontier`, as many of each length, weighted by how often
each occurs; what that command has recovered with the shipped weights is taken from ``--frontier``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import alternate
from benchmarks.peer_systems import RecoverFn, Systems
from benchmarks.vec2text import BASE, CORRECTOR, load_network
from unembed.baselines.left_to_right import write_texts
from unembed.baselines.zero2text import Zero2Text
from unembed.evaluation.bootstrap import RESAMPLES, Figure, draw_blocks
from unembed.evaluation.frontier import MARKS
from unembed.evaluation.metrics import COLUMNS, Recovery, make_ruler, word_f1
from unembed.evaluation.samples import Sample
from unembed.files import atomic

MANY, FEW, BATCH = 256, 64, 16  # texts of a row, texts searched at once
VECTOR, CALLS, FLOOR = "The vector alone", "Vector and encoder", "Floors"
UNTRAINED = "Vector and encoder, nothing trained for that encoder"
LEAKED = "Leaked pairs of paraphrase-MiniLM-L3-v2, vectors of that encoder"
METRICS = {  # → heading of its column
    "exact match": "EM",
    "token accuracy": "position",
    "word F1": "F1",
    "BLEU (sentence)": "BLEU",
    "ROUGE-L": "ROUGE-L",
    "cosine": "cosine",
    "names": "names",
    "numbers": "numbers",
    "milliseconds": "ms",
    "passes": "passes",
    "encoder calls": "made",
}
WITH_INTERVAL = ("exact match", "word F1", "cosine")  # in the tables; figures.json has all
SHORT, LONG = MARKS[1:6], MARKS[6:]


@dataclass(frozen=True)
class Plan:
    """A system on some of the texts.

    Attributes:
        name: Of its rows.
        access: What the attacker has.
        texts: The first so many.
        batch: Texts at once; what a kill can lose.
        recover: Recovers a batch.
        needs: Files without which it cannot run.
    """

    name: str
    access: str
    texts: int
    batch: int
    recover: RecoverFn
    needs: tuple[Path, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the folder of what it recovered."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.name} {self.texts}")


def make_plans(systems: Systems, frontier: Path | None) -> list[Plan]:
    """The rows, what is worth most first."""
    s, run = systems, systems.work / "denoiser" / "latest.safetensors"
    base, corrector = (s.work / "vec2text" / name for name in (BASE, CORRECTOR))
    both = (base, corrector)
    plans = [
        Plan("unembed, shipped weights", VECTOR, MANY, FEW, s.invert("shipped", "greedy")),
        *(
            Plan(kind, FLOOR, MANY, MANY, s.floor(kind))
            for kind in ("shuffled", "unconditional", "nearest", "constant")
        ),
        *(
            Plan(f"{name}, {n} pairs", LEAKED, MANY, FEW, s.leaked(n, name == "ALGEN"))
            for n in (100, 300, 1000)
            for name in ("ALGEN", "unembed")
        ),
        Plan("unembed, equal samples", VECTOR, MANY, FEW, s.invert("equal", "greedy"), (run,)),
        Plan("Vec2Text inverter, greedy", VECTOR, MANY, FEW, s.left_to_right(1), (base,)),
        Plan("Vec2Text inverter, 4 beams", VECTOR, MANY, FEW, s.left_to_right(4), (base,)),
    ]
    loops: list[tuple[str, int, dict[int, int], int]] = [
        ("Vec2Text, 1 x 1", 1, {2: 1}, MANY),
        ("Vec2Text, s x 2", 2, {7: 2, 15: 4, 31: 8}, MANY),
        ("Vec2Text, 4 x 4", 4, {53: 4}, MANY),
        ("Vec2Text, s x 4", 4, {117: 8, 245: 16}, FEW),
        ("Vec2Text, 8 x 8", 8, {457: 8}, FEW),
    ]
    if frontier is not None:
        shipped = Plan("unembed search, shipped weights", CALLS, MANY, MANY, s.searched(frontier))
        plans.append(shipped)
    equal = "unembed search, equal samples"
    recover = s.invert("equal", "guided-search", SHORT)
    plans.append(Plan(equal, CALLS, MANY, BATCH, recover, (run,)))
    for name, beams, steps, texts in loops:
        plans.append(Plan(name, CALLS, texts, BATCH, s.corrected(beams, steps), both))
    recover = s.invert("equal", "guided-search", LONG)
    plans.append(Plan(f"{equal}, long", CALLS, FEW, BATCH, recover, (run,)))
    for settings, texts in (
        (Zero2Text(beams=1, queries=40, candidates=300), FEW),
        (Zero2Text(beams=10, queries=50, candidates=100), FEW),
    ):
        name = f"Zero2Text, {settings.beams} beams, {settings.candidates} candidates"
        plans.append(Plan(name, UNTRAINED, texts, 4, s.zero2text(settings)))  # an hour each
    return plans


# Running, and what is on the disk


def run_plan(plan: Plan, systems: Systems) -> None:
    """Recover the batches that are not there yet."""
    folder = systems.work / "rows" / plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    samples = systems.samples[: plan.texts]
    for first in range(0, len(samples), plan.batch):
        path = folder / f"{first:05d}.json"
        if path.is_file():
            continue
        batch = samples[first : first + plan.batch]
        began = time.perf_counter()
        recoveries = plan.recover(first, batch)
        rows = [
            {"original": sample.text, "marks": {k: asdict(v) for k, v in one.items()}}
            for sample, one in zip(batch, recoveries, strict=True)
        ]
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(rows), encoding="utf-8")
        print(f"{plan.name}: {first + len(batch)} of {len(samples)}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


def read_plan(plan: Plan, systems: Systems) -> dict[int, list[tuple[Sample, Recovery]]]:
    """What a plan has recovered so far: calls at most → texts and recoveries."""
    results: dict[int, list[tuple[Sample, Recovery]]] = {}
    for path in sorted((systems.work / "rows" / plan.folder).glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for sample, row in zip(systems.samples[int(path.stem) :], rows, strict=False):
            if sample.text != row["original"]:
                raise SystemExit(f"{path} is of other texts; delete {path.parent}")
            for mark, recovery in row["marks"].items():
                results.setdefault(int(mark), []).append((sample, Recovery(**recovery)))
    return results


def figures_of(
    results: Sequence[tuple[Sample, Recovery]], systems: Systems
) -> dict[str, Figure | None]:
    """Metric → mean with its interval, of the first texts, each length weighted by its share."""
    ruler, _ = make_ruler(systems.shipped.tokenizer, None)
    rows = [ruler.measure(s.text, s.token_ids, r)[0] for s, r in results]
    table = np.array(rows)[:, [COLUMNS.index(m) for m in METRICS if m != "word F1"]]
    words = np.array([word_f1(s.text, r.text) for s, r in results])
    table = np.insert(table, list(METRICS).index("word F1"), words, axis=1)  # [N, metrics]
    sums, weights = np.zeros((RESAMPLES + 1, len(METRICS))), np.zeros((RESAMPLES + 1, len(METRICS)))
    for number, (bucket, share) in enumerate(systems.shares.items()):
        of_bucket = table[[b == bucket for b in systems.buckets[: len(table)]]]
        draws = draw_blocks(len(of_bucket), number)  # [R, texts]
        draws = np.concatenate([np.ones((1, len(of_bucket))), draws]) * share / len(of_bucket)
        sums += draws @ np.nan_to_num(of_bucket)
        weights += draws @ ~np.isnan(of_bucket)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / weights
    figures: dict[str, Figure | None] = {}
    for column, metric in enumerate(METRICS):
        count = int((~np.isnan(table[:, column])).sum())
        low, high = np.nanquantile(means[1:, column], (0.025, 0.975)) if count else (0.0, 0.0)
        figure = Figure(float(means[0, column]), float(low), float(high), count)
        figures[metric] = figure if count else None
    return figures


def print_tables(plans: Sequence[Plan], systems: Systems, partial: bool = False) -> None:
    """A table for each kind of access; what has not run is named below, all intervals on disk.

    Args:
        plans: Rows.
        systems: Texts.
        partial: Show a row from 64 texts on, with their number, before it is whole.
    """
    missing, everything = [], []
    for access in (VECTOR, CALLS, UNTRAINED, LEAKED, FLOOR):
        rows = []
        for plan in (plan for plan in plans if plan.access == access):
            results, texts = read_plan(plan, systems), min(plan.texts, len(systems.samples))
            least = min(texts, FEW) if partial else texts
            whole = {mark: some for mark, some in results.items() if len(some) >= least}
            if not all(len(some) == texts for some in whole.values()) or not whole:
                count = max(map(len, results.values()), default=0)
                missing.append(f"{plan.name} (n = {count} of {texts})")
            rows += [(mark, plan.name, some) for mark, some in whole.items()]
        if rows:
            print(f"\n**{access}**\n\n| system | calls | n | {' | '.join(METRICS.values())} |")
            print("|---" * (3 + len(METRICS)) + "|")
        for mark, name, some in sorted(rows, key=lambda row: row[0]):
            figures = figures_of(some, systems)
            cells = " | ".join(_spell(metric, figures[metric]) for metric in METRICS)
            print(f"| {name.removesuffix(', long')} | {mark} | {len(some)} | {cells} |")
            values = {metric: figure and asdict(figure) for metric, figure in figures.items()}
            everything.append({"system": name, "access": access, "calls": mark, "figures": values})
    if missing:
        print(f"\nNot whole{'' if partial else ', left out'}: " + "; ".join(missing) + ".")
    with atomic(systems.work / "figures.json") as temporary:
        temporary.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def _spell(metric: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    digits = 3 if abs(figure.high) < 2 else 1  # noqa: PLR2004 - shares, or BLEU and counts
    interval = f" [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"
    return f"{figure.mean:.{digits}f}{interval if metric in WITH_INTERVAL else ''}"


def print_speed(systems: Systems, rounds: int) -> None:
    """Milliseconds a text of one pass in all positions and of one token after the other."""
    ids, vectors = systems.shipped.tokenizer, systems.vectors(systems.samples[:FEW])
    inverter = systems.equal.to("cpu", "bfloat16")
    network = load_network(systems.work / "vec2text" / BASE).to(torch.bfloat16)
    for batch in (1, FEW):
        part = vectors[:batch]
        tensor = torch.from_numpy(part)
        sides: dict[str, Callable[[], object]] = {
            "unembed, 8 passes": lambda part=part: inverter.invert(part),  # type: ignore[misc]
            "left to right, greedy": lambda t=tensor: write_texts(network, ids, t),  # type: ignore[misc]
            "left to right, 4 beams": lambda t=tensor: write_texts(network, ids, t, beams=4),  # type: ignore[misc]
        }
        for name, seconds in alternate(sides, rounds).items():
            print(
                f"batch {batch}: {name}: {1000 * float(np.median(seconds)) / batch:.1f} ms a text"
            )


def main() -> None:
    """Run the plans that are not finished, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--frontier", type=Path, help="of `unembed evaluate --frontier --out`")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of plans")
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    parser.add_argument("--partial", action="store_true", help="show rows from 64 texts on")
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS", help="time texts instead")
    parser.add_argument("--dtype", default="bfloat16", help="of the denoisers and Vec2Text")
    arguments = parser.parse_args()
    systems = Systems(arguments.texts, arguments.pairs, arguments.work, arguments.dtype)
    if arguments.speed:
        print_speed(systems, arguments.speed)
        return
    plans = make_plans(systems, arguments.frontier)
    for plan in [] if arguments.table else plans:
        matches = arguments.only is None or any(plan.name.startswith(o) for o in arguments.only)
        if matches and all(path.is_file() for path in plan.needs):
            run_plan(plan, systems)
    print_tables(plans, systems, arguments.partial)


if __name__ == "__main__":
    main()
