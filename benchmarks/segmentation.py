"""Sentence segmenters side by side: ``python -m benchmarks.segmentation TEXTS.parquet``.

The house's regular expression, sentencex with the rules of each language and of English, and those
of blingfire, pysbd and uniseg that are installed; these three are no dependencies. The file has the
columns ``text`` and ``lang``.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.machine import print_table
from unembed.config import DataSection
from unembed.data.pieces import sentence_ends

Segmenter = Callable[[str], int]
_CANDIDATES = ("sentencex", "sentencex, en", "blingfire", "uniseg", "pysbd")


def segmenters(language: str) -> dict[str, Segmenter]:
    """Name → function that counts the sentences of a text."""
    functions: dict[str, Segmenter] = {
        "regex": partial(_count, DataSection()),
        "sentencex": partial(_count, DataSection(segmenter="sentencex", language=language)),
        "sentencex, en": partial(_count, DataSection(segmenter="sentencex")),
    }
    modules: dict[str, Any] = {}
    for name in ("blingfire", "uniseg.sentencebreak", "pysbd"):
        try:
            modules[name] = importlib.import_module(name)
        except ImportError:
            continue
    if "blingfire" in modules:
        split = modules["blingfire"].text_to_sentences
        functions["blingfire"] = lambda text: str(split(text)).count("\n") + 1
    if "uniseg.sentencebreak" in modules:
        sentences = modules["uniseg.sentencebreak"].sentences
        functions["uniseg"] = lambda text: sum(1 for _ in sentences(text))
    if "pysbd" in modules:
        try:
            segment = modules["pysbd"].Segmenter(language=language, clean=False).segment
            functions["pysbd"] = lambda text: len(segment(text))
        except ValueError:
            pass  # it does not know the language
    return functions


def _count(settings: DataSection, text: str) -> int:
    return len(set(sentence_ends(text, settings)))


def main() -> None:
    """Print sentences found and million characters a second for each language."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--count", type=int, default=30, help="texts of each language")
    arguments = parser.parse_args()
    rows = pq.read_table(arguments.texts, columns=["text", "lang"]).to_pylist()
    names = ["regex", *_CANDIDATES]
    table = []
    for language in sorted({row["lang"] for row in rows}):
        texts = [row["text"] for row in rows if row["lang"] == language][: arguments.count]
        letters = sum(map(len, texts))
        cells = dict.fromkeys(names, "not there")
        for name, count in segmenters(language).items():
            began = time.perf_counter()
            sentences = sum(map(count, texts))
            rate = letters / (time.perf_counter() - began) / 1e6
            cells[name] = f"{sentences}, {rate:.2f} M/s"
        table.append([language, str(letters), *(cells[name] for name in names)])
    print_table(["language", "characters", *names], table)


if __name__ == "__main__":
    main()
