"""Named filters: why a text is left out. The first that fails is the one that is counted."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from unembed.errors import DataError

_LOOKED_AT = 4000  # characters; enough to judge a long text
_LETTERS_END = 0x40000  # the planes that hold scripts
_REPETITION_FROM = 200  # characters; shorter texts do not compress whatever they say


@dataclass(frozen=True)
class Limits:
    """What the filters let through.

    Attributes:
        min_chars: Shortest text, in characters.
        max_chars: Longest text, in characters.
        min_letters: Least share of letters and their marks among the visible characters, in any
            script: texts of emoji, numbers or markup stay below.
        min_compressed: Least size after compression as a share of the size before: a text that
            says one thing a hundred times stays below.
    """

    min_chars: int = 10
    max_chars: int = 100_000
    min_letters: float = 0.5
    min_compressed: float = 0.08

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through.

        Raises:
            DataError: The shortest is longer than the longest.
        """
        if self.min_chars > self.max_chars:
            raise DataError(
                f"at least {self.min_chars} as the second of --chars",
                str(self.max_chars),
                "Raise it or lower the first",
            )


def first_failure(text: str, limits: Limits) -> str | None:
    """The name of the first filter that a text fails, or none.

    Args:
        text: Without white space around it.
        limits: What the filters let through.
    """
    return next((name for name, fails in FILTERS.items() if fails(text, limits)), None)


def _is_too_long(text: str, limits: Limits) -> bool:
    return len(text) > limits.max_chars


def _is_empty(text: str, limits: Limits) -> bool:
    return not text


def _has_nul(text: str, limits: Limits) -> bool:
    return "\0" in text


def _is_not_unicode(text: str, limits: Limits) -> bool:
    """Half of a surrogate pair, as JSON may spell it, has no place in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _is_too_short(text: str, limits: Limits) -> bool:
    return len(text) < limits.min_chars


def _has_few_letters(text: str, limits: Limits) -> bool:
    visible = "".join(text[:_LOOKED_AT].split())
    letters = sum(len(run) for run in _letters().findall(visible))
    return letters < limits.min_letters * len(visible)


def _repeats_itself(text: str, limits: Limits) -> bool:
    if len(text) < _REPETITION_FROM:
        return False
    content = text[:_LOOKED_AT].encode("utf-8")
    return len(zlib.compress(content, 1)) < limits.min_compressed * len(content)


@cache
def _letters() -> re.Pattern[str]:
    """Runs of letters and marks; ``str.isalpha`` leaves the vowel signs of Hindi or Thai out."""
    ranges: list[str] = []
    start: int | None = None
    for code in range(_LETTERS_END + 1):
        inside = code < _LETTERS_END and unicodedata.category(chr(code))[0] in "LM"
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return re.compile(f"[{''.join(ranges)}]+")


FILTERS: dict[str, Callable[[str, Limits], bool]] = {
    "too_long": _is_too_long,
    "empty": _is_empty,
    "nul_bytes": _has_nul,
    "invalid_utf8": _is_not_unicode,
    "too_short": _is_too_short,
    "few_letters": _has_few_letters,
    "repetitive": _repeats_itself,
}
