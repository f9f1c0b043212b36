"""Decode vectors of held-out texts from all masked; say how much came back, beside baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.pairs import Pairs
from unembed.encoders import as_encoder
from unembed.encoders.base import Encoder
from unembed.errors import ConfigError, require_callable, require_whole
from unembed.evaluation.bootstrap import (
    OTHER_VECTORS,
    RESAMPLES,
    Figure,
    Tally,
    block_count,
    draw_blocks,
    duration,
    put_in_words,
)
from unembed.evaluation.cache import FOLDER, RowCache, as_folder
from unembed.evaluation.metrics import BINS, Recovery, Ruler, make_ruler
from unembed.evaluation.rows import (
    BATCH,
    BLIND,
    CHUNK,
    SHUFFLED,
    Attack,
    Bench,
    Part,
    ProgressFn,
    Recover,
    Spec,
    name_attacks,
    require_encoder,
    require_no_map,
)
from unembed.evaluation.samples import (
    LABELS,
    LENGTH,
    Example,
    Passage,
    Sample,
    Samples,
    cutting,
    draw_indices,
    groups_of,
    make_example,
    paired,
)
from unembed.files import locked
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer
from unembed.vectors.invert import as_inverter

_MOST_GROUPS, _COMPARED = 30, 256  # the latter: stored vectors compared with texts embedded here
_SAME_VECTOR, _FEW_UNLIKE = 0.99, 0.02
OTHERS = "others"

Figures = dict[str, Figure | None]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The tables of one evaluation.

    Attributes:
        rows: What was decoded (``inverter`` or each of several strategies; the baselines) →
            metric → figure; a metric that could not be computed is None.
        breakdowns: ``length``, ``domain`` and ``lang``, where there are such → group → row →
            metric → figure.
        calibration: Row → for each tenth of confidence its tokens, their mean confidence and the
            share of them that is right.
        examples: Texts with their recoveries by every attack: all texts up to 1,000, else as many
            drawn with the seed.
        settings: How it was made: inverter, encoder, strategies, seed, number of texts.
        notes: What is missing, and why.
    """

    rows: dict[str, Figures]
    breakdowns: dict[str, dict[str, dict[str, Figures]]]
    calibration: dict[str, list[dict[str, float]]]
    examples: list[Example]
    settings: dict[str, Any]
    notes: list[str]

    def __repr__(self) -> str:
        """Say what was measured, and what it comes to."""
        texts, encoder = self.settings["texts"], self.settings["encoder"]["name"]
        return f"Evaluation({texts} texts, {encoder}, rows: {', '.join(self.rows)}. {self.verdict})"

    @property
    def verdict(self) -> str:
        """What the figures come to, in plain words."""
        return put_in_words(self.rows, list(self.settings["attacks"]), self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"verdict": self.verdict, **asdict(self)}

    def to_rows(self) -> list[dict[str, Any]]:
        """One record for each row and metric, as `pandas.DataFrame` takes them."""
        return [
            {"row": row, "metric": metric, **asdict(figure)}
            for row, figures in self.rows.items()
            for metric, figure in figures.items()
            if figure is not None
        ]


