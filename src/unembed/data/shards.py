"""Shards of prepared pairs, the unit of work: passages → pieces → arrays under temporary names.

The process that holds the folder's lock renames the arrays and lists them in the manifest. Whoever
makes a shard, on whichever machine, makes the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.config import DataSection
from unembed.data.pairs import array_digest, shard_names, write_array
from unembed.data.pieces import Piece, cut_pieces
from unembed.data.readers import read_texts
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.batching import one_ahead
from unembed.errors import DataError, EncoderError
from unembed.tokenizer import TextTokenizer

_UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Reads:
    """Limit of what an encoder reads of pieces that another tokenizer than its own has cut.

    Attributes:
        tokenizer: The encoder's own.
        most: Content tokens of it; the rest would be cut off without a word.
    """

    tokenizer: TextTokenizer
    most: int

    def whole(self, pieces: list[Piece], dropped: Counter[str]) -> list[Piece]:
        """The pieces that are read whole; the others are counted as ``beyond_encoder``."""
        lengths = map(len, self.tokenizer.encode([piece.text for piece in pieces]))
        readable = [piece for piece, n in zip(pieces, lengths, strict=True) if n <= self.most]
        dropped["beyond_encoder"] += len(pieces) - len(readable)
        return readable


@dataclass(frozen=True)
class Job:
    """Job of a preparation; plain data, so that it can be sent to another machine.

    Attributes:
        source: File or folder of texts.
        out: Folder of the pairs.
        column: Column or key that holds the text.
        settings: How passages become pieces.
        tokenizer: The encoder's or another, maybe trimmed.
        identity: The encoder that embeds the pieces.
        fingerprint: The encoder's, as the manifest keeps it.
        round_trip: Leave out pieces that do not decode back. Folders begun by a version that did
            not are finished as they were begun.
        temporary: What a file's name ends in until it is whole and known to the manifest.
        reads: Where the tokenizer is not the encoder's: what that reads, if it has a limit.
    """

    source: Path
    out: Path
    column: str
    settings: DataSection
    tokenizer: TextTokenizer
    identity: EncoderIdentity
    fingerprint: dict[str, Any] | None = None
    round_trip: bool = True
    temporary: str = ".tmp"
    reads: Reads | None = None


@dataclass(frozen=True)
class ShardTask:
    """Task of making a shard: its passages.

    Attributes:
        index: Number of the shard.
        first: Index of its first passage in the source.
        passages: How many to read; at the source's end there may be fewer.
        tokens_sha256: Checksum its tokens must have, of a shard that is made again.
    """

    index: int
    first: int
    passages: int
    tokens_sha256: str | None = None


@dataclass(frozen=True)
class CutShard:
    """A shard before its embeddings: pieces, their token ids [N, L], what was left out and why."""

    task: ShardTask
    passages: int
    pieces: list[Piece]
    tokens: NDArray[np.uint32]
    dropped: dict[str, int]


@dataclass(frozen=True)
class MadeShard:
    """A shard whose arrays are on the disk under temporary names.

    Attributes:
        index: Number of the shard.
        entry: What the manifest says about it; the keys of ``sha256`` are the final names.
        temporary: What the files' names end in so far.
    """

    index: int
    entry: dict[str, Any]
    temporary: str

    def commit(self, out: Path) -> None:
        """Give the files their final names.

        Raises:
            DataError: They are not there.
        """
        for name in self.entry["sha256"]:
            try:
                (out / (name + self.temporary)).replace(out / name)
            except FileNotFoundError as error:
                raise DataError(
                    f"{name} in {out}, where a worker has written it",
                    "no such file",
                    "Choose an --out folder that all machines share",
                ) from error

    def discard(self, out: Path) -> None:
        """Remove the files."""
        for name in self.entry["sha256"]:
            (out / (name + self.temporary)).unlink(missing_ok=True)


Report = Callable[[CutShard, int], None]
# Makes shards, in order: by itself (`make_here`) or with the help of other processes
Runner = Callable[[Job, Iterable[ShardTask], Report], Generator[MadeShard]]


class PassageReader:
    """Reads stretches of a source, and the whole of it only once when they come in order."""

    def __init__(self, source: Path, column: str) -> None:
        self.source, self.column = source, column
        self._texts: Iterator[str] | None = None
        self._position = 0

    def read(self, first: int, count: int) -> list[str]:
        """The passages from ``first``; fewer than ``count`` at the end of the source."""
        texts, position = self._texts, self._position
        self._texts = None  # an iterator that has raised would look like the end of the source
        if texts is None or position > first:
            texts, position = read_texts(self.source, self.column), 0
        passages = list(islice(texts, first - position, first - position + count))
        self._texts, self._position = texts, first + count
        return passages


def make_here(
    encoder: Encoder, job: Job, tasks: Iterable[ShardTask], report: Report
) -> Generator[MadeShard]:
    """Make shards one after another; a thread reads and cuts the next while this one is encoded."""
    for cut in one_ahead(_cut_all(job, tasks)):
        yield make_shard(job, encoder, cut, report)


def _cut_all(job: Job, tasks: Iterable[ShardTask]) -> Iterator[CutShard]:
    reader = PassageReader(job.source, job.column)
    for task in tasks:
        cut = cut_shard(job, reader, task)
        yield cut
        if cut.passages < task.passages:
            return


def cut_shard(job: Job, reader: PassageReader, task: ShardTask) -> CutShard:
    """Read a shard's passages and cut them.

    Raises:
        DataError: The source cannot be read, or no longer yields the tokens of a damaged shard.
    """
    texts = reader.read(task.first, task.passages)
    dropped: Counter[str] = Counter()
    pieces = cut_pieces(
        texts,
        job.tokenizer,
        job.settings,
        task.first,
        dropped=dropped,
        round_trip=job.round_trip,
    )
    if job.reads is not None:
        pieces = job.reads.whole(pieces, dropped)
    tokens = job.tokenizer.pack((piece.token_ids for piece in pieces), job.settings.length)
    if task.tokens_sha256 not in (None, array_digest(tokens)):
        raise DataError(
            f"{job.source} to yield the tokens of the damaged shard {task.index} again",
            "other tokens",
            "Restore the source as it was, or prepare into a new folder",
        )
    counts = {reason: count for reason, count in sorted(dropped.items()) if count}
    return CutShard(task, len(texts), pieces, tokens, counts)


def make_shard(
    job: Job, encoder: Encoder, cut: CutShard, report: Report | None = None
) -> MadeShard:
    """Encode a shard's pieces and write its arrays under temporary names.

    Raises:
        DataError: The disk is full.
        EncoderError: A vector is not finite or not of unit length.
    """
    finished = 0

    def count(more: int) -> None:
        nonlocal finished
        finished += more
        if report is not None:
            report(cut, finished)

    texts = [piece.text for piece in cut.pieces]
    vectors = encoder.encode(texts, count)
    _require_unit(encoder, texts, vectors)
    arrays: list[NDArray[Any]] = [cut.tokens, vectors.astype(np.float16)]
    sha256: dict[str, str] = {}
    entry = {
        "passages": cut.passages,
        "pairs": len(texts),
        "sha256": sha256,
        "dropped": cut.dropped,
    }
    shard = MadeShard(cut.task.index, entry, job.temporary)
    try:
        for name, array in zip(shard_names(cut.task.index), arrays, strict=True):
            sha256[name] = write_array(job.out / (name + job.temporary), array)
    except Exception:
        shard.discard(job.out)  # a first whole file is worth nothing without the second
        raise
    return shard


def _require_unit(encoder: Encoder, texts: list[str], vectors: NDArray[np.float32]) -> None:
    """Refuse vectors that would poison a shard, whatever encoder made them."""
    wrong = ~(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _UNIT_TOLERANCE)  # true for NaN too
    if wrong.any():
        row = int(wrong.argmax())
        raise EncoderError(
            "finite vectors of unit length",
            f"length {np.linalg.norm(vectors[row])} from {encoder.identity.name} for "
            f"{texts[row][:80]!r}, one of {int(wrong.sum())}",
            "Try --device cpu; `unembed preflight` shows what an encoder does",
        )
