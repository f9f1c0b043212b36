"""A folder of prepared pairs: its files, their checksums, and the manifest that lists them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from unembed.config import DataSection
from unembed.encoders.base import EncoderIdentity
from unembed.errors import DataError
from unembed.files import atomic, file_digest, text_files

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 1 << 16
_BLOCKS, _LEAST_BLOCKS = 4096, 16  # read for a digest: in all, and of each of many files
_MOST_CHARS = 500  # characters of a setting in a message


class _Tokenizer(BaseModel):
    digest: str


class _Pieces(BaseModel):
    length: int


class _Shard(BaseModel):
    passages: int
    pairs: int
    sha256: dict[str, str]


class _Manifest(BaseModel):
    """What is read without a further look; there is more in the file."""

    encoder: EncoderIdentity
    tokenizer: _Tokenizer
    source: dict[str, Any]
    pieces: _Pieces
    complete: bool
    shards: list[_Shard]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The description of a folder of prepared pairs.

    Raises:
        DataError: There is none, or it is not one this version reads.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"prepared pairs in {folder}", "no manifest.json", "Run `unembed prepare` first"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def difference(expected: Any, actual: Any) -> tuple[str, str]:
    """Two settings that differ, for a message: of mappings only the keys that do."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        expected, actual = ({key: side.get(key) for key in keys} for side in (expected, actual))
    first, second = (
        text if len(text := str(side)) < _MOST_CHARS else f"{text[:_MOST_CHARS]} …"
        for side in (expected, actual)
    )
    return first, second


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
        raise _write_error(path, error) from error


def array_digest(array: NDArray[Any]) -> str:
    """SHA-256 of the file an array would be written as."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a JSON file in one step.

    Raises:
        DataError: The disk is full.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> Exception:
    """What to say when a file cannot be written; NumPy counts bytes in place of an error number."""
    if error.errno not in _FULL and "requested and" not in str(error):
        return error
    return DataError(
        f"room on the disk of {path.parent}",
        str(error),
        "Free some space and run the same command again: what is finished is kept",
    )
