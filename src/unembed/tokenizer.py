"""Token ids of the target sequence: content, one end token, padding; and the mask token."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers

from unembed.errors import CheckpointError, EncoderError
from unembed.files import read_bounded

_MOST_BYTES = 128 << 20  # of a tokenizer.json
_LONGEST_TOKEN = 4096
_MOST_IDS = 1 << 22
_MOST_GROWTH = 16.0
_SPECIAL = 3  # special tokens
_SPACE_SIGN = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True)
class TextTokenizer:
    """A fast tokenizer and the three special ids the diffusion needs.

    Ids above the backend's highest, up to ``size``, are ours: special tokens the encoder's own
    vocabulary lacks.

    Attributes:
        definition: The tokenizer as JSON, which is what is saved and what the digest is taken of.
        size: Vocabulary size V, our additions included.
        mask_id: Stands at every position not yet decided.
        pad_id: Fills the positions after the end.
        end_id: Ends the text.
        source_ids: Of a trimmed vocabulary: the backend's id of each of our ids, ascending. A token
            that is not among them is spelled with shorter ones that are.
    """

    definition: str
    size: int
    mask_id: int
    pad_id: int
    end_id: int
    source_ids: tuple[int, ...] | None = None

    @classmethod
    def from_backend(
        cls, backend: Tokenizer, mask_id: int | None, pad_id: int | None, end_id: int | None
    ) -> TextTokenizer:
        """Wrap a fast tokenizer; special ids it does not have are appended to its vocabulary."""
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        ids = []
        for special in (mask_id, pad_id, end_id):
            ids.append(size if special is None else special)
            size += special is None
        if len(set(ids)) != len(ids):
            # Some models pad with their end token; the denoiser needs to tell the two apart.
            ids[1] = size
            size += 1
        return cls(backend.to_str(), size, ids[0], ids[1], ids[2])

    @cached_property
    def backend(self) -> Tokenizer:
        """The Rust tokenizer, without padding or truncation."""
        backend: Tokenizer = Tokenizer.from_str(self.definition)
        return backend

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that never stand for text."""
        return frozenset((self.mask_id, self.pad_id, self.end_id))

    @cached_property
    def carries_spaces(self) -> bool:
        """True if tokens cover the white space before them: byte-level BPE, Metaspace, Unigram."""
        text = "a b c"
        (encoding,) = self.encodings([text])
        return any(text[start:stop].startswith(" ") for start, stop in encoding.offsets)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tokenizer's definition and our ids."""
        ids = f"{self.size},{self.mask_id},{self.pad_id},{self.end_id}"
        if self.source_ids is not None:
            ids += f",{ranges_of(self.source_ids)}"
        return hashlib.sha256((self.definition + ids).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Content ids of each text, without special tokens."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        contents = [encoding.ids for encoding in encodings]  # the fast way works out no offsets
        if self.source_ids is None:
            return contents
        spelling = self._spelling
        return [[ours for token in ids for ours in spelling[token]] for ids in contents]

    def spelled_lengths(self, ids: Sequence[int]) -> list[int]:
        """Count the trimmed vocabulary's tokens that each of the backend's ids becomes."""
        spelling = self._spelling
        return [len(spelling[token]) for token in ids]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """The backend's own ids (not those of a trimmed vocabulary) with character offsets."""
        result: list[Encoding] = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return result

    def pack(self, contents: Iterable[Sequence[int]], length: int) -> NDArray[np.uint32]:
        """Target sequences [N, L]: content, end token, padding.

        Contents longer than ``length - 1`` are an error of the caller.
        """
        contents = list(contents)
        rows = np.full((len(contents), length), self.pad_id, dtype=np.uint32)
        for row, ids in zip(rows, contents, strict=True):
            assert len(ids) < length, "content must leave room for the end token"
            row[: len(ids)] = ids
            row[len(ids)] = self.end_id
        return rows

    def content_positions(self, ids: Sequence[int]) -> list[int]:
        """Positions before the first end token that hold text."""
        stop = ids.index(self.end_id) if self.end_id in ids else len(ids)
        return [i for i in range(stop) if ids[i] not in self.special_ids]

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Text of each target sequence, up to its end token."""
        contents = []
        for row in rows:
            ids = [int(token) for token in row]
            contents.append([ids[i] for i in self.content_positions(ids)])
        return self._text_of(contents)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The characters that each token adds to the decoded text, spaces included.

        A token that ends inside a character adds nothing; the one that completes it adds it.
        """
        pieces, before = [], ""
        for decoded in self.decode([ids[: stop + 1] for stop in range(len(ids))]):
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

    def _text_of(self, contents: Sequence[list[int]]) -> list[str]:
        if self.source_ids is not None:
            contents = [[self.source_ids[token] for token in ids] for ids in contents]
        texts: list[str] = self.backend.decode_batch(contents, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def decodes_back(self, texts: Sequence[str], contents: Sequence[list[int]]) -> list[bool]:
        """Tell whether each text's tokens stand for that text and no other.

        Decoded and tokenised again they must be the same ids, and the decoded text must be the
        text up to the tokenizer's normalisation and white space. It is not where there is an
        unknown token, a special token spelled out in the text, or half a character.

        Args:
            texts: Some texts.
            contents: What ``encode`` made of them.
        """
        decoded = self._text_of(contents)
        # A text that comes back as it was needs no second look, and its tokens no second making
        odd = [row for row, text in enumerate(texts) if decoded[row] != text]
        good = [self.special_ids.isdisjoint(ids) for ids in contents]
        for row, again in zip(odd, self.encode([decoded[row] for row in odd]), strict=True):
            same = again == contents[row] and self._same_text(texts[row], decoded[row])
            good[row] = good[row] and same
        return good

    def _same_text(self, one: str, other: str) -> bool:
        """Tell whether two texts differ only in what normalisation and white space make of them."""
        plain = ("".join(text.lower().split()) for text in (one, other))
        return next(plain) == next(plain) or self._normal_form(one) == self._normal_form(other)

    def _normal_form(self, text: str) -> str:
        normalizer = self.backend.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return "".join(normal.replace(_SPACE_SIGN, " ").split())

    def trim(self, token_ids: Sequence[int]) -> TextTokenizer:
        """The same tokenizer with a smaller vocabulary.

        Args:
            token_ids: Ids to keep; the three special ones are kept in any case.
        """
        assert self.source_ids is None, "a vocabulary is trimmed once"
        ids = tuple(sorted({*token_ids, *self.special_ids}))
        ours = {token: index for index, token in enumerate(ids)}
        mask_id, pad_id, end_id = (ours[i] for i in (self.mask_id, self.pad_id, self.end_id))
        return TextTokenizer(self.definition, len(ids), mask_id, pad_id, end_id, ids)

    def rows_of(self, words: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows of an encoder's word embeddings [V', H'] that belong to our ids, in our order.

        Special ids beyond V' come last and have none.
        """
        if self.source_ids is None:
            return words
        return words[[token for token in self.source_ids if token < len(words)]]

    @cached_property
    def _spelling(self) -> _Spelling:
        assert self.source_ids is not None
        return _Spelling(self.backend, self.definition, self.source_ids)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for displays."""
        names = {self.mask_id: "[MASK]", self.pad_id: "[PAD]", self.end_id: "[END]"}

        def spell(token: int) -> str:
            if self.source_ids is not None and token < len(self.source_ids):
                token = self.source_ids[token]
            return self.backend.id_to_token(token) or "�"

        return [names.get(int(i)) or spell(int(i)) for i in ids]

    def ids_to_dict(self) -> dict[str, Any]:
        """The sizes and ids that the tokenizer's own file does not hold."""
        ids: dict[str, Any] = {
            "size": self.size,
            "mask_id": self.mask_id,
            "pad_id": self.pad_id,
            "end_id": self.end_id,
        }
        return ids if self.source_ids is None else {**ids, "kept": ranges_of(self.source_ids)}

    def save(self, path: Path) -> None:
        """Write the tokenizer's definition (``tokenizer.json``)."""
        path.write_text(self.definition, encoding="utf-8")

    @classmethod
    def load(cls, path: Path, ids: dict[str, Any]) -> TextTokenizer:
        """Read what ``save`` and ``ids_to_dict`` wrote.

        Raises:
            CheckpointError: The file is missing or is not a tokenizer.
        """
        try:
            numbers = {name: value for name, value in ids.items() if name != "kept"}
            source_ids = ids_of(ids["kept"]) if "kept" in ids else None
            definition = read_bounded(path, _MOST_BYTES).decode("utf-8")
            require_bounded_growth(definition)
            tokenizer = cls(definition, **numbers, source_ids=source_ids)
            longest = max(map(len, tokenizer.backend.get_vocab()), default=0)
            if longest > _LONGEST_TOKEN:
                raise ValueError(f"a token of {longest} characters")
            largest = max(tokenizer.backend.get_vocab().values(), default=-1)
            used = range(tokenizer.size) if source_ids is None else source_ids
            missing = sum(i > largest for i in used) - _SPECIAL  # which may have been appended
            if missing > 0:
                raise ValueError(f"{largest + 1} tokens, {missing} fewer than config.json has")
            if source_ids is not None and len(source_ids) != tokenizer.size:
                raise ValueError(f"{len(source_ids)} tokens kept of {tokenizer.size}")
            for name in ("mask_id", "pad_id", "end_id"):
                if getattr(tokenizer, name) not in range(tokenizer.size):
                    problem = f"{name} {getattr(tokenizer, name)!r} in {tokenizer.size} tokens"
                    raise ValueError(problem)
            if len(tokenizer.special_ids) < _SPECIAL:
                raise ValueError("one id for two of mask, padding and end")
            return tokenizer
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(
                f"a tokenizer in {path}",
                " ".join(str(error).split())[:300] or type(error).__name__,
                "Copy the folder again",
            ) from error


class _Spelling(dict[int, tuple[int, ...]]):
    """The backend's id → our ids: itself where it is kept, else shorter tokens, found when asked.

    A byte-level vocabulary spells anything. Another may lack a character: the unknown token then
    stands for it, or nothing where there is none, and `decodes_back` finds such a text.
    """

    def __init__(self, backend: Tokenizer, definition: str, source_ids: Sequence[int]) -> None:
        super().__init__({token: (ours,) for ours, token in enumerate(source_ids)})
        model = json.loads(definition)["model"]
        self._backend = backend
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._ours = {backend.id_to_token(token): ours for ours, token in enumerate(source_ids)}
        unknown = model.get("unk_token")
        if isinstance(model.get("unk_id"), int):
            unknown = backend.id_to_token(model["unk_id"])
        self._unknown = (self._ours[unknown],) if unknown in self._ours else ()

    def __missing__(self, token: int) -> tuple[int, ...]:
        name = self._backend.id_to_token(token) or ""
        ids, inside = [], bool(self._prefix) and name.startswith(self._prefix)
        name = name.removeprefix(self._prefix) if inside else name
        while name:
            match = self._longest(name, self._prefix if inside else "")
            if match is None:
                ids, name = list(self._unknown), ""
            else:
                ids.extend(match[0])
                name, inside = name[match[1] :], True
        self[token] = tuple(ids)
        return self[token]

    def _longest(self, name: str, prefix: str) -> tuple[list[int], int] | None:
        """Our ids for the longest start of a name that can be written, and its characters."""
        for stop in range(len(name), 0, -1):
            ours = self._ours.get(prefix + name[:stop])
            if ours is not None:
                return [ours], stop
        signs = [self._ours.get(f"<0x{byte:02X}>") for byte in name[0].encode("utf-8")]
        byte_values = [sign for sign in signs if sign is not None]
        return (byte_values, 1) if len(byte_values) == len(signs) else None


def ranges_of(ids: Sequence[int]) -> str:
    """Ascending numbers as text, runs shortened: ``0-255 300 305-310``."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def ids_of(ranges: str) -> tuple[int, ...]:
    """The numbers that ``ranges_of`` wrote.

    Raises:
        ValueError: They are none, or millions.
    """
    ids: list[int] = []
    for run in ranges.split():
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first) + 1
        if len(ids) + stop - start > _MOST_IDS or stop > _MOST_IDS:
            raise ValueError(f"tokens {run}, more than there are")
        ids.extend(range(start, stop))
    return tuple(ids)


def require_bounded_growth(definition: str) -> None:
    """Refuse a tokenizer whose steps, one after another, make a text many times longer.

    Raises:
        ValueError: They do, or it is no JSON.
    """
    try:
        data = json.loads(definition)
        growth = max(_growth(data.get("normalizer")), _growth(data.get("decoder")))
    except (RecursionError, AttributeError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: no tokenizer") from error
    if growth > _MOST_GROWTH:
        raise ValueError("a normalizer or decoder that makes texts many times longer")


def _growth(step: Any) -> float:
    """How much longer a step of a tokenizer can make a text, at most."""
    if not isinstance(step, dict):
        return 1.0
    parts = [*(step.get("decoders") or ()), *(step.get("normalizers") or ())]
    growth = math.prod(map(_growth, parts), start=1.0)
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String") or " "  # a regular expression may match a letter
        growth *= max(1.0, len(step["content"]) / len(pattern))
    return growth


def from_transformers(tokenizer: Any) -> TextTokenizer:
    """The fast tokenizer inside a Hugging Face one, with its special ids.

    Raises:
        EncoderError: The model has only a slow (pure Python) tokenizer.
    """
    if isinstance(tokenizer, Tokenizer):  # that of a StaticEmbedding, without special tokens
        return TextTokenizer.from_backend(tokenizer, None, None, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderError(
            "an encoder with a fast tokenizer (tokenizer.json)",
            type(tokenizer).__name__,
            "Convert the tokenizer to the fast format first",
        )
    end_id = (
        tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    )
    return TextTokenizer.from_backend(
        backend, tokenizer.mask_token_id, tokenizer.pad_token_id, end_id
    )


def load_tokenizer(name: str) -> TextTokenizer:
    """A tokenizer apart from any encoder.

    Args:
        name: Local folder or Hub repository that `transformers` loads a fast tokenizer from.

    Raises:
        EncoderError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)  # type: ignore[no-untyped-call, unused-ignore]
    except Exception as error:  # whatever files and network can make the library raise
        raise EncoderError(
            f"a tokenizer in a local folder or on the Hugging Face Hub: {name}",
            " ".join(str(error).split())[:300] or type(error).__name__,
            "Correct data.vocabulary.tokenizer",
        ) from error
    return from_transformers(tokenizer)


def word_tokenizer(words: Sequence[str]) -> TextTokenizer:
    """A lower-casing tokenizer over a fixed list of words, for tests and dry runs."""
    vocabulary = {"[UNK]": 0, **{word: index for index, word in enumerate(words, start=1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    return TextTokenizer.from_backend(backend, None, None, None)
