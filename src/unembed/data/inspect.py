"""Report on a folder of prepared pairs: counts, lengths, sizes, writing systems, some pairs."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.pairs import Pairs
from unembed.data.readers import read_texts
from unembed.errors import DataError
from unembed.files import atomic, file_format, has_extra, require_extra, text_files

_SAMPLE = 2000  # pairs decoded for languages and writing systems
_CHUNK = 65_536
_QUANTILES = (5, 50, 95)
_MOST_BARS = 15


@dataclass(frozen=True)
class Inspection:
    """Report on a folder of prepared pairs.

    Attributes:
        pairs: Their number N.
        shards: Stretches of the source they are in, two files each.
        complete: Whether the whole source was read.
        bytes: Size of the shards on the disk.
        encoder: Identity of the encoder.
        fingerprint: SHA-256 of its probe vectors; None in folders without one.
        vocabulary: Size V of the tokenizer, and what it was before trimming, where it was.
        distinct_tokens: Ids that occur.
        lengths: Pairs of each number of content tokens, 0 to L-1.
        dropped: Pieces left out, by reason.
        languages: Passages or pairs of each language, the most frequent first; None where nothing
            tells.
        languages_are: What was counted: passages by a column of the source, or a sample of pairs
            in which languages were detected.
        writing: Letters of each writing system in a sample of the pairs.
        examples: Some of the texts.
        source: What the pairs were made from.
        outdated: What is wrong with pairs that an older version cut; None where nothing is.
    """

    pairs: int
    shards: int
    complete: bool
    bytes: int
    encoder: dict[str, Any]
    fingerprint: str | None
    vocabulary: dict[str, int]
    distinct_tokens: int
    lengths: list[int]
    dropped: dict[str, int]
    languages: dict[str, int] | None
    languages_are: str
    writing: dict[str, int]
    examples: list[str]
    source: dict[str, Any]
    outdated: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def quantiles(self) -> dict[int, int]:
        """Content tokens below which 5, 50 and 95% of the pairs lie."""
        total = np.cumsum(self.lengths)
        bounds = {}
        for share in _QUANTILES:
            bounds[share] = int(np.searchsorted(total, total[-1] * share / 100))
        return bounds


def inspect_pairs(
    folder: Path,
    examples: int = 5,
    seed: int = 0,
    source: Path | None = None,
    lang_column: str = "lang",
) -> Inspection:
    """Describe a folder of prepared pairs; also one that is still being written.

    Args:
        folder: What `prepare_pairs` wrote.
        examples: Texts to show.
        seed: Draws the texts and the sample for languages and writing systems.
        source: What the pairs were prepared from, to count languages by its column; without it
            they are detected in the sample, where `py3langid` is installed.
        lang_column: Column or key of the source that holds the language.

    Raises:
        DataError: There are no pairs, a shard is missing or damaged, or the source is another one
            or names no languages.
    """
    pairs = Pairs.open(folder)
    manifest, counts = pairs.manifest, pairs.token_counts
    draw = np.random.default_rng(seed)
    sample = draw.choice(len(pairs), size=min(len(pairs), max(_SAMPLE, examples)), replace=False)
    texts = pairs.tokenizer.decode(pairs.rows(np.sort(sample))[0])
    indices = draw.permutation(len(texts))[:examples]
    dropped: Counter[str] = Counter()
    for shard in manifest["shards"]:
        dropped.update(shard.get("dropped", {}))
    vocabulary = {"size": pairs.tokenizer.size}
    if "vocabulary" in manifest:
        vocabulary["before_trimming"] = manifest["vocabulary"]["before"]
    names = [name for shard in manifest["shards"] for name in shard["sha256"]]
    by_column = None if source is None else named_languages(source, manifest, lang_column)
    languages, languages_are = by_column or detected_languages(texts) or (None, "not known")
    return Inspection(
        pairs=len(pairs),
        shards=len(manifest["shards"]),
        complete=bool(manifest["complete"]),
        bytes=sum((folder / name).stat().st_size for name in names),
        encoder=manifest["encoder"],
        fingerprint=manifest.get("fingerprint", {}).get("sha256"),
        vocabulary=vocabulary,
        distinct_tokens=int((counts > 0).sum()),
        lengths=_lengths(pairs).tolist(),
        dropped=dict(sorted(dropped.items())),
        languages=languages,
        languages_are=languages_are,
        writing=dict(writing_systems(texts).most_common()),
        examples=[texts[index] for index in indices],
        source=manifest["source"],
        outdated=pairs.outdated,
    )


def _lengths(pairs: Pairs) -> NDArray[np.int64]:
    """Pairs of each number of content tokens, [L]."""
    length = pairs.tokens[0].shape[1]
    counts = np.zeros(length, dtype=np.int64)
    for shard in pairs.tokens:
        for start in range(0, len(shard), _CHUNK):
            ends = (shard[start : start + _CHUNK] == pairs.tokenizer.end_id).argmax(axis=1)
            counts += np.bincount(ends, minlength=length)
    return counts


def writing_systems(texts: list[str]) -> Counter[str]:
    """Letters of each writing system: the first word of their Unicode names."""
    letters = Counter("".join(texts))
    systems: Counter[str] = Counter()
    for letter, count in letters.items():
        if letter.isalpha():
            systems[unicodedata.name(letter, "unnamed").split()[0].capitalize()] += count
    return systems


def plot_inspection(report: Inspection, path: Path) -> None:
    """Draw the histograms of lengths, languages and writing systems into a PNG.

    Raises:
        ConfigError: Matplotlib is not installed.
        DataError: The file cannot be written.
    """
    require_extra("plots", "the histograms", "leave --png out")
    from matplotlib.figure import Figure

    bars = {"writing systems\n(letters in a sample)": report.writing}
    if report.languages:
        bars = {f"languages\n({report.languages_are})": report.languages, **bars}
    figure = Figure(figsize=(5 + 4 * len(bars), 4), layout="constrained")
    lengths, *rest = figure.subplots(1, 1 + len(bars))
    lengths.bar(range(len(report.lengths)), report.lengths, width=0.9)
    lengths.set(xlabel="content tokens", ylabel="pairs", title=f"{report.pairs:,} pairs")
    for axes, (title, counts) in zip(rest, bars.items(), strict=True):
        most = list(counts.items())[:_MOST_BARS][::-1]
        axes.barh([name for name, _ in most], [count for _, count in most])
        axes.set_title(title, fontsize="small")
    try:
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"a place to write {path}", str(error), "Choose another --png") from error


def named_languages(
    source: Path, manifest: dict[str, Any], column: str = "lang"
) -> tuple[dict[str, int], str]:
    """Passages of each language among those that pairs were made from, by a column of the source.

    Args:
        source: What the pairs were prepared from; checked by name and size.
        manifest: That of the pairs.
        column: Column or key that holds the language.

    Returns:
        Language → passages, the most frequent first, and a line on what was counted.

    Raises:
        DataError: It is another source, or names no languages.
    """
    files = text_files(source)
    stated = {"name": source.name, "bytes": sum(file.stat().st_size for file in files)}
    actual = {key: manifest["source"].get(key) for key in stated}
    if stated != actual:
        raise DataError(f"the source of the pairs, {actual}", f"{stated}", "Correct --source")
    if any(file_format(file) == ".txt" for file in files):
        raise DataError(
            f"a column {column!r} in {source}",
            "plain text, which has none",
            "Leave --source out: languages are then detected in a sample",
        )
    passages = sum(shard["passages"] for shard in manifest["shards"])
    counts = Counter(islice(read_texts(source, column), passages))
    languages = {lang or "(none)": count for lang, count in counts.most_common()}
    return languages, f"passages, by the column {column!r} of {source.name}"


def detected_languages(texts: Sequence[str]) -> tuple[dict[str, int], str] | None:
    """Texts of each language as `py3langid` guesses it; None where that is not installed.

    Args:
        texts: A sample. Short ones and close languages are often taken for each other.

    Returns:
        Language (ISO 639) → texts, the most frequent first, and a line on what was counted.
    """
    if not has_extra("languages"):
        return None
    from py3langid import classify

    counts = Counter(classify(text)[0] for text in texts)
    return dict(counts.most_common()), f"detected, sample of {len(texts):,} pairs"
