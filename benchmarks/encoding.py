"""Encoding speed: our adapter beside `SentenceTransformer.encode` at its defaults, in one run.

    python -m benchmarks.encoding [--texts FILE] [--count 2000] [--rounds 5]

Without --texts the sentences are made from a list of words, with lengths like those of sentences.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import read_texts
from unembed.device import choose_compute
from unembed.encoders.fake import FakeEncoder
from unembed.encoders.sentence import SentenceEncoder, load_encoder


def make_texts(encoder: SentenceEncoder, path: Path | None, count: int) -> list[str]:
    """Pieces as `unembed prepare` cuts them."""
    if path is None:
        words = list(FakeEncoder().tokenizer.backend.get_vocab())
        generator = np.random.default_rng(0)
        lengths = generator.integers(5, 32, size=count)
        return [" ".join(generator.choice(words, size=length)) for length in lengths]
    passages = [text for text, _ in zip(read_texts(path), range(count), strict=False)]
    return [p.text for p in cut_pieces(passages, encoder.tokenizer, DataSection())][:count]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--texts", type=Path, default=None)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    encoder = load_encoder()  # in the format that `unembed prepare` chooses on this machine
    library = load_encoder(compute=choose_compute("auto", "float32"))._model  # its defaults
    texts = make_texts(encoder, options.texts, options.count)
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
