"""Text files → prepared pairs on disk: token ids and embeddings, shard by shard, resumable.

Which tokens of the vocabulary a corpus needs is counted first, where that is asked for.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from unembed.config import Config, DataSection
from unembed.data.pairs import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    damaged_shards,
    difference,
    piece_settings,
    read_manifest,
    shard_names,
    source_digest,
)
from unembed.data.pieces import CUTTER, cut_pieces, is_outdated
from unembed.data.readers import read_texts, require_texts
from unembed.data.shards import CutShard, Job, Reads, Runner, ShardTask, make_here
from unembed.encoders.base import Encoder, EncoderIdentity, recorded_name
from unembed.encoders.fingerprint import Fingerprint, make_fingerprint
from unembed.errors import DataError
from unembed.files import locked, remove_unfinished, require_apart, text_files, write_json
from unembed.tokenizer import TextTokenizer, ids_of, load_tokenizer

DIGEST = "digest"
_BATCH = 4096
_SPACE_SIGNS = "\u2581\u0120\u010a"  # SentencePiece's space; byte-level's space and line end


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation: passages read, pairs made, shards written."""

    passages: int
    pairs: int
    shards: int


ProgressFn = Callable[[PrepareProgress], None]


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
    run: Runner | None = None,
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
        run: Who makes the shards; this process when not given (see `data.distributed`).

    Returns:
        The manifest.

    Raises:
        DataError: The source cannot be read or yields no piece, the folder was prepared from
            something else, another process is writing to it, or the disk is full.
        EncoderError: The encoder is not the one the folder was begun with, or returns vectors that
            are not finite or not of unit length.
    """
    require_texts(source, column)
    require_apart(source, out)
    if source.name in (MANIFEST, TOKENIZER):
        require_apart(source, out / source.name)  # it would be written over
    job = _job(source, out, column, config.data, encoder)
    with locked(out):
        job, manifest = _open_manifest(job)
        damaged = list(_repairs(job, manifest)) if verify else []
        if damaged or not manifest["complete"]:
            job = _prove_encoder(job, encoder, manifest)
            _begin(job, manifest)
            tasks = chain(damaged, _missing(job, manifest, limit))
            run = run or partial(make_here, encoder)
            try:
                _write_shards(job, manifest, tasks, limit, progress, run)
            finally:
                _sweep(out)
        return manifest


def _job(source: Path, out: Path, column: str, settings: DataSection, encoder: Encoder) -> Job:
    """Describe the work, with the encoder's tokenizer or the one that was asked for."""
    most, name = getattr(encoder, "most_tokens", None), settings.vocabulary.tokenizer
    if name is None:
        _require_room(encoder, most, settings.length - 1)
        return Job(source, out, column, settings, encoder.tokenizer, encoder.identity)
    tokenizer = load_tokenizer(name)
    recorded = settings.vocabulary.model_copy(update={"tokenizer": recorded_name(name)})
    settings = settings.model_copy(update={"vocabulary": recorded})
    reads = None if most is None else Reads(encoder.tokenizer, most)
    return Job(source, out, column, settings, tokenizer, encoder.identity, reads=reads)


def _require_room(encoder: Encoder, most: int | None, tokens: int) -> None:
    """Refuse pieces of which the encoder would read only the beginning."""
    if most is not None and tokens > most:
        raise DataError(
            f"pieces of at most {most} tokens, which is what {encoder.identity.name} reads",
            f"data.length {tokens + 1}",
            f"Set data.length to {most + 1} or less",
        )


