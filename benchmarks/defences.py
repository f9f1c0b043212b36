"""How near attackers come to the encoder's vectors through each defence, nothing decoded.

    python -m benchmarks.defences records.parquet --queries queries.parquet

The cosine of an attacker's estimate says how well a defence is undone, within a minute; what comes
back of the text is what `unembed defend` measures. Held-out records, as there.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np

from unembed.defences.attackers import Attacker, Case, Denoising, Realignment, Unaware
from unembed.defences.defence import Vectors, parse_defences, unit
from unembed.defences.records import Queries, read_queries, read_records
from unembed.defences.utility import rank, utilities
from unembed.encoders.base import EncoderIdentity
from unembed.evaluation.bootstrap import Figure, summarise

DEFENCES = "rotation,permutation,gaussian,int8,binary,pq,cut,mean"
HELD_OUT = 500


def show(figure: Figure | None) -> str:
    """A mean with its interval, for a cell."""
    return "none" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def main() -> None:
    """Print a row a defence: the cosine that each attacker reaches, and what search keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--queries", type=Path)
    parser.add_argument("--defences", default=DEFENCES)
    parser.add_argument("--pairs", default="10,100,400,1000")
    arguments = parser.parse_args()
    records = read_records(arguments.records, 1_000_000, 0)
    dimension = records.vectors.shape[1]
    queries = Queries(records.vectors[:200], None, list(range(200)))
    if arguments.queries is not None:
        queries = read_queries(arguments.queries, None, dimension)
    attackers: list[Attacker] = [Unaware(), Denoising()]
    attackers += [Realignment(int(count)) for count in arguments.pairs.split(",")]
    order = np.random.default_rng(0).permutation(len(records))
    targets, rest = order[:HELD_OUT], order[HELD_OUT:]
    plain = rank(parse_defences("none")[0], queries, records.vectors, records.vectors)
    measure = utilities(records.ids, queries, plain)
    print("| defence |", " | ".join([*(a.name for a in attackers), *measure(plain)]), "|")
    for defence in parse_defences(arguments.defences):
        recipe = copy.deepcopy(defence)
        defence.fit(records.vectors, np.random.default_rng(1))
        outputs = defence.apply(records.vectors, np.random.default_rng(2))
        case = Case(
            defence, recipe, outputs, outputs[targets], records.vectors[rest], outputs[rest],
            records.vectors[rest], EncoderIdentity("", None, dimension, "", ""), 0,
        )  # fmt: skip
        cells = [show(reached(attacker, case, records.vectors[targets])) for attacker in attackers]
        values = measure(rank(defence, queries, outputs, records.vectors))
        cells += [show(summarise(each)) for each in values.values()]
        print(f"| {defence} |", " | ".join(cells), "|", flush=True)


def reached(attacker: Attacker, case: Case, clean: Vectors) -> Figure | None:
    """Cosine of an attacker's estimates with the encoder's vectors; none where he does as U."""
    estimates = attacker.estimate(case)
    if estimates is None:
        return None
    return summarise((unit(estimates) * clean).sum(axis=1).tolist())


if __name__ == "__main__":
    main()
