"""Text files → prepared pairs on disk: token ids and embeddings, shard by shard, resumable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import ValidationError

from unembed.config import Config, DataSection
from unembed.data.files import text_files
from unembed.data.pieces import Piece, cut_pieces
from unembed.data.sources import read_texts
from unembed.data.vocabulary import choose_kept, count_tokens
from unembed.encoders.base import Encoder
from unembed.encoders.preflight import Fingerprint, make_fingerprint
from unembed.encoders.tokenizer import TextTokenizer, ids_of
from unembed.errors import DataError, EncoderError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
_KEYS = ("encoder", "tokenizer", "source", "pieces", "complete", "shards")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class PrepareProgress:
    """What a preparation has done so far: passages read, pairs made, shards written."""

    passages: int
    pairs: int
    shards: int


ProgressFn = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class _Job:
    """What a preparation works on; the tokenizer is the encoder's, or a trimmed one.

    ``round_trip``: leave out pieces that do not decode back. Folders begun by a version that did
    not are finished as they were begun.
    """

    source: Path
    out: Path
    config: Config
    encoder: Encoder
    column: str
    tokenizer: TextTokenizer
    round_trip: bool = True


def prepare_pairs(
    source: Path,
    out: Path,
    config: Config,
    encoder: Encoder,
    *,
    column: str = "text",
    limit: int | None = None,
    verify: bool = True,
    progress: ProgressFn | None = None,
) -> dict[str, Any]:
    """Cut a text file into pieces, embed them and write the pairs.

    Started again on the same folder, it makes damaged shards anew and goes on after the last whole
    one.

    Args:
        source: Parquet, JSONL or plain text.
        out: Folder for ``manifest.json``, ``tokens-*.npy`` [N, L] and ``embeddings-*.npy`` [N, D].
        config: Settings of the pieces.
        encoder: The embedding model.
        column: Column or key that holds the text.
        limit: Stop after the shard that reaches this many pairs.
        verify: Compare the shards found with their checksums first.
        progress: Called after every batch of embeddings and every shard.

    Returns:
        The manifest.

    Raises:
        DataError: The source cannot be read or yields no piece, the folder was prepared from
            something else, another process is writing to it, or the disk is full.
        EncoderError: The encoder is not the one the folder was begun with, or returns vectors that
            are not finite or not of unit length.
    """
    if next(read_texts(source, column), None) is None:
        # A wrong file or column fails here, before anything is written
        raise DataError(f"texts in {source}", "an empty file", "Choose another source")
    _require_room(encoder, config.data.length - 1)
    out.mkdir(parents=True, exist_ok=True)
    job = _Job(source, out, config, encoder, column, encoder.tokenizer)
    try:
        with FileLock(out / ".lock", timeout=0):
            job, manifest = _open_manifest(job)
            damaged = damaged_shards(out, manifest) if verify else []
            if damaged or not manifest["complete"]:
                _prove_encoder(job, manifest)
            for index in damaged:
                _remake_shard(job, manifest, index, progress)
            _write_missing_shards(job, manifest, limit, progress)
            return manifest
    except Timeout as error:
        raise DataError(
            f"{out} to be free", "another process writing to it", "Wait for it, or choose --out"
        ) from error


def _require_room(encoder: Encoder, tokens: int) -> None:
    """Refuse pieces of which the encoder would read only the beginning."""
    most = getattr(encoder, "most_tokens", None)
    if most is not None and tokens > most:
        raise DataError(
            f"pieces of at most {most} tokens, which is what {encoder.identity.name} reads",
            f"data.length {tokens + 1}",
            f"Set data.length to {most + 1} or less",
        )


def _open_manifest(job: _Job) -> tuple[_Job, dict[str, Any]]:
    """The folder's manifest: the one found, if it describes this very preparation, or a new one."""
    found = read_manifest(job.out) if (job.out / MANIFEST).exists() else None
    counted = None
    if job.config.data.vocabulary.min_count is not None:
        if found is None:
            kept, counted = _count_vocabulary(job)
            job = replace(job, tokenizer=job.tokenizer.trim(kept))
        elif "kept" in found["tokenizer"]:  # else it is refused below
            job = replace(job, tokenizer=job.tokenizer.trim(ids_of(found["tokenizer"]["kept"])))
    described = {
        "format": FORMAT,
        "encoder": job.encoder.identity.to_dict(),
        "tokenizer": {"digest": job.tokenizer.digest, **job.tokenizer.ids_to_dict()},
        "source": {
            "name": job.source.name,
            "bytes": sum(file.stat().st_size for file in text_files(job.source)),
            "column": job.column,
        },
        "pieces": job.config.data.model_dump(),
    }
    if found is None:
        trimmed = {} if counted is None else {"vocabulary": counted}
        manifest = {**described, **trimmed, "round_trip": True, "complete": False, "shards": []}
        return job, manifest
    for key, value in described.items():
        if (piece_settings(found) if key == "pieces" else found.get(key)) != value:
            raise DataError(
                f"{job.out} to hold pairs with {key} {_short(value)}",
                _short(found.get(key)),
                "Choose another --out folder, or delete this one",
            )
    return replace(job, round_trip=found.get("round_trip", False)), found


