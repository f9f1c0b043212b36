"""Many sources and languages → one shuffled stream of samples, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from unembed.data.collect.filters import Duplicates, Limits, first_failure
from unembed.data.collect.sources import MissingLanguageError, Weighted


class Sample(NamedTuple):
    """A text that was kept."""

    text: str
    lang: str
    source: str


@dataclass
class Tally:
    """Counts of events.

    Attributes:
        events: (language, source, event) → times. An event is ``read``, ``kept`` or the name of a
            filter.
        missing: Languages that a source lacks.
    """

    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def sums(self, part: int) -> dict[str, dict[str, int]]:
        """The events of each language (part 0) or source (part 1), both sorted by name."""
        sums: dict[str, dict[str, int]] = {}
        for key, times in sorted(self.events.items(), key=lambda item: (item[0][part], item[0][2])):
            events = sums.setdefault(key[part], {})
            events[key[2]] = events.get(key[2], 0) + times
        return sums

    def total(self, event: str) -> int:
        """Count how often an event happened in all."""
        return sum(times for key, times in self.events.items() if key[2] == event)


@dataclass
class Stream:
    """The texts of one language in one source."""

    lang: str
    source: str
    weight: float
    texts: Iterator[str]


Streams = dict[str, dict[str, Stream]]


def open_streams(sources: Sequence[Weighted], langs: Sequence[str], tally: Tally) -> Streams:
    """Open every language of every source and read its first text, so that what is wrong shows.

    Returns:
        Language → name of a source → its texts.

    Raises:
        DataError: A source cannot be read, or no source has one of the languages.
    """
    streams: Streams = {lang: {} for lang in langs}
    names = source_names(sources)
    for lang in langs:
        missing: list[MissingLanguageError] = []
        for name, weighted in zip(names, sources, strict=True):

            def skip(reason: str, lang: str = lang, name: str = name) -> None:
                tally.events[lang, name, "read"] += 1
                tally.events[lang, name, reason] += 1

            texts = weighted.source.texts(lang, len(langs) == 1, skip)
            try:
                first = [text for text in [next(texts, None)] if text is not None]
            except MissingLanguageError as error:
                missing.append(error)
                tally.missing.append((lang, name))
                continue
            streams[lang][name] = Stream(lang, name, weighted.weight, chain(first, texts))
        if len(missing) == len(sources):
            raise missing[0]
    return streams


def source_names(sources: Sequence[Weighted]) -> list[str]:
    """Name the sources for the column ``source``, numbered where two share a name."""
    names: list[str] = []
    for weighted in sources:
        name, number = weighted.source.name, 2
        while name in names:
            name, number = f"{weighted.source.name}#{number}", number + 1
        names.append(name)
    return names


def quotas(langs: Sequence[str], samples: int) -> dict[str, int]:
    """Samples of each language: equal, the first ones get what does not divide."""
    share, rest = divmod(samples, len(langs))
    return {lang: share + (index < rest) for index, lang in enumerate(langs)}


def draw_samples(
    streams: Streams,
    targets: dict[str, int],
    limits: Limits,
    duplicates: Duplicates,
    draw: random.Random,
    tally: Tally,
) -> Iterator[Sample]:
    """Yield samples until each language has what is wanted or its sources end.

    Languages alternate at random so that any stretch of the stream holds them in proportion; of a
    language's sources one is drawn by weight for each sample that is kept.

    Raises:
        DataError: A source cannot be read on.
    """
    remaining = {lang: count for lang, count in targets.items() if count}
    while remaining:
        lang = _choose(draw, remaining)
        sources = streams[lang]
        if not sources:
            del remaining[lang]
            continue
        name = _choose(draw, {name: stream.weight for name, stream in sources.items()})
        sample = _next_sample(sources[name], limits, duplicates, tally)
        if sample is None:
            del sources[name]
            continue
        remaining[lang] -= 1
        if not remaining[lang]:
            del remaining[lang]
        yield sample


def _choose(draw: random.Random, weights: dict[str, int] | dict[str, float]) -> str:
    point = draw.random() * sum(weights.values())
    for name, weight in weights.items():
        point -= weight
        if point < 0:
            return name
    return next(reversed(weights))  # rounding


def _next_sample(
    stream: Stream, limits: Limits, duplicates: Duplicates, tally: Tally
) -> Sample | None:
    """The next text of a stream that passes, or none at its end."""
    for raw in stream.texts:
        text = raw.strip()
        reason = first_failure(text, limits) or duplicates.reason(text)
        tally.events[stream.lang, stream.source, "read"] += 1
        tally.events[stream.lang, stream.source, reason or "kept"] += 1
        if reason is None:
            return Sample(text, stream.lang, stream.source)
    return None


def shuffle(
    samples: Iterable[Sample], draw: random.Random, rows: int, chars: int
) -> Iterator[Sample]:
    """Yield samples in random order out of a buffer.

    Args:
        samples: In any order.
        draw: Where the order comes from.
        rows: Most samples in the buffer.
        chars: Most characters in the buffer.
    """
    buffer: list[Sample] = []
    size = 0
    for sample in samples:
        buffer.append(sample)
        size += len(sample.text)
        while len(buffer) > rows or size > chars:
            choice = _take(buffer, draw)
            size -= len(choice.text)
            yield choice
    while buffer:
        yield _take(buffer, draw)


def _take(buffer: list[Sample], draw: random.Random) -> Sample:
    place = int(draw.random() * len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
