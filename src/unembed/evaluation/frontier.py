"""What encoder calls buy: metrics after 0, 2, 7 ... calls, by length, from one search a text.

The strategies that call the encoder do not look ahead: what they have after m calls does not depend
on the calls they may make afterwards. So the search with the most calls gives every smaller point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.pairs import Pairs
from unembed.decoding import Decoding
from unembed.decoding.sequential import Sequential
from unembed.encoders.base import Encoder
from unembed.encoders.oracle import Corpus
from unembed.errors import ConfigError, require_callable, require_kind, require_whole
from unembed.evaluation.bootstrap import Figure, draw_blocks
from unembed.evaluation.cache import RowCache, as_folder, settings_digest
from unembed.evaluation.metrics import COLUMNS, Recovery, Ruler, make_ruler
from unembed.evaluation.rows import Attack, Bench, ProgressFn, Spec, cosines_of, name_attacks
from unembed.evaluation.samples import Passage, Sample, Samples, cutting
from unembed.inverter import Inverter
from unembed.vectors.invert import as_inverter

MARKS = (0, 2, 7, 15, 31, 53, 117, 245, 457)  # those of Vec2Text's frontier, and none
METRICS = ("exact match", "token-set F1", "BLEU (sentence)", "cosine")
ALL = "all"
PER_LENGTH = 64  # texts of each bucket
_LOWEST = (1, 9, 13, 21)  # tokens of the shortest text of each bucket
_BATCH = 16  # texts searched together; what a kill can lose
_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Frontier:
    """Metrics after so many encoder calls.

    Attributes:
        points: Strategy → length bucket, or ``all`` → calls at most → metric → figure; None where
            a metric is not installed. ``all`` weighs the buckets by their share of all pieces.
        shares: Share of each bucket among all pieces.
        settings: How it was made.
        notes: What is missing, and why.
    """

    points: dict[str, dict[str, dict[int, dict[str, Figure | None]]]]
    shares: dict[str, float]
    settings: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table for each strategy."""
        lines = []
        for name, buckets in self.points.items():
            lines += [f"**{name}**", ""]
            lines += [
                f"| tokens | calls | {' | '.join(METRICS)} |",
                "|---" * (2 + len(METRICS)) + "|",
            ]
            for bucket, marks in buckets.items():
                for mark, figures in marks.items():
                    cells = [_spell(figures[metric]) for metric in METRICS]
                    lines.append(f"| {bucket} | {mark} | {' | '.join(cells)} |")
            lines.append("")
        n = self.settings["texts"]
        lines += [f"n = {n}; mean [95% bootstrap interval]; calls are those allowed at most.", ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes), ""])