def _open_manifest(job: Job) -> tuple[Job, dict[str, Any]]:
    """The folder's manifest: the one found, if it describes this very preparation, or a new one."""
    manifest = read_manifest(job.out) if (job.out / MANIFEST).exists() else None
    vocabulary = None
    if job.settings.vocabulary.min_count is not None:
        if manifest is None:
            token_ids, vocabulary = _count_vocabulary(job)
            job = replace(job, tokenizer=job.tokenizer.trim(token_ids))
        elif "kept" in manifest["tokenizer"]:  # else it is refused below
            job = replace(job, tokenizer=job.tokenizer.trim(ids_of(manifest["tokenizer"]["kept"])))
    description: dict[str, Any] = {
        "format": FORMAT,
        "encoder": job.identity.to_dict(),
        "tokenizer": {"digest": job.tokenizer.digest, **job.tokenizer.ids_to_dict()},
        "source": {
            "name": job.source.name,
            "bytes": sum(file.stat().st_size for file in text_files(job.source)),
            "column": job.column,
            DIGEST: source_digest(job.source),
        },
        "pieces": job.settings.model_dump(),
    }
    if manifest is None:
        extra = {} if vocabulary is None else {"vocabulary": vocabulary}
        state = {"cutter": CUTTER, "round_trip": True, "complete": False, "shards": []}
        return job, {**description, **extra, **state}
    if is_outdated(manifest, job.tokenizer):
        raise DataError(
            f"pieces in {job.out} that end where sentences end",
            "pairs made with an older cutter, which put a token of the next sentence behind them",
            "Choose another --out folder, or delete this one",
        )
    description["source"] = _without_missing_digest(description["source"], manifest["source"])
    if EncoderIdentity.from_dict(manifest["encoder"]).key == job.identity.key:
        description["encoder"] = manifest["encoder"]  # wherever it is now
    for key, value in description.items():
        current = piece_settings(manifest) if key == "pieces" else manifest.get(key)
        if current != value:
            expected, actual = difference(value, current)
            raise DataError(
                f"{job.out} to hold pairs with {key} {expected}",
                actual,
                "Choose another --out folder, or delete this one",
            )
    return replace(job, round_trip=manifest.get("round_trip", False)), manifest


def _without_missing_digest(source: dict[str, Any], entry: Any) -> dict[str, Any]:
    """The source, of which an older version kept the name and size but not the digest."""
    if isinstance(entry, dict) and DIGEST not in entry:
        return {key: value for key, value in source.items() if key != DIGEST}
    return source


def _count_vocabulary(job: Job) -> tuple[tuple[int, ...], dict[str, int]]:
    """The ids to keep, and what the manifest says about the choice."""
    settings, tokenizer = job.settings, job.tokenizer
    counts = count_tokens(read_texts(job.source, job.column), tokenizer, settings)
    token_ids = choose_tokens(tokenizer, counts, settings.vocabulary.min_count or 1)
    facts = {"before": tokenizer.size, "after": len(token_ids), "tokens_counted": int(counts.sum())}
    return token_ids, facts


def _prove_encoder(job: Job, encoder: Encoder, manifest: dict[str, Any]) -> Job:
    """Keep the encoder's fingerprint, or compare it with the one kept."""
    if "fingerprint" in manifest:
        Fingerprint.from_dict(manifest["fingerprint"]).require_same(encoder, "pairs")
    else:
        manifest["fingerprint"] = make_fingerprint(encoder).to_dict()
    return replace(job, fingerprint=manifest["fingerprint"])


def _begin(job: Job, manifest: dict[str, Any]) -> None:
    """Write what the shards need beside them, before the first of them."""
    _sweep(job.out)
    if not manifest["shards"] or not (job.out / TOKENIZER).exists():
        job.tokenizer.save(job.out / TOKENIZER)
    if not manifest["shards"]:
        write_json(job.out / MANIFEST, manifest)  # keeps a vocabulary that took long to count


