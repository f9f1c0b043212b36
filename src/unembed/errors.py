"""Errors a user can act on.

Every message says what was expected, what was found and what to do. The command line prints the
message as one line and exits with code 2; the Python API raises the exception.
"""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from types import UnionType
from typing import Any

_MOST_CHARS = 1000  # of each part of a message


class UnembedError(Exception):
    """Base of every error that is the input's fault rather than the program's."""

    def __init__(self, expected: str, actual: str, fix: str) -> None:
        """Build the message from its three parts, each a phrase without a final full stop."""
        self.expected, self.actual, self.fix = expected, actual, fix
        parts = [_phrase(part) for part in (expected, actual, fix)]
        super().__init__("expected {}; found {}. {}.".format(*parts))


def _phrase(text: str) -> str:
    """A reason that a library gives may have several lines and a full stop, a name any length."""
    line = " ".join(line.strip() for line in text.splitlines()).strip().removesuffix(".")
    if len(line) > _MOST_CHARS:
        line = f"{line[: _MOST_CHARS // 2]} … {line[-_MOST_CHARS // 2 :]}"
    return line


class ConfigError(UnembedError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class DataError(UnembedError):
    """A text file or a folder of prepared pairs cannot be used."""


class EncoderError(UnembedError):
    """An encoder cannot be loaded, or is not the one it claims to be."""


class EmbeddingError(UnembedError):
    """A vector or text handed in cannot be inverted or encoded."""


class StoreError(UnembedError):
    """A vector store cannot be reached, read or understood."""


class CheckpointError(UnembedError):
    """Saved weights or a training state cannot be read, or belong to something else."""


class TrainingError(UnembedError):
    """Training cannot start or must not go on."""


# Checks of what Python callers pass


def require_kind(value: object, kind: type | UnionType, what: str, fix: str) -> None:
    """Refuse a value that is no instance of a class.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, kind):
        raise ConfigError(what, f"{type(value).__name__} {value!r:.80}", fix)


def require_callable(**values: Any) -> None:
    """Refuse a value, not None, that cannot be called.

    Args:
        **values: By the name that the error says.

    Raises:
        ConfigError: One of them cannot.
    """
    for name, value in values.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{name} as a function", f"{value!r:.80}", f"Correct {name}")


def require_whole(**values: tuple[Any, int]) -> tuple[int, ...]:
    """Refuse a value that is no whole number, or below its least; return them as Python's.

    Args:
        **values: (value, least) by the name that the error says.

    Raises:
        ConfigError: One of them is.
    """
    for name, (value, low) in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
            raise ConfigError(
                f"{name} as a whole number of at least {low}", f"{value!r:.80}", f"Correct {name}"
            )
    return tuple(int(value) for value, _ in values.values())


def require_number(**values: tuple[Any, float, float]) -> tuple[float, ...]:
    """Refuse a value that is no number, or out of its range; return them as Python's.

    Args:
        **values: (value, least, largest) by the name that the error says.

    Raises:
        ConfigError: One of them is.
    """
    for name, (value, low, high) in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            span = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            raise ConfigError(f"{name} as a number {span}", f"{value!r:.80}", f"Correct {name}")
    return tuple(float(value) for value, _, _ in values.values())


def require_switch(**values: Any) -> None:
    """Refuse a value that is neither True nor False.

    Args:
        **values: By the name that the error says.

    Raises:
        ConfigError: One of them is.
    """
    for name, value in values.items():
        if type(value).__name__ not in ("bool", "bool_"):  # NumPy's too
            raise ConfigError(f"{name} as True or False", f"{value!r:.80}", f"Correct {name}")


def require_path(**values: Any) -> None:
    """Refuse a value, not None, that is no path, or the empty one.

    Args:
        **values: By the name that the error says.

    Raises:
        ConfigError: One of them is.
    """
    for name, value in values.items():
        if value is not None and not (isinstance(value, (str, os.PathLike)) and str(value)):
            raise ConfigError(f"{name} as a path", f"{value!r:.80}", f"Correct {name}")


def require_text(**values: Any) -> None:
    """Refuse a value, not None, that is no text.

    Args:
        **values: By the name that the error says.

    Raises:
        ConfigError: One of them is none.
    """
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{name} as text", f"{value!r:.80}", f"Correct {name}")