def _count_vocabulary(job: _Job) -> tuple[tuple[int, ...], dict[str, int]]:
    """The ids to keep, and what the manifest says about the choice."""
    settings, tokenizer = job.config.data, job.tokenizer
    counts = count_tokens(read_texts(job.source, job.column), tokenizer, settings)
    kept = choose_kept(tokenizer, counts, settings.vocabulary.min_count or 1)
    facts = {"before": tokenizer.size, "after": len(kept), "tokens_counted": int(counts.sum())}
    return kept, facts


def piece_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """How the pieces were cut, settings that are younger than the manifest at their defaults.

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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 500 else f"{text[:500]} …"  # noqa: PLR2004 - characters


def damaged_shards(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Shards of which a file is missing or has another checksum than when it was made."""
    return [
        index
        for index, shard in enumerate(manifest["shards"])
        if any(
            not (folder / name).is_file() or file_digest(folder / name) != wanted
            for name, wanted in shard["sha256"].items()
        )
    ]


def _prove_encoder(job: _Job, manifest: dict[str, Any]) -> None:
    """Keep the encoder's fingerprint, or compare it with the one kept."""
    if "fingerprint" in manifest:
        Fingerprint.from_dict(manifest["fingerprint"]).require_same(job.encoder, "pairs")
    else:
        manifest["fingerprint"] = make_fingerprint(job.encoder).to_dict()


def _remake_shard(
    job: _Job, manifest: dict[str, Any], index: int, progress: ProgressFn | None
) -> None:
    shards = manifest["shards"]
    before = shards[index]
    passages, pairs = (sum(s[key] for s in shards[:index]) for key in ("passages", "pairs"))
    texts = list(islice(read_texts(job.source, job.column, skip=passages), before["passages"]))
    pieces, dropped = _cut(job, texts, passages)
    tokens_name = shard_names(index)[0]
    tokens = job.tokenizer.pack((p.token_ids for p in pieces), job.config.data.length)
    if array_digest(tokens) != before["sha256"][tokens_name]:
        raise DataError(
            f"{job.source} to yield the tokens of the damaged shard {index} again",
            "other tokens",
            "Restore the source as it was, or prepare into a new folder",
        )
    if not (job.out / TOKENIZER).exists():
        job.tokenizer.save(job.out / TOKENIZER)
    done = PrepareProgress(passages, pairs, index)
    shard = _write_shard(job, pieces, len(texts), done, progress)
    counted = {"dropped": dropped} if "dropped" in before else {}
    shards[index] = {"passages": len(texts), **shard, **counted}
    write_json(job.out / MANIFEST, manifest)


