"""The languages of prepared pairs: as their source names them, or detected in a sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from unembed.data.files import file_format, text_files
from unembed.data.sources import read_texts
from unembed.errors import DataError


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
    found = {"name": source.name, "bytes": sum(file.stat().st_size for file in files)}
    made_from = {key: manifest["source"].get(key) for key in found}
    if found != made_from:
        raise DataError(f"the source of the pairs, {made_from}", f"{found}", "Correct --source")
    if any(file_format(file) == ".txt" for file in files):
        raise DataError(
            f"a column {column!r} in {source}",
            "plain text, which has none",
            "Leave --source out: languages are then detected in a sample",
        )
    passages = sum(shard["passages"] for shard in manifest["shards"])
    counts = Counter(islice(read_texts(source, column), passages))
    named = {lang or "(none)": count for lang, count in counts.most_common()}
    return named, f"passages, by the column {column!r} of {source.name}"


def detected_languages(texts: Sequence[str]) -> tuple[dict[str, int], str] | None:
    """Texts of each language as `py3langid` guesses it; None where that is not installed.

    Args:
        texts: A sample. Short ones and close languages are often taken for each other.

    Returns:
        Language (ISO 639) → texts, the most frequent first, and a line on what was counted.
    """
    try:
        from py3langid import classify
    except ImportError:
        return None
    counts = Counter(classify(text)[0] for text in texts)
    return dict(counts.most_common()), f"detected, sample of {len(texts):,} pairs"