def measure_frontier(  # noqa: PLR0913 - as `evaluate`
    inverter: Inverter,
    encoder: Encoder,
    texts: Iterable[str | Passage],
    *,
    strategy: Spec | Sequence[Spec] = "guided-search",
    steps: int | None = None,
    marks: Sequence[int] = MARKS,
    limit: int = PER_LENGTH,
    seed: int = 0,
    corpus: Pairs | None = None,
    folder: str | Path | None = None,
    progress: ProgressFn | None = None,
) -> Frontier:
    """Measure what a strategy has recovered after each of some numbers of encoder calls.

    Args:
        inverter: Under test.
        encoder: The one it was trained for.
        texts: Held out; gone through more than once.
        strategy: One or several, as `unembed.evaluate` takes them, all of which call the encoder.
            With ``encoder_calls=N`` one stops at N calls.
        steps: Denoiser passes of a greedy text where the strategy does not say; 8 if None.
        marks: Numbers of calls, ascending, from 0: the greedy text, without a call.
        limit: Texts drawn of each length bucket, with the seed.
        seed: Of the draw, the strategies and the bootstrap.
        corpus: Pairs whose nearest texts the search starts from beside the greedy one.
        folder: Keeps recovered texts as they come, so that the same call goes on after a kill.
        progress: Called with (stage, done, total).

    Raises:
        ConfigError: A strategy that calls no encoder, or wrong settings.
        DataError: Too few texts, or the folder holds something else.
        EncoderError: The inverter belongs to another encoder.
    """
    inverter, folder = as_inverter(inverter), as_folder(folder)
    inverter.require_encoder(encoder)
    require_whole(limit=(limit, 1), seed=(seed, 0))
    marks = sorted(require_whole(**{f"marks[{i}]": (mark, 0) for i, mark in enumerate(marks)}))
    if not marks:
        raise ConfigError("marks: numbers of encoder calls", "none", "Leave marks out")
    require_callable(progress=progress)
    require_kind(corpus, Pairs | None, "corpus as pairs", "Open them with Pairs.open")
    report = progress or (lambda stage, done, total: None)
    specs = [strategy] if isinstance(strategy, (str, Decoding, Attack)) else list(strategy)
    attacks = {
        str(spec): _with_calls(attack, max(marks))
        for spec, attack in ((one, next(iter(name_attacks(one, steps).values()))) for one in specs)
    }
    samples = Samples(texts, inverter.tokenizer, cutting(inverter))
    buckets, shares = draw_by_length(samples, cutting(inverter).length, limit, seed)
    bench = Bench(inverter, encoder, attacks, None, None, seed, report, len(samples), corpus)
    ruler, notes = make_ruler(inverter.tokenizer, None)
    provenance = {} if folder is None else bench.provenance()
    points: dict[str, dict[str, dict[int, dict[str, Figure | None]]]] = {}
    for name, attack in attacks.items():
        reached = [mark for mark in marks if mark <= attack.decoding.encoder_calls]
        values = {}
        for bucket, some in buckets.items():
            settings: dict[str, Any] = {
                "attack": bench.describe(attack),
                "marks": reached,
                "bucket": bucket,
            }
            settings |= {"texts": samples.digest, "limit": limit, "seed": seed} | provenance
            with RowCache(folder, f"frontier {name} {bucket}", settings) as journal:
                search = _Search(
                    inverter, encoder, attack.decoding, reached, seed, bench.corpus_search(attack)
                )
                show = _reporter(report, f"{name}, {bucket} tokens", len(some))
                values[bucket] = _values(search.recover_all(some, journal, show), some, ruler)
        points[name] = _figures(values, shares, reached, seed)
    facts = {
        "texts": {bucket: len(some) for bucket, some in buckets.items()},
        "encoder": encoder.identity.to_dict(),
        "attacks": {name: bench.describe(attack) for name, attack in attacks.items()},
        "seed": seed,
        "corpus": None if corpus is None else settings_digest(corpus.manifest),
    }
    return Frontier(points, shares, facts, [note for note in notes if "BLEU" in note])


def _with_calls(attack: Attack, calls: int) -> Attack:
    """The attack with as many calls as the last mark, unless it says how many."""
    if not attack.decoding.strategy.needs_encoder:
        raise ConfigError(
            "strategies that call the encoder", attack.decoding.name, "Correct --strategies"
        )
    if attack.limit is not None:
        raise ConfigError("one limit for all strategies", str(attack), "Use --limit")
    if attack.decoding.encoder_calls:
        return attack
    return replace(attack, decoding=replace(attack.decoding, encoder_calls=calls))


def draw_by_length(
    samples: Samples, length: int, limit: int, seed: int
) -> tuple[dict[str, list[Sample]], dict[str, float]]:
    """Draw texts of each length bucket, in their order; and the share of each among all.

    Args:
        samples: All pieces.
        length: Positions L of the inverter, which bounds the last bucket.
        limit: Texts of each bucket.
        seed: Of the draw.
    """
    highest = [*(low - 1 for low in _LOWEST[1:]), max(length - 1, _LOWEST[-1])]
    names = [f"{low}-{high}" for low, high in zip(_LOWEST, highest, strict=True)]
    sizes = np.array([len(sample.token_ids) for sample in samples])
    which = np.searchsorted(_LOWEST, sizes, side="right") - 1
    least = int(sizes.min())
    names[0] = f"{least}-{highest[0]}" if least <= highest[0] else names[0]
    rng, bucket_of = np.random.default_rng(seed), {}
    for number, name in enumerate(names):
        places = np.flatnonzero(which == number)
        for place in rng.permutation(places)[:limit].tolist():
            bucket_of[place] = name
    buckets: dict[str, list[Sample]] = {name: [] for name in names}
    for place, sample in enumerate(samples):
        if place in bucket_of:
            buckets[bucket_of[place]].append(sample)
    shares = {name: float((which == number).mean()) for number, name in enumerate(names)}
    return (
        {name: some for name, some in buckets.items() if some},
        {name: share for name, share in shares.items() if share},
    )


