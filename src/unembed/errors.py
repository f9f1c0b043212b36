"""Errors a user can act on.

Every message says what was expected, what was found and what to do. The command line prints the
message as one line and exits with code 2; the Python API raises the exception.
"""

from __future__ import annotations

from types import UnionType

_MOST_CHARS = 1000  # of each part of a message


class UnembedError(Exception):
    """Base of every error that is the input's fault rather than the program's."""

    def __init__(self, expected: str, found: str, fix: str) -> None:
        """Build the message from its three parts, each a phrase without a final full stop."""
        self.expected, self.found, self.fix = expected, found, fix
        parts = [_phrase(part) for part in (expected, found, fix)]
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


def require_kind(value: object, kind: type | UnionType, what: str, fix: str) -> None:
    """Refuse a value that is no instance of a class.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, kind):
        raise ConfigError(what, f"{type(value).__name__} {value!r:.80}", fix)
