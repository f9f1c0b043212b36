"""Prepared pairs, memory-mapped: random rows across shards without loading them; their manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from unembed.config import DataSection
from unembed.data.pieces import is_outdated
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint, require_encoder
from unembed.encoders.vectors import VectorStatistics
from unembed.errors import DataError
from unembed.files import (
    MANIFEST_BYTES,
    as_path,
    file_digest,
    read_json,
    text_files,
    write_error,
)
from unembed.tokenizer import TextTokenizer

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
_BLOCK = 1 << 16
_BLOCKS, _LEAST_BLOCKS = 4096, 16  # read for a digest: in all, and of each of many files
_MOST_CHARS = 500  # characters of a setting in a message
_DESCRIBED = 4096  # pairs whose embeddings the statistics of the encoder's vectors come from
_SEARCHED = 8192  # pairs compared at a time


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
    def open(cls, folder: str | Path, shards: int | None = None) -> Pairs:
        """Map a folder that `prepare_pairs` wrote; also one it is still writing.

        Args:
            folder: Of the pairs.
            shards: Only the first so many; all there are when not given.

        Raises:
            DataError: No manifest, or a shard is missing, damaged or of the wrong shape.
        """
        folder = as_path(folder)
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
        """Fault of pairs that an older version cut; None where there is none."""
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
        require_encoder(encoder, self.encoder, self.fingerprint, "pairs")

    @cached_property
    def token_counts(self) -> NDArray[np.int64]:
        """Counts of each id of the vocabulary in the target sequences, [V].

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


# The manifest: files, checksums, and what the pairs were made from


class _Tokenizer(BaseModel):
    digest: str


class _Pieces(BaseModel):
    length: int


class _Shard(BaseModel):
    passages: int
    pairs: int
    sha256: dict[str, str]
    dropped: dict[str, int] = {}


class _Vocabulary(BaseModel):
    before: int


class _Fingerprint(BaseModel):
    sha256: str


class _Manifest(BaseModel):
    """Schema of what is read without a further look; there is more in the file."""

    encoder: EncoderIdentity
    tokenizer: _Tokenizer
    source: dict[str, Any]
    pieces: _Pieces
    complete: bool
    shards: list[_Shard]
    # Not in every manifest
    vocabulary: _Vocabulary = _Vocabulary(before=0)
    fingerprint: _Fingerprint = _Fingerprint(sha256="")
    cutter: int = 1
    round_trip: bool = False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The description of a folder of prepared pairs.

    Raises:
        DataError: There is none, or it is not one this version reads.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path, MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"prepared pairs in {folder}", "no manifest.json", "Run `unembed prepare` first"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"JSON in {path}", str(error), "Prepare the pairs again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        version = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"format {FORMAT} in {path}", str(version), "Prepare the pairs again")
    if manifest.get("kind") == "texts":
        raise DataError(
            f"prepared pairs in {folder}",
            "texts that `unembed prepare --stage 1` collected",
            f"Run `unembed prepare --stage 2 --source {folder} --out …`, and name its folder",
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"a whole manifest of pairs in {path}",
            f"{where}: {first['msg'].lower()}",
            "Prepare the pairs again",
        ) from error
    return manifest


def piece_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """Settings the pieces were cut with, those younger than the manifest at their defaults.

    Raises:
        DataError: They are not settings this version knows.
    """
    try:
        return DataSection.model_validate(manifest["pieces"]).model_dump()
    except ValidationError as error:
        raise DataError(
            "known settings under pieces in manifest.json",
            str(error.errors()[0]["msg"]),
            "Upgrade unembed, or prepare the pairs again",
        ) from error


