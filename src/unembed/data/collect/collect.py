"""Sources → a folder of Parquet shards (text, lang, source) and a manifest; killed, it resumes.

Everything follows from the sources and the settings, so a second start draws the same samples
again: those of finished shards are compared with what the manifest recorded, the rest is written.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from unembed.data.collect.filters import Duplicates, Limits
from unembed.data.collect.mix import (
    Sample,
    Streams,
    Tally,
    draw_samples,
    open_streams,
    quotas,
    shuffle,
    source_names,
)
from unembed.data.collect.sources import Weighted
from unembed.data.pairs import difference
from unembed.errors import DataError
from unembed.files import (
    MANIFEST_BYTES,
    atomic,
    file_digest,
    locked,
    read_json,
    remove_unfinished,
    require_apart,
    write_json,
)

MANIFEST = "manifest.json"
FORMAT = 1
KIND = "texts"
NEAR = (0.1, 0.95)  # similarities of near-duplicates; above, MinHash has too few bands
_GROUP_ROWS, _GROUP_CHARS = 4096, 8 << 20
_REPORT_EVERY = 256


@dataclass(frozen=True)
class CollectSettings:
    """Settings of a collection.

    Attributes:
        langs: Languages, each with the same share.
        samples: Texts in all.
        seed: Draws the order of languages and sources, and shuffles.
        limits: What the filters let through.
        near_duplicates: Also leave out texts about this similar (Jaccard) to one kept before.
        buffer_rows: Texts in the shuffle buffer.
        buffer_chars: Characters in the shuffle buffer, at most.
        shard_rows: Texts in a shard.
    """

    langs: tuple[str, ...]
    samples: int
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    near_duplicates: float | None = None
    buffer_rows: int = 10_000
    buffer_chars: int = 16 << 20
    shard_rows: int = 50_000

    def __post_init__(self) -> None:
        """Refuse languages that are none, and what no MinHash finds.

        Raises:
            DataError: A language is blank or comes twice, or there is none; or texts are to be left
                out for a similarity that MinHash cannot tell.
        """
        if not self.langs or not all(self.langs) or len(set(self.langs)) < len(self.langs):
            raise DataError(
                "different languages in --langs", repr(",".join(self.langs)), "Correct --langs"
            )
        least, most = NEAR
        if self.near_duplicates is not None and not least <= self.near_duplicates <= most:
            raise DataError(
                f"a similarity of {least} to {most} for --near-duplicates",
                str(self.near_duplicates),
                "Correct it",
            )


@dataclass(frozen=True)
class CollectProgress:
    """Progress of a collection: texts read, texts in shards, shards."""

    texts: int
    samples: int
    shards: int


CollectFn = Callable[[CollectProgress], None]


def collect_texts(
    sources: Sequence[Weighted],
    out: Path,
    settings: CollectSettings,
    progress: CollectFn | None = None,
) -> dict[str, Any]:
    """Collect texts from sources into Parquet shards.

    Started again on the same folder with the same settings, it ends with the same files.

    Args:
        sources: Where the texts come from.
        out: Folder for ``manifest.json`` and ``texts-*.parquet``.
        settings: What to collect.
        progress: Called now and then.

    Returns:
        The manifest.

    Raises:
        DataError: A source cannot be read or has changed since, no text passes the filters, the
            disk is full, the folder holds something else, or another process is writing to it.
    """
    description = _describe(sources, settings)
    for path in (path for weighted in sources for path in weighted.source.paths(settings.langs)):
        require_apart(path, out)
        if path.resolve().parent == out.resolve():
            raise DataError(
                f"an --out folder without sources, which {path.name} may be written over",
                str(out),
                "Choose another --out",
            )
    if out.exists():
        _read_manifest(out, description)
    duplicates = Duplicates(settings.samples, settings.near_duplicates)
    tally = Tally()
    streams = open_streams(sources, settings.langs, tally)
    try:
        with locked(out):
            remove_unfinished(out)
            manifest = _read_manifest(out, description)
            samples = _samples(streams, settings, duplicates, tally)
            _write_shards(out, manifest, samples, settings, tally, progress)
            manifest["counts"] = _counts(settings, tally, duplicates)
            manifest["complete"] = True
            write_json(out / MANIFEST, manifest)
            return manifest
    except OSError as error:
        raise DataError(
            f"room to write in {out}",
            str(error),
            "Make room and run the command again; it goes on where it stopped",
        ) from error


def _describe(sources: Sequence[Weighted], settings: CollectSettings) -> dict[str, Any]:
    entries = [
        {**weighted.source.describe(settings.langs), "name": name, "weight": weighted.weight}
        for name, weighted in zip(source_names(sources), sources, strict=True)
    ]
    plain = {**asdict(settings), "langs": list(settings.langs)}
    return {"format": FORMAT, "kind": KIND, "settings": plain, "sources": entries}


def _read_manifest(out: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The folder's manifest: the one found, if it describes this very collection, or a new one."""
    path = out / MANIFEST
    if not path.exists():
        return {**description, "complete": False, "shards": []}
    try:
        manifest = read_json(path, MANIFEST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"JSON in {path}", str(error), "Choose another --out folder") from error
    for key, value in description.items():
        current = manifest.get(key) if isinstance(manifest, dict) else None
        if current != value:
            expected, actual = difference(value, current)
            raise DataError(
                f"{out} to hold a collection with {key} {expected}",
                actual,
                "Choose another --out folder, or delete this one",
            )
    return dict(manifest)