def _sweep(out: Path) -> None:
    """Remove what workers, of this start or one that was killed, have begun and not handed in."""
    remove_unfinished(out)
    for pattern in ("*.npy.*.tmp", f"{MANIFEST}.tmp"):  # of workers; of older versions
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _write_shards(
    job: Job,
    manifest: dict[str, Any],
    tasks: Iterable[ShardTask],
    limit: int | None,
    progress: ProgressFn | None,
    run: Runner,
) -> None:
    """Have shards made and put each into its place; the manifest follows its files."""
    shards: list[dict[str, Any]] = manifest["shards"]

    def report(cut: CutShard, finished: int) -> None:
        if progress is not None:
            totals = _totals(shards[: cut.task.index])
            passages = totals.passages + cut.passages * finished // max(len(cut.pieces), 1)
            progress(replace(totals, passages=passages, pairs=totals.pairs + finished))

    with closing(run(job, tasks, report)) as finished:
        for shard in finished:
            entry, new = shard.entry, shard.index == len(shards)
            if new:
                manifest["complete"] = entry["passages"] < job.settings.passages_per_shard
                if manifest["complete"] and _totals(shards).pairs == entry["pairs"] == 0:
                    shard.discard(job.out)
                    for name in (MANIFEST, TOKENIZER):  # other settings may use the folder
                        (job.out / name).unlink(missing_ok=True)
                    raise _no_piece(job, entry["dropped"])
            elif "dropped" not in shards[shard.index]:  # made by a version that did not count them
                del entry["dropped"]
            shard.commit(job.out)
            shards[shard.index : shard.index + 1] = [entry]
            write_json(job.out / MANIFEST, manifest)
            totals = _totals(shards)
            if progress is not None and new:
                progress(totals)
            if new and (manifest["complete"] or (limit is not None and totals.pairs >= limit)):
                return


def _totals(shards: list[dict[str, Any]]) -> PrepareProgress:
    passages, pairs = (sum(shard[key] for shard in shards) for key in ("passages", "pairs"))
    return PrepareProgress(passages, pairs, len(shards))


def _repairs(job: Job, manifest: dict[str, Any]) -> Iterator[ShardTask]:
    """The shards to make again, with what their tokens must come out as."""
    shards = manifest["shards"]
    for index in damaged_shards(job.out, manifest):
        before = shards[index]
        tokens_sha256 = before["sha256"][shard_names(index)[0]]
        first = _totals(shards[:index]).passages
        yield ShardTask(index, first, before["passages"], tokens_sha256)


def _missing(job: Job, manifest: dict[str, Any], limit: int | None) -> Iterator[ShardTask]:
    """The shards from the first missing one on, without an end: the source's shows when read."""
    totals, size = _totals(manifest["shards"]), job.settings.passages_per_shard
    if manifest["complete"] or (limit is not None and totals.pairs >= limit):
        return
    for number in count():
        yield ShardTask(totals.shards + number, totals.passages + number * size, size)


def _no_piece(job: Job, dropped: dict[str, int]) -> DataError:
    return DataError(
        f"pieces of {job.settings.min_tokens} tokens or more in {job.source}",
        f"none (left out: {dropped})" if dropped else "none",
        "Lower data.min_tokens or choose another source",
    )


# The vocabulary


def count_tokens(
    texts: Iterable[str],
    tokenizer: TextTokenizer,
    settings: DataSection,
    *,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.int64]:
    """Count how often each id occurs in the pieces of some passages, [V].

    Args:
        texts: Passages, read once and never held together.
        tokenizer: With its whole vocabulary.
        settings: How passages become pieces.
        limit: Read no further than the batch that reaches this many pieces.
        progress: Called after each batch with the passages read and the pieces counted.
    """
    counts = np.zeros(tokenizer.size, dtype=np.int64)
    first, total, iterator = 0, 0, iter(texts)
    for batch in _batches(iterator):
        # Whether pieces decode back takes as long to find out as the rest, and hardly counts
        pieces = cut_pieces(batch, tokenizer, settings, first, round_trip=False)
        ids = [token for piece in pieces for token in piece.token_ids]
        counts += np.bincount(ids, minlength=tokenizer.size)
        first, total = first + len(batch), total + len(pieces)
        if progress is not None:
            progress(first, total)
        if limit is not None and total >= limit:
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
