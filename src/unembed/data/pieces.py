"""Passages → pieces: sentences, packed sentences, and cuts, each short enough for the denoiser."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from unembed.config import DataSection
from unembed.encoders.tokenizer import TextTokenizer

# An end mark, closing quotes or brackets after it, then white space; CJK marks need none.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*\s+|[。！？]+[」』”’）]*\s*|\n+")


@dataclass(frozen=True)
class Piece:
    """A natural piece of text and its content tokens (5 to L-1 of them by default)."""

    text: str
    token_ids: list[int]


def cut_pieces(
    passages: Sequence[str], tokenizer: TextTokenizer, settings: DataSection, first_index: int = 0
) -> list[Piece]:
    """Cut passages into pieces of ``min_tokens`` to ``length - 1`` tokens.

    Deterministic: the choice between single and packed sentences depends on the seed and the
    passage's index alone, so a resumed run cuts the same pieces.

    Args:
        passages: Source texts.
        tokenizer: The denoiser's tokenizer.
        settings: Lengths, share of packing and seed.
        first_index: Index of the first passage in its source.
    """
    spans: list[str] = []
    for index, (passage, encoding) in enumerate(
        zip(passages, tokenizer.encodings(passages), strict=True), start=first_index
    ):
        draw = zlib.crc32(f"{settings.seed}:{index}".encode()) / 2**32
        packed = draw < settings.pack
        spans.extend(_spans(passage, encoding, settings.length - 1, packed))
    # Tokens are taken from the piece itself, not sliced from the passage: the vector and the
    # tokens must speak of the same string, and a cut can change how its edges are tokenised.
    pieces = zip(spans, tokenizer.encode(spans), strict=True)
    fits = range(settings.min_tokens, settings.length)
    return [Piece(text, ids) for text, ids in pieces if len(ids) in fits]


def _spans(passage: str, encoding: Encoding, most: int, packed: bool) -> Iterator[str]:
    """Stripped substrings of at most ``most`` tokens that end at sentence ends where possible."""
    starts = [offset[0] for offset in encoding.offsets]
    words = encoding.word_ids
    start, token = 0, 0
    total = len(starts)
    ends = [match.end() for match in _SENTENCE_END.finditer(passage)] + [len(passage)]
    end_tokens = _tokens_before(starts, ends)
    position = 0
    while token < total:
        while end_tokens[position] <= token:
            position += 1
        stop = end_tokens[position]
        if stop - token <= most:
            while packed and position + 1 < len(ends) and end_tokens[position + 1] - token <= most:
                position += 1
            stop = end_tokens[position]
        else:
            stop = _word_start(words, token, token + most)
            while stop > token + 1 and starts[stop] == starts[stop - 1]:
                stop -= 1  # a byte-level token inside a character
        stop_char = starts[stop] if stop < total else len(passage)
        span = passage[start:stop_char].strip()
        if span:
            yield span
        start, token = stop_char, stop


def _tokens_before(starts: list[int], ends: list[int]) -> list[int]:
    """For each character offset, how many tokens start before it."""
    counts, token = [], 0
    for end in ends:
        while token < len(starts) and starts[token] < end:
            token += 1
        counts.append(token)
    return counts


def _word_start(words: list[int | None], first: int, stop: int) -> int:
    """The last token in (first, stop] that starts a word; ``stop`` when a word fills the span."""
    for candidate in range(stop, first, -1):
        if candidate >= len(words) or words[candidate] != words[candidate - 1]:
            return candidate
    return stop
