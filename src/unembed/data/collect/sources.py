"""Sources of texts: files and folders, or a data set of the Hub, behind one protocol."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from unembed.data.collect.filters import Pick, Skip, read_rows
from unembed.errors import DataError
from unembed.files import exists, require_extra, text_files

LANG = "{lang}"
_WEIGHT = re.compile(r"(?P<spec>.+):(?P<weight>\d+|\d*\.\d+)")
_HUB_PARTS = 3


class MissingLanguageError(DataError):
    """A source has no text in a language."""


class Source(Protocol):
    """Texts of several languages.

    Attributes:
        name: What the column ``source`` says.
    """

    @property
    def name(self) -> str:
        """Name in the column ``source``."""

    def describe(self, langs: Sequence[str]) -> dict[str, Any]:
        """Describe what tells this source from another, for the manifest; no absolute paths.

        Raises:
            DataError: The source is not there.
        """

    def paths(self, langs: Sequence[str]) -> list[Path]:
        """The files and folders of this machine that it reads."""

    def texts(self, lang: str, alone: bool, skip: Skip) -> Iterator[str]:
        """Yield the texts of a language in a fixed order, in bounded memory.

        Args:
            lang: The language.
            alone: No other language is asked for.
            skip: Called with the reason for each row that cannot be read.

        Raises:
            MissingLanguageError: There is no text in the language.
            DataError: The source cannot be read, or lacks a column.
        """


@dataclass(frozen=True)
class FileSource:
    """Local files: one, a folder of them, or a pattern with ``*`` in its last part.

    Attributes:
        pattern: The path. ``{lang}`` in it stands for the language; without it, rows are chosen by
            ``lang_column``.
        column: Column or key of the text.
        lang_column: Column or key of the language.
    """

    pattern: str
    column: str = "text"
    lang_column: str = "lang"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return Path(self.pattern).name

    def describe(self, langs: Sequence[str]) -> dict[str, Any]:
        """Name, columns, and the names and sizes of the files as one digest."""
        digest, files, size = hashlib.sha256(), 0, 0
        for lang in langs if LANG in self.pattern else langs[:1]:
            for path in [file for each in self._existing(lang) for file in text_files(each)]:
                files, size = files + 1, size + path.stat().st_size
                digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        return {
            "kind": "files",
            "name": self.name,
            "column": self.column,
            "lang_column": self.lang_column,
            "files": files,
            "bytes": size,
            "digest": digest.hexdigest(),
        }

    def paths(self, langs: Sequence[str]) -> list[Path]:
        """The file, the folder, or what the pattern finds."""
        return [path for lang in langs for path in self._existing(lang)]

    def texts(self, lang: str, alone: bool, skip: Skip) -> Iterator[str]:
        """Yield the texts of a language, file by file in the order of names."""
        pick = Pick(self.column, self.lang_column, lang, LANG in self.pattern, alone)
        any_text, passed_over = False, Counter[str]()

        def count(reason: str) -> None:
            passed_over[reason] += 1
            skip(reason)

        for path in [file for each in self._paths(lang) for file in text_files(each)]:
            for text in read_rows(path, pick, count):
                any_text = True
                yield text
        if not any_text:
            where = self.pattern.replace(LANG, lang)
            column = "" if pick.monolingual else f" by the column {self.lang_column!r}"
            rest = f" (passed over: {dict(passed_over)})" if passed_over else ""
            raise MissingLanguageError(
                f"texts in {lang!r} in {where}{column}",
                f"none{rest}",
                "Correct --langs or --source",
            )

    def _existing(self, lang: str) -> list[Path]:
        try:
            return self._paths(lang)
        except MissingLanguageError:
            return []

    def _paths(self, lang: str) -> list[Path]:
        path = Path(self.pattern.replace(LANG, lang))
        paths = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        if not any(exists(each) for each in paths) and (LANG in self.pattern or not paths):
            raise MissingLanguageError(
                f"texts in {lang!r}", f"nothing at {path}", "Correct --langs or --source"
            )
        return paths


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face Hub, streamed; or a local folder laid out as one.

    Attributes:
        repository: Its name, with ``@REVISION`` if not the newest, or a folder.
        config: Its configuration; ``{lang}`` in it stands for the language. Without, rows are
            chosen by ``lang_column``.
        column: Column of the text.
        lang_column: Column of the language.
    """

    repository: str
    config: str | None = None
    column: str = "text"
    lang_column: str = "lang"

    @property
    def name(self) -> str:
        """The data set without its revision; of a folder, its last part."""
        path = Path(self.repository)
        return path.name if path.is_absolute() else self.repository.split("@")[0]

    def describe(self, langs: Sequence[str]) -> dict[str, Any]:
        """Name, revision, configuration and columns."""
        return {
            "kind": "hub",
            "name": self.name,
            "revision": self._revision,
            "config": self.config,
            "column": self.column,
            "lang_column": self.lang_column,
        }

    def texts(self, lang: str, alone: bool, skip: Skip) -> Iterator[str]:
        """Yield the texts of a language as they are downloaded."""
        in_config = LANG in (self.config or "")
        pick = Pick(self.column, self.lang_column, lang, in_config, alone)
        filtering: bool | None = None
        any_text = False
        for row in self._rows(lang):
            if filtering is None:
                filtering = pick.filters(self.repository, list(row))
            if filtering and row.get(pick.lang_column) != lang:
                continue
            any_text = True
            text = row.get(pick.column)
            if isinstance(text, str):
                yield text
            else:
                skip("no_text")
        if not any_text:
            raise MissingLanguageError(
                f"texts in {lang!r} in {self.repository}", "none", "Correct --langs or --source"
            )

    def paths(self, langs: Sequence[str]) -> list[Path]:
        """The folder, where it is one; its cache of downloads is nobody's output."""
        path = Path(self.repository)
        return [path] if exists(path) else []

    @property
    def _revision(self) -> str | None:
        if exists(Path(self.repository)):
            return None
        return self.repository.partition("@")[2] or None

    def _rows(self, lang: str) -> Iterator[dict[str, Any]]:
        require_extra("hub", "data sets of the Hub", "take local files as --source")
        from datasets import load_dataset

        config = self.config.replace(LANG, lang) if self.config else None
        revision = self._revision
        path = self.repository.removesuffix(f"@{revision}") if revision else self.repository
        try:
            with _without_torch():
                rows = iter(
                    load_dataset(path, config, split="train", revision=revision, streaming=True)
                )
                first = list(islice(rows, 1))
            yield from first
            yield from rows
        except Exception as error:  # whatever the network, the Hub or the decoders raise
            raise self._error(lang, error) from error

    def _error(self, lang: str, error: Exception) -> DataError:
        """Turn what a library said into our error."""
        config = f" ({self.config.replace(LANG, lang)})" if self.config else ""
        place = f"the data set {self.repository}{config}"
        reason = f"{type(error).__name__}: {error}"
        if LANG in (self.config or "") and "BuilderConfig" in str(error):
            return MissingLanguageError(
                f"{lang!r} in {place}", reason, "Correct --langs or --source"
            )
        if isinstance(error, ConnectionError | TimeoutError):
            fix = "Check the network and run the command again; it goes on where it stopped"
            return DataError(f"an answer from the Hub about {place}", reason, fix)
        return DataError(f"readable rows in {place}", reason, "Correct --source, or run it again")


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep `datasets` from importing PyTorch, 220 MB, for tensors that nobody asks for."""
    from datasets import config

    available = config.TORCH_AVAILABLE
    config.TORCH_AVAILABLE = available and "torch" in sys.modules
    try:
        yield
    finally:
        config.TORCH_AVAILABLE = available


@dataclass(frozen=True)
class Weighted:
    """A source and its share of the samples of a language, relative to the other sources'."""

    source: Source
    weight: float = 1.0


