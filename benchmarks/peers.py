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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import alternate
from benchmarks.vec2text import BASE, CORRECTOR, load_network
from unembed.baselines.algen import fit_pseudo_inverse
from unembed.baselines.left_to_right import LeftToRight, write_texts
from unembed.baselines.vec2text import Vec2Text, calls_at_most
from unembed.baselines.zero2text import Zero2Text
from unembed.data.pairs import Pairs
from unembed.decoding import Decoding
from unembed.denoiser import weights_digest
from unembed.device import choose_compute
from unembed.encoders.alignment import PairSums, fit_alignment
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.bootstrap import RESAMPLES, Figure, draw_blocks
from unembed.evaluation.evaluate import cutting
from unembed.evaluation.frontier import MARKS, PER_LENGTH, draw_by_length
from unembed.evaluation.metrics import COLUMNS, Recovery, make_ruler, word_f1
from unembed.evaluation.rows import cosines_of, derangement, nearest_pairs, unconditional
from unembed.evaluation.samples import PassageFile, Sample, Samples
from unembed.files import atomic
from unembed.inverter import Inverter
from unembed.training.export import inverter_from_run

MANY, FEW, BATCH = 256, 64, 16  # texts of a row, texts searched at once
VECTOR, CALLS, LEAKED, FLOOR = "vector", "vector + encoder", "leaked pairs", "floor"
METRICS = (
    *("exact match", "token accuracy", "word F1", "BLEU (sentence)", "ROUGE-L", "cosine"),
    *("names", "numbers", "milliseconds", "passes", "encoder calls"),
)
SHORT, LONG = MARKS[1:6], MARKS[6:]

Marked = dict[int, Recovery]  # encoder calls at most → what came back
RecoverFn = Callable[[int, list[Sample]], list[Marked]]  # index of the first, texts


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


