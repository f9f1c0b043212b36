"""Metrics of one recovered text: a number each, or None where it cannot be computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.files import install_line
from unembed.tokenizer import TextTokenizer

KINDS = ("numbers", "e-mail addresses", "URLs", "names")
BINS = 10  # of the calibration error
_NGRAMS = 4

MEANS = (
    *("token accuracy", "exact match", "token-set precision", "token-set recall", "token-set F1"),
    *("informative recall", "BLEU (sentence)", "ROUGE-L", "cosine"),
    *KINDS,
    *("length error", "length bias", "passes", "encoder calls", "milliseconds"),
)
BLEU_PARTS = (
    *(f"matching {n}-grams" for n in range(1, _NGRAMS + 1)),
    *(f"recovered {n}-grams" for n in range(1, _NGRAMS + 1)),
    *("recovered words", "original words"),
)
CALIBRATION_PARTS = (*(f"overconfidence in bin {b}" for b in range(BINS)), "confident tokens")
COLUMNS = (*MEANS, *BLEU_PARTS, *CALIBRATION_PARTS)
CORPUS_BLEU, CALIBRATION = "BLEU (corpus)", "calibration error"

# The order of tables
METRICS = (*MEANS[:7], CORPUS_BLEU, *MEANS[7:13], CALIBRATION, *MEANS[13:])

ESSENTIAL = ("token accuracy", "exact match", "token-set F1", "cosine")  # for the terminal

_LATIN_WORD = re.compile(r"[a-z0-9]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Recovery:
    """Recovery of one text, by a strategy or by a baseline.

    Attributes:
        text: The text.
        token_ids: Its content tokens.
        confidences: Probability of each token when it was unmasked; None for what is not decoded.
        passes: Denoiser passes; None for what is not decoded.
        encoder_calls: Texts embedded on the way; None for what is not decoded.
        milliseconds: Share of its batch's decoding time; None for what is not decoded.
        cosine: Of the recovered text, embedded again, with the original's vector; None where
            there is no text to embed.
    """

    text: str
    token_ids: list[int]
    confidences: list[float] | None = None
    passes: int | None = None
    encoder_calls: int | None = None
    milliseconds: float | None = None
    cosine: float | None = None


def token_accuracy(original: Sequence[int], recovered: Sequence[int]) -> float:
    """Share of the original's tokens that stand at the same position in the recovery, 0 to 1."""
    hits = sum(a == b for a, b in zip(original, recovered, strict=False))
    return hits / len(original)


def exact_match(original: Sequence[int], recovered: Sequence[int]) -> float:
    """1 when the token sequences are the same, else 0."""
    return float(list(original) == list(recovered))


def token_set_precision(original: Sequence[int], recovered: Sequence[int]) -> float | None:
    """Share of the distinct recovered tokens that the original has; None when none came back."""
    hypothesis = set(recovered)
    return len(hypothesis & set(original)) / len(hypothesis) if hypothesis else None


def token_set_recall(original: Sequence[int], recovered: Sequence[int]) -> float:
    """Share of the original's distinct tokens that came back, anywhere, 0 to 1."""
    reference = set(original)
    return len(reference & set(recovered)) / len(reference)


