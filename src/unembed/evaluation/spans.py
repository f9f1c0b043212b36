"""Numbers, e-mail addresses, URLs and names: what of them came back."""

from __future__ import annotations

import re
from collections.abc import Callable

from unembed.encoders.tokenizer import TextTokenizer

KINDS = ("numbers", "e-mail addresses", "URLs", "names")

_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]*[^\s<>\"')\].,;:!?]")
_ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_NUMBER = re.compile(r"(?<!\w)\d+(?:[.,:]\d+)*(?!\w)")
_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_PRONOUN = re.compile(r"I(?:['’]\w+)?")
_BEFORE_A_SENTENCE = re.compile(r"(?:^|[.!?…:\n])[\s\"'“”\u2018’«»(\[\-–—•*]*$")


def find_spans(text: str) -> dict[str, set[str]]:
    """The distinct numbers, e-mail addresses, URLs and names of a text.

    A name is a word with a capital initial inside a sentence, each word by itself: "New York" are
    two. Where a sentence starts, capitals tell nothing, so names there are passed over; languages
    that capitalise nouns (German) have many that are none.

    Args:
        text: As it was written; a lower-cased one has no names.
    """
    found: dict[str, set[str]] = {}
    for kind, pattern in (("URLs", _URL), ("e-mail addresses", _ADDRESS), ("numbers", _NUMBER)):
        found[kind] = set(pattern.findall(text))
        text = pattern.sub(" _ ", text)  # a number inside a URL is not counted again
    names = set()
    for match in _WORD.finditer(text):
        word = match.group()
        inside = not _BEFORE_A_SENTENCE.search(text, 0, match.start())
        if word[0].isupper() and inside and not _PRONOUN.fullmatch(word):
            names.add(word.rstrip("'’-"))
    return {**found, "names": names}


def span_recalls(original: str, recovered: str, tokenizer: TextTokenizer) -> dict[str, float]:
    """Share of the original's spans of each kind that stand in the recovery.

    Compared without case and white space: many tokenizers, that of all-MiniLM-L6-v2 among them,
    lower-case, drop accents and put spaces around signs. A span must not run on into a longer word.

    Args:
        original: The text as it was embedded.
        recovered: What came back.
        tokenizer: Of the inverter; spans are compared as it spells them.

    Returns:
        Only the kinds that the original has.
    """
    folded, recalls = recovered.casefold(), {}
    for kind, spans in find_spans(original).items():
        patterns = list(filter(None, map(_speller(tokenizer), spans)))
        if patterns:
            hits = sum(re.search(pattern, folded) is not None for pattern in patterns)
            recalls[kind] = hits / len(patterns)
    return recalls


def _speller(tokenizer: TextTokenizer) -> Callable[[str], str]:
    """A span → the pattern of it, as the tokenizer spells it; empty if it spells nothing."""

    def pattern(span: str) -> str:
        (spelled,) = tokenizer.decode(tokenizer.encode([span]))
        signs = [re.escape(sign) for sign in "".join(spelled.split()).casefold()]
        return r"(?<!\w)" + r"\s*".join(signs) + r"(?!\w)" if signs else ""

    return pattern
