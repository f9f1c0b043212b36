"""Inverting a text or a file of vectors: what the command and the demo do with an `Inverter`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.decoding.strategy import Inversion
from unembed.encoders.base import Encoder
from unembed.errors import ConfigError, EmbeddingError, require_callable, require_whole
from unembed.files import as_path
from unembed.inverter import Inverter
from unembed.vectors.output import PartFile, named_columns, require_writable
from unembed.vectors.read import Chunk, VectorFile

BATCH = 64
_IDENTITY_BYTES = 1 << 20  # of each end of a file, by which it is known again
_NOT_IDENTITY = ("encoder", "on_step", "batch_size")  # arguments that change no text


@dataclass(frozen=True)
class RoundTrip:
    """A text, what its embedding gave away, and how close that is.

    Attributes:
        original: The text.
        inversion: What was recovered from the vector.
        cosine: Between the vectors of the original and of the recovered text; None when nothing
            was recovered.
        token_recall: Share of the original's distinct tokens that came back.
        exact: The token sequences are the same.
        seconds: Decoding time, without loading and encoding.
    """

    original: str
    inversion: Inversion
    cosine: float | None
    token_recall: float
    exact: bool
    seconds: float


def as_inverter(inverter: Any) -> Inverter:
    """The inverter that a caller hands over, loaded where it is a name or a folder.

    Raises:
        ConfigError: It is something else.
        CheckpointError: It cannot be loaded.
    """
    if isinstance(inverter, (str, Path)):
        return Inverter.from_pretrained(inverter)
    if not hasattr(inverter, "invert") or isinstance(inverter, type):
        actual = f"{type(inverter).__name__} {inverter!r:.80}"
        raise ConfigError("an inverter", actual, "Load it with Inverter.from_pretrained")
    network: Inverter = inverter
    return network


def invert_text(inverter: Inverter, encoder: Encoder, text: str, **options: Any) -> RoundTrip:
    """Encode a text, invert the vector, encode the recovery and compare.

    Args:
        inverter: Trained for this encoder.
        encoder: Makes the vectors; also what a strategy with encoder calls asks.
        text: At least one visible character.
        **options: Of `Inverter.invert`.

    Raises:
        EncoderError: The inverter belongs to another encoder.
        EmbeddingError: The text is empty.
    """
    inverter = as_inverter(inverter)
    inverter.require_encoder(encoder)
    vector = encoder.encode([text])
    began = time.perf_counter()
    inversion = inverter.invert(vector, encoder=encoder, **options)[0]
    seconds = time.perf_counter() - began
    cosine = None
    if inversion.text:
        cosine = float((encoder.encode([inversion.text]) @ vector[0])[0])
    original = inverter.tokenizer.encode([text])[0]
    reference = set(original)
    return RoundTrip(
        original=text,
        inversion=inversion,
        cosine=cosine,
        token_recall=len(reference & set(inversion.token_ids)) / max(len(reference), 1),
        exact=original == inversion.token_ids,
        seconds=seconds,
    )


def invert_file(
    inverter: Inverter,
    source: str | Path | VectorFile,
    *,
    check: Encoder | None = None,
    **options: Any,
) -> list[Inversion]:
    """Invert the vectors of a file; see `VectorFile` for what it may be.

    Args:
        inverter: Trained for the encoder that made them.
        source: The file.
        check: The encoder; each text is embedded again, and its cosine kept.
        **options: Of `Inverter.invert`.

    Raises:
        EmbeddingError: The file cannot be read or its vectors cannot be inverted.
    """
    stream = invert_stream(inverter, source, check=check, **options)
    return [item for _, items in stream for item in items]


def _as_file(source: Any) -> VectorFile:
    return source if isinstance(source, VectorFile) else VectorFile(source)


def invert_to_file(
    inverter: Inverter,
    source: str | Path | VectorFile,
    out: str | Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    check: Encoder | None = None,
    **options: Any,
) -> int:
    """Invert the vectors of a file into another, a chunk in memory at a time.

    Each batch is kept in ``out`` with ``.part`` at its end as soon as it is done, and the same
    call goes on from there. The file appears under its name when it is whole; one that was there
    is replaced then.

    Args:
        inverter: Trained for the encoder that made them.
        source: The vectors.
        out: ``.jsonl`` or ``.parquet``: for each vector ``row`` (its index in the source),
            ``text``, ``token_ids``, ``confidences``, ``passes``, ``encoder_calls``, ``order`` and
            ``cosine``, and the columns kept; one of these names gets ``source_`` before it.
        progress: Called with (stage, rows read, rows in all).
        check: The encoder; each text is embedded again, and its cosine written.
        **options: Of `Inverter.invert`.

    Returns:
        Texts written.

    Raises:
        EmbeddingError: The vectors cannot be read or none can be inverted, or ``out`` cannot be
            written or is the source itself, or its ``.part`` is of another call.
    """
    inverter, source, out = as_inverter(inverter), _as_file(source), as_path(out)
    require_callable(progress=progress)
    require_writable(out, source.parts())
    total = len(source)
    part_file = PartFile(out, _identity(inverter, source, check, options))
    try:
        last_row = part_file.last
        stream = invert_stream(inverter, source, check=check, after=last_row, **options)
        for chunk, inversions in stream:
            rows = [
                {"row": row, **asdict(item)}
                | named_columns({name: values[i] for name, values in chunk.columns.items()})
                for i, (row, item) in enumerate(zip(chunk.rows, inversions, strict=False))
            ]
            part_file.write([row for row in rows if row["row"] > last_row])
            if progress is not None:
                progress("inverting", chunk.end, total)
        part_file.finish()
    except OSError as error:
        raise EmbeddingError(
            f"a place to write {out}", str(error), "Choose another --out"
        ) from error
    finally:
        part_file.close()
    return part_file.count


def invert_stream(
    inverter: Inverter | str | Path,
    source: str | Path | VectorFile,
    *,
    check: Encoder | None = None,
    after: int = -1,
    batch_size: int = BATCH,
    **options: Any,
) -> Iterator[tuple[Chunk, list[Inversion]]]:
    """Yield some vectors of a file and what is recovered from them, batch by batch.

    Args:
        inverter: Trained for the encoder that made them.
        source: The vectors; what is strange about them is added to its notes.
        check: The encoder; each text is embedded again, and its cosine kept.
        after: Batches that end at or before this row come without texts: they are done already.
        batch_size: Vectors decoded together.
        **options: Of `Inverter.invert`.

    Raises:
        EmbeddingError: The file cannot be read or its vectors cannot be inverted.
        EncoderError: ``check`` is not the inverter's encoder.
        ConfigError: ``batch_size`` is no whole number of at least 1.
    """
    inverter, source = as_inverter(inverter), _as_file(source)
    require_whole(batch_size=(batch_size, 1), after=(after, -1))
    if check is not None:
        inverter.require_encoder(check)
    for chunk in _chunks(inverter, source):
        _compare(inverter, chunk, source)
        for start in range(0, max(1, len(chunk.rows)), batch_size):
            part = chunk.part(start, start + batch_size)
            if not part.rows or part.rows[-1] <= after:
                yield part, []
                continue
            inversions = _invert(inverter, part, {**options, "batch_size": batch_size})
            if check is not None:
                inversions = _with_cosines(inversions, inverter.map_vectors(part.vectors), check)
            yield part, inversions


def _chunks(inverter: Inverter, source: VectorFile) -> Iterator[Chunk]:
    """The vectors; an error about their size also says whose they should be."""
    alignment = inverter.alignment
    name = inverter.encoder.name if alignment is None else alignment.name
    try:
        yield from source.chunks(inverter.dimension)
    except EmbeddingError as error:
        if "dimensions" not in f"{error.expected} {error.actual}":
            raise
        whose = f"Use vectors of {name}"
        fix = whose if "Use vectors of" in error.fix else f"{whose}. {error.fix}"
        raise EmbeddingError(error.expected, error.actual, fix) from error


def _compare(inverter: Inverter, chunk: Chunk, source: VectorFile) -> None:
    """Note where vectors cannot be the encoder's, once a file."""
    alignment, name = inverter.alignment, inverter.encoder.name
    fingerprint = getattr(inverter, "fingerprint", None)
    statistics = None if fingerprint is None else fingerprint.statistics
    if alignment is not None:
        statistics, name = alignment.statistics, alignment.name
    source.compare(chunk, statistics, name)


