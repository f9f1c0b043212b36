"""Originals beside recoveries, token by token; a choice of good, middling and bad ones by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unembed.evaluation.metrics import Recovery, token_set_f1
from unembed.evaluation.samples import Sample
from unembed.tokenizer import TextTokenizer

MOST = 1000  # texts kept as examples
RIGHT, ELSEWHERE, WRONG = "right", "elsewhere", "wrong"
_THIRDS = ("good", "middling", "bad")


@dataclass(frozen=True)
class Example:
    """An original beside its recovery.

    Attributes:
        original: The text.
        recovered: What came back.
        cosine: Between their vectors; None when nothing came back.
        index: Of the text among those evaluated.
        row: The attack that made the recovery.
        f1: Token-set F1.
        tokens: The recovery in pieces that join to its text, each with ``right`` (the original
            has the token in this place), ``elsewhere`` (in another place) or ``wrong``.
        labels: ``domain`` and ``lang`` of the text, where they are known.
    """

    original: str
    recovered: str
    cosine: float | None
    index: int
    row: str
    f1: float
    tokens: list[tuple[str, str]]
    labels: dict[str, str]


def make_example(
    index: int, row: str, sample: Sample, recovery: Recovery, tokenizer: TextTokenizer
) -> Example:
    """Compare a recovery with its original, token by token."""
    original, recovered = sample.token_ids, recovery.token_ids
    vocabulary = set(original)
    marks = []
    for place, token in enumerate(recovered):
        right = place < len(original) and original[place] == token
        marks.append(RIGHT if right else ELSEWHERE if token in vocabulary else WRONG)
    return Example(
        original=sample.text,
        recovered=recovery.text,
        cosine=recovery.cosine,
        index=index,
        row=row,
        f1=token_set_f1(original, recovered),
        vocabulary=list(zip(pieces_of(recovered, tokenizer), marks, strict=True)),
        labels=sample.labels,
    )


def pieces_of(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The characters that each token adds to the decoded text, spaces included.

    A token that ends inside a character adds nothing; the one that completes it adds it.
    """
    pieces, before = [], ""
    for decoded in tokenizer.decode([ids[: stop + 1] for stop in range(len(ids))]):
        text = decoded.rstrip("\ufffd")
        if before.startswith(text):  # half a character can take finished ones with it
            pieces.append("")
            continue
        shared = 0
        while shared < min(len(before), len(text)) and before[shared] == text[shared]:
            shared += 1
        pieces.append(text[shared:])
        before = text
    return pieces


def draw_indices(texts: int, seed: int) -> set[int]:
    """Which texts are kept as examples: all, or as many as ``MOST`` drawn with the seed."""
    if texts <= MOST:
        return set(range(texts))
    return set(np.random.default_rng(seed).choice(texts, size=MOST, replace=False).tolist())


def choose_examples(
    examples: Sequence[Example], seed: int, per_third: int = 3
) -> dict[str, list[Example]]:
    """Good, middling and bad recoveries, by a rule that leaves nothing to choose.

    The texts are ordered by the token-set F1 that the first attack reached, cut into thirds, and
    from each third as many are drawn with the seed.

    Args:
        examples: Of any number of attacks; the first one's are used.
        seed: Of the draw.
        per_third: Examples drawn from each third, fewer where there are not as many.

    Returns:
        ``good``, ``middling`` and ``bad``, each in the order of the texts.
    """
    first = [example for example in examples if example.row == examples[0].row]
    order = sorted(first, key=lambda example: (-example.f1, example.index))
    generator = np.random.default_rng(seed)
    thirds = {}
    for name, third in zip(_THIRDS, np.array_split(np.arange(len(order)), 3), strict=True):
        places = generator.choice(third, size=min(per_third, len(third)), replace=False)
        thirds[name] = [order[place] for place in sorted(places, key=lambda p: order[p].index)]
    return thirds
