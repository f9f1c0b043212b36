"""Events of a decoding as plain data: the state after a step, and the result."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from difflib import SequenceMatcher
from itertools import groupby, zip_longest
from typing import Any

from unembed.decoding import DecodingStep
from unembed.decoding.strategy import Inversion
from unembed.evaluation.metrics import exact_match, token_accuracy, token_set_f1
from unembed.tokenizer import TextTokenizer

_WORD_STARTS = "▁Ġ"  # how vocabularies write that a word begins


class Speller:
    """Token ids as text, the vocabulary's signs for "joins" (##) and "starts a word" (▁, Ġ) kept.

    Args:
        tokenizer: Of the inverter.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self._spellings: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Spell one token; a byte-level vocabulary's is decoded, so that it can be read."""
        if token not in self._spellings:
            (name,), (text,) = (
                self.tokenizer.token_strings([token]),
                self.tokenizer.decode([[token]]),
            )
            start = name[:1] if name[:1] in _WORD_STARTS else ""
            self._spellings[token] = start + text if text else name
        return self._spellings[token]

    def all(self, text: str) -> list[str]:
        """The tokens of a text."""
        return [self(token) for token in self.tokenizer.encode([text])[0]]


def step_event(step: DecodingStep, row: int, speller: Speller, seconds: float) -> dict[str, Any]:
    """Describe one text after a denoiser pass, for an event.

    Args:
        step: The batch.
        row: Which text of it.
        speller: Of the model.
        seconds: Since decoding began.
    """
    event: dict[str, Any] = {
        "index": step.index,
        "total": step.total,
        "mask_ratio": round(float(step.mask_ratio[row]), 4),
        "milliseconds": round(1000 * seconds, 1),
        "tokens": _tokens(step, row, speller),
    }
    if step.cosines is not None:
        event["cosine"] = round(float(step.cosines[row]), 4)
    if step.encoder_calls is not None:
        event["encoder_calls"] = int(step.encoder_calls[row])
    return event


def _tokens(step: DecodingStep, row: int, speller: Speller) -> list[dict[str, Any]]:
    """A dictionary per position; what the denoiser would say where nothing is unmasked."""
    ids, states = speller.tokenizer, _states(step, row, speller.tokenizer)
    tokens, confidences = step.tokens[row].tolist(), step.confidences[row].tolist()
    if step.guesses is not None and step.guess_confidences is not None:
        guesses = step.guesses[row].tolist(), step.guess_confidences[row].tolist()
        for place, state in enumerate(states):
            if state == "masked":
                states[place] = "guessed"
                tokens[place], confidences[place] = guesses[0][place], guesses[1][place]
    changed = step.changed[row].tolist()
    return [
        {
            "text": "" if token in ids.special_ids else speller(token),
            "confidence": round(p, 4),
            "state": state,
            "changed": new,
        }
        for token, p, state, new in zip(tokens, confidences, states, changed, strict=True)
    ]


def _states(step: DecodingStep, row: int, ids: TextTokenizer) -> list[str]:
    states, ended = [], False
    for token in step.tokens[row].tolist():
        if token == ids.mask_id:
            states.append("masked")
        elif ended or token == ids.pad_id:
            states.append("padding")
        else:
            ended = token == ids.end_id
            states.append("end" if ended else "settled")
    return states


def is_news(step: DecodingStep, before: DecodingStep | None, row: int) -> bool:
    """Tell whether a step changed anything for a text: others of its batch may take longer."""
    if before is None or bool(step.changed[row].any()) or float(step.mask_ratio[row]) > 0:
        return True
    calls = step.encoder_calls, before.encoder_calls
    return calls[0] is not None and calls[1] is not None and bool(calls[0][row] != calls[1][row])


def figures(
    inversion: Inversion, original: str | None, cosine: float | None, speller: Speller
) -> dict[str, Any]:
    """A recovery, and how near it is to the original where that is known.

    Args:
        inversion: What came back.
        original: The text that was embedded; None where only a vector was given.
        cosine: Of the recovered text's embedding with the vector; None where nothing came back.
        speller: Of the model.
    """
    tokens = [
        {"text": speller(token), "confidence": round(confidence, 4)}
        for token, confidence in zip(inversion.token_ids, inversion.confidences, strict=True)
    ]
    metrics: dict[str, Any] = dict.fromkeys(
        ("alignment", "token_accuracy", "exact_match", "token_f1")
    )
    ids = [] if original is None else speller.tokenizer.encode([original])[0]
    if original is not None:
        aligned = align_words(original, inversion.text, speller.tokenizer)
        metrics["alignment"] = [
            {"kind": kind, "original": a, "recovered": b} for kind, a, b in aligned
        ]
    if ids:
        metrics["token_accuracy"] = token_accuracy(ids, inversion.token_ids)
        metrics["exact_match"] = exact_match(ids, inversion.token_ids) == 1.0
        metrics["token_f1"] = token_set_f1(ids, inversion.token_ids)
    return {
        "text": inversion.text,
        "tokens": tokens,
        **metrics,
        "cosine": None if cosine is None else round(cosine, 6),
        "passes": inversion.passes,
        "encoder_calls": inversion.encoder_calls,
    }


Aligned = tuple[str, str | None, str | None]  # kind, original, recovered


def align_words(original: str, recovered: str, tokenizer: TextTokenizer) -> list[Aligned]:
    """Align words: which came back, which are others, missing, or were not there.

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
    keys = _spell(ours + theirs, tokenizer)
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


def _spell(words: list[str], tokenizer: TextTokenizer) -> list[str]:
    spellings: Iterator[str] = iter(tokenizer.decode(tokenizer.encode(words)))
    return ["".join(next(spellings).split()).casefold() or word.casefold() for word in words]


def _kind(same: bool, original: str | None, recovered: str | None) -> str:
    if same:
        return "right"
    if recovered is None:
        return "missing"
    return "extra" if original is None else "wrong"
