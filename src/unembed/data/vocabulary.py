"""Which tokens a corpus needs: counting them, and choosing those to keep."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.tokenizer import TextTokenizer

_BATCH = 4096
_SPACE_SIGNS = "\u2581\u0120\u010a"  # SentencePiece's space; byte-level's space and line end


def count_tokens(
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    settings: DataSection,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int64]:
    """How often each id occurs in the pieces of some passages, [V].

    Args:
        texts: Passages, read once and never held together.
        tokenizer: With its whole vocabulary.
        settings: How passages become pieces.
        limit: Read no further than the batch that reaches this many pieces.
        progress: Called after each batch with the passages read and the pieces counted.
    """
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    first, counted, iterator = 0, 0, iter(texts)
    for batch in _batches(iterator):
        # Whether pieces decode back takes as long to find out as the rest, and hardly counts
        pieces = cut_pieces(batch, tokenizer, settings, first, round_trip=False)
        ids = [token for piece in pieces for token in piece.token_ids]
        counts += np.bincount(ids, minlength=tokenizer.size)
        first, counted = first + len(batch), counted + len(pieces)
        if progress is not None:
            progress(first, counted)
        if limit is not None and counted >= limit:
            break
    return counts


def choose_tokens(
    tokenizer: TextTokenizer, counts: NDArray[np.int64], min_count: int
) -> tuple[int, ...]:
    """The ids to keep: frequent tokens, and what is needed to spell the others.

    Single characters are kept when they are ASCII or occur in a token that was seen; single bytes
    (of byte-level vocabularies and of byte fallback) always; and the unknown token.

    Args:
        tokenizer: With its whole vocabulary.
        counts: Of its ids, [V].
        min_count: Occurrences from which a token is kept.
    """
    model = json.loads(tokenizer.definition)["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    names = {token: name for name, token in vocabulary.items()}
    occurring = np.flatnonzero(counts)
    letters = set(string.printable) | set(_SPACE_SIGNS)
    letters.update(*(names.get(int(token), "") for token in occurring))
    if "ByteLevel" in tokenizer.definition:
        letters.update(pre_tokenizers.ByteLevel.alphabet())
    tokens = {int(token) for token in occurring if counts[token] >= min_count}
    for name, token in vocabulary.items():
        bare = name.removeprefix(prefix)
        if bare in letters or _is_byte(name):
            tokens.add(token)
    unknown = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))
    if isinstance(unknown, int):
        tokens.add(unknown)
    return tuple(sorted({*tokens, *tokenizer.special_ids}))


def _is_byte(name: str) -> bool:
    return len(name) == len("<0x00>") and name.startswith("<0x") and name.endswith(">")


def _batches(iterator: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(iterator, _BATCH)):
        yield batch
