"""Decode held-out texts from a fully masked start and say how much came back, beside controls."""

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
from unembed.evaluation.attacks import Attack, name_attacks
from unembed.evaluation.examples import Example, draw_indices, make_example
from unembed.evaluation.journal import Journal
from unembed.evaluation.metrics import BINS, Recovery, Ruler, make_ruler
from unembed.evaluation.recovering import CHUNK, Bench, Part, ProgressFn, Recover
from unembed.evaluation.summary import RESAMPLES, Figure, Tally, block_count, draw_blocks
from unembed.evaluation.texts import LABELS, Passage, Sample, Samples
from unembed.inverter import Inverter

_MOST_GROUPS = 30
_LENGTHS = ((1, 3), (4, 8), (9, 16), (17, 24), (25, 32))  # tokens, both ends included
LENGTH, OTHERS = "length", "others"

Figures = dict[str, Figure | None]


@dataclass(frozen=True)
class Evaluation:
    """The tables of one evaluation.

    Attributes:
        rows: What was decoded (``inverter`` or each of several strategies; the controls) →
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
    strategy: str | Attack | Sequence[str | Attack] = "greedy",
    steps: int | None = None,
    train_pairs: Pairs | None = None,
    limit: int | None = 1000,
    seed: int = 0,
    folder: Path | None = None,
    progress: ProgressFn | None = None,
) -> Evaluation:
    """Measure what vectors of held-out texts give away.

    The texts are cut into pieces as in training. Each piece is embedded, decoded and compared; the
    recovered text is embedded again for the cosine. Controls go through the same metrics:
    another text's embedding (what fluent guessing is worth), no embedding (what the model writes
    unprompted), the nearest training text by cosine (what retrieval alone is worth) and random
    tokens. docs/evaluation.md defines every metric and control.

    Args:
        inverter: Under test.
        encoder: The encoder it was trained for.
        texts: Held out: never trained on. Gone through twice, a piece of it in memory at a time;
            a `PassageFile` reads them from a file, with their domain and language.
        strategy: One or several: names such as ``greedy``, with settings such as
            ``greedy:steps=8``, or attacks.
        steps: Denoiser passes per text where the strategy does not say; one per position if None.
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
    report = progress or (lambda stage, done, total: None)
    samples = Samples(
        texts,
        inverter.tokenizer,
        _cutting(inverter),
        limit=limit,
        seed=seed,
        report=lambda done: report("cutting the texts", done, 0),
    )
    known = train_pairs is not None and _same_tokens(inverter, train_pairs)
    counts = train_pairs.token_counts() if known and train_pairs is not None else None
    bench = Bench(inverter, encoder, attacks, train_pairs, counts, seed, report, len(samples))
    ruler, notes = make_ruler(inverter.tokenizer, counts)
    if train_pairs is None:
        notes.append("nearest training text: not measured, no training pairs were given")
    with ExitStack() as stack:
        rows, provenance = [], {} if folder is None else bench.provenance()
        for name, recover, batch, settings in bench.rows():
            made_by = {**settings, "texts": samples.digest, "limit": limit, "seed": seed}
            journal = stack.enter_context(Journal(folder, name, made_by | provenance))
            rows.append(_Row(name, recover, batch, journal, len(samples)))
        kept, examples = draw_indices(len(samples), seed), []
        for first, chunk in samples.chunks(CHUNK):
            part = Part(encoder, first, chunk)
            for row in rows:
                found = row.recoveries(part, partial(bench.show, row.name))
                row.add(part, found, ruler)
                if row.name in attacks:
                    places = [i for i in range(len(chunk)) if first + i in kept]
                    examples += [
                        make_example(first + i, row.name, chunk[i], found[i], ruler.tokenizer)
                        for i in places
                    ]
    examples.sort(key=lambda example: (list(attacks).index(example.row), example.index))
    return _conclude(bench, rows, examples, notes)


def _cutting(inverter: Inverter) -> DataSection:
    """How texts were cut in training."""
    return DataSection.model_validate(
        {"length": inverter.length, **inverter.trained.get("config", {}).get("data", {})}
    )


def _same_tokens(inverter: Inverter, pairs: Pairs) -> bool:
    return pairs.tokenizer.digest == inverter.tokenizer.digest


@dataclass
class _Row:
    """One row of the tables while it fills."""

    name: str
    recover: Recover
    batch: int
    journal: Journal
    texts: int
    groups: dict[tuple[str, str], Tally] = field(default_factory=dict)
    bins: NDArray[np.float64] = field(default_factory=lambda: np.zeros((BINS, 3)))

    def recoveries(self, part: Part, show: Callable[[int], None]) -> list[Recovery]:
        """Those of a chunk: what is finished on the disk, and the rest."""
        originals = [sample.text for sample in part.samples]
        found = self.journal.read(originals)
        show(part.first + len(found))
        for start in range(len(found), len(originals), self.batch):
            stop = min(start + self.batch, len(originals))
            new = self.recover(part, start, stop)
            self.journal.append(originals[start:stop], new)
            found += new
            show(part.first + stop)
        return found

    def add(self, part: Part, found: Sequence[Recovery], ruler: Ruler) -> None:
        """Measure the recoveries of a chunk."""
        for index, (sample, recovery) in enumerate(zip(part.samples, found, strict=True)):
            values, bins = ruler.measure(sample.text, sample.token_ids, recovery)
            self.bins += bins
            for group in (("", ""), *groups_of(sample)):
                self._tally(group).add(part.first + index, values)

    def _tally(self, group: tuple[str, str]) -> Tally:
        if group not in self.groups:
            label = group[0]
            taken = sum(name == label for name, _ in self.groups)
            if taken >= _MOST_GROUPS and group[1] != OTHERS:
                return self._tally((label, OTHERS))
            self.groups[group] = Tally(self.texts)
        return self.groups[group]


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
    figures = {row.name: row.groups["", ""].figures(weights) for row in rows}
    breakdowns: dict[str, dict[str, dict[str, Figures]]] = {}
    for label, group in sorted(rows[0].groups, key=_in_order):
        if label:
            breakdowns.setdefault(label, {})[group] = {
                row.name: row.groups[label, group].figures(weights) for row in rows
            }
    first = next(iter(bench.attacks.values()))
    passes = figures[rows[0].name]["passes"]
    settings = {
        "texts": bench.total,
        "encoder": bench.encoder.identity.to_dict(),
        "strategy": first.strategy,
        "passes": None if passes is None else _whole(passes.mean),
        "seed": bench.seed,
        "threat_model": first.threat_model,
        "encoder_calls": first.encoder_calls,
        "attacks": {
            name: {**asdict(attack), "threat_model": attack.threat_model}
            for name, attack in bench.attacks.items()
        },
        "controls_decoded_by": asdict(bench.guesser),
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
    known = (LENGTH, *LABELS)
    low = int(name.partition("-")[0]) if label == LENGTH else 0
    return known.index(label) if label else -1, name == OTHERS, low, name


def _reliability(bins: NDArray[np.float64]) -> list[dict[str, float]]:
    return [
        {"tokens": tokens, "confidence": confidence / tokens, "accuracy": right / tokens}
        for tokens, confidence, right in bins.tolist()
        if tokens
    ]
