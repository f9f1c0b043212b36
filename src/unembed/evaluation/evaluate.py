"""Decode held-out texts from a fully masked start and say how much came back, beside baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.config import DataSection
from unembed.data.pairs import Pairs
from unembed.encoders.base import Encoder
from unembed.evaluation.bootstrap import RESAMPLES, Figure, Tally, block_count, draw_blocks
from unembed.evaluation.cache import RowCache
from unembed.evaluation.metrics import BINS, Recovery, Ruler, make_ruler
from unembed.evaluation.rows import (
    CHUNK,
    Attack,
    Bench,
    Part,
    ProgressFn,
    Recover,
    Spec,
    name_attacks,
)
from unembed.evaluation.samples import (
    LABELS,
    Example,
    Passage,
    Sample,
    Samples,
    draw_indices,
    make_example,
)
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer

_MOST_GROUPS = 30
_LENGTHS = ((1, 3), (4, 8), (9, 16), (17, 24), (25, 32))  # tokens, both ends included
LENGTH, OTHERS = "length", "others"

Figures = dict[str, Figure | None]


@dataclass(frozen=True)
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate(  # noqa: PLR0913 - the front door; all but the first three have a default
    inverter: Inverter,
    encoder: Encoder,
    texts: Iterable[str | Passage],
    *,
    strategy: Spec | Sequence[Spec] = "greedy",
    steps: int | None = None,
    train_pairs: Pairs | None = None,
    limit: int | None = 1000,
    seed: int = 0,
    folder: Path | None = None,
    progress: ProgressFn | None = None,
) -> Evaluation:
    """Measure what vectors of held-out texts give away.

    The texts are cut into pieces as in training. Each piece is embedded, decoded and compared; the
    recovered text is embedded again for the cosine. Baselines go through the same metrics:
    another text's embedding (what fluent guessing is worth), no embedding (what the model writes
    unprompted), the nearest training text by cosine (what retrieval alone is worth) and random
    tokens. docs/evaluation.md defines every metric and baseline.

    Args:
        inverter: Under test.
        encoder: The encoder it was trained for.
        texts: Held out: never trained on. Gone through twice, a piece of it in memory at a time;
            a `PassageFile` reads them from a file, with their domain and language.
        strategy: How to decode, one or several: a `Decoding` or its text, such as ``greedy`` or
            ``greedy:steps=32``.
        steps: Denoiser passes per text where the strategy does not say; 8 if None.
        train_pairs: The training pairs, for the nearest text and the rarity of tokens.
        limit: Pieces to evaluate, drawn with the seed; all when None.
        seed: Of the draw, of the strategies that sample and of the bootstrap.
        folder: Keeps recovered texts as they come, so that the same call goes on after an
            interruption.
        progress: Called with (stage, done, total); the total is 0 while it is unknown.

    Raises:
        DataError: The texts yield fewer than two pieces, or the folder holds something else.
        EncoderError: The inverter or the pairs belong to another encoder.
        ConfigError: A strategy that does not exist, or wrong settings of one.
    """
    inverter.require_encoder(encoder)
    if train_pairs is not None:
        inverter.encoder.require_same(train_pairs.encoder, "training pairs")
    attacks = name_attacks(strategy, steps)
    for attack in attacks.values():  # a wrong one is told before the others have taken hours
        attack.decoding.check(has_encoder=True)
    report = progress or (lambda stage, count, total: None)
    samples = Samples(
        texts,
        inverter.tokenizer,
        _cutting(inverter),
        limit=limit,
        seed=seed,
        report=lambda count: report("cutting the texts", count, 0),
    )
    same_vocabulary = train_pairs is not None and _same_tokens(inverter, train_pairs)
    counts = train_pairs.token_counts if same_vocabulary and train_pairs is not None else None
    bench = Bench(inverter, encoder, attacks, train_pairs, counts, seed, report, len(samples))
    ruler, notes = make_ruler(inverter.tokenizer, counts)
    if train_pairs is None:
        notes.append("nearest training text: not measured, no training pairs were given")
    with ExitStack() as stack:
        rows, provenance = [], {} if folder is None else bench.provenance()
        for name, recover, batch, settings in bench.rows():
            identity = {**settings, "texts": samples.digest, "limit": limit, "seed": seed}
            cache = stack.enter_context(RowCache(folder, name, identity | provenance))
            mask = _attack_mask(attacks.get(name), len(samples), seed)
            rows.append(_Row(name, recover, batch, cache, len(samples), mask))
        indices, examples, naming = draw_indices(len(samples), seed), [], _Groups()
        for first, chunk in samples.chunks(CHUNK):
            part = Part(encoder, first, chunk)
            groups = [naming.of(sample) for sample in chunk]
            for row in rows:
                places, recoveries = row.recoveries(part, partial(bench.show, row.name))
                row.add(part, groups, places, recoveries, ruler)
                if row.name in attacks:
                    examples += row.examples(part, places, recoveries, indices, ruler.tokenizer)
    examples.sort(key=lambda example: (list(attacks).index(example.row), example.index))
    return _conclude(bench, rows, examples, notes)


def _cutting(inverter: Inverter) -> DataSection:
    """How texts were cut in training."""
    return DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )


def _same_tokens(inverter: Inverter, pairs: Pairs) -> bool:
    return pairs.tokenizer.digest == inverter.tokenizer.digest


def _attack_mask(attack: Attack | None, texts: int, seed: int) -> NDArray[np.bool_]:
    """Which texts a row is of: all, or as many as its attack is limited to, drawn with the seed."""
    mask = np.ones(texts, dtype=bool)
    if attack is not None and attack.limit is not None and attack.limit < texts:
        indices = np.random.default_rng(seed).choice(texts, size=attack.limit, replace=False)
        mask[:] = False
        mask[indices] = True
    return mask


@dataclass
class _Row:
    """One row of the tables while it fills; ``chosen`` [N] says which texts it is of."""

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
        """Those of a chunk, with their places in it: what is on the disk, and the rest."""
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
        """Of the row's texts that are of a group; all missing where there are none."""
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


