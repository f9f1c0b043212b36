"""Recovered texts on the disk as they come, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from unembed.errors import DataError, require_path
from unembed.evaluation.metrics import Recovery
from unembed.files import locked

FOLDER = "decoded"
UNFINISHED = ".unfinished"  # folder of an audit's or a comparison's recoveries, removed at the end
_DIGITS = 12


def settings_digest(settings: dict[str, Any]) -> str:
    """SHA-256 of plain data, the same for equal data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def as_folder(folder: Any) -> Path | None:
    """The folder to keep things in; raises ConfigError for what is no path."""
    require_path(folder=folder)
    return None if folder is None else Path(folder)


@contextmanager
def unfinished_folder(folder: Path | None) -> Iterator[Path | None]:
    """Keep recoveries in a folder until all are there: it goes when the block ends well.

    They are unmasked, so it is for nobody else to read, and for one process at a time.

    Args:
        folder: Of the report; nothing is kept when None.

    Raises:
        DataError: It cannot be made, or another process is writing to it.
    """
    if folder is None:
        yield None
        return
    subfolder = folder / UNFINISHED
    try:
        subfolder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error
    with locked(subfolder):
        yield subfolder
    shutil.rmtree(subfolder, ignore_errors=True)


class RowCache:
    """The recoveries of one row of the tables, in the order of the texts, one JSON object a line.

    The name of the file holds a digest of what the recoveries depend on, so other settings are
    another file. The first line says those settings; a last line without its end was cut short and
    is removed.

    Args:
        folder: Of the report; nothing is kept when None.
        name: Of the row.
        settings: What the recoveries depend on, plain data.

    Attributes:
        count: Recoveries that were there at the beginning.

    Raises:
        DataError: The folder cannot be written.
    """

    def __init__(self, folder: Path | None, name: str, settings: dict[str, Any]) -> None:
        self._file: BinaryIO | None = None
        self._finished: Iterator[bytes] = iter(())
        self.count = 0
        if folder is None:
            return
        label = re.sub(r"[^\w.=-]+", "-", name)[:60]
        where = folder / FOLDER
        self.path = where / f"{label}-{settings_digest(settings)[:_DIGITS]}.jsonl"
        try:
            where.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(self.path)
            self.count = max(0, lines - 1)
            if lines == 0:
                first = json.dumps({"row": name, "settings": settings}) + "\n"
                self.path.write_text(first, encoding="utf-8")
            self._file = self.path.open("ab")
        except OSError as error:
            raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error
        self._finished = _lines_after_the_first(self.path)

    def __enter__(self) -> RowCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, originals: Sequence[str]) -> list[Recovery]:
        """The finished recoveries of the next texts, as many as there are.

        Raises:
            DataError: What is on the disk belongs to other texts, or is damaged.
        """
        recoveries = []
        for original in originals:
            line = next(self._finished, None)
            if line is None:
                break
            try:
                row = json.loads(line)
                same = row.pop("original") == original
                recovery = Recovery(**row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._wrong(str(error)) from error
            if not same:
                raise self._wrong("another text")
            recoveries.append(recovery)
        return recoveries

    def append(self, originals: Sequence[str], recoveries: Sequence[Recovery]) -> None:
        """Keep the recoveries of the next texts."""
        if self._file is None:
            return
        for original, recovery in zip(originals, recoveries, strict=True):
            line = json.dumps({"original": original, **asdict(recovery)}, ensure_ascii=False)
            self._file.write(line.encode() + b"\n")
        self._file.flush()

    def complete(
        self, originals: Sequence[str], recover: Callable[[int], list[Recovery]]
    ) -> list[Recovery]:
        """The recoveries of the next texts: those on the disk, and the rest, which it keeps.

        Args:
            originals: The texts.
            recover: Recovers the texts from the given one on.
        """
        recoveries = self.read(originals)
        done = len(recoveries)
        if done < len(originals):
            recoveries += recover(done)
            self.append(originals[done:], recoveries[done:])
        return recoveries

    def _wrong(self, actual: str) -> DataError:
        return DataError(
            f"the recoveries of these texts in {self.path}",
            actual,
            "Delete the file, or the folder",
        )


def _whole_lines(path: Path) -> int:
    """Lines with their ends; what follows the last end is cut off."""
    if not path.exists():
        return 0
    count = end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            count += 1
            end += len(line)
    return count


def _lines_after_the_first(path: Path) -> Iterator[bytes]:
    """The lines that are there now; those appended later are left out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.readline()
        while file.tell() < size:
            yield file.readline()
