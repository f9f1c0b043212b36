"""Personal data replaced in the texts before they are embedded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from unembed.auditing.sensitive import start_presidio
from unembed.defences.defence import Defence, Vectors
from unembed.errors import ConfigError, require_kind
from unembed.evaluation.metrics import find_spans
from unembed.files import require_extra

FINDERS = ("forms", "presidio")
_PLACEHOLDERS = {
    "e-mail addresses": "<EMAIL>",
    "URLs": "<URL>",
    "names": "<NAME>",
    "numbers": "<NUMBER>",
}
_LEAST_SCORE = 0.35  # of Presidio's; below are guesses by the form alone


@dataclass
class ReplacePii(Defence):
    """Personal data in the texts replaced by its kind, then the texts are embedded again.

    The store's own vectors are of no use here: the encoder has to run. Some of it is missed,
    whoever looks for it.

    Attributes:
        finder: ``forms``: numbers, addresses and URLs by their form, names inside sentences by
            their capital; or ``presidio``: Microsoft's recognisers, with a spaCy model for names.
        model: Name or folder of that spaCy model.
    """

    identity: ClassVar[bool] = True
    finder: str = "forms"
    model: str = "en_core_web_lg"

    def __post_init__(self) -> None:
        if self.finder not in FINDERS:
            raise ConfigError(
                f"finder of pii: {' or '.join(FINDERS)}", repr(self.finder), "Correct it"
            )

    def rewrite(self, texts: Sequence[str]) -> list[str]:
        """The texts with what was found replaced.

        Raises:
            ConfigError: Presidio or its model is not installed.
        """
        replace = replace_spans if self.finder == "forms" else presidio_replacer(self.model)
        return [replace(text) for text in texts]

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """The same vectors: those of the changed texts."""
        return vectors

    def invert(self, rows: Vectors) -> Vectors:
        """The same vectors."""
        return rows


def replace_spans(text: str) -> str:
    """Replace names, numbers, e-mail addresses and URLs of a text by ``<NAME>`` and so on."""
    require_kind(text, str, "a text", "Leave out what is none")
    spans = find_spans(text)
    for kind, placeholder in _PLACEHOLDERS.items():
        for span in sorted(spans[kind], key=len, reverse=True):
            text = re.sub(rf"(?<![\w<]){re.escape(span)}(?!\w)", placeholder, text)
    return text


class Finding(NamedTuple):
    """Characters ``start`` to ``end`` of a text are of a kind, with a score from 0 to 1."""

    start: int
    end: int
    kind: str
    score: float


def replace_findings(text: str, findings: Iterable[Finding]) -> str:
    """Replace what was found by ``<KIND>``: the surest first, then the longest, none twice."""
    ranked = sorted(findings, key=lambda f: (-f.score, f.start - f.end))
    choice: list[Finding] = []
    for finding in ranked:
        if all(finding.end <= other.start or other.end <= finding.start for other in choice):
            choice.append(finding)
    for start, end, kind, _ in sorted(choice, reverse=True):
        text = f"{text[:start]}<{kind}>{text[end:]}"
    return text


def presidio_replacer(model: str) -> Callable[[str], str]:
    """Load Presidio's recognisers for English; nothing is downloaded.

    Args:
        model: Name or folder of a spaCy model.

    Raises:
        ConfigError: Presidio or the model is not installed.
    """
    require_extra("pii", "pii:finder=presidio", "use pii, which finds by form")
    import spacy

    if not (spacy.util.is_package(model) or Path(model).is_dir()):  # Presidio would download it
        raise ConfigError(
            f"the spaCy model {model} for pii:finder=presidio",
            "that it is not installed",
            f"Run `python -m spacy download {model}`, or name another: pii:model=...",
        )
    analyzer = start_presidio(model)

    def replace(text: str) -> str:
        results: list[Any] = analyzer.analyze(
            text=text, language="en", score_threshold=_LEAST_SCORE
        )
        return replace_findings(
            text, (Finding(r.start, r.end, r.entity_type, r.score) for r in results)
        )

    return replace