def evaluate(  # noqa: PLR0913 - the front door; all but the first three have a default
    inverter: Inverter,
    encoder: Encoder | None,
    texts: Iterable[str | Passage],
    *,
    vectors: Any = None,
    strategy: Spec | Sequence[Spec] = "greedy",
    steps: int | None = None,
    train_pairs: Pairs | None = None,
    corpus: Pairs | None = None,
    limit: int | None = 1000,
    max_tokens: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: ProgressFn | None = None,
    announce: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure what vectors of held-out texts give away.

    The texts are cut into pieces as in training and embedded; stored vectors are taken as they
    are, each with its whole text. What is decoded is compared and embedded again for the cosine.
    Baselines go through the same metrics. docs/evaluation.md defines every metric and baseline.

    Args:
        inverter: Under test.
        encoder: The encoder it was trained for. With stored vectors it may be None: no cosine is
            measured then.
        texts: Held out: never trained on. Gone through twice, a piece of it in memory at a time;
            `PassageFile` and, with stored vectors, `StoredPassages` read them from files.
        vectors: Stored vectors of the texts, in their order, [N, D].
        strategy: How to decode, one or several: a `Decoding` or its text (``greedy:steps=32``).
        steps: Denoiser passes per text where the strategy does not say; 8 if None.
        train_pairs: The training pairs, for the nearest text and the rarity of tokens.
        corpus: Pairs of texts like those under attack, which guided search starts from.
        limit: Pieces to evaluate, drawn with the seed; all when None.
        max_tokens: Longest piece; if None what fits into the inverter's prefix, or what it writes.
        seed: Of the draw, of the strategies that sample and of the bootstrap.
        folder: Keeps recovered texts as they come, so that the same call goes on where it ended.
        progress: Called with (stage, done, total); the total is 0 while it is unknown.
        announce: Called before anything is decoded, with how long it will take.

    Raises:
        DataError: The texts yield fewer than two pieces, or the folder holds something else.
        EncoderError: The inverter or the pairs belong to another encoder, or there is none.
        EmbeddingError: Stored vectors that cannot be inverted.
        ConfigError: A strategy that does not exist, or wrong settings of one.
    """
    inverter, encoder = as_inverter(inverter), as_encoder(encoder)
    attacks = _checked(inverter, encoder, train_pairs, corpus, name_attacks(strategy, steps))
    require_whole(seed=(seed, 0), limit=(1 if limit is None else limit, 1))
    require_callable(progress=progress, announce=announce)
    folder = as_folder(folder)
    report = progress or (lambda stage, count, total: None)
    samples = Samples(
        texts if vectors is None else paired(texts, vectors, inverter.dimension),
        inverter.tokenizer,
        cutting(inverter, max_tokens),
        limit=limit,
        seed=seed,
        report=lambda count: report("cutting the texts", count, 0),
    )
    counts = None
    if train_pairs is not None and train_pairs.tokenizer.digest == inverter.tokenizer.digest:
        counts = train_pairs.token_counts
    context = train_pairs, counts, seed, report, len(samples), corpus
    bench = Bench(inverter, encoder, attacks, *context)
    ruler, notes = make_ruler(inverter.tokenizer, counts)
    notes = _first_notes(bench, samples) + notes
    lock = nullcontext() if folder is None else locked(folder / FOLDER)
    with lock, ExitStack() as stack:
        rows, provenance = [], {} if folder is None else bench.provenance()
        for name, recover, batch, settings in bench.rows():
            identity = {**settings, "texts": samples.digest, "limit": limit, "seed": seed}
            cache = stack.enter_context(RowCache(folder, name, identity | provenance))
            mask = _attack_mask(attacks.get(name), len(samples), seed)
            rows.append(_Row(name, recover, batch, cache, len(samples), mask))
        if announce is not None:
            announce(_forecast(bench, rows, next(samples.chunks(BATCH))))
        examples = _fill(bench, rows, samples, ruler)
    return _conclude(bench, rows, examples, notes, samples.has_vectors)


def _fill(bench: Bench, rows: list[_Row], samples: Samples, ruler: Ruler) -> list[Example]:
    """Measure the recoveries of every row, a chunk of the texts at a time; return the examples."""
    indices, naming = draw_indices(len(samples), bench.seed), _Groups()
    examples: list[Example] = []
    for first, chunk in samples.chunks(CHUNK):
        part = Part(bench.encoder, first, chunk, bench.inverter)
        groups = [naming.of(sample) for sample in chunk]
        for row in rows:
            places, recoveries = row.recoveries(part, partial(bench.show, row.name))
            row.add(part, groups, places, recoveries, ruler)
            if row.name in bench.attacks:
                examples += row.examples(part, places, recoveries, indices, ruler.tokenizer)
    order = list(bench.attacks)
    return sorted(examples, key=lambda example: (order.index(example.row), example.index))


def _checked(
    inverter: Inverter,
    encoder: Encoder | None,
    pairs: Pairs | None,
    corpus: Pairs | None,
    attacks: dict[str, Attack],
) -> dict[str, Attack]:
    """The attacks; a wrong one is told before the others have taken hours."""
    for name, value in (("train_pairs", pairs), ("corpus", corpus)):
        if not isinstance(value, Pairs | None):
            raise ConfigError(f"{name} as pairs", f"{value!r:.80}", "Open them with Pairs.open")
    if encoder is not None:
        inverter.require_encoder(encoder)
    if pairs is not None:
        inverter.encoder.require_same(pairs.encoder, "training pairs")
    for attack in attacks.values():
        attack.decoding.check(has_encoder=encoder is not None)
    names = {attack.decoding.name for attack in attacks.values()}
    if corpus is not None and "guided-search" not in names:
        raise ConfigError("a corpus with guided-search only", ", ".join(names), "Leave corpus out")
    return attacks


def _first_notes(bench: Bench, samples: Samples) -> list[str]:
    """What is to be known before any figure: stored vectors that are strange, what is missing."""
    notes = []
    if samples.has_vectors:
        part = Part(bench.encoder, *next(samples.chunks(_COMPARED)), bench.inverter)
        notes += _stored_notes(bench, part)
        longest = bench.inverter.length - 1
        long = sum(len(sample.token_ids) > longest for sample in samples)
        if long:
            notes.append(
                f"{long} of {len(samples)} texts have more than the {longest} tokens that the "
                "inverter writes; the rest of them counts as not recovered"
            )
    else:
        require_encoder(bench.encoder)
        require_no_map(bench.inverter)
    return notes


def _stored_notes(bench: Bench, part: Part) -> list[str]:
    """Whether stored vectors look like the encoder's, and like those of their texts."""
    name, alignment = bench.inverter.encoder.name, bench.inverter.alignment
    statistics = getattr(getattr(bench.inverter, "fingerprint", None), "statistics", None)
    if alignment is not None:
        statistics, name = alignment.statistics, alignment.name
    doubt = None if statistics is None else statistics.doubt(part.stored_vectors, name)
    notes = [] if doubt is None else [doubt]
    if bench.encoder is None:
        return [*notes, "cosine: not measured, there is no encoder to embed what is recovered"]
    if alignment is not None:
        return [*notes, f"vectors: mapped ({alignment.describe()})"]
    again = bench.encoder.encode([sample.text for sample in part.samples])
    cosines = (again * part.vectors).sum(axis=1)
    unlike = int((cosines < _SAME_VECTOR).sum())
    if unlike > _FEW_UNLIKE * len(cosines):
        notes.append(
            f"{OTHER_VECTORS} as {name} embeds them here: {unlike} of "
            f"{len(cosines)} have a cosine below {_SAME_VECTOR}, median "
            f"{float(np.median(cosines)):.3f} (another prompt, pooling, truncation, quantisation, "
            "or texts cut or changed after they were embedded)"
        )
    return notes


def _forecast(bench: Bench, rows: list[_Row], trial: tuple[int, list[Sample]]) -> str:
    """How many texts are decoded how often, and how long that takes here."""
    part, seconds = Part(bench.encoder, *trial, bench.inverter), 0.0
    attacks = dict.fromkeys((SHUFFLED, BLIND), bench.guesser) | bench.attacks
    for row in rows:
        if row.name in attacks:
            count = int(row.mask.sum()) - row.cache.count
            seconds += bench.seconds(part, attacks[row.name], max(0, count))
    times = len([row for row in rows if row.name in attacks])
    return f"{bench.total} texts, each decoded up to {times} times: {duration(seconds)} here"


def _attack_mask(attack: Attack | None, texts: int, seed: int) -> NDArray[np.bool_]:
    """Choose the texts of a row: all, or as many as its attack is limited to, by the seed."""
    mask = np.ones(texts, dtype=bool)
    if attack is not None and attack.limit is not None and attack.limit < texts:
        indices = np.random.default_rng(seed).choice(texts, size=attack.limit, replace=False)
        mask = np.isin(np.arange(texts), indices)
    return mask


@dataclass
class _Row:
    """Row of the tables while it fills; ``mask`` [N] says which texts it is of."""

    name: str
    recover: Recover
    batch: int
    cache: RowCache
    texts: int
    mask: NDArray[np.bool_]
    groups: dict[tuple[str, str], Tally] = field(default_factory=dict)
    bins: NDArray[np.float64] = field(default_factory=lambda: np.zeros((BINS, 3)))

    def recoveries(
        self, part: Part, show: Callable[[int], None]
    ) -> tuple[list[int], list[Recovery]]:
        """Get the recoveries of a chunk, with their places in it: from the disk, and the rest."""
        last = part.first + len(part.samples)
        places = np.flatnonzero(self.mask[part.first : last]).tolist()
        mine = part if len(places) == len(part.samples) else part.some(places)
        originals = [sample.text for sample in mine.samples]
        recoveries = self.cache.read(originals)
        for start in range(len(recoveries), len(originals), self.batch):
            show(part.first + places[start])
            stop = min(start + self.batch, len(originals))
            new = self.recover(mine, start, stop)
            self.cache.append(originals[start:stop], new)
            recoveries += new
        show(last)
        return places, recoveries

    def add(
        self,
        part: Part,
        groups: Sequence[Sequence[tuple[str, str]]],
        places: Sequence[int],
        recoveries: Sequence[Recovery],
        ruler: Ruler,
    ) -> None:
        """Measure the recoveries of some texts of a chunk, whose groups are given."""
        for place, recovery in zip(places, recoveries, strict=True):
            sample = part.samples[place]
            values, bins = ruler.measure(sample.text, sample.token_ids, recovery)
            self.bins += bins
            for group in (("", ""), *groups[place]):
                tally = self.groups.setdefault(group, Tally(self.texts))
                tally.add(part.first + place, values)

    def examples(
        self,
        part: Part,
        places: Sequence[int],
        recoveries: Sequence[Recovery],
        indices: set[int],
        tokenizer: TextTokenizer,
    ) -> list[Example]:
        """The recoveries of a chunk that are kept, beside their originals."""
        return [
            make_example(part.first + i, self.name, part.samples[i], recovery, tokenizer)
            for i, recovery in zip(places, recoveries, strict=True)
            if part.first + i in indices
        ]

    def figures(self, group: tuple[str, str], weights: NDArray[np.float64]) -> Figures:
        """Compute the figures of a row's texts of a group; all missing where there are none."""
        return self.groups.get(group, Tally(self.texts)).figures(weights)


class _Groups:
    """Names the groups of texts, the same for all rows; what is too many is collected."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def of(self, sample: Sample) -> list[tuple[str, str]]:
        """The groups of a text."""
        groups = []
        for label, name in groups_of(sample):
            names = self._names.setdefault(label, set())
            if label == LENGTH or len(names) < _MOST_GROUPS:
                names.add(name)
            groups.append((label, name if name in names else OTHERS))
        return groups


def _conclude(
    bench: Bench, rows: list[_Row], examples: list[Example], notes: list[str], has_vectors: bool
) -> Evaluation:
    if bench.pairs is None:
        notes = [*notes, "nearest training text: not measured, no training pairs were given"]
    weights = draw_blocks(block_count(bench.total), bench.seed)
    figures = {row.name: row.figures(("", ""), weights) for row in rows}
    breakdowns: dict[str, dict[str, dict[str, Figures]]] = {}
    for label, group in sorted({group for row in rows for group in row.groups}, key=_in_order):
        if label:
            breakdowns.setdefault(label, {})[group] = {
                row.name: row.figures((label, group), weights) for row in rows
            }
    first, alignment = next(iter(bench.attacks.values())), bench.inverter.alignment
    passes = figures[rows[0].name]["passes"]
    settings = {
        "texts": bench.total,
        "encoder": bench.inverter.encoder.to_dict(),
        "vectors": "stored" if has_vectors else "embedded here",
        **({} if alignment is None else {"alignment": alignment.describe()}),
        "strategy": first.decoding.name,
        "passes": None if passes is None else _whole(passes.mean),
        "seed": bench.seed,
        "threat_model": bench.describe(first)["threat_model"],
        "encoder_calls": first.decoding.encoder_calls,
        "attacks": {name: bench.describe(attack) for name, attack in bench.attacks.items()},
        "controls_decoded_by": bench.guesser.to_dict(),
        "bootstrap_resamples": RESAMPLES,
    }
    calibration = {row.name: _reliability(row.bins) for row in rows if row.bins.any()}
    return Evaluation(figures, breakdowns, calibration, examples, settings, notes)


def _whole(number: float) -> float:
    """Write a number without a fraction where there is none: 16 passes."""
    return int(number) if number.is_integer() else number


def _in_order(group: tuple[str, str]) -> tuple[int, bool, int, str]:
    """Lengths ascending, then labels by name, the collected rest last."""
    label, name = group
    order = (LENGTH, *LABELS)
    low = int(name.partition("-")[0]) if label == LENGTH else 0
    return order.index(label) if label else -1, name == OTHERS, low, name


def _reliability(bins: NDArray[np.float64]) -> list[dict[str, float]]:
    return [
        {"tokens": tokens, "confidence": confidence / tokens, "accuracy": right / tokens}
        for tokens, confidence, right in bins.tolist()
        if tokens
    ]
