"""Held-out texts: cut into pieces or with stored vectors, a chunk at a time; examples.

An example is an original beside its recovery, token by token; good, middling and bad ones are
chosen by a seed.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import (
    column_values,
    csv_rows,
    json_lines,
    open_parquet,
    parquet_batches,
    read_texts,
)
from unembed.encoders.base import is_unicode
from unembed.encoders.vectors import as_unit_vectors
from unembed.errors import DataError, require_number, require_whole
from unembed.evaluation.metrics import Recovery, token_set_f1
from unembed.files import count_lines, file_format, text_files
from unembed.tokenizer import TextTokenizer
from unembed.vectors.read import VectorFile

if TYPE_CHECKING:
    from unembed.inverter import Inverter

LABELS, LENGTH = ("domain", "lang"), "length"
_LENGTHS = ((1, 3), (4, 8), (9, 16), (17, 24), (25, 32))  # tokens, both ends included
_REPORT_EVERY = 500
_MOST_CORPUS = 200_000

Labels = dict[str, str]


def cutting(inverter: Inverter, max_tokens: int | None = None) -> DataSection:
    """Find how texts are cut: as in training, into pieces of at most so many tokens.

    When not given, that is what fits into the inverter's prefix, where it has one. Raises
    ConfigError for more tokens than it writes.
    """
    trained = inverter.trained.get("config", {}).get("data", {})
    data = DataSection.model_validate({"length": inverter.length, **trained})
    length = inverter.spec.prefix or data.length
    if max_tokens is not None:
        require_number(max_tokens=(max_tokens, 1, inverter.length - 1))
        length = require_whole(max_tokens=(max_tokens, 1))[0] + 1
    least = min(data.min_tokens, length - 1)
    return data.model_copy(update={"length": length, "min_tokens": least})


@dataclass(frozen=True)
class Passage:
    """A held-out text and what is known of it.

    Attributes:
        text: The text.
        labels: ``domain`` and ``lang``, where they are known.
        vector: The stored one of the whole text, unit length [D]; None for a text that is to be
            cut and embedded.
    """

    text: str
    labels: Labels = field(default_factory=dict)
    vector: NDArray[np.float32] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Sample:
    """A piece to evaluate: its text, content tokens, labels and, where there is one, vector [D]."""

    text: str
    token_ids: list[int]
    labels: Labels
    vector: NDArray[np.float32] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PassageFile:
    """The passages of a file or folder, read anew each time they are gone through.

    Attributes:
        path: What `unembed.data.readers.read_texts` takes.
        column: Column or key of the text; the columns ``domain`` and ``lang`` are labels.
    """

    path: str | Path
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
            columns = [column_values(path, column) for column in batch.columns]
            rows = zip(*columns, strict=True) if names else repeat((), batch.num_rows)
            yield from (_without_blanks(dict(zip(names, row, strict=True))) for row in rows)
    elif kind == ".jsonl":
        for line in json_lines(path):
            yield _labels_of(line.value if isinstance(line.value, dict) else {})
    elif kind in (".csv", ".tsv"):
        yield from map(_labels_of, csv_rows(path))
    else:
        yield from repeat({}, count_lines(path))


def _without_blanks(labels: dict[str, object]) -> Labels:
    return {name: str(value) for name, value in labels.items() if value not in (None, "")}


def paired(texts: Iterable[str | Passage], vectors: Any, dimension: int) -> list[Passage]:
    """Put each text beside its stored vector.

    Args:
        texts: Strings or passages.
        vectors: One for each of them, [N, D], of any length; see `as_unit_vectors`.
        dimension: D.

    Raises:
        DataError: Another number of vectors than of texts, or a lone string.
        EmbeddingError: They are no vectors of the dimension.
    """
    passages = list(_as_passages(texts))
    units = as_unit_vectors(vectors, dimension)
    if len(units) != len(passages):
        raise DataError(
            "a vector for each text",
            f"{len(units)} vectors and {len(passages)} texts",
            "Hand them over in the same order",
        )
    pairs = zip(passages, units, strict=True)
    return [replace(passage, vector=vector) for passage, vector in pairs]


@dataclass(frozen=True)
class StoredPassages:
    """Stored vectors with their texts, read anew each time they are gone through.

    Rows without a text are passed over.

    Attributes:
        source: The vectors; what is noted and left out while reading is told there.
        dimension: Their size D.
        column: Column or key of the text beside each vector; ``domain`` and ``lang`` are labels.
        texts: A file of texts, one for each vector in the same order, in place of the column.
    """

    source: VectorFile
    dimension: int
    column: str = "text"
    texts: PassageFile | None = None

    def __iter__(self) -> Iterator[Passage]:
        names = () if self.texts is not None else (self.column, *LABELS)
        counts: Counter[str] = Counter()
        file = replace(self.source, keep=names, optional=LABELS, left_out=counts, rows_left_out={})
        passages = enumerate(iter(self.texts or ()))
        row_count, passage = 0, (-1, Passage(""))
        for chunk in file.chunks(self.dimension):
            row_count = chunk.end
            units = as_unit_vectors(chunk.vectors, self.dimension) if chunk.rows else ()
            for index, vector in enumerate(units):
                if self.texts is None:
                    row = {name: values[index] for name, values in chunk.columns.items()}
                    yield Passage(self._text(row, chunk.rows[index]), _labels_of(row), vector)
                    continue
                while passage[0] < chunk.rows[index]:
                    passage = next(passages, (-1, passage[1]))
                    if passage[0] < 0:
                        raise self._uneven(f"fewer texts than vectors ({row_count} or more)")
                yield replace(passage[1], vector=vector)
        self.source.left_out.clear()
        self.source.left_out.update(counts)
        self.source.rows_left_out.update(file.rows_left_out)
        if any(number >= row_count and item.text.strip() for number, item in passages):
            raise self._uneven(f"more texts than the {row_count} vectors")

    def _text(self, row: dict[str, Any], number: int) -> str:
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"text in the column {self.column!r} of {self.source.path}",
                f"{type(text).__name__} beside vector {number} (counted from 0)",
                "Pass --text-column with the one that holds the texts",
            )
        if text and not is_unicode(text):
            raise DataError(
                f"texts that UTF-8 can write in {self.source.path}",
                f"half a surrogate pair beside vector {number} (counted from 0)",
                "Correct its encoding",
            )
        return text or ""

    def _uneven(self, problem: str) -> DataError:
        path = None if self.texts is None else self.texts.path
        return DataError(
            f"a text in {path} for each vector of {self.source.path}", problem, "Correct --texts"
        )


def _labels_of(row: Mapping[str, object]) -> Labels:
    return _without_blanks({name: row.get(name) for name in LABELS})


def _as_passages(texts: Any) -> Iterator[Passage]:
    table = isinstance(texts, Mapping) or hasattr(texts, "columns")  # names would be its texts
    if isinstance(texts, str) or table or not isinstance(texts, Iterable):
        kind = "the lone string" if isinstance(texts, str) else type(texts).__name__
        fix = "Pass the column with the texts" if table else "Put it into a list"
        raise DataError("a list of texts", f"{kind} {texts!r:.80}", fix)
    for index, text in enumerate(texts):
        passage = Passage(text) if isinstance(text, str) else text
        if not isinstance(passage, Passage) or not isinstance(passage.text, str):
            actual = f"{text!r:.80} at position {index}"
            raise DataError("a text", actual, "Leave it out, or make it a string")
        yield passage


def groups_of(sample: Sample) -> Iterator[tuple[str, str]]:
    """The groups of the breakdowns that a text belongs to."""
    tokens = len(sample.token_ids)
    bins = (f"{low}-{high}" for low, high in _LENGTHS if low <= tokens <= high)
    yield LENGTH, next(bins, f"{_LENGTHS[-1][1] + 1}-")
    for name in LABELS:
        if name in sample.labels:
            yield name, sample.labels[name]


class Samples:
    """The pieces to evaluate, drawn with a seed from all that the texts yield.

    The texts are gone through twice: to count the pieces, and to hand out the chosen ones. A text
    with a stored vector is one piece, whole: it is what was embedded.

    Args:
        texts: Strings or passages, gone through more than once.
        tokenizer: Of the inverter.
        settings: How pieces are cut, as in training.
        limit: Pieces to draw; all when None.
        seed: Of the draw.
        report: Called with the number of texts read.

    Attributes:
        has_vectors: The vectors are given with the texts.
        digest: SHA-256 of all texts, labels and stored vectors.

    Raises:
        DataError: The texts yield fewer than two pieces, or some have a vector and others none.
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
        self._texts = list(texts) if isinstance(texts, Iterator) else texts
        self._tokenizer, self._settings = tokenizer, settings
        vector_count = 0
        self._counts = array("L")  # pieces of each text
        digest = hashlib.sha256()
        for index, passage in enumerate(self._passages()):
            self._counts.append(len(self._cut(index, passage)))
            digest.update(json.dumps([passage.text, passage.labels]).encode())
            if passage.vector is not None:
                digest.update(passage.vector.tobytes())
                vector_count += 1
            if (index + 1) % _REPORT_EVERY == 0:
                report(index + 1)
        report(len(self._counts))
        self.digest, self.has_vectors = digest.hexdigest(), vector_count > 0
        if vector_count not in (0, len(self._counts)):
            raise DataError(
                "a stored vector with each text, or with none",
                f"{vector_count} with {len(self._counts)} texts",
                "Leave the others out",
            )
        total = sum(self._counts)
        if total < 2:  # noqa: PLR2004 - the shuffled baseline needs another text
            raise DataError(
                "at least 2 texts with a stored vector"
                if self.has_vectors
                else f"texts that yield at least 2 pieces of {settings.min_tokens} tokens or more",
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
        return _as_passages(self._texts)

    def _cut(self, index: int, passage: Passage) -> list[Sample]:
        if passage.vector is not None:
            (ids,) = self._tokenizer.encode([passage.text])
            return [Sample(passage.text, ids, passage.labels, passage.vector)] if ids else []
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
        tokens=list(zip(tokenizer.pieces(recovered), marks, strict=True)),
        labels=sample.labels,
    )


def draw_indices(texts: int, seed: int) -> set[int]:
    """Draw the texts kept as examples: all, or as many as ``MOST`` with the seed."""
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


def corpus_texts(path: Path, column: str) -> list[str]:
    """Read the first 200,000 texts of a file that can be embedded, such as an attacker may have.

    Raises:
        DataError: The file cannot be read.
    """
    usable = (text for text in read_texts(path, column) if text.strip() and is_unicode(text))
    return list(islice(usable, _MOST_CORPUS))