def parse_source(spec: str, column: str = "text", lang_column: str = "lang") -> Weighted:
    """Read a ``--source``.

    Args:
        spec: ``c4``, ``hf:NAME[:CONFIG][:COLUMN]`` or a path; then ``:WEIGHT``, if any. ``{lang}``
            in a path or configuration stands for the language.
        column: Column of the text, where the spec names none.
        lang_column: Column of the language.

    Raises:
        DataError: It names nothing, or its weight is zero.
    """
    if not spec.strip():
        raise DataError("a --source", repr(spec), "Name a file, a folder or a data set")
    match = None if exists(Path(spec)) else _WEIGHT.fullmatch(spec)
    name, weight = (match["spec"], float(match["weight"])) if match else (spec, 1.0)
    if weight <= 0:
        raise DataError("a weight above 0", spec, "Leave the source out")
    if name == "c4":
        return Weighted(HubSource("allenai/c4", LANG, column, lang_column), weight)
    if not name.startswith("hf:"):
        return Weighted(FileSource(name, column, lang_column), weight)
    parts = name.removeprefix("hf:").split(":")
    if len(parts) > _HUB_PARTS or not parts[0]:
        raise DataError("hf:NAME[:CONFIG][:COLUMN][:WEIGHT]", spec, "Correct --source")
    repository, config, text = (*parts, "", "")[:3]
    return Weighted(HubSource(repository, config or None, text or column, lang_column), weight)
