"""Personal data replaced in the texts before they are embedded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unembed.defences.defence import Defence, Vectors
from unembed.evaluation.metrics import find_spans

_PLACEHOLDERS = {
    "e-mail addresses": "<EMAIL>",
    "URLs": "<URL>",
    "names": "<NAME>",
    "numbers": "<NUMBER>",
}


@dataclass
class ReplacePii(Defence):
    """Names, numbers, e-mail addresses and URLs replaced by their kind, then embedded again.

    What has a form is found, and names inside sentences; some of it is missed. The store's own
    vectors are of no use here: the encoder has to run.
    """

    identity: ClassVar[bool] = True

    def rewrite(self, texts: Sequence[str]) -> list[str]:
        """The texts with what was found replaced; one that nothing else is left of stays one."""
        return [replace_spans(text) for text in texts]

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """The same vectors: those of the changed texts."""
        return vectors

    def invert(self, stored: Vectors) -> Vectors:
        """The same vectors."""
        return stored


def replace_spans(text: str) -> str:
    """Replace names, numbers, e-mail addresses and URLs of a text by ``<NAME>`` and so on."""
    spans = find_spans(text)
    for kind, placeholder in _PLACEHOLDERS.items():
        for span in sorted(spans[kind], key=len, reverse=True):
            text = re.sub(rf"(?<![\w<]){re.escape(span)}(?!\w)", placeholder, text)
    return text
