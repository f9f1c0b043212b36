"""Pairs of text and vector that leaked: read, turned into an alignment, and what they are worth."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.pairs import MANIFEST, Pairs
from unembed.data.readers import read_texts
from unembed.decoding import Decoding
from unembed.denoiser import weights_digest
from unembed.encoders.alignment import Alignment, PairSums, fit_alignment
from unembed.encoders.base import Encoder, is_unicode
from unembed.encoders.fingerprint import make_fingerprint
from unembed.encoders.vectors import VectorStatistics, row_peaks, to_unit_length, typical_rows
from unembed.errors import DataError, EmbeddingError, require_kind, require_text, require_whole
from unembed.evaluation.bootstrap import Figure, summarise
from unembed.evaluation.metrics import token_set_f1, word_f1
from unembed.evaluation.rows import ProgressFn, derangement
from unembed.files import as_path
from unembed.inverter import Inverter
from unembed.vectors.invert import as_inverter
from unembed.vectors.read import VectorFile, vector_size

_CHUNK, _POOL = 1024, 4096
CURVE = (1, 10, 30, 100, 300, 1000, 3000)
METRICS = ("word F1", "token-set F1", "cosine")
CONSTANT, NOISE, OWN = "constant output", "random vector", "vectors of the inverter's own encoder"
SHUFFLED = "shuffled"

Block = tuple[list[str], NDArray[np.float64]]  # texts and vectors [n, D'] of the same rows
Fit = Callable[[NDArray[np.float32], NDArray[np.float32]], Alignment]  # x, y → a map


@dataclass
class LeakedPairs:
    """Texts and their vectors of one encoder, in a file or in a folder of prepared pairs.

    A row without a usable text or vector, or with a text that came before, is left out and counted.

    Attributes:
        path: What `VectorFile` reads, with texts beside the vectors, or a folder that
            `unembed prepare` wrote.
        column: Column or key of the text.
        key: Column or key of the vector; the usual names are tried if not given.
        apart_from: Texts that are not to be among them: those held out.
        encoder: Of texts alone (what `read_texts` reads): embeds them. None: vectors are there.
        only: Texts that may be among them; all when None.
        left_out: Rows left out, by reason, of the last time they were read.
        row_count: Rows read then.
    """

    path: Path
    column: str = "text"
    key: str | None = None
    apart_from: frozenset[str] = frozenset()
    encoder: Encoder | None = None
    only: frozenset[str] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    row_count: int = 0

    def blocks(self, limit: int | None = None) -> Iterator[Block]:
        """The usable pairs, a chunk at a time; no more than the first ``limit`` are embedded.

        Raises:
            EmbeddingError: The file cannot be read, lacks a column, or has no usable pair.
            DataError: Nor can a file of texts alone.
            EncoderError: An encoder behind an API gives no usable answer.
        """
        for texts, vectors in self._usable(limit):
            rows = vectors if self.encoder is None else self.encoder.encode(texts)
            yield texts, rows.astype(np.float64, copy=False)

    def choose(self, own: Encoder, count: int, seed: int) -> None:
        """Take only ``count`` of the first 4,096 usable texts, typical ones by vectors of ``own``.

        Texts near the centres of clusters gain 0.02 to 0.04 of cosine at 30 (docs/log.md).
        """
        texts = [text for block, _ in self._usable(_POOL) for text in block]
        if count < len(texts):
            rows = typical_rows(own.encode(texts), count, seed)
            self.only = frozenset(texts[row] for row in rows)

    def _usable(self, limit: int | None) -> Iterator[Block]:
        """Texts and vectors as they were read; those of texts alone have no dimension."""
        self.left_out.clear()
        self.row_count, usable, digests = 0, 0, dict[bytes, bytes]()
        kind = self._rows if self.encoder is None else self._texts
        for texts, vectors in self._prepared() if self._is_prepared else kind():
            reasons = [self._fault(t, v, digests) for t, v in zip(texts, vectors, strict=True)]
            self.left_out.update(reason for reason in reasons if reason is not None)
            good = [row for row, reason in enumerate(reasons) if reason is None]
            if self.only is not None:
                good = [row for row in good if texts[row] in self.only]
            good = good if limit is None else good[: limit - usable]
            usable += len(good)
            if good:
                yield [texts[row] for row in good], vectors[good]
            if usable == limit:
                return
        if not usable:
            raise EmbeddingError(
                f"pairs of a text and a vector in {self.path}",
                f"{self.row_count} rows, none usable "
                f"({self.describe_left_out() or 'an empty file'})",
                "Correct the file, or say where they are with --text-column and --column",
            )

    @property
    def source(self) -> dict[str, Any]:
        """What is known of the encoder: of prepared pairs its identity and fingerprint."""
        if self._is_prepared:
            pairs = Pairs.open(self.path)
            identity, fingerprint = pairs.encoder, pairs.fingerprint
        elif self.encoder is not None:
            identity, fingerprint = self.encoder.identity, make_fingerprint(self.encoder)
        else:
            return {}
        facts = {"name": identity.name, "encoder": identity.to_dict()}
        return facts if fingerprint is None else {**facts, "fingerprint": fingerprint.sha256}

    def describe_left_out(self) -> str:
        """``3 × no text, 1 × NaN or infinity``; empty where nothing was left out."""
        return ", ".join(f"{count} × {reason}" for reason, count in self.left_out.most_common())

    @property
    def _is_prepared(self) -> bool:
        return self.encoder is None and (as_path(self.path) / MANIFEST).is_file()

    def _fault(self, text: Any, vector: NDArray[Any], digests: dict[bytes, bytes]) -> str | None:
        """Say why a pair is not used; remember the others by 8 bytes of text and of vector."""
        if not isinstance(text, str):
            return "no text" if text is None else "text that is no string"
        if not text.strip():
            return "empty text"
        if not is_unicode(text):
            return "text that UTF-8 cannot write"
        if text in self.apart_from:
            return "text that is held out"
        name, value = (hashlib.sha256(b).digest()[:8] for b in (text.encode(), vector.tobytes()))
        if name not in digests:
            digests[name] = value
            return None
        return "duplicate row" if digests[name] == value else "text of a row before, other vector"

    def _texts(self) -> Iterator[tuple[list[Any], NDArray[np.float64]]]:
        texts = read_texts(self.path, self.column)
        while chunk := list(islice(texts, _CHUNK // 4)):  # progress is shown after each
            self.row_count += len(chunk)
            yield chunk, np.empty((len(chunk), 0))

    def _rows(self) -> Iterator[tuple[list[Any], NDArray[np.float64]]]:
        file = VectorFile(self.path, self.key, skip_bad=True, keep=[self.column])
        before: Counter[str] = Counter()
        try:
            for chunk in file.chunks(vector_size(file)):
                self.row_count = chunk.end
                self.left_out.update(file.left_out - before)
                before = file.left_out.copy()
                yield chunk.columns.get(self.column, []), chunk.vectors
        except EmbeddingError as error:
            if "--keep" not in error.fix:
                raise
            raise EmbeddingError(
                error.expected, error.actual, "Pass --text-column with the one that holds the text"
            ) from error

    def _prepared(self) -> Iterator[tuple[list[Any], NDArray[np.float64]]]:
        pairs = Pairs.open(self.path)
        for start in range(0, len(pairs), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(pairs)))
            tokens, embeddings = pairs.rows(rows)
            contents = [
                [r[i] for i in pairs.tokenizer.content_positions(r)] for r in tokens.tolist()
            ]
            self.row_count = int(rows[-1]) + 1
            yield pairs.tokenizer.decode(contents), embeddings.astype(np.float64)


def align_pairs(
    inverter: Inverter,
    encoder: Encoder,
    leaked: LeakedPairs,
    *,
    name: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: ProgressFn = lambda stage, done, total: None,
) -> Alignment:
    """Embed the texts of leaked pairs with the inverter's encoder and fit the map between.

    Args:
        inverter: Whose space the map leads to.
        encoder: The inverter's; needed here only, not for inverting.
        leaked: The pairs.
        name: Of the encoder that made the vectors, for messages.
        limit: Only the first so many usable pairs; of texts alone, so many typical ones.
        seed: Of this choice, and of the pairs that maps are compared on.
        progress: Called with (stage, pairs done, 0).

    Raises:
        EmbeddingError: No usable pair.
        EncoderError: The encoder is not the inverter's.
    """
    require_kind(leaked, LeakedPairs, "leaked pairs", "Make LeakedPairs of their file")
    inverter = as_inverter(inverter)
    inverter.require_encoder(encoder)
    require_whole(limit=(1 if limit is None else limit, 1), seed=(seed, 0))
    require_text(name=name)
    if leaked.encoder is not None and limit is not None:
        progress("choosing the texts", 0, 0)
        leaked.choose(encoder, limit, seed)
    sums, lengths = PairSums(seed), list[NDArray[np.float64]]()
    for texts, vectors in leaked.blocks(limit):
        lengths.append(np.linalg.norm(vectors, axis=1))
        sums.add(to_unit_length(vectors, row_peaks(vectors)), encoder.encode(texts))
        progress("embedding the texts", sums.count, 0)
    norms = np.concatenate(lengths)
    return fit_alignment(
        sums,
        inverter.encoder,
        inverter=weights_digest(inverter.denoiser),
        source=leaked.source | ({} if name is None else {"name": name}),
        norms=(float(norms.min()), float(norms.mean()), float(norms.max())),
        left_out=dict(leaked.left_out),
        statistics=VectorStatistics.measure(sums.x),
    )


@dataclass(frozen=True)
class CurvePoint:
    """What held-out texts lose to somebody with n leaked pairs.

    Attributes:
        pairs: n.
        method: Of the map.
        predicted: Cosine that the map promises: leave-one-out; None where a single pair made it.
        reached: Mean cosine of the mapped held-out vectors with those of the inverter's encoder.
        figures: Metric → mean over the held-out texts, with its interval.
        shuffled: The same, with the recovery of another text's vector.
        doubt: Why the map predicts nothing, where it does not.
    """

    pairs: int
    method: str
    predicted: float | None
    reached: float
    figures: dict[str, Figure | None]
    shuffled: dict[str, Figure | None]
    doubt: str | None = None


@dataclass(frozen=True)
class AlignCurve:
    """Leak against the number of leaked pairs, beside its floors and its ceiling.

    Attributes:
        points: By number of pairs, ascending.
        floors: ``constant output`` (the text of the mean vector), ``random vector``; and the
            ceiling, the texts' vectors of the inverter's own encoder → metric → figure.
        settings: How it was made.
        notes: What is missing, and why.
    """

    points: list[CurvePoint]
    floors: dict[str, dict[str, Figure | None]]
    settings: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def align_curve(  # noqa: PLR0913 - all but the first four have a default
    inverter: Inverter,
    encoder: Encoder,
    leaked: LeakedPairs,
    held_out: LeakedPairs,
    counts: Sequence[int] = CURVE,
    *,
    limit: int = 500,
    decoding: Decoding | str = "greedy",
    seed: int = 0,
    fit: Fit | None = None,
    progress: ProgressFn = lambda stage, done, total: None,
) -> AlignCurve:
    """Measure what 1, 10, … leaked pairs give away of held-out vectors.

    The pairs are drawn with the seed, each number a part of the next; none of them is held out.

    Args:
        inverter: Reads vectors of its own encoder.
        encoder: That encoder.
        leaked: Pairs of the unseen encoder.
        held_out: Others of the same encoder.
        counts: Numbers of pairs.
        limit: Held-out texts, drawn with the seed.
        decoding: How to decode.
        seed: Of the draws, of strategies that sample and of the bootstrap.
        fit: Makes the map of unit vectors x [n, D'] and y [n, D]; `fit_alignment` if not given.
        progress: Called with (stage, done, total).

    Raises:
        EmbeddingError: Pairs that cannot be used, or of two dimensions.
        DataError: Fewer than two held-out texts.
    """
    inverter = as_inverter(inverter).aligned(None)
    require_kind(leaked, LeakedPairs, "leaked pairs", "Make LeakedPairs of their file")
    texts, x_test = _draw(held_out, limit, [seed, 1])
    if len(texts) < 2:  # noqa: PLR2004 - shuffled needs another text
        raise DataError("at least 2 held-out texts", f"{len(texts)}", "Choose another file")
    leaked.apart_from = frozenset(texts)
    leaked_texts, x = _draw(leaked, max(counts), [seed, 0])
    if x.shape[1] != x_test.shape[1]:
        raise EmbeddingError(
            f"held-out vectors of {x.shape[1]} dimensions, as the leaked ones have",
            f"{x_test.shape[1]} in {held_out.path}",
            "Use vectors of the same encoder",
        )
    progress("embedding the texts", 0, len(texts) + len(leaked_texts))
    y_test, y = encoder.encode(texts), encoder.encode(leaked_texts)
    measure = _Measure(inverter, encoder, texts, y_test, decoding, seed)
    sizes = sorted({min(count, len(leaked_texts)) for count in counts})
    total = len(sizes) + 3
    points = []
    for done, size in enumerate(sizes):
        progress("decoding", done, total)
        alignment = (fit or _fitter(inverter))(x[:size], y[:size])
        y_hat = alignment(x_test)
        figures, shuffled = measure(y_hat)
        predicted = alignment.cosine if alignment.cosines else None
        reached = float((y_hat * y_test).sum(axis=1).mean())
        point = (size, alignment.method, predicted, reached, figures, shuffled, alignment.doubt())
        points.append(CurvePoint(*point))
    noise = np.random.default_rng([seed, 2]).standard_normal(y_test.shape)
    floors: dict[str, dict[str, Figure | None]] = {}
    for name, vectors in (
        (CONSTANT, np.broadcast_to(y.mean(axis=0), y_test.shape)),
        (NOISE, noise),
        (OWN, y_test),
    ):
        progress("decoding", len(sizes) + len(floors), total)
        floors[name] = measure(vectors)[0]
    settings = {
        "texts": len(texts),
        "dimension": x.shape[1],
        "encoder": inverter.encoder.to_dict(),
        "decoding": str(decoding),
        "seed": seed,
    }
    return AlignCurve(points, floors, settings, _notes(leaked, held_out, counts, len(leaked_texts)))


def _notes(
    leaked: LeakedPairs, held_out: LeakedPairs, counts: Sequence[int], there: int
) -> list[str]:
    notes = []
    if there < max(counts):
        more = ", ".join(f"{count:,}" for count in sorted(counts) if count > there)
        notes.append(
            f"{more} pairs: not measured, there are {there:,} usable ones in {leaked.path}"
        )
    for pairs in (leaked, held_out):
        if pairs.left_out:
            notes.append(f"left out of {pairs.path}: {pairs.describe_left_out()}")
    return notes


def _fitter(inverter: Inverter) -> Fit:
    def fit(x: NDArray[np.float32], y: NDArray[np.float32]) -> Alignment:
        sums = PairSums()
        sums.add(x, y)
        return fit_alignment(sums, inverter.encoder)

    return fit


def _draw(pairs: LeakedPairs, most: int, seed: list[int]) -> tuple[list[str], NDArray[np.float32]]:
    """Some of the pairs in a random order, all alike likely; only so many are in memory."""
    require_kind(pairs, LeakedPairs, "leaked pairs", "Make LeakedPairs of their file")
    random = np.random.default_rng(seed)
    texts, vectors, keys = list[str](), np.empty((0, 0), np.float32), np.empty(0)
    for more, rows in pairs.blocks():
        units = to_unit_length(rows, row_peaks(rows))
        vectors = np.concatenate([vectors, units]) if len(texts) else units
        texts, keys = texts + more, np.concatenate([keys, random.random(len(more))])
        order = np.argsort(keys, kind="stable")[:most]
        texts, vectors, keys = [texts[i] for i in order], vectors[order], keys[order]
    return texts, vectors


@dataclass(frozen=True)
class _Measure:
    """What comes back of the held-out texts from vectors in the inverter's space."""

    inverter: Inverter
    encoder: Encoder
    texts: list[str]
    own: NDArray[np.float32]
    decoding: Decoding | str
    seed: int

    def __call__(
        self, vectors: NDArray[Any]
    ) -> tuple[dict[str, Figure | None], dict[str, Figure | None]]:
        """Figures of vectors [N, D], and those with the recoveries handed to other texts."""
        model = self.encoder if _calls(self.decoding) else None
        inversions = self.inverter.invert(
            vectors, decoding=self.decoding, encoder=model, seed=self.seed
        )
        recovered = [item.text for item in inversions]
        with_text = [row for row, text in enumerate(recovered) if text.strip()]
        again = np.zeros_like(self.own)
        if with_text:
            again[with_text] = self.encoder.encode([recovered[row] for row in with_text])
        ids = [set(item.token_ids) for item in inversions]
        target_ids = [set(row) for row in self.inverter.tokenizer.encode(self.texts)]
        results = []
        for order in (np.arange(len(recovered)), derangement(len(recovered))):
            cosines = (again[order] * self.own).sum(axis=1)
            rows = [int(row) for row in order]
            values: dict[str, list[float | None]] = {
                "word F1": [
                    word_f1(t, recovered[r]) for t, r in zip(self.texts, rows, strict=True)
                ],
                "token-set F1": [
                    token_set_f1(sorted(t), sorted(ids[r]))
                    for t, r in zip(target_ids, rows, strict=True)
                ],
                "cosine": [
                    float(c) if recovered[r].strip() else None
                    for c, r in zip(cosines, rows, strict=True)
                ],
            }
            results.append({name: summarise(each, self.seed) for name, each in values.items()})
        return results[0], results[1]


def _calls(decoding: Decoding | str) -> bool:
    parsed = Decoding.parse(decoding) if isinstance(decoding, str) else decoding
    return parsed.encoder_calls > 0
