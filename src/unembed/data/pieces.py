"""Passages → pieces: sentences, packed sentences, and cuts, each short enough for the denoiser."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tokenizers import Encoding

from unembed.config import DataSection
from unembed.encoders.base import is_unicode
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

Positions = tuple[list[int], list[int | None]]  # first character and word of each token


@dataclass(frozen=True)
class Piece:
    """A natural piece of text and its content tokens (5 to L-1 of them by default)."""

    text: str
    token_ids: list[int]


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
    for index, passage, encoding in _encoded(sections, tokenizer):
        draw = zlib.crc32(f"{settings.seed}:{index}".encode()) / 2**32
        packed = draw < settings.pack
        where = _positions(encoding, tokenizer)
        ends = sentence_ends(passage, settings)
        found = list(_spans(passage, ends, where, settings.length - 1, packed))
        if settings.windows > 1:
            for first in _window_starts(where, settings):
                found.extend(_spans(passage, ends, where, settings.length - 1, True, first))
            different = list(dict.fromkeys(found))
            dropped["repeated"] += len(found) - len(different)
            found = different
        spans.extend(found)
    # Tokens are taken from the piece itself, not sliced from the passage: the vector and the
    # tokens must speak of the same string, and a cut can change how its edges are tokenised.
    pieces = [Piece(*pair) for pair in zip(spans, tokenizer.encode(spans), strict=True)]
    kept = []
    for piece in pieces:
        if len(piece.token_ids) < settings.min_tokens:
            dropped["too_short"] += 1
        elif len(piece.token_ids) >= settings.length:
            dropped["too_long"] += 1
        else:
            kept.append(piece)
    return _that_decode_back(kept, tokenizer, dropped) if round_trip else kept


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


def _encoded(
    sections: Iterable[tuple[int, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[int, str, Encoding]]:
    """Add the tokens, a bounded number of characters at a time: they take a hundred times more."""
    together: list[tuple[int, str]] = []
    held = 0
    for index, section in sections:
        together.append((index, section))
        held += len(section)
        if held >= _TOGETHER:
            yield from _with_tokens(together, tokenizer)
            together, held = [], 0
    yield from _with_tokens(together, tokenizer)


def _with_tokens(
    sections: list[tuple[int, str]], tokenizer: TextTokenizer
) -> Iterator[tuple[int, str, Encoding]]:
    encodings = tokenizer.encodings([section for _, section in sections])
    for (index, section), encoding in zip(sections, encodings, strict=True):
        yield index, section, encoding


def sentence_ends(text: str, settings: DataSection) -> list[int]:
    """Where sentences end, as character offsets; the end of the text is the last."""
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


def _positions(encoding: Encoding, tokenizer: TextTokenizer) -> Positions:
    """First character and word of each token; of a token that is spelled, once for each part."""
    starts, words = [offset[0] for offset in encoding.offsets], encoding.word_ids
    if tokenizer.kept is None:
        return starts, words
    parts = tokenizer.spelled_lengths(encoding.ids)
    return (
        [start for start, count in zip(starts, parts, strict=True) for _ in range(count)],
        [word for word, count in zip(words, parts, strict=True) for _ in range(count)],
    )


def _window_starts(where: Positions, settings: DataSection) -> list[int]:
    """First tokens of the further windows: fractions of a piece's length into the passage."""
    (starts, words), most = where, settings.length - 1
    firsts = []
    for window in range(1, settings.windows):
        first = most * window // settings.windows
        if 0 < first < len(starts):
            first = _word_start(words, 0, first)
            while first > 0 and starts[first] == starts[first - 1]:
                first -= 1
            firsts.append(first)
    return [first for first in dict.fromkeys(firsts) if first > 0]


def _spans(
    passage: str, ends: list[int], where: Positions, most: int, packed: bool, first: int = 0
) -> Iterator[str]:
    """Stripped substrings of at most ``most`` tokens that stop at the ``ends`` where possible.

    They follow each other from the token ``first``.
    """
    starts, words = where
    start, token = starts[first] if first else 0, first
    total = len(starts)
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