def _with_cosines(
    inversions: list[Inversion], vectors: NDArray[np.float32], encoder: Encoder
) -> list[Inversion]:
    """Add each text's cosine with its vector, mapped where that was; None without a text."""
    indices = [i for i, item in enumerate(inversions) if item.text.strip()]
    checked = list(inversions)
    if indices:
        embeddings = encoder.encode([inversions[i].text for i in indices])
        for i, cosine in zip(indices, (embeddings * vectors[indices]).sum(axis=1), strict=True):
            checked[i] = replace(inversions[i], cosine=float(np.clip(cosine, -1, 1)))
    return checked


def _invert(inverter: Inverter, part: Chunk, options: dict[str, Any]) -> list[Inversion]:
    """A vector draws from (seed, its row), whatever was left out before it."""
    inversions: list[Inversion] = []
    start = 0
    for stop in range(1, len(part.rows) + 1):
        if stop == len(part.rows) or part.rows[stop] != part.rows[stop - 1] + 1:
            run = part.vectors[start:stop]
            inversions += inverter.invert(run, first_index=part.rows[start], **options)
            start = stop
    return inversions


def _identity(
    inverter: Inverter, source: VectorFile, check: Encoder | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Identify what the texts depend on: vectors, weights, settings."""
    ranges, alignment = source.ranges, inverter.alignment
    return {
        **({} if alignment is None else {"alignment": alignment.digest}),
        "vectors": [_file_identity(path) for path in source.parts()],
        "key": source.key,
        "keep": list(source.keep),
        "ranges": None if ranges is None else [ranges.low.tolist(), ranges.high.tolist()],
        "check": check is not None,
        "weights": _weights_identity(inverter),
        "options": {k: repr(v) for k, v in sorted(options.items()) if k not in _NOT_IDENTITY},
    }


def _file_identity(path: Path) -> str:
    """SHA-256 of a file's size, its first and its last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_IDENTITY_BYTES))
        file.seek(max(0, size - _IDENTITY_BYTES))
        digest.update(file.read(_IDENTITY_BYTES))
    return digest.hexdigest()


def _weights_identity(inverter: Inverter) -> str:
    digest = hashlib.sha256(json.dumps(inverter.encoder.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(inverter.denoiser.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
