"""Held-out texts with their labels, cut into the pieces to evaluate, a chunk at a time; examples.

An example is an original beside its recovery, token by token; good, middling and bad ones are
chosen by a seed.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import json_lines, open_parquet, parquet_batches, read_texts
from unembed.errors import DataError
from unembed.evaluation.metrics import Recovery, token_set_f1
from unembed.files import count_lines, file_format, text_files
from unembed.tokenizer import TextTokenizer

LABELS = ("domain", "lang")
_REPORT_EVERY = 500

Labels = dict[str, str]


@dataclass(frozen=True)
class Passage:
    """A held-out text and what is known of it: ``domain`` and ``lang``, where they are."""

    text: str
    labels: Labels


@dataclass(frozen=True)
class Sample:
    """A piece to evaluate: its text, content tokens, and the labels of its passage."""

    text: str
    token_ids: list[int]
    labels: Labels


@dataclass(frozen=True)
class PassageFile:
    """The passages of a file or folder, read anew each time they are gone through.

    Attributes:
        path: What `unembed.data.readers.read_texts` takes.
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
        for batch in parquet_batches(path, names, file=file):
            yield from map(_without_blanks, batch.to_pylist())
    elif kind == ".jsonl":
        for line in json_lines(path):
            row = line.value if isinstance(line.value, dict) else {}
            yield _without_blanks({name: row.get(name) for name in LABELS})
    else:
        yield from repeat({}, count_lines(path))


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
        pieces = cut_pieces([passage.text], self._tokenizer, self._settings, index)
        return [Sample(piece.text, piece.token_ids, passage.labels) for piece in pieces]


# Examples

MOST = 1000  # texts kept as examples
RIGHT, ELSEWHERE, WRONG = "right", "elsewhere", "wrong"
_THIRDS = ("good", "middling", "bad")


@dataclass(frozen=True)
class Example:
    """An original beside its recovery.

    Attributes:
        original: The text.
        recovered: What came back.
        cosine: Between their vectors; None when nothing came back.
        index: Of the text among those evaluated.
        row: The attack that made the recovery.
        f1: Token-set F1.
        tokens: The recovery in pieces that join to its text, each with ``right`` (the original
            has the token in this place), ``elsewhere`` (in another place) or ``wrong``.
        labels: ``domain`` and ``lang`` of the text, where they are known.
    """

    original: str
    recovered: str
    cosine: float | None
    index: int
    row: str
    f1: float
    tokens: list[tuple[str, str]]
    labels: dict[str, str]


def make_example(
    index: int, row: str, sample: Sample, recovery: Recovery, tokenizer: TextTokenizer
) -> Example:
    """Compare a recovery with its original, token by token."""
    original, recovered = sample.token_ids, recovery.token_ids
    vocabulary = set(original)
    marks = []
    for place, token in enumerate(recovered):
        right = place < len(original) and original[place] == token
        marks.append(RIGHT if right else ELSEWHERE if token in vocabulary else WRONG)
    return Example(
        original=sample.text,
        recovered=recovery.text,
        cosine=recovery.cosine,
        index=index,
        row=row,
        f1=token_set_f1(original, recovered),
        tokens=list(zip(pieces_of(recovered, tokenizer), marks, strict=True)),
        labels=sample.labels,
    )


def pieces_of(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The characters that each token adds to the decoded text, spaces included.

    A token that ends inside a character adds nothing; the one that completes it adds it.
    """
    pieces, before = [], ""
    for decoded in tokenizer.decode([ids[: stop + 1] for stop in range(len(ids))]):
        text = decoded.rstrip("\ufffd")
        if before.startswith(text):  # half a character can take finished ones with it
            pieces.append("")
            continue
        shared = 0
        while shared < min(len(before), len(text)) and before[shared] == text[shared]:
            shared += 1
        pieces.append(text[shared:])
        before = text
    return pieces


def draw_indices(texts: int, seed: int) -> set[int]:
    """Which texts are kept as examples: all, or as many as ``MOST`` drawn with the seed."""
    if texts <= MOST:
        return set(range(texts))
    return set(np.random.default_rng(seed).choice(texts, size=MOST, replace=False).tolist())


def choose_examples(
    examples: Sequence[Example], seed: int, per_third: int = 3
) -> dict[str, list[Example]]:
    """Good, middling and bad recoveries, by a rule that leaves nothing to choose.

    The texts are ordered by the token-set F1 that the first attack reached, cut into thirds, and
    from each third as many are drawn with the seed.

    Args:
        examples: Of any number of attacks; the first one's are used.
        seed: Of the draw.
        per_third: Examples drawn from each third, fewer where there are not as many.

    Returns:
        ``good``, ``middling`` and ``bad``, each in the order of the texts.
    """
    first = [example for example in examples if example.row == examples[0].row]
    order = sorted(first, key=lambda example: (-example.f1, example.index))
    generator = np.random.default_rng(seed)
    thirds = {}
    for name, third in zip(_THIRDS, np.array_split(np.arange(len(order)), 3), strict=True):
        places = generator.choice(third, size=min(per_third, len(third)), replace=False)
        thirds[name] = [order[place] for place in sorted(places, key=lambda p: order[p].index)]
    return thirds
