"""Passages → pieces, sentences or cuts short enough for the denoiser; or chunks, as of stores."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Encoding

from unembed.config import DataSection
from unembed.encoders.base import is_unicode
from unembed.errors import DataError
from unembed.tokenizer import TextTokenizer

# An end mark (Latin, Arabic, Urdu, Indic, Armenian, Ethiopic), closing quotes or brackets
# after it, then white space; CJK marks need none.
SENTENCE_END = re.compile(
    r"[.!?…\u061f\u06d4\u0964\u0965\u0589\u1362]+[\"'”’)\]]*\s+"
    r"|[。！？]+[」』”’）]*\s*|\n+"
)
_LINE = re.compile(r"[^\n]+\n*|\n+")
_SECTION = 1 << 18  # characters of a passage tokenised at once
_TOGETHER = 1 << 20  # characters of all passages whose tokens are in memory at once

# Scripts that put no space between words: ideographs and kana
_UNSPACED = re.compile(
    "[\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
SHORTEST, LONGEST = 24, 190  # words of a chunk: about 32 and 256 tokens
_BUCKETS = (24, 48, 96)  # words from which on chunks are drawn in equal shares
CUTTER = 2  # version of the cuts; 1 ended pieces a token late where tokens carry the space before


@dataclass(frozen=True)
class Piece:
    """A natural piece of text and its content tokens (5 to L-1 of them by default)."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class _Layout:
    """Offsets of the tokens of a passage; of a token that is spelled, once for each part.

    Attributes:
        starts: First visible character of each token: behind the space that it may carry.
        stops: Character behind each token.
        words: Whether a word starts with the token, so that a long sentence may be cut before it.
    """

    starts: list[int]
    stops: list[int]
    words: list[bool]


def is_outdated(manifest: Mapping[str, Any], tokenizer: TextTokenizer) -> bool:
    """Tell whether pairs were cut by an older version that this tokenizer led astray."""
    return tokenizer.carries_spaces and manifest.get("cutter", 1) < CUTTER


def cut_pieces(
    passages: Sequence[str],
    tokenizer: TextTokenizer,
    settings: DataSection,
    first_index: int = 0,
    *,
    dropped: Counter[str] | None = None,
    round_trip: bool = True,
) -> list[Piece]:
    """Cut passages into pieces of ``min_tokens`` to ``length - 1`` tokens.

    Deterministic: the choice between single and packed sentences depends on the seed and the
    passage's index alone, so a resumed run cuts the same pieces.

    Args:
        passages: Source texts.
        tokenizer: The denoiser's tokenizer.
        settings: Lengths, share of packing, windows and seed.
        first_index: Index of the first passage in its source.
        dropped: Counts the pieces left out, by reason: ``too_short``, ``too_long``, ``repeated``
            (another window of the passage yields it too), ``not_round_trip``; and passages, as
            ``empty`` or ``invalid_utf8`` (half a surrogate pair).
        round_trip: Leave out pieces whose tokens do not decode back to their text.
    """
    dropped = Counter() if dropped is None else dropped
    spans: list[str] = []
    sections = _sections(passages, first_index, dropped)
    for index, passage, encoding in _encode(sections, tokenizer):
        draw = zlib.crc32(f"{settings.seed}:{index}".encode()) / 2**32
        packed = draw < settings.pack
        layout = _layout(passage, encoding, tokenizer)
        ends = sentence_ends(passage, settings)
        cuts = list(_spans(passage, ends, layout, settings.length - 1, packed))
        if settings.windows > 1:
            for first in _window_starts(layout, settings):
                cuts.extend(_spans(passage, ends, layout, settings.length - 1, True, first))
            different = list(dict.fromkeys(cuts))
            dropped["repeated"] += len(cuts) - len(different)
            cuts = different
        spans.extend(cuts)
    # Tokens are taken from the piece itself, not sliced from the passage: the vector and the
    # tokens must speak of the same string, and a cut can change how its edges are tokenised.
    pieces = [Piece(*pair) for pair in zip(spans, tokenizer.encode(spans), strict=True)]
    fitting = []
    for piece in pieces:
        if len(piece.token_ids) < settings.min_tokens:
            dropped["too_short"] += 1
        elif len(piece.token_ids) >= settings.length:
            dropped["too_long"] += 1
        else:
            fitting.append(piece)
    return _that_decode_back(fitting, tokenizer, dropped) if round_trip else fitting


