"""Prepared pairs, memory-mapped: random rows across shards without loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.encode import TOKENIZER, file_digest, read_manifest, shard_names
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.tokenizer import TextTokenizer
from unembed.errors import DataError


@dataclass(frozen=True)
class Pairs:
    """(token ids, embedding) of N texts.

    Attributes:
        tokens: Arrays uint32 [N_s, L], one per shard.
        embeddings: Arrays float16 [N_s, D], one per shard.
        starts: First row of each shard, and N at the end.
        manifest: What `unembed prepare` recorded.
        tokenizer: The tokenizer of the token ids.
    """

    tokens: list[NDArray[np.uint32]]
    embeddings: list[NDArray[np.float16]]
    starts: NDArray[np.int64]
    manifest: dict[str, Any]
    tokenizer: TextTokenizer

    @classmethod
    def open(cls, folder: Path) -> Pairs:
        """Map a folder that `prepare_pairs` wrote; also one it is still writing.

        Raises:
            DataError: No manifest, or a shard is missing, damaged or of the wrong shape.
        """
        manifest = read_manifest(folder)
        length = manifest["pieces"]["length"]
        dimension = manifest["encoder"]["dimension"]
        tokens, embeddings = [], []
        for index, shard in enumerate(manifest["shards"]):
            rows = shard["pairs"]
            token_file, embedding_file = shard_names(index)
            tokens.append(_map(folder / token_file, (rows, length), np.uint32))
            embeddings.append(_map(folder / embedding_file, (rows, dimension), np.float16))
        if not tokens:
            raise DataError(f"pairs in {folder}", "no finished shard", "Run `unembed prepare`")
        starts = np.cumsum([0] + [len(array) for array in tokens], dtype=np.int64)
        special = {k: manifest["tokenizer"][k] for k in ("size", "mask_id", "pad_id", "end_id")}
        tokenizer = TextTokenizer.load(folder / TOKENIZER, special)
        if tokenizer.digest != manifest["tokenizer"]["digest"]:
            raise DataError(
                f"the tokenizer the pairs were made with in {folder / TOKENIZER}",
                "another one",
                "Prepare the pairs again into a new folder",
            )
        return cls(tokens, embeddings, starts, manifest, tokenizer)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @staticmethod
    def verify(folder: Path) -> None:
        """Compare every shard with the checksum written when it was made.

        Raises:
            DataError: A file is missing or its content has changed.
        """
        for shard in read_manifest(folder)["shards"]:
            for name, wanted in shard["sha256"].items():
                if not (folder / name).is_file() or file_digest(folder / name) != wanted:
                    raise DataError(
                        f"the content of {folder / name} as it was prepared",
                        "a missing file or another checksum",
                        "Prepare the pairs again into a new folder",
                    )

    @property
    def encoder(self) -> EncoderIdentity:
        """The encoder that made the embeddings."""
        return EncoderIdentity.from_dict(self.manifest["encoder"])

    def token_counts(self) -> NDArray[np.int64]:
        """How often each id of the vocabulary occurs in the target sequences, [V]."""
        counts = np.zeros(self.tokenizer.size, dtype=np.int64)
        for shard in self.tokens:
            counts += np.bincount(shard.ravel(), minlength=self.tokenizer.size)
        return counts

    def rows(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Token ids int64 [B, L] and unit embeddings float32 [B, D] of the given rows."""
        tokens = np.empty((len(indices), self.tokens[0].shape[1]), dtype=np.int64)
        embeddings = np.empty((len(indices), self.embeddings[0].shape[1]), dtype=np.float32)
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        for shard in np.unique(shards):
            chosen = shards == shard
            local = indices[chosen] - self.starts[shard]
            tokens[chosen] = self.tokens[shard][local]
            embeddings[chosen] = self.embeddings[shard][local]
        # float16 storage leaves the norm off by up to 1e-3
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-6)
        return tokens, embeddings


def _map(path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"an array at {path}", str(error), "Prepare the pairs again into a new folder"
        ) from error
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{np.dtype(dtype)} {shape} in {path}", f"{array.dtype} {array.shape}", "Prepare again"
        )
    return array