def _samples(
    streams: Streams, settings: CollectSettings, duplicates: Duplicates, tally: Tally
) -> Iterator[Sample]:
    targets = quotas(settings.langs, settings.samples)
    mixing, shuffling = random.Random(settings.seed), random.Random(settings.seed + 1)
    samples = draw_samples(streams, targets, settings.limits, duplicates, mixing, tally)
    return shuffle(samples, shuffling, settings.buffer_rows, settings.buffer_chars)


def _write_shards(
    out: Path,
    manifest: dict[str, Any],
    samples: Iterator[Sample],
    settings: CollectSettings,
    tally: Tally,
    progress: CollectFn | None,
) -> None:
    """Write the shards that are missing or damaged; check that the others would be the same."""
    shards: list[dict[str, Any]] = manifest["shards"]
    index = total = 0
    while (first := next(samples, None)) is not None:
        rows = _watch([first], samples, settings.shard_rows, total, index, tally, progress)
        path = out / f"texts-{index:05d}.parquet"
        recorded = shards[index] if index < len(shards) else None
        entry = _replay(rows, path, recorded) if recorded else _write_shard(rows, path)
        if recorded is None:
            shards.append(entry)
            write_json(out / MANIFEST, manifest)
        elif entry != recorded:
            raise _changed(path)
        index, total = index + 1, total + entry["rows"]
    if not index:
        counts = {name: tally.total(name) for name in sorted({key[2] for key in tally.events})}
        raise DataError("texts that pass the filters", f"none: {counts}", "Change the limits")
    if index < len(shards):
        raise _changed(out / shards[index]["name"])


def _watch(
    first: list[Sample],
    rest: Iterator[Sample],
    size: int,
    count: int,
    shards: int,
    tally: Tally,
    progress: CollectFn | None,
) -> Iterator[Sample]:
    """The samples of one shard, reported as they pass."""
    for source in (first, islice(rest, size - 1)):
        for sample in source:
            yield sample
            count += 1
            if progress is not None and count % _REPORT_EVERY == 0:
                progress(CollectProgress(tally.total("read"), count, shards))


def _replay(rows: Iterable[Sample], path: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """Pass over a shard that is on disk as recorded; make it again if it is not."""
    if not path.is_file() or file_digest(path) != recorded["sha256"]:
        return _write_shard(rows, path)
    digest, count = hashlib.sha256(), 0
    for sample in rows:
        _digest(digest, sample)
        count += 1
    return {**recorded, "rows": count, "content": digest.hexdigest()}


def _changed(path: Path) -> DataError:
    return DataError(
        f"the same texts for {path} as at the first start",
        "others: a source or a library has changed since",
        "Choose another --out folder, or delete this one",
    )


def _digest(digest: Any, sample: Sample) -> None:
    digest.update("\0".join(sample).encode("utf-8") + b"\0")


def _write_shard(rows: Iterable[Sample], path: Path) -> dict[str, Any]:
    """Write a shard in one step; returns the manifest's entry."""
    digest, count = hashlib.sha256(), 0
    with atomic(path) as temporary:
        with _ShardWriter(temporary) as writer:
            for sample in rows:
                _digest(digest, sample)
                writer.add(sample)
                count += 1
        sha256 = file_digest(temporary)
    return {
        "name": path.name,
        "rows": count,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "content": digest.hexdigest(),
    }


class _ShardWriter:
    """Parquet, a row group in memory at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = pa.dictionary(pa.int32(), pa.string())
        self._schema = pa.schema([("text", pa.string()), ("lang", names), ("source", names)])
        few = ["lang", "source"]  # texts are all different: no dictionary, no smallest and largest
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=few, write_statistics=few
        )
        self._rows: list[Sample] = []
        self._chars = 0

    def add(self, sample: Sample) -> None:
        self._rows.append(sample)
        self._chars += len(sample.text)
        if len(self._rows) >= _GROUP_ROWS or self._chars >= _GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [
                pa.array(list(column), field.type)
                for column, field in zip(columns, self._schema, strict=True)
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._chars = [], 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def _counts(settings: CollectSettings, tally: Tally, duplicates: Duplicates) -> dict[str, Any]:
    targets = quotas(settings.langs, settings.samples)
    langs, events = tally.sums(0), sorted({key[2] for key in tally.events} - {"read", "kept"})
    return {
        "read": tally.total("read"),
        "kept": tally.total("kept"),
        "left_out": {name: tally.total(name) for name in events},
        "langs": {
            lang: {"wanted": targets[lang], **langs.get(lang, {})} for lang in settings.langs
        },
        "sources": tally.sums(1),
        "missing": [{"lang": lang, "source": source} for lang, source in tally.missing],
        "not_remembered": duplicates.forgotten,
    }