class Systems:
    """Loads what the plans share, when it is first needed."""

    def __init__(self, texts: Path, pairs: Path, work: Path, dtype: str) -> None:
        self.texts, self.pairs_folder, self.work, self.dtype = texts, pairs, work, dtype
        self.encoder: Encoder = load_encoder(compute=choose_compute("cpu", "float32"))
        self.shipped = Inverter.from_pretrained("minilm").to("cpu", dtype)
        samples = Samples(PassageFile(texts), self.shipped.tokenizer, cutting(self.shipped))
        chosen, self.shares = draw_by_length(samples, self.shipped.length, PER_LENGTH, 0)
        turns = zip(*chosen.values(), strict=True)  # the first 64 are 16 of each length
        self.samples = [sample for turn in turns for sample in turn]
        self.buckets = [name for _ in range(PER_LENGTH) for name in chosen]

    def vectors(self, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Unit vectors [N, D] of some texts."""
        return self.encoder.encode([sample.text for sample in samples])

    @cached_property
    def equal(self) -> Inverter:
        """The denoiser of as many samples as Vec2Text's inverter."""
        return inverter_from_run(self.work / "denoiser", "latest").to("cpu", self.dtype)

    def network(self, name: str) -> LeftToRight:
        """One of Vec2Text's networks, in the format of the products."""
        return load_network(self.work / "vec2text" / name).to(self.shipped.search_compute.dtype)

    @cached_property
    def vec2text(self) -> Vec2Text:
        """Vec2Text."""
        networks = self.network(BASE), self.network(CORRECTOR)
        return Vec2Text(*networks, self.shipped.tokenizer, self.encoder)

    @cached_property
    def pairs(self) -> Pairs:
        """Training pairs."""
        return Pairs.open(self.pairs_folder)

    # How each system recovers a batch

    def invert(self, which: str, decoding: str, marks: Sequence[int] = ()) -> RecoverFn:
        """Ours; with marks the nearest text after so many calls each."""

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            inverter, vectors = getattr(self, which), self.vectors(samples)
            parsed = Decoding.parse(decoding)
            if marks:
                parsed = replace(parsed, encoder_calls=max(marks))
            seen: list[list[tuple[int, float, list[int]]]] = [[] for _ in samples]
            began = time.process_time()
            results = inverter.invert(
                vectors,
                decoding=parsed,
                encoder=self.encoder if parsed.encoder_calls else None,
                first_index=first,
                on_call=lambda row, ids, cosine, spent: seen[row].append((spent, cosine, [*ids])),
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            if not marks:
                texts = [result.text for result in results]
                cosines = cosines_of(self.encoder, texts, vectors)
                return [
                    {0: Recovery(r.text, r.token_ids, None, r.passes, 0, each, c)}
                    for r, c in zip(results, cosines, strict=True)
                ]
            return [
                {
                    mark: self._nearest(calls, mark, r.passes if mark == max(marks) else None, each)
                    for mark in marks
                }
                for r, calls in zip(results, seen, strict=True)
            ]

        return recover

    def _nearest(
        self, calls: list[tuple[int, float, list[int]]], mark: int, passes: int | None, each: float
    ) -> Recovery:
        """The nearest text embedded with so many calls; time and passes of the last mark only."""
        affordable = [call for call in calls if call[0] <= mark]
        _, cosine, ids = max(affordable, key=lambda call: call[1])
        content = [ids[k] for k in self.shipped.tokenizer.content_positions(ids)]
        (text,) = self.shipped.tokenizer.decode([ids])
        spent = affordable[-1][0]
        return Recovery(text, content, None, passes, spent, each if passes else None, cosine)

    def searched(self, folder: Path) -> RecoverFn:
        """Ours, as ``unembed evaluate --frontier --out FOLDER`` has recovered the same texts."""
        known: dict[str, Marked] = {}
        for path in sorted((folder / "decoded").glob("frontier-guided-search-*.jsonl")):
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            settings = json.loads(first)["settings"]
            if settings["weights"] != weights_digest(self.shipped.denoiser):
                raise SystemExit(f"{path} was made with other weights")
            for k, line in enumerate(map(json.loads, lines)):
                mark = settings["marks"][k % len(settings["marks"])]
                text = line.pop("original")
                known.setdefault(text, {})[mark] = Recovery(**line)
        return lambda first, samples: [
            {mark: one for mark, one in known[sample.text].items() if mark} for sample in samples
        ]

    def left_to_right(self, beams: int) -> RecoverFn:
        """Vec2Text's inverter alone."""

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            vectors, network = self.vectors(samples), self.network(BASE)
            began = time.process_time()
            tokens, _ = write_texts(
                network, self.shipped.tokenizer, torch.from_numpy(vectors), beams=beams
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            return self._marked(tokens[:, 0].tolist(), vectors, 0, each)

        return recover

    def corrected(self, beams: int, steps: dict[int, int]) -> RecoverFn:
        """Vec2Text with its corrector; steps by the calls at most that they take."""
        assert all(calls_at_most(s, beams) == calls for calls, s in steps.items())

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            vectors, ids = self.vectors(samples), self.shipped.tokenizer
            began = time.process_time()
            rounds = self.vec2text.correct(vectors, max(steps.values()), beams)
            each = (time.process_time() - began) * 1000 / len(samples)
            marked: list[Marked] = [{} for _ in samples]
            for calls, step in steps.items():
                result, last = rounds[step], step == max(steps.values())
                rows = result.tokens.tolist()
                for k, (row, text) in enumerate(zip(rows, ids.decode(rows), strict=True)):
                    content = [row[place] for place in ids.content_positions(row)]
                    spent, cosine = int(result.calls[k]), float(result.cosines[k])
                    passes = result.passes if last else None
                    time_spent = each if last else None
                    marked[k][calls] = Recovery(
                        text, content, None, passes, spent, time_spent, cosine
                    )
            return marked

        return recover

    def zero2text(self, settings: Zero2Text) -> RecoverFn:
        """Zero2Text."""

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            vectors = self.vectors(samples)
            calls = settings.calls_at_most
            began = time.process_time()
            results = self.shipped.invert(
                vectors,
                decoding=Decoding(settings, encoder_calls=calls),
                encoder=self.encoder,
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            marked: list[Marked] = []
            for r in results:
                facts = r.passes, r.encoder_calls, each, r.cosine
                marked.append({calls: Recovery(r.text, r.token_ids, None, *facts)})
            return marked

        return recover

    def leaked(self, count: int, published: bool) -> RecoverFn:
        """Vectors of paraphrase-MiniLM-L3-v2 through a map from leaked pairs, then our decoder."""

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            from unembed.baselines.language_model import load_local_embedder

            embed = load_local_embedder()
            ids, y = self.pairs.rows(np.arange(count))
            x = embed(self.pairs.tokenizer.decode(ids.tolist()))
            target = self.shipped.encoder
            sums = PairSums(0)
            sums.add(x, y)
            alignment = (
                fit_pseudo_inverse(x, y, target) if published else fit_alignment(sums, target)
            )
            mapped = alignment(embed([sample.text for sample in samples]))
            began = time.process_time()
            results = self.shipped.invert(mapped)
            each = (time.process_time() - began) * 1000 / len(samples)
            texts = [result.text for result in results]
            cosines = cosines_of(self.encoder, texts, self.vectors(samples))
            return [
                {0: Recovery(r.text, r.token_ids, None, r.passes, 0, each, c)}
                for r, c in zip(results, cosines, strict=True)
            ]

        return recover

    def floor(self, kind: str) -> RecoverFn:
        """What guessing gives: another text's vector, none, the nearest text, the mean vector."""

        def recover(first: int, samples: list[Sample]) -> list[Marked]:
            vectors = self.vectors(samples)
            inverter, given = self.shipped, vectors
            if kind == "nearest":
                rows, _ = nearest_pairs(self.pairs, vectors, lambda done: None)
                return self._marked(rows, vectors, None, None)
            if kind == "shuffled":
                given = vectors[derangement(len(samples))]
            elif kind == "unconditional":
                inverter = unconditional(inverter)
            else:
                mean = self.pairs.rows(np.arange(4096))[1].mean(axis=0)
                given = np.tile(mean, (len(samples), 1))
            rows = [result.token_ids for result in inverter.invert(given)]
            return self._marked(rows, vectors, 0, None)

        return recover

    def _marked(
        self,
        rows: Sequence[list[int]],
        vectors: NDArray[np.float32],
        passes: int | None,
        each: float | None,
    ) -> list[Marked]:
        """Texts of token ids, without a call; as many passes as tokens where they are 0."""
        ids = self.shipped.tokenizer
        texts = ids.decode(rows)
        cosines = cosines_of(self.encoder, texts, vectors)
        marked: list[Marked] = []
        for row, text, cosine in zip(rows, texts, cosines, strict=True):
            content = [row[place] for place in ids.content_positions(row)]
            count = len(content) + 1 if passes == 0 and each is not None else passes
            marked.append({0: Recovery(text, content, None, count, 0, each, cosine)})
        return marked


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
        (Zero2Text(beams=1, queries=40, candidates=100), FEW),
        (Zero2Text(beams=10, queries=50, candidates=50), FEW),
    ):
        name = f"Zero2Text, {settings.beams} beams, {settings.candidates} candidates"
        plans.append(Plan(name, CALLS, texts, 4, s.zero2text(settings)))  # hours
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
        marked = plan.recover(first, batch)
        rows = [
            {"original": sample.text, "marks": {k: asdict(v) for k, v in one.items()}}
            for sample, one in zip(batch, marked, strict=True)
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
    table = np.insert(table, METRICS.index("word F1"), words, axis=1)  # [N, metrics]
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


def print_tables(plans: Sequence[Plan], systems: Systems) -> None:
    """A table for each kind of access; what has not run is named below."""
    missing = []
    for access in (VECTOR, CALLS, LEAKED, FLOOR):
        print(f"\n**{access}**\n\n| system | calls | n | {' | '.join(METRICS)} |")
        print("|---" * (3 + len(METRICS)) + "|")
        rows = []
        for plan in (plan for plan in plans if plan.access == access):
            results, texts = read_plan(plan, systems), min(plan.texts, len(systems.samples))
            whole = {mark: some for mark, some in results.items() if len(some) == texts}
            if not whole:
                count = max(map(len, results.values()), default=0)
                missing.append(f"{plan.name} (n = {count} of {texts})")
            rows += [(mark, plan.name, some) for mark, some in whole.items()]
        for mark, name, some in sorted(rows, key=lambda row: row[0]):
            figures = figures_of(some, systems)
            cells = " | ".join(_spell(figures[metric]) for metric in METRICS)
            print(f"| {name.removesuffix(', long')} | {mark} | {len(some)} | {cells} |")
    if missing:
        print("\nNot whole, left out: " + "; ".join(missing) + ".")


def _spell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    digits = 3 if abs(figure.high) < 2 else 1  # noqa: PLR2004 - shares, or BLEU and counts
    return f"{figure.mean:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


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
    parser.add_argument("--speed", type=int, default=0, metavar="ROUNDS", help="time texts instead")
    parser.add_argument("--dtype", default="bfloat16", help="of the denoisers and Vec2Text")
    arguments = parser.parse_args()
    systems = Systems(arguments.texts, arguments.pairs, arguments.work, arguments.dtype)
    if arguments.speed:
        print_speed(systems, arguments.speed)
        return
    plans = make_plans(systems, arguments.frontier)
    for plan in [] if arguments.table else plans:
        wanted = arguments.only is None or any(plan.name.startswith(o) for o in arguments.only)
        if wanted and all(path.is_file() for path in plan.needs):
            run_plan(plan, systems)
    print_tables(plans, systems)


if __name__ == "__main__":
    main()
