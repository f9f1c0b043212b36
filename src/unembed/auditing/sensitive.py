"""What hurts when it comes back: names, numbers, dates, addresses; found, counted and masked."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unembed.evaluation.metrics import find_spans
from unembed.files import has_extra

KINDS = (
    "names",
    "e-mail addresses",
    "phone numbers",
    "URLs",
    "identifiers",
    "amounts",
    "dates",
    "numbers",
)
_MASK = "•"

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_CURRENCY = r"(?:[$€£¥₹]|usd|eur|gbp|chf|jpy|dollars?|euros?|pounds?)"
_FIGURE = r"\d{1,3}(?:[ ,.’']\d{3})+(?:[.,]\d{1,2})?|\d+(?:[.,]\d{1,2})?"
# In this order, and what one has taken is not looked at again: a date is no phone number
_PATTERNS = {
    "URLs": r"(?:https?://|www\.)[^\s<>\"')\]]*[^\s<>\"')\].,;:!?]",
    "e-mail addresses": r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    "identifiers": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b"  # IBAN
    r"|\b(?:\d{4}[ -]){3}\d{4}\b"  # payment cards
    r"|\b\d{3}-\d{2}-\d{4}\b"  # US social security
    r"|\b(?:\d{1,3}\.){3}\d{1,3}\b"  # IPv4
    r"|\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"
    r"|\b(?=[A-Z0-9-]*\d)(?=[A-Z0-9-]*[A-Z])[A-Z0-9]{2,}(?:-?[A-Z0-9]{2,})+\b",
    "dates": rf"\b\d{{4}}-\d{{2}}-\d{{2}}\b|\b\d{{1,2}}[./]\d{{1,2}}[./]\d{{2,4}}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th|\.)? (?:of )?(?i:{_MONTH})(?: \d{{4}})?\b"
    rf"|\b(?i:{_MONTH}) \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?\b",
    "amounts": rf"(?i:{_CURRENCY}) ?(?:{_FIGURE})|(?:{_FIGURE}) ?(?i:{_CURRENCY})(?!\w)",
    "phone numbers": r"(?<!\w)\+?\(?\d{1,4}\)?(?:[ ./-]?\(?\d{2,4}\)?){2,5}(?!\w)",
}
_COMPILED = {kind: re.compile(pattern) for kind, pattern in _PATTERNS.items()}
_PHONE_DIGITS = 7
# Written with a capital in headings, and no names
_COMMON = frozenset(
    "a an and are as at be but by can do for from has have he her his how i if in is it its may my "
    "no not of on or our out she so than that the their then there these they this to up us was we "
    "what when where which who why will with you your".split()
)
_LEAST_SCORE = 0.4  # below, Presidio takes any nine digits for a passport
_PRESIDIO = {
    "PERSON": "names",
    "LOCATION": "names",
    "NRP": "names",
    "EMAIL_ADDRESS": "e-mail addresses",
    "PHONE_NUMBER": "phone numbers",
    "URL": "URLs",
    "DATE_TIME": "dates",
}

Finder = Callable[[str], dict[str, set[str]]]


def find_sensitive(text: str) -> dict[str, set[str]]:
    """The distinct sensitive spans of a text, by kind; kinds without one are left out.

    Patterns find what has a form: e-mail addresses, URLs, phone numbers, dates, amounts, IBANs,
    card, social-security and IP numbers, codes of capitals and digits. Names are the words with a
    capital inside a sentence (`unembed.evaluation.metrics.find_spans`), so that nouns of German
    count; names at the beginning of a sentence and words all in capitals do not.

    Args:
        text: As it was written.
    """
    spans: dict[str, set[str]] = {}
    rest = text
    for kind, pattern in _COMPILED.items():
        hits = {match.group() for match in pattern.finditer(rest)}
        if kind == "phone numbers":
            hits = {hit for hit in hits if sum(map(str.isdigit, hit)) >= _PHONE_DIGITS}
        for hit in sorted(hits, key=len, reverse=True):
            rest = rest.replace(hit, " _ ")
        spans[kind] = hits
    other = find_spans(rest)
    spans["names"] = {
        name for name in other["names"] if name.casefold() not in _COMMON and not name.isupper()
    }
    spans["numbers"] = other["numbers"]
    return {kind: spans[kind] for kind in KINDS if spans[kind]}


def make_finder(use_presidio: bool = True) -> tuple[Finder, str]:
    """What finds sensitive spans here, and a note that says what it is.

    With the extra ``pii`` (presidio-analyzer, and a model of spaCy that is installed) its kinds
    are added to those of our patterns.
    """
    own = "own patterns"
    if not use_presidio or not has_extra("pii"):
        return find_sensitive, own
    try:
        import spacy

        models = [name for name in spacy.util.get_installed_models() if name.startswith("en_")]
        if not models:
            return find_sensitive, f"{own} (Presidio is there, but no English model of spaCy)"
        analyzer = start_presidio(models[0])
    except (ImportError, OSError, ValueError) as error:
        return find_sensitive, f"{own} (Presidio did not start: {error})"
    return PatternsAndPresidio(analyzer), f"{own} and Presidio ({models[0]})"


def start_presidio(model: str) -> Any:
    """Start Presidio's recognisers for English; nothing is downloaded.

    Args:
        model: Name or folder of a spaCy model that is installed: Presidio would fetch another.

    Raises:
        ImportError: The extra ``pii`` is not installed.
        OSError: The model cannot be read.
        ValueError: It is none that Presidio takes.
    """
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    logging.getLogger("tldextract").setLevel(logging.CRITICAL)  # offline it has a list of its own
    models = [{"lang_code": "en", "model_name": model}]
    settings = {"nlp_engine_name": "spacy", "models": models}
    engine = NlpEngineProvider(nlp_configuration=settings).create_engine()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])


@dataclass(frozen=True)
class PatternsAndPresidio:
    """Our patterns, and what Presidio adds to them."""

    analyzer: Any

    def __call__(self, text: str) -> dict[str, set[str]]:
        """Find spans as `find_sensitive` does; of those that overlap with ours, ours count."""
        spans = find_sensitive(text)
        own = {span for texts in spans.values() for span in texts}
        for hit in self.analyzer.analyze(text=text, language="en", score_threshold=_LEAST_SCORE):
            kind = _PRESIDIO.get(hit.entity_type, "identifiers")
            span = text[hit.start : hit.end]
            if kind == "names":  # by words, as ours
                spans.setdefault(kind, set()).update(re.findall(r"[^\W\d_]{2,}", span))
            elif not any(span in other or other in span for other in own):
                spans.setdefault(kind, set()).add(span)
        return {kind: spans[kind] for kind in KINDS if kind in spans}


class Masker:
    """Hides the sensitive spans of a record in all that is shown of it.

    Args:
        spans: Of the original.
        names: Of other records, hidden too where a capital begins them.
    """

    def __init__(self, spans: Mapping[str, set[str]], names: Iterable[str] = ()) -> None:
        words = {w for texts in spans.values() for text in texts for w in _words(text)}
        self._words = {word.casefold() for word in words}
        self._names = frozenset(names)
        union = "|".join(sorted(map(re.escape, spans.get("names", ())), key=len, reverse=True))
        # A first name that begins a sentence: "Rosa" before a surname that is known
        self._first = re.compile(rf"\b[^\W\d_a-z][^\W\d_]+(?= (?:{union})\b)") if union else None
        self._long = sorted((t for texts in spans.values() for t in texts), key=len, reverse=True)

    def text(self, text: str) -> str:
        """A text with the spans, their words and every number hidden."""
        if self._first is not None:
            text = self._first.sub(lambda match: self._hide_name(match.group()), text)
        for span in self._long:
            text = text.replace(span, mask(span))
        return re.sub(r"\w+", lambda match: self.word(match.group()), text)

    def word(self, word: str) -> str:
        """A word, hidden if it is one of a span's or holds a digit."""
        bare = word.strip().casefold()
        hidden = bare in self._words or word in self._names or any(map(str.isdigit, bare))
        return mask(word) if hidden and _MASK not in word else word

    @staticmethod
    def _hide_name(word: str) -> str:
        return word if word.casefold() in _COMMON else mask(word)


def _words(text: str) -> Iterator[str]:
    return iter(re.findall(r"\w+", text))


def mask(text: str) -> str:
    """A text with its first letter left: "Maria" → "M••••"; spaces and signs stay, digits go."""
    signs, past_first = [], False
    for sign in text:
        keep = not sign.isalnum() or (not past_first and sign.isalpha())
        signs.append(sign if keep else _MASK)
        past_first = past_first or sign.isalnum()
    return "".join(signs)
