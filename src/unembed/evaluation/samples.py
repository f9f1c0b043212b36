"""Held-out texts with their labels, cut into the pieces to evaluate, a chunk at a time."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.errors import DataError
from unembed.files import file_format, open_parquet, read_lines, read_texts, text_files
from unembed.tokenizer import TextTokenizer

LABELS = ("domain", "lang")
_BATCH_ROWS = 4096
_REPORT_EVERY = 500

Labels = dict[str, str]


@dataclass(frozen=True)
class Passage:
    """A held-out text and what is known of it: ``domain`` and ``lang``, where they are.

    One whose vector is given, in float64 [D'], is not cut: the vector is of the whole.
    """

    text: str
    labels: Labels
    vector: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Sample:
    """A piece to evaluate: its text, content tokens, the labels and the vector of its passage."""

    text: str
    token_ids: list[int]
    labels: Labels
    vector: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class PassageFile:
    """The passages of a file or folder, read anew each time they are gone through.

    Attributes:
        path: What `unembed.files.read_texts` takes.
        column: Column or key of the text; the columns ``domain`` and ``lang`` are labels.
    """

    path: Path
    column: str = "text"

    def __iter__(self) -> Iterator[Passage]:
        labels = chain.from_iterable(_labels(file) for file in text_files(self.path))
        for text, row in zip(read_texts(self.path, self.column), labels, strict=True):
            yield Passage(text, row)


def _labels(path: Path) -> Iterator[Labels]:
    """The labels of every row of a file, in the order of `read_texts`."""
    kind = file_format(path)
    if kind == ".parquet":
        file = open_parquet(path)
        names = [name for name in LABELS if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
            for row in batch.to_pylist():
                yield _without_blanks(row)
        return
    for line in read_lines(path):
        blank = kind == ".txt" or line is None or not line.strip()
        row = {} if blank else json.loads(line or b"{}")
        yield _without_blanks(
            {name: row.get(name) for name in LABELS} if isinstance(row, dict) else {}
        )


def _without_blanks(labels: dict[str, object]) -> Labels:
    return {name: str(value) for name, value in labels.items() if value not in (None, "")}


class Samples:
    """The pieces to evaluate, drawn with a seed from all that the texts yield.

    The texts are gone through twice: to count the pieces, and to hand out the chosen ones.

    Args:
        texts: Strings or passages, gone through more than once.
        tokenizer: Of the inverter.
        settings: How pieces are cut, as in training.
        limit: Pieces to draw; all when None.
        seed: Of the draw.
        report: Called with the number of texts read.

    Raises:
        DataError: The texts yield fewer than two pieces.
    """

    def __init__(
        self,
        texts: Iterable[str | Passage],
        tokenizer: TextTokenizer,
        settings: DataSection,
        *,
        limit: int | None = None,
        seed: int = 0,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        if isinstance(texts, str):
            raise DataError("a list of texts", f"the single {texts!r:.80}", "Put it into a list")
        self._texts = list(texts) if iter(texts) is texts else texts
        self._tokenizer, self._settings = tokenizer, settings
        self._counts = array("L")  # pieces of each text
        digest = hashlib.sha256()
        for index, passage in enumerate(self._passages()):
            self._counts.append(len(self._cut(index, passage)))
            digest.update(json.dumps([passage.text, passage.labels]).encode())
            digest.update(b"" if passage.vector is None else passage.vector.tobytes())
            if (index + 1) % _REPORT_EVERY == 0:
                report(index + 1)
        report(len(self._counts))
        self.digest = digest.hexdigest()
        total = sum(self._counts)
        if total < 2:  # noqa: PLR2004 - the shuffled baseline needs another text
            raise DataError(
                f"texts that yield at least 2 pieces of {settings.min_tokens} tokens or more",
                str(total),
                "Choose another file",
            )
        self._mask = np.ones(total, dtype=bool)
        if limit is not None and limit < total:
            indices = np.random.default_rng(seed).choice(total, size=max(limit, 2), replace=False)
            self._mask[:] = False
            self._mask[indices] = True

    def __len__(self) -> int:
        return int(self._mask.sum())

    def __iter__(self) -> Iterator[Sample]:
        start = 0
        for index, passage in enumerate(self._passages()):
            mask = self._mask[start : start + self._counts[index]]
            start += self._counts[index]
            if mask.any():
                pieces = self._cut(index, passage)
                yield from (s for s, take in zip(pieces, mask, strict=True) if take)

    def chunks(self, size: int) -> Iterator[tuple[int, list[Sample]]]:
        """Index of the first, and at most ``size`` + 1 samples; never one alone."""
        first = 0
        chunk: list[Sample] = []
        for index, sample in enumerate(self):
            if len(chunk) >= size and index + 1 < len(self):
                yield first, chunk
                first, chunk = index, []
            chunk.append(sample)
        yield first, chunk

    def _passages(self) -> Iterator[Passage]:
        for text in self._texts:
            yield Passage(text, {}) if isinstance(text, str) else text

    def _cut(self, index: int, passage: Passage) -> list[Sample]:
        if passage.vector is not None:
            (ids,) = self._tokenizer.encode([passage.text])
            return [Sample(passage.text, ids, passage.labels, passage.vector)] if ids else []
        pieces = cut_pieces([passage.text], self._tokenizer, self._settings, index)
        return [Sample(piece.text, piece.token_ids, passage.labels) for piece in pieces]