def token_set_f1(original: Sequence[int], recovered: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over the sets of tokens, order ignored, 0 to 1."""
    reference, hypothesis = set(original), set(recovered)
    return 2.0 * len(reference & hypothesis) / (len(reference) + len(hypothesis))


def word_f1(original: str, recovered: str) -> float:
    """Harmonic mean of precision and recall over the sets of words, without case, 0 to 1."""
    reference, hypothesis = (set(_WORD.findall(text.casefold())) for text in (original, recovered))
    return 2.0 * len(reference & hypothesis) / max(len(reference) + len(hypothesis), 1)


def informative_recall(
    original: Sequence[int], recovered: Sequence[int], weights: NDArray[np.float64]
) -> float:
    """Token-set recall with each token weighted by its rarity: weights [V], see `rarity`."""
    reference = sorted(set(original))
    hits = sorted(set(reference) & set(recovered))
    return float(weights[hits].sum() / weights[reference].sum())


def rarity(counts: NDArray[np.int64], tokenizer: TextTokenizer) -> NDArray[np.float64]:
    """Information in nats of each token, −log of its frequency in a corpus, [V].

    Args:
        counts: How often each id occurs, [V]; special tokens are left out of the frequencies, and
            one is added to each count, so that a token never seen is rare, not infinitely so.
        tokenizer: Of the ids.
    """
    smoothed = counts.astype(np.float64) + 1.0
    smoothed[list(tokenizer.special_ids)] = 0.0
    weights = np.zeros_like(smoothed)
    positive = smoothed > 0
    weights[positive] = -np.log(smoothed[positive] / smoothed.sum())
    return weights


def calibration_sums(
    original: Sequence[int], recovered: Sequence[int], confidences: Sequence[float]
) -> NDArray[np.float64]:
    """Tokens, confidence and right tokens of one text in each bin of confidence, [bins, 3].

    A token is right where the original has it at the same position.
    """
    sums = np.zeros((BINS, 3))
    for place, (token, confidence) in enumerate(zip(recovered, confidences, strict=True)):
        right = place < len(original) and original[place] == token
        sums[min(int(confidence * BINS), BINS - 1)] += (1.0, confidence, float(right))
    return sums


@dataclass(frozen=True)
class Ruler:
    """Measures recoveries; build it with `make_ruler`.

    Attributes:
        tokenizer: Of the inverter.
        weights: Information of each token [V]; None where the training corpus is unknown.
        bleu: Scorer of `sacrebleu`, sentence by sentence; None where it is not installed.
        rouge: Scorer of `rouge-score`; None where it is not installed.
    """

    tokenizer: TextTokenizer
    weights: NDArray[np.float64] | None
    bleu: Any
    rouge: Any

    def measure(
        self, original: str, ids: Sequence[int], recovery: Recovery
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The numbers of one text.

        Args:
            original: The text, as it was embedded.
            ids: Its content tokens, at least one.
            recovery: What came back.

        Returns:
            A value per name of ``COLUMNS``, not-a-number where it cannot be computed; and the
            sums of `calibration_sums`.
        """
        hypothesis = recovery.token_ids
        # Half of a tokenizer's changes (case, spaces) can never be recovered, so what the
        # recovery is compared with has gone through it too: an exact match has BLEU 100.
        (reference,) = self.tokenizer.decode([ids])
        values: dict[str, float | None] = {
            "token accuracy": token_accuracy(ids, hypothesis),
            "exact match": exact_match(ids, hypothesis),
            "token-set precision": token_set_precision(ids, hypothesis),
            "token-set recall": token_set_recall(ids, hypothesis),
            "token-set F1": token_set_f1(ids, hypothesis),
            "cosine": recovery.cosine,
            "length error": float(abs(len(hypothesis) - len(ids))),
            "length bias": float(len(hypothesis) - len(ids)),
            "passes": recovery.passes,
            "encoder calls": recovery.encoder_calls,
            "milliseconds": recovery.milliseconds,
        }
        if self.weights is not None:
            values["informative recall"] = informative_recall(ids, hypothesis, self.weights)
        values |= span_recalls(original, recovery.text, self.tokenizer)
        values |= self._overlaps(reference, recovery.text)
        bins = np.zeros((BINS, 3))
        if recovery.confidences is not None:
            bins = calibration_sums(ids, hypothesis, recovery.confidences)
            sums = (*(bins[:, 1] - bins[:, 2]), bins[:, 0].sum())
            values |= dict(zip(CALIBRATION_PARTS, sums, strict=True))
        numbers = [values.get(name) for name in COLUMNS]
        return np.array([np.nan if v is None else v for v in numbers], dtype=np.float64), bins

    def _overlaps(self, reference: str, text: str) -> Iterator[tuple[str, float]]:
        """BLEU of the sentence (0 to 100), the sums that BLEU of the corpus needs, ROUGE-L."""
        if self.bleu is not None:
            score = self.bleu.sentence_score(text, [reference])
            yield "BLEU (sentence)", score.score
            parts = (*score.counts, *score.totals, score.sys_len, score.ref_len)
            yield from zip(BLEU_PARTS, parts, strict=True)
        # The library sees Latin letters and digits only
        if self.rouge is not None and _LATIN_WORD.search(reference.lower()):
            yield "ROUGE-L", self.rouge.score(reference, text)["rougeL"].fmeasure


def make_ruler(
    tokenizer: TextTokenizer, counts: NDArray[np.int64] | None
) -> tuple[Ruler, list[str]]:
    """A ruler, and notes of the metrics that it cannot measure.

    Args:
        tokenizer: Of the inverter.
        counts: How often each token occurs in the training corpus, [V]; None when unknown.
    """
    notes, bleu, rouge = [], None, None
    try:
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU(effective_order=True)
    except ImportError:
        notes.append(_missing("BLEU", "sacrebleu"))
    try:
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"])
    except ImportError:
        notes.append(_missing("ROUGE-L", "rouge-score"))
    if counts is None:
        notes.append(
            "informative recall: not measured, the training corpus is not known (no training "
            "pairs of the inverter's tokenizer were given)"
        )
    weights = None if counts is None else rarity(counts, tokenizer)
    return Ruler(tokenizer, weights, bleu, rouge), notes


def _missing(metric: str, package: str) -> str:
    return f"{metric}: not measured, {package} is not installed ({install_line('evaluation')})"


def corpus_bleu(sums: Sequence[float]) -> float:
    """BLEU of a corpus, 0 to 100, from the sums of ``BLEU_PARTS`` over its texts."""
    from sacrebleu.metrics.bleu import BLEU

    rounded = [round(value) for value in sums]
    correct, total = rounded[:_NGRAMS], rounded[_NGRAMS:-2]
    score = BLEU.compute_bleu(correct, total, rounded[-2], rounded[-1], smooth_method="exp")
    return float(score.score)


def calibration_error(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected calibration error from sums [..., bins + 1] of ``CALIBRATION_PARTS`` over texts.

    Equation 3 of Guo et al. (2017, arXiv 1706.04599): the gap between mean confidence and accuracy
    of each bin, weighted by its share of the tokens.
    """
    result: NDArray[np.float64] = np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]
    return result


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
    spans: dict[str, set[str]] = {}
    for kind, pattern in (("URLs", _URL), ("e-mail addresses", _ADDRESS), ("numbers", _NUMBER)):
        spans[kind] = set(pattern.findall(text))
        text = pattern.sub(" _ ", text)  # a number inside a URL is not counted again
    names = set()
    for match in _WORD.finditer(text):
        word = match.group()
        inside = not _BEFORE_A_SENTENCE.search(text, 0, match.start())
        if word[0].isupper() and inside and not _PRONOUN.fullmatch(word):
            names.add(word.rstrip("'’-"))
    return {**spans, "names": names}


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
    counts = count_recovered(find_spans(original), recovered, speller(tokenizer))
    return {kind: hits / total for kind, (hits, total) in counts.items()}


def count_recovered(
    spans: Mapping[str, set[str]], recovered: str, spell: Callable[[str], str]
) -> dict[str, tuple[int, int]]:
    """For each kind how many of the spans stand in a recovery, and how many there were.

    Compared without case, accents and white space, as the inverter's tokenizer spells them; a span
    must not run on into a longer word.

    Args:
        spans: Of the original.
        recovered: What came back.
        spell: Of `speller`.
    """
    folded, counts = recovered.casefold(), {}
    for kind, texts in spans.items():
        patterns = list(filter(None, map(spell, sorted(texts))))
        if patterns:
            hits = sum(re.search(pattern, folded) is not None for pattern in patterns)
            counts[kind] = (hits, len(patterns))
    return counts


def speller(tokenizer: TextTokenizer) -> Callable[[str], str]:
    """A span → the pattern of it, as the tokenizer spells it; empty if it spells nothing."""

    def pattern(span: str) -> str:
        (text,) = tokenizer.decode(tokenizer.encode([span]))
        signs = [re.escape(sign) for sign in "".join(text.split()).casefold()]
        return r"(?<!\w)" + r"\s*".join(signs) + r"(?!\w)" if signs else ""

    return pattern


def windows_of(ids: list[int], size: int) -> list[list[int]]:
    """Cut a text into half overlapping windows of some tokens; whole where it is no longer."""
    if len(ids) <= size:
        return [ids]
    starts = [*range(0, len(ids) - size, max(1, size // 2)), len(ids) - size]
    return [ids[start : start + size] for start in starts]
