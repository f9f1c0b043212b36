"""Prepared pairs, memory-mapped: random rows across shards without loading them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.manifest import TOKENIZER, damaged_shards, read_manifest, shard_names
from unembed.data.pieces import is_outdated
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint
from unembed.encoders.vectors import VectorStatistics
from unembed.errors import DataError
from unembed.tokenizer import TextTokenizer

_DESCRIBED = 4096  # pairs whose embeddings the statistics of the encoder's vectors come from


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
    def open(cls, folder: Path, shards: int | None = None) -> Pairs:
        """Map a folder that `prepare_pairs` wrote; also one it is still writing.

        Args:
            folder: Of the pairs.
            shards: Only the first so many; all there are when not given.

        Raises:
            DataError: No manifest, or a shard is missing, damaged or of the wrong shape.
        """
        manifest = read_manifest(folder)
        manifest = {**manifest, "shards": manifest["shards"][:shards]}
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
        special = {k: value for k, value in manifest["tokenizer"].items() if k != "digest"}
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
        damaged = damaged_shards(folder, read_manifest(folder))
        if damaged:
            names = ", ".join(shard_names(damaged[0]))
            raise DataError(
                f"the content of {names} in {folder} as it was prepared",
                f"a missing file or another checksum ({len(damaged)} damaged shards)",
                "Run the same `unembed prepare` again: it makes damaged shards anew",
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of the shards: the same pairs in the same order."""
        sums = [shard["sha256"] for shard in self.manifest["shards"]]
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    @property
    def encoder(self) -> EncoderIdentity:
        """The encoder that made the embeddings."""
        return EncoderIdentity.from_dict(self.manifest["encoder"])

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The encoder's vectors of the probe texts, unless the pairs are older than that."""
        record = self.manifest.get("fingerprint")
        return None if record is None else Fingerprint.from_dict(record)

    @property
    def outdated(self) -> str | None:
        """What is wrong with pairs that an older version cut; None where nothing is."""
        if not is_outdated(self.manifest, self.tokenizer):
            return None
        return (
            "the pairs were made with an older cutter: many pieces end with the first token of the "
            "next sentence. Prepare them again into a new folder"
        )

    def describe_encoder(self) -> dict[str, Any] | None:
        """The fingerprint as plain data, with statistics of the pairs' own embeddings."""
        if self.fingerprint is None:
            return None
        spaced = np.linspace(0, len(self) - 1, min(len(self), _DESCRIBED)).astype(np.int64)
        statistics = VectorStatistics.measure(self.rows(np.unique(spaced))[1])
        return replace(self.fingerprint, statistics=statistics).to_dict()

    def require_encoder(self, encoder: Encoder) -> None:
        """Refuse an encoder that is not the one that made the embeddings.

        Raises:
            EncoderError: Its weights or prompt differ, or it embeds the probe texts elsewhere.
        """
        self.encoder.require_same(encoder.identity, "pairs")
        if self.fingerprint is not None:
            self.fingerprint.require_same(encoder, "pairs")

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """How often each id of the vocabulary occurs in the target sequences, [V].

        Counted when first asked for, which reads all tokens.
        """
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
            mask = shards == shard
            local = indices[mask] - self.starts[shard]
            tokens[mask] = self.tokens[shard][local]
            embeddings[mask] = self.embeddings[shard][local]
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
