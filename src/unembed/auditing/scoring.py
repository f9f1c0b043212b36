"""How much came back: token F1, exact match, ROUGE-L, recall of what hurts; beside floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.auditing.sensitive import KINDS, Finder
from unembed.evaluation.bootstrap import Figure, draw_blocks
from unembed.evaluation.metrics import (
    Recovery,
    count_recovered,
    exact_match,
    speller,
    token_set_f1,
    windows_of,
)
from unembed.files import has_extra
from unembed.tokenizer import TextTokenizer

F1, EXACT, ROUGE, COSINE = "token F1", "exact match", "ROUGE-L", "cosine"
ANY = "anything that hurts"
MEANS = (F1, EXACT, ROUGE, COSINE)
_LEVELS = (0.025, 0.975)
TEXT_CHARS = 20_000  # of one text that are scored
LENGTHS = ((1, 8), (9, 16), (17, 31), (32, 128), (129, 512), (513, None))

Figures = dict[str, Figure | None]


@dataclass(frozen=True)
class Record:
    """A row of the store that has a text.

    Attributes:
        row: Its index in the sample.
        id: Its id in the store.
        text: As it is stored, at most 20,000 characters of it.
        token_ids: Of the text, as the inverter's tokenizer writes it.
        spans: What hurts in it, by kind.
        group: Its value of the field grouped by.
    """

    row: int
    id: str
    text: str
    token_ids: list[int]
    spans: dict[str, set[str]]
    group: str | None = None

    @property
    def length(self) -> str:
        """The bucket of its length in tokens."""
        size = len(self.token_ids)
        low, high = next(b for b in LENGTHS if b[1] is None or size <= b[1])
        return f"{low} or more" if high is None else f"{low} to {high}"


def make_records(
    ids: Sequence[str],
    texts: Sequence[str | None],
    groups: Sequence[Any] | None,
    tokenizer: TextTokenizer,
    finder: Finder,
) -> list[Record]:
    """The rows that have a text with at least one token."""
    records = []
    for row, text in enumerate(texts):
        original = (text or "")[:TEXT_CHARS].encode("utf-8", "replace").decode("utf-8")
        if not original.strip():
            continue
        (tokens,) = tokenizer.encode([original])
        if tokens:
            group = None if groups is None else str(groups[row])[:80]
            records.append(Record(row, ids[row], original, tokens, finder(original), group))
    return records


class Scorer:
    """Measures recoveries against the stored texts.

    An inverter writes at most L - 1 tokens. A longer text is compared whole, as words may come
    from all of it, and in every window of that size; the best counts for token F1 and ROUGE-L:
    what a reader would take the recovery for. Floors are scored in the same way. Recall of what
    hurts is over the whole text.

    Args:
        tokenizer: Of the inverter.
        longest: Tokens it writes at most, L - 1.
    """

    def __init__(self, tokenizer: TextTokenizer, longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest
        self._spell = speller(tokenizer)
        self._patterns: dict[str, str] = {}
        self._rouge: Any = None
        if has_extra("evaluation"):
            from rouge_score.rouge_scorer import RougeScorer

            self._rouge = RougeScorer(["rougeL"])

    def measure(self, record: Record, recovery: Recovery) -> dict[str, Any]:
        """Numbers of one record: a value a metric, and for each kind (recovered, in all)."""
        ids = record.token_ids
        windows = [*([ids] if len(ids) > self._longest else []), *windows_of(ids, self._longest)]
        scores = [token_set_f1(window, recovery.token_ids) for window in windows]
        best = int(np.argmax(scores))
        values: dict[str, Any] = {
            F1: scores[best],
            EXACT: exact_match(record.token_ids, recovery.token_ids),
            COSINE: recovery.cosine,
        }
        if self._rouge is not None:
            (reference,) = self._tokenizer.decode([windows[best]])
            values[ROUGE] = self._rouge.score(reference, recovery.text)["rougeL"].fmeasure
        values |= count_recovered(record.spans, recovery.text, self._pattern)
        return values

    def _pattern(self, span: str) -> str:
        if span not in self._patterns:
            self._patterns[span] = self._spell(span)
        return self._patterns[span]


def figures(values: Sequence[Mapping[str, Any]], seed: int) -> Figures:
    """Means with 95% bootstrap intervals; of what hurts the share of all spans that came back.

    Args:
        values: Of `Scorer.measure`, one a record.
        seed: Of the bootstrap.

    Returns:
        Metric or kind → figure, None where no record has it. Of a kind, n counts its spans.
    """
    if not values:
        return {}
    weights = draw_blocks(len(values), seed)
    table: Figures = {}
    for name in MEANS:
        numbers = np.array([v.get(name) for v in values], dtype=np.float64)
        present = (~np.isnan(numbers)).astype(np.float64)
        table[name] = _ratio(np.nan_to_num(numbers), present, weights)
    totals = np.zeros((2, len(values)))
    for kind in KINDS:
        counts = np.array([v.get(kind, (0, 0)) for v in values], dtype=np.float64).T
        totals += counts
        table[kind] = _ratio(counts[0], counts[1], weights)
    table[ANY] = _ratio(totals[0], totals[1], weights)
    return table


def _ratio(
    parts: NDArray[np.float64], wholes: NDArray[np.float64], weights: NDArray[np.float64]
) -> Figure | None:
    total = float(wholes.sum())
    if total == 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (weights @ parts) / (weights @ wholes)
    ratios = ratios[np.isfinite(ratios)]
    low, high = np.quantile(ratios, _LEVELS)
    mean = float(parts.sum() / total)
    mean, low, high = (round(float(number), 6) for number in (mean, low, high))
    return Figure(mean, low, high, int(total))