@dataclass(frozen=True)
class _Search:
    """Makes the recoveries of texts at each mark."""

    inverter: Inverter
    encoder: Encoder
    decoding: Decoding
    marks: Sequence[int]
    seed: int
    corpus: Corpus | None = None

    def recover_all(
        self, samples: Sequence[Sample], journal: RowCache, show: Any
    ) -> list[list[Recovery]]:
        """Recoveries of each text at each mark: what is on the disk, and the rest."""
        count = len(self.marks)
        originals = [sample.text for sample in samples for _ in self.marks]
        recoveries = journal.read(originals)
        first = len(recoveries) // count  # a text cut short is searched again: it comes out alike
        for start in range(first, len(samples), _BATCH):
            show(start)
            stop = min(start + _BATCH, len(samples))
            new = [one for text in self._recover(samples[start:stop], start) for one in text]
            new = new[len(recoveries) - start * count :]
            here = slice(len(recoveries), stop * count)
            journal.append(originals[here], new)
            recoveries += new
        show(len(samples))
        return [recoveries[k : k + count] for k in range(0, len(recoveries), count)]

    def _recover(self, samples: Sequence[Sample], first: int) -> list[list[Recovery]]:
        vectors = self.encoder.encode([sample.text for sample in samples])
        calls: list[list[tuple[int, float, list[int]]]] = [[] for _ in samples]
        self.inverter.invert(
            vectors,
            seed=self.seed,
            first_index=first,
            decoding=self.decoding,
            encoder=self.encoder,
            on_call=lambda row, ids, cosine, spent: calls[row].append((spent, cosine, list(ids))),
            corpus=self.corpus,
        )
        greedy = self.inverter.invert(
            vectors, decoding=replace(self.decoding, strategy=Sequential(), encoder_calls=0)
        )
        cosines = cosines_of(self.encoder, [one.text for one in greedy], vectors)
        return [
            [
                self._at(mark, history)
                if mark and history
                else Recovery(start.text, start.token_ids, encoder_calls=0, cosine=cosine)
                for mark in self.marks
            ]
            for start, cosine, history in zip(greedy, cosines, calls, strict=True)
        ]

    def _at(self, mark: int, history: Sequence[tuple[int, float, list[int]]]) -> Recovery:
        """The nearest of the texts that were embedded with so many calls."""
        affordable = [call for call in history if call[0] <= mark]
        _, cosine, ids = max(affordable, key=lambda call: call[1])
        tokenizer = self.inverter.tokenizer
        content = [ids[k] for k in tokenizer.content_positions(ids)]
        (text,) = tokenizer.decode([ids])
        return Recovery(text, content, encoder_calls=affordable[-1][0], cosine=cosine)


def _reporter(report: ProgressFn, stage: str, total: int) -> Any:
    return lambda done: report(stage, done, total)


def _values(
    recoveries: Sequence[Sequence[Recovery]], samples: Sequence[Sample], ruler: Ruler
) -> NDArray[np.float64]:
    """Metrics of each text at each mark [N, marks, metrics]; not-a-number is missing."""
    columns = [COLUMNS.index(name) for name in METRICS]
    return np.array(
        [
            [ruler.measure(sample.text, sample.token_ids, one)[0][columns] for one in some]
            for sample, some in zip(samples, recoveries, strict=True)
        ]
    )


def _figures(
    values: dict[str, NDArray[np.float64]],
    shares: dict[str, float],
    marks: Sequence[int],
    seed: int,
) -> dict[str, dict[int, dict[str, Figure | None]]]:
    """Means with intervals, of each bucket and of all weighted by their shares."""
    means, replicates = {}, {}
    for number, (bucket, of_texts) in enumerate(values.items()):
        n = len(of_texts)
        flat = np.nan_to_num(of_texts.reshape(n, -1))
        means[bucket] = of_texts.mean(axis=0)
        resamples = draw_blocks(n, seed + number) @ flat / n
        replicates[bucket] = resamples.reshape(-1, *of_texts.shape[1:])
    total = sum(shares[bucket] for bucket in values)
    weights = {bucket: shares[bucket] / total for bucket in values}
    means[ALL] = np.sum([weights[b] * means[b] for b in values], axis=0)
    replicates[ALL] = np.sum([weights[b] * replicates[b] for b in values], axis=0)
    counts = {bucket: len(of_texts) for bucket, of_texts in values.items()}
    counts[ALL] = sum(counts.values())
    points: dict[str, dict[int, dict[str, Figure | None]]] = {}
    for bucket, mean in means.items():
        low, high = np.quantile(replicates[bucket], _LEVELS, axis=0)
        points[bucket] = {
            mark: {
                metric: None
                if np.isnan(mean[m, k])
                else Figure(float(mean[m, k]), float(low[m, k]), float(high[m, k]), counts[bucket])
                for k, metric in enumerate(METRICS)
            }
            for m, mark in enumerate(marks)
        }
    return points


def _spell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
