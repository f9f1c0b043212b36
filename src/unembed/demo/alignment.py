"""An original and its recovery side by side, word by word."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby, zip_longest

from unembed.encoders.tokenizer import TextTokenizer

Aligned = tuple[str, str | None, str | None]  # kind, original, recovered


def align_words(original: str, recovered: str, tokenizer: TextTokenizer) -> list[Aligned]:
    """Which words came back, which are others, missing, or were not there.

    Words are compared as the tokenizer spells them, so a capital letter or an accent that it drops
    makes no difference; punctuation is left out.

    Args:
        original: The text that was embedded.
        recovered: What came back.
        tokenizer: Of the inverter.

    Returns:
        In reading order: ``right``, ``wrong``, ``missing`` (no recovered word) or ``extra`` (no
        original word), and the words as they were written.
    """
    ours, theirs = split_words(original), split_words(recovered)
    keys = _spelled(ours + theirs, tokenizer)
    matcher = SequenceMatcher(None, keys[: len(ours)], keys[len(ours) :], autojunk=False)
    aligned: list[Aligned] = []
    for same, i, i_end, j, j_end in matcher.get_opcodes():
        for a, b in zip_longest(ours[i:i_end], theirs[j:j_end]):
            aligned.append((_kind(same == "equal", a, b), a, b))
    return aligned


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and marks; a sign of Chinese or Japanese is a word by itself."""
    words: list[str] = []
    for kind, run in groupby(text, key=_class_of):
        if kind == "sign":
            words += run
        elif kind == "word":
            words.append("".join(run))
    return words


def _class_of(sign: str) -> str:
    if unicodedata.category(sign)[0] not in "LNM":
        return "none"
    name = unicodedata.name(sign, "")
    return "sign" if name.startswith(("CJK", "HIRAGANA", "KATAKANA")) else "word"


def _spelled(words: list[str], tokenizer: TextTokenizer) -> list[str]:
    decoded: Iterator[str] = iter(tokenizer.decode(tokenizer.encode(words)))
    return ["".join(next(decoded).split()).casefold() or word.casefold() for word in words]


def _kind(same: bool, original: str | None, recovered: str | None) -> str:
    if same:
        return "right"
    if recovered is None:
        return "missing"
    return "extra" if original is None else "wrong"
