"""Text files → prepared pairs on disk: token ids and embeddings, shard by shard, resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from unembed.config import Config
from unembed.data.pieces import Piece, cut_pieces
from unembed.data.sources import read_texts
from unembed.encoders.base import Encoder
from unembed.errors import DataError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
_KEYS = ("encoder", "tokenizer", "source", "pieces", "complete", "shards")


@dataclass(frozen=True)
class PrepareProgress:
    """What a preparation has done so far: passages read, pairs made, shards written."""

    passages: int
    pairs: int
    shards: int


ProgressFn = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class _Job:
    """What a preparation works on."""

    source: Path
    out: Path
    config: Config
    encoder: Encoder
    column: str


def prepare_pairs(
    source: Path,
    out: Path,
    config: Config,
    encoder: Encoder,
    *,
    column: str = "text",
    limit: int | None = None,
    progress: ProgressFn | None = None,
) -> dict[str, Any]:
    """Cut a text file into pieces, embed them and write the pairs.

    Started again on the same folder, it goes on after the last whole shard.

    Args:
        source: Parquet, JSONL or plain text.
        out: Folder for ``manifest.json``, ``tokens-*.npy`` [N, L] and ``embeddings-*.npy`` [N, D].
        config: Settings of the pieces.
        encoder: The embedding model.
        column: Column or key that holds the text.
        limit: Stop after the shard that reaches this many pairs.
        progress: Called after every batch of embeddings and every shard.

    Returns:
        The manifest.

    Raises:
        DataError: The source cannot be read or yields no piece, the folder was prepared from
            something else, or another process is writing to it.
    """
    if next(read_texts(source, column), None) is None:
        # A wrong file or column fails here, before anything is written
        raise DataError(f"texts in {source}", "an empty file", "Choose another source")
    out.mkdir(parents=True, exist_ok=True)
    job = _Job(source, out, config, encoder, column)
    try:
        with FileLock(out / ".lock", timeout=0):
            manifest = _open_manifest(job)
            _write_missing_shards(job, manifest, limit, progress)
            return manifest
    except Timeout as error:
        raise DataError(
            f"{out} to be free", "another process writing to it", "Wait for it, or choose --out"
        ) from error


def _open_manifest(job: _Job) -> dict[str, Any]:
    """The folder's manifest: the one found, if it describes this very preparation, or a new one."""
    identity, tokenizer = job.encoder.identity, job.encoder.tokenizer
    described = {
        "format": FORMAT,
        "encoder": identity.to_dict(),
        "tokenizer": {"digest": tokenizer.digest, **tokenizer.ids_to_dict()},
        "source": {
            "name": job.source.name,
            "bytes": job.source.stat().st_size,
            "column": job.column,
        },
        "pieces": job.config.data.model_dump(),
    }
    if not (job.out / MANIFEST).exists():
        return {**described, "complete": False, "shards": []}
    manifest = read_manifest(job.out)
    for key, value in described.items():
        if manifest.get(key) != value:
            raise DataError(
                f"{job.out} to hold pairs with {key} {value}",
                f"{manifest.get(key)}",
                "Choose another --out folder, or delete this one",
            )
    return manifest


def _write_missing_shards(
    job: _Job, manifest: dict[str, Any], limit: int | None, progress: ProgressFn | None
) -> None:
    shards: list[dict[str, Any]] = manifest["shards"]
    settings = job.config.data
    passages = sum(shard["passages"] for shard in shards)
    texts = read_texts(job.source, job.column, skip=passages)
    while not manifest["complete"]:
        pairs = sum(shard["pairs"] for shard in shards)
        if limit is not None and pairs >= limit:
            return
        batch = list(islice(texts, settings.passages_per_shard))
        pieces = cut_pieces(batch, job.encoder.tokenizer, settings, first_index=passages)
        complete = len(batch) < settings.passages_per_shard
        if complete and pairs == len(pieces) == 0:
            raise DataError(
                f"pieces of {settings.min_tokens} tokens or more in {job.source}",
                "none",
                "Lower data.min_tokens or choose another source",
            )
        if not shards:
            job.encoder.tokenizer.save(job.out / TOKENIZER)
        done = PrepareProgress(passages, pairs, len(shards))
        shard = _write_shard(job, pieces, len(batch), done, progress)
        shards.append({"passages": len(batch), **shard})
        passages += len(batch)
        manifest["complete"] = complete
        write_json(job.out / MANIFEST, manifest)
        if progress is not None:
            progress(PrepareProgress(passages, pairs + len(pieces), len(shards)))


def _write_shard(
    job: _Job,
    pieces: list[Piece],
    passages: int,
    done: PrepareProgress,
    progress: ProgressFn | None,
) -> dict[str, Any]:
    """Encode and write one shard; returns its entry of the manifest."""
    tokenizer, length = job.encoder.tokenizer, job.config.data.length
    finished = 0

    def report(count: int) -> None:
        nonlocal finished
        finished += count
        if progress is not None:
            read = done.passages + passages * finished // max(len(pieces), 1)
            progress(replace(done, passages=read, pairs=done.pairs + finished))

    tokens = tokenizer.pack((piece.token_ids for piece in pieces), length)
    vectors = job.encoder.encode([piece.text for piece in pieces], report).astype(np.float16)
    tokens_name, embeddings_name = shard_names(done.shards)
    return {
        "pairs": len(pieces),
        "sha256": {
            tokens_name: _write_array(job.out / tokens_name, tokens),
            embeddings_name: _write_array(job.out / embeddings_name, vectors),
        },
    }


def shard_names(index: int) -> tuple[str, str]:
    """File names of a shard's token ids and embeddings."""
    return f"tokens-{index:05d}.npy", f"embeddings-{index:05d}.npy"


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write under a temporary name, flush to the disk, rename; returns the file's SHA-256."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    digest = file_digest(temporary)
    temporary.replace(path)
    return digest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The description of a folder of prepared pairs.

    Raises:
        DataError: There is none, or it is not one this version reads.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"prepared pairs in {folder}", "no manifest.json", "Run `unembed prepare` first"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"JSON in {path}", str(error), "Prepare the pairs again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"format {FORMAT} in {path}", str(found), "Prepare the pairs again")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise DataError(f"{', '.join(missing)} in {path}", "nothing", "Prepare the pairs again")
    return manifest
