"""Alignment: the published recipe beside ours on the same pairs, the time of a fit, of inverting.

python -m benchmarks.alignment recipes leaked.parquet held-out.parquet
python -m benchmarks.alignment fit
python -m benchmarks.alignment inverting
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unembed.baselines.algen import fit_pseudo_inverse
from unembed.encoders.alignment import Alignment, PairSums, fit_alignment
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.leaked import CURVE, LeakedPairs, align_curve
from unembed.evaluation.report.plots import curve_table
from unembed.inverter import Inverter


def recipes(options: argparse.Namespace) -> None:
    """Both recipes on the same nested pairs and the same held-out texts."""
    inverter = Inverter.from_pretrained("minilm").to("cpu", options.dtype)
    encoder = load_encoder("all-MiniLM-L6-v2")
    for name, fit in (
        ("published", partial(fit_pseudo_inverse, target=inverter.encoder)),
        ("ours", None),
    ):
        if options.only not in (None, name):
            continue
        leaked, held_out = (LeakedPairs(Path(p)) for p in (options.leaked, options.held_out))
        counts = list(map(int, options.counts.split(",")))
        curve = align_curve(
            inverter, encoder, leaked, held_out, counts, limit=options.limit, fit=fit
        )
        print(f"{name}: {options.limit} texts, {options.dtype}")
        for row in curve_table(curve):
            print("| " + " | ".join(row) + " |", flush=True)
        for note in curve.notes:
            print(note)


def fit(options: argparse.Namespace) -> None:
    """10,000 pairs of 1,536 dimensions, added a thousand at a time as a stream is."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((10_000, 300)).astype(np.float32)
    x, y = (
        hidden @ random.standard_normal((300, d)).astype(np.float32)
        + 8 * random.standard_normal((10_000, d)).astype(np.float32)
        for d in (1536, 384)
    )
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    del hidden
    began, sums = time.perf_counter(), PairSums()
    cpu = time.process_time()
    for start in range(0, 10_000, 1000):
        sums.add(x[start : start + 1000], y[start : start + 1000])
    alignment = fit_alignment(sums, EncoderIdentity("own", None, 384, "0" * 64, ""))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{alignment.describe()}: {seconds:.1f} s, {cpu:.1f} s of processor time")
    print(f"peak memory of the process {peak:.2f} GiB")


def inverting(options: argparse.Namespace) -> None:
    """The same vectors plain and through a map, in turns."""
    inverter = Inverter.from_pretrained("minilm")
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 1536)).astype(np.float32)
    matrix = random.standard_normal((1536, 384)).astype(np.float32)
    means = np.zeros(len(matrix), np.float32), np.zeros(matrix.shape[1], np.float32)
    plain = Alignment("linear", matrix, *means, 1, None, None, {}, 0.0, inverter.encoder)
    aligned = inverter.aligned(plain)
    vectors = aligned.map_vectors(x)
    times: dict[str, list[float]] = {"plain": [], "aligned": []}
    for _ in range(options.rounds + 1):
        for name, reader, inputs in (("plain", inverter, vectors), ("aligned", aligned, x)):
            began = time.process_time()
            reader.invert(inputs)
            times[name].append(time.process_time() - began)
    ratios = [a / p for a, p in zip(times["aligned"][1:], times["plain"][1:], strict=True)]
    began = time.process_time()
    for _ in range(100):
        aligned.map_vectors(x)
    share = (time.process_time() - began) / 100 / statistics.median(times["plain"][1:])
    print(f"aligned / plain {statistics.median(ratios):.4f} x (processor time, batch 64)")
    print(f"the map alone takes {share:.2%} of plain inversion")


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("recipes", "fit", "inverting"))
    parser.add_argument("leaked", nargs="?")
    parser.add_argument("held_out", nargs="?")
    parser.add_argument("--only", choices=("published", "ours"))
    parser.add_argument("--counts", default=",".join(map(str, CURVE)))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    {"recipes": recipes, "fit": fit, "inverting": inverting}[options.what](options)


if __name__ == "__main__":
    main()
