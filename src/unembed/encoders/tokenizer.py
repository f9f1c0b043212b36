"""Token ids of the target sequence: content, one end token, padding; and the mask token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers

from unembed.errors import CheckpointError, EncoderError


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
    """

    definition: str
    size: int
    mask_id: int
    pad_id: int
    end_id: int

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
        for given in (mask_id, pad_id, end_id):
            ids.append(size if given is None else given)
            size += given is None
        if len(set(ids)) != len(ids):
            # Some models pad with their end token; the denoiser needs to tell the two apart.
            ids[1] = size
            size += 1
        return cls(backend.to_str(), size, *ids)

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
    def digest(self) -> str:
        """SHA-256 over the tokenizer's definition and our ids."""
        ids = f"{self.size},{self.mask_id},{self.pad_id},{self.end_id}"
        return hashlib.sha256((self.definition + ids).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Content ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.encodings(texts)]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Content ids with their character offsets."""
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
        texts: list[str] = self.backend.decode_batch(contents, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id, for displays."""
        names = {self.mask_id: "[MASK]", self.pad_id: "[PAD]", self.end_id: "[END]"}
        return [names.get(int(i)) or self.backend.id_to_token(int(i)) or "�" for i in ids]

    def ids_to_dict(self) -> dict[str, int]:
        """The sizes and ids that the tokenizer's own file does not hold."""
        return {
            "size": self.size,
            "mask_id": self.mask_id,
            "pad_id": self.pad_id,
            "end_id": self.end_id,
        }

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
            tokenizer = cls(path.read_text(encoding="utf-8"), **ids)
            _ = tokenizer.backend  # builds it
            return tokenizer
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(
                f"a tokenizer in {path}", str(error).splitlines()[0], "Copy the folder again"
            ) from error


def from_transformers(tokenizer: Any) -> TextTokenizer:
    """The fast tokenizer inside a Hugging Face one, with its special ids.

    Raises:
        EncoderError: The model has only a slow (pure Python) tokenizer.
    """
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


def word_tokenizer(words: Sequence[str]) -> TextTokenizer:
    """A lower-casing tokenizer over a fixed list of words, for tests and dry runs."""
    vocabulary = {"[UNK]": 0, **{word: index for index, word in enumerate(words, start=1)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    return TextTokenizer.from_backend(backend, None, None, None)