def _sections(
    passages: Iterable[str], first_index: int, dropped: Counter[str]
) -> Iterator[tuple[int, str]]:
    """Passages with their index, those left out that hold no text; enormous ones in stretches."""
    for index, passage in enumerate(passages, start=first_index):
        if not is_unicode(passage):
            dropped["invalid_utf8"] += 1
        elif not passage.strip():
            dropped["empty"] += 1
        else:
            for section in _stretches(passage):
                yield index, section


def _stretches(passage: str) -> Iterator[str]:
    """Cut after a space where there is one."""
    start = 0
    while len(passage) - start > _SECTION:
        stop = start + _SECTION
        stop = max(passage.rfind(sign, start, stop) for sign in " \n") + 1 or stop
        yield passage[start:stop]
        start = stop
    yield passage[start:]


def _encode(
    sections: Iterable[tuple[int, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[int, str, Encoding]]:
    """Add the tokens, a bounded number of characters at a time: they take a hundred times more."""
    together: list[tuple[int, str]] = []
    chars = 0
    for index, section in sections:
        together.append((index, section))
        chars += len(section)
        if chars >= _TOGETHER:
            yield from _with_tokens(together, tokenizer)
            together, chars = [], 0
    yield from _with_tokens(together, tokenizer)


def _with_tokens(
    sections: list[tuple[int, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[int, str, Encoding]]:
    encodings = tokenizer.encodings([section for _, section in sections])
    for (index, section), encoding in zip(sections, encodings, strict=True):
        yield index, section, encoding


def sentence_ends(text: str, settings: DataSection) -> list[int]:
    """Find the character offsets where sentences end; the end of the text is the last."""
    if settings.segmenter == "regex":
        return [match.end() for match in SENTENCE_END.finditer(text)] + [len(text)]
    from sentencex import segment

    ends, end = [], 0
    for line in _LINE.findall(text):  # it takes the lines of a paragraph together
        for sentence in segment(settings.language, line):
            end += len(sentence)
            ends.append(end)
    return [*ends, len(text)]


def _that_decode_back(
    pieces: list[Piece], tokenizer: TextTokenizer, dropped: Counter[str]
) -> list[Piece]:
    good = tokenizer.decodes_back([p.text for p in pieces], [p.token_ids for p in pieces])
    dropped["not_round_trip"] += len(pieces) - sum(good)
    return [piece for piece, fine in zip(pieces, good, strict=True) if fine]


def _layout(passage: str, encoding: Encoding, tokenizer: TextTokenizer) -> _Layout:
    """Find what is visible of each token, and which tokens start a word.

    Tokenizers that leave spaces out say themselves which tokens make a word. Of the others some
    have one word for a whole text (Gemma 3), some one for each digit (Qwen3): there a word starts
    after white space, or beside a character of a script that has none.
    """
    offsets = encoding.offsets
    starts = [_visible(passage, start, stop) for start, stop in offsets]
    if tokenizer.carries_spaces:
        words = [True, *(a != b and _starts_word(passage, b) for a, b in pairwise(starts))]
    else:
        numbers = encoding.word_ids
        words = [True, *(one != other for one, other in pairwise(numbers))]
    stops = [stop for _, stop in offsets]
    if tokenizer.source_ids is None:
        return _Layout(starts, stops, words)
    parts = tokenizer.spelled_lengths(encoding.ids)
    copies = [index for index, count in enumerate(parts) for _ in range(count)]
    inside = [one == other for one, other in pairwise([None, *copies])]
    return _Layout(
        [starts[index] for index in copies],
        [stops[index] for index in copies],
        [words[index] and not part for index, part in zip(copies, inside, strict=True)],
    )


def _visible(passage: str, start: int, stop: int) -> int:
    """First character of a token that is no white space; its first where all are."""
    if not passage[start : start + 1].isspace():
        return start
    text = passage[start:stop]
    return start + len(text) - len(text.lstrip() or text)


def _starts_word(passage: str, start: int) -> bool:
    before, after = passage[start - 1 : start], passage[start : start + 1]
    if before.isspace() or after.isspace():
        return True
    return after.isalnum() and _UNSPACED.search(before + after) is not None


def _window_starts(layout: _Layout, settings: DataSection) -> list[int]:
    """First tokens of the further windows: fractions of a piece's length into the passage."""
    starts, most = layout.starts, settings.length - 1
    firsts = []
    for window in range(1, settings.windows):
        first = most * window // settings.windows
        if 0 < first < len(starts):
            first = _word_start(layout.words, 0, first)
            if first < len(starts) and not layout.words[first]:
                continue  # one word fills the window
            while first > 0 and starts[first] == starts[first - 1]:
                first -= 1
            firsts.append(first)
    return [first for first in dict.fromkeys(firsts) if first > 0]


def _spans(
    passage: str, ends: list[int], layout: _Layout, most: int, packed: bool, first: int = 0
) -> Iterator[str]:
    """Stripped substrings of at most ``most`` tokens that stop at the ``ends`` where possible.

    They follow each other from the token ``first``.
    """
    starts, total = layout.starts, len(layout.starts)
    start, token = starts[first] if first else 0, first
    counts = _tokens_before(starts, ends)
    position = 0
    while token < total and starts[token] < len(passage):  # the rest would be white space
        while ends[position] <= max(start, starts[token]):
            position += 1
        if counts[position] - token <= most:
            while packed and position + 1 < len(ends) and counts[position + 1] - token <= most:
                position += 1
            stop = counts[position]
            stop_char = starts[stop] if stop < total else len(passage)
            if passage[ends[position] : layout.stops[stop - 1]].strip():
                # The sentence ends inside a token: the next piece starts with the rest of it
                stop, stop_char = stop - 1, ends[position]
        else:
            stop = _word_start(layout.words, token, token + most)
            while stop > token + 1 and starts[stop] == starts[stop - 1]:
                stop -= 1  # a byte-level token inside a character
            stop_char = starts[stop] if stop < total else len(passage)
        span = passage[start:stop_char].strip()
        if span:
            yield span
        start, token = stop_char, stop


def _tokens_before(starts: list[int], ends: list[int]) -> list[int]:
    """Count the tokens that start before each character offset."""
    counts, token = [], 0
    for end in ends:
        while token < len(starts) and starts[token] < end:
            token += 1
        counts.append(token)
    return counts


def _word_start(words: list[bool], first: int, stop: int) -> int:
    """The last token in (first, stop] that starts a word; ``stop`` when a word fills the span."""
    for candidate in range(stop, first, -1):
        if candidate >= len(words) or words[candidate]:
            return candidate
    return stop


def chunks_of(passages: Sequence[str], limit: int, seed: int) -> list[str]:
    """Draw chunks of 24 to 190 words from passages, as many short as middling and long ones.

    Args:
        passages: Raw texts.
        limit: Chunks at most; longer passages are cut, shorter left out.
        seed: Of the draw.

    Raises:
        DataError: No passage is long enough.
    """
    buckets: list[list[str]] = [[] for _ in _BUCKETS]
    for passage in passages:
        words = passage.split()
        for start in range(0, len(words), LONGEST):
            chunk = words[start : start + LONGEST]
            if len(chunk) >= SHORTEST:
                length = sum(len(chunk) >= least for least in _BUCKETS) - 1
                buckets[length].append(passage if len(chunk) == len(words) else " ".join(chunk))
    rng = np.random.default_rng(seed)
    chunks: list[str] = []
    for place, bucket in enumerate(sorted(buckets, key=len)):  # what one lacks, others may give
        count = min(len(bucket), (limit - len(chunks)) // (len(buckets) - place))
        chunks += [bucket[i] for i in rng.permutation(len(bucket))[:count].tolist()]
    if not chunks:
        raise DataError(
            f"passages of at least {SHORTEST} words", "none", "Use longer texts, such as chunks"
        )
    return [chunks[i] for i in rng.permutation(len(chunks)).tolist()]