def groups_of(sample: Sample) -> Iterator[tuple[str, str]]:
    """The groups of the breakdowns that a text belongs to."""
    tokens = len(sample.token_ids)
    bins = (f"{low}-{high}" for low, high in _LENGTHS if low <= tokens <= high)
    yield LENGTH, next(bins, f"{_LENGTHS[-1][1] + 1}-")
    for name in LABELS:
        if name in sample.labels:
            yield name, sample.labels[name]


def _conclude(
    bench: Bench, rows: list[_Row], examples: list[Example], notes: list[str]
) -> Evaluation:
    weights = draw_blocks(block_count(bench.total), bench.seed)
    figures = {row.name: row.figures(("", ""), weights) for row in rows}
    breakdowns: dict[str, dict[str, dict[str, Figures]]] = {}
    for label, group in sorted({group for row in rows for group in row.groups}, key=_in_order):
        if label:
            breakdowns.setdefault(label, {})[group] = {
                row.name: row.figures((label, group), weights) for row in rows
            }
    first = next(iter(bench.attacks.values()))
    passes = figures[rows[0].name]["passes"]
    settings = {
        "texts": bench.total,
        "encoder": bench.encoder.identity.to_dict(),
        "strategy": first.decoding.name,
        "passes": None if passes is None else _whole(passes.mean),
        "seed": bench.seed,
        "threat_model": first.decoding.threat_model,
        "encoder_calls": first.decoding.encoder_calls,
        "attacks": {name: attack.to_dict() for name, attack in bench.attacks.items()},
        "controls_decoded_by": bench.guesser.to_dict(),
        "bootstrap_resamples": RESAMPLES,
    }
    calibration = {row.name: _reliability(row.bins) for row in rows if row.bins.any()}
    return Evaluation(figures, breakdowns, calibration, examples, settings, notes)


def _whole(number: float) -> float:
    """Without a fraction where there is none: 16 passes."""
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