def difference(expected: Any, actual: Any) -> tuple[str, str]:
    """Two settings that differ, for a message: of mappings only the keys that do."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        expected, actual = ({key: side.get(key) for key in keys} for side in (expected, actual))
    first, second = (
        text if len(text := _spell(side)) < _MOST_CHARS else f"{text[:_MOST_CHARS]} …"
        for side in (expected, actual)
    )
    return first, second


def _spell(side: Any) -> str:
    """A setting for readers: of a mapping ``name mine.txt, bytes 12``, digests only if alone."""
    if not isinstance(side, dict):
        return str(side)
    plain = {key: value for key, value in side.items() if key != "digest"} or side
    return ", ".join(f"{key} {value}" for key, value in plain.items())


def shard_names(index: int) -> tuple[str, str]:
    """File names of a shard's token ids and embeddings."""
    return f"tokens-{index:05d}.npy", f"embeddings-{index:05d}.npy"


def source_digest(path: Path) -> str:
    """SHA-256 by which a changed source is noticed: of the files' names, sizes and content.

    A folder's names are taken below it, a file's own not at all. A file of up to 256 MiB is read
    whole; of a larger one 4096 blocks of 64 KiB are: the first, the last and evenly spaced ones.
    Of n files each gets an n-th of that, but at least 16 blocks.

    Raises:
        DataError: There is no text file.
    """
    files = text_files(path)
    blocks = max(_LEAST_BLOCKS, _BLOCKS // len(files))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= blocks * _BLOCK:
                digest.update(hashlib.file_digest(content, "sha256").digest())
                continue
            for block in range(blocks):
                content.seek((size - _BLOCK) * block // (blocks - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def damaged_shards(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Shards of which a file is missing or has another checksum than when it was made."""
    return [
        index
        for index, shard in enumerate(manifest["shards"])
        if any(
            not (folder / name).is_file() or file_digest(folder / name) != digest
            for name, digest in shard["sha256"].items()
        )
    ]


def write_array(path: Path, array: NDArray[Any]) -> str:
    """Write an array and flush it to the disk; returns the file's SHA-256.

    Raises:
        DataError: The disk is full.
    """
    try:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        return file_digest(path)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise write_error(path, error) from error


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of the file an array would be written as."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def nearest_rows(
    pairs: Pairs,
    vectors: NDArray[np.float32],
    count: int,
    report: Callable[[int], None] = lambda rows: None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find the rows of the nearest pairs of each unit vector [N, D], nearest first.

    Args:
        pairs: Searched from first to last.
        vectors: Unit vectors [N, D].
        count: Pairs for each, k.
        report: Called with the number of pairs searched.

    Returns:
        Rows [N, k] and their cosines [N, k]; the first of equals comes first.
    """
    best: NDArray[np.float32] = np.zeros((len(vectors), 0), dtype=np.float32)
    rows: NDArray[np.int64] = np.zeros((len(vectors), 0), dtype=np.int64)
    for start in range(0, len(pairs), _SEARCHED):
        index = np.arange(start, min(start + _SEARCHED, len(pairs)))
        _, embeddings = pairs.rows(index)
        best = np.concatenate([best, vectors @ embeddings.T], axis=1)
        rows = np.concatenate([rows, np.broadcast_to(index, (len(vectors), len(index)))], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :count]
        best = np.take_along_axis(best, order, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        report(int(index[-1]) + 1)
    return rows, best


@dataclass(frozen=True, repr=False)
class CorpusSearch:
    """Finds texts of a corpus by their vectors: what an auditor with similar texts starts from.

    Attributes:
        pairs: Of the encoder under attack.
        tokenizer: Of the inverter.
        count: Texts for each vector.
    """

    pairs: Pairs
    tokenizer: TextTokenizer
    count: int = 4

    def __repr__(self) -> str:
        """Say which corpus it is: what the recovered texts depend on."""
        manifest = json.dumps(self.pairs.manifest, sort_keys=True)
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        return f"CorpusSearch({digest}, {self.count})"

    def __call__(self, vectors: NDArray[np.float32]) -> list[list[list[int]]]:
        """Token ids of the nearest texts of each unit vector [B, D], nearest first."""
        rows, _ = nearest_rows(self.pairs, vectors, self.count)
        tokens, _ = self.pairs.rows(rows.ravel())
        texts = self.pairs.tokenizer.decode(tokens)
        ids = self.tokenizer.encode(texts)  # which may be another's
        each = rows.shape[1]
        return [ids[k : k + each] for k in range(0, len(ids), each)]