def _cut(job: _Job, texts: list[str], first_index: int) -> tuple[list[Piece], dict[str, int]]:
    """Pieces of some passages, and how many were left out for which reason."""
    dropped: Counter[str] = Counter()
    pieces = cut_pieces(
        texts,
        job.tokenizer,
        job.config.data,
        first_index,
        dropped=dropped,
        round_trip=job.round_trip,
    )
    return pieces, {reason: count for reason, count in sorted(dropped.items()) if count}


def _write_missing_shards(
    job: _Job, manifest: dict[str, Any], limit: int | None, progress: ProgressFn | None
) -> None:
    shards: list[dict[str, Any]] = manifest["shards"]
    settings = job.config.data
    passages = sum(shard["passages"] for shard in shards)
    texts = read_texts(job.source, job.column, skip=passages)
    if not shards:
        job.tokenizer.save(job.out / TOKENIZER)
        write_json(job.out / MANIFEST, manifest)  # keeps a vocabulary that took long to count
    while not manifest["complete"]:
        pairs = sum(shard["pairs"] for shard in shards)
        if limit is not None and pairs >= limit:
            return
        batch = list(islice(texts, settings.passages_per_shard))
        pieces, dropped = _cut(job, batch, passages)
        complete = len(batch) < settings.passages_per_shard
        if complete and pairs == len(pieces) == 0:
            raise DataError(
                f"pieces of {settings.min_tokens} tokens or more in {job.source}",
                f"none (left out: {dropped})" if dropped else "none",
                "Lower data.min_tokens or choose another source",
            )
        done = PrepareProgress(passages, pairs, len(shards))
        shard = _write_shard(job, pieces, len(batch), done, progress)
        shards.append({"passages": len(batch), **shard, "dropped": dropped})
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
    length = job.config.data.length
    finished = 0

    def report(count: int) -> None:
        nonlocal finished
        finished += count
        if progress is not None:
            read = done.passages + passages * finished // max(len(pieces), 1)
            progress(replace(done, passages=read, pairs=done.pairs + finished))

    tokens = job.tokenizer.pack((piece.token_ids for piece in pieces), length)
    texts = [piece.text for piece in pieces]
    vectors = job.encoder.encode(texts, report)
    _require_unit(job.encoder, texts, vectors)
    tokens_name, embeddings_name = shard_names(done.shards)
    return {
        "pairs": len(pieces),
        "sha256": {
            tokens_name: _write_array(job.out / tokens_name, tokens),
            embeddings_name: _write_array(job.out / embeddings_name, vectors.astype(np.float16)),
        },
    }


def _require_unit(encoder: Encoder, texts: list[str], vectors: NDArray[np.float32]) -> None:
    """Refuse vectors that would poison a shard, whatever encoder made them."""
    wrong = ~(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _UNIT_TOLERANCE)  # true for NaN too
    if wrong.any():
        row = int(wrong.argmax())
        raise EncoderError(
            "finite vectors of unit length",
            f"length {np.linalg.norm(vectors[row])} from {encoder.identity.name} for "
            f"{texts[row][:80]!r}, one of {int(wrong.sum())}",
            "Try --device cpu; `unembed preflight` shows what an encoder does",
        )


def shard_names(index: int) -> tuple[str, str]:
    """File names of a shard's token ids and embeddings."""
    return f"tokens-{index:05d}.npy", f"embeddings-{index:05d}.npy"


def _write_array(path: Path, array: NDArray[Any]) -> str:
    """Write under a temporary name, flush to the disk, rename; returns the file's SHA-256."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        digest = file_digest(temporary)
        temporary.replace(path)
    except OSError as error:
        raise _write_error(temporary, error) from error
    return digest


def _write_error(temporary: Path, error: OSError) -> Exception:
    """What to say when a file cannot be written; half a file is removed."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    if error.errno not in _FULL:
        return error
    return DataError(
        f"room on the disk of {temporary.parent}",
        str(error),
        "Free some space and run the same command again: what is finished is kept",
    )


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of the file an array would be written as."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file in one step.

    Raises:
        DataError: The disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _write_error(temporary, error) from error


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
