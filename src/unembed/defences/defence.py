"""Defence of vectors: fitted to them, applied, inverted where that is possible, saved."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from unembed.errors import ConfigError, DataError, UnembedError
from unembed.files import as_path, atomic

Vectors = NDArray[np.float32]

_FORMAT = 1
_SWITCH = {"true": True, "false": False}
_MODE = 0o600  # of a file of secrets
_ENDINGS = (".defence.json", ".defence.safetensors", ".secret.safetensors")
SHIPPED = {  # name → module of `unembed.defences` and class; in the order of tables
    "none": ("defence", "NoDefence"),
    "gaussian": ("noise", "Gaussian"),
    "laplace": ("noise", "Laplace"),
    "int8": ("quantise", "Int8"),
    "binary": ("quantise", "Binary"),
    "pq": ("product", "ProductQuantisation"),
    "cut": ("cut", "Cut"),
    "mean": ("mean", "MeanRemoval"),
    "rotation": ("rotate", "Rotation"),
    "permutation": ("rotate", "Permutation"),
    "pii": ("pii", "ReplacePii"),
}
ALL = (
    *("none", "gaussian", "gaussian:cosine=0.9"),
    *("gaussian:cosine=0.8", "laplace", "int8", "binary", "binary:rerank=100"),
    *("pq:parts=96", "pq", "cut", "cut:keep=0.25", "mean", "rotation"),
    *("permutation", "rotation:keep=0.5", "pii"),
)


class Defence(ABC):
    """What stands between an encoder's vectors and the store; settings are a dataclass's fields.

    Attributes:
        secret: Whether part of it is unknown to whoever reads the store. The parts named in
            ``secrets`` then go into a file of their own, readable to the owner alone.
        fitted: Names of the arrays that `fit` sets and `save` writes.
        secrets: Those of them that are secret.
        rerank: Results that are ranked again by exact vectors kept elsewhere; 0: none.
        identity: Whether what it stores are the encoder's own vectors, as after a change of texts.
    """

    secret: ClassVar[bool] = False
    fitted: ClassVar[tuple[str, ...]] = ()
    secrets: ClassVar[tuple[str, ...]] = ()
    identity: ClassVar[bool] = False
    rerank: int = 0

    def __str__(self) -> str:
        """The text that `parse_defence` reads."""
        return ":".join([name_of(type(self)), *(f"{k}={v}" for k, v in self.settings().items())])

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the defaults, plain data."""
        own: Any = self  # a user's class need be no dataclass
        if not is_dataclass(own):
            return {}
        values = {f.name: (getattr(own, f.name), f.default) for f in fields(own)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def describe(self) -> str:
        """One line on what it does: the first of its docstring."""
        return (type(self).__doc__ or str(self)).strip().splitlines()[0]

    def rewrite(self, texts: Sequence[str]) -> list[str] | None:
        """The texts to embed in place of these; None where texts stay as they are."""
        return None

    def fit(self, vectors: Vectors, random: np.random.Generator) -> None:  # noqa: B027 - optional
        """Learn from the store's unit vectors [N, D] and draw secrets; does nothing by default."""

    def __getattr__(self, name: str) -> Any:
        """Say of an array that `fit` sets that it is not there yet."""
        if name in type(self).fitted:
            raise ConfigError(
                f"{self} fitted to vectors", f"no {name}", "Call fit before, or load_defence"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @abstractmethod
    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """Turn unit vectors [n, D] into what the store searches, float32 [n, D']."""

    def query(self, vectors: Vectors) -> Vectors:
        """Turn unit vectors of queries [n, D] into what is compared with the store, [n, D']."""
        return self.apply(vectors, np.random.default_rng(0))

    def invert(self, rows: Vectors) -> Vectors | None:
        """What the public part says of the vectors [n, D] behind stored ones; None: nothing."""
        return None

    def sigma(self, dimension: int) -> float | None:
        """Standard deviation of independent noise in each of D numbers; None where there is none.

        Stored vectors are taken for scaled to unit length after the noise.
        """
        return None

    def codes(self, rows: Vectors) -> NDArray[Any]:
        """Stored vectors as they lie on the disk, [n, ...]; float32 as they are by default."""
        return rows

    def bytes_each(self, dimension: int) -> int:
        """Bytes of one stored vector of D' numbers."""
        return int(self.codes(np.zeros((1, dimension), np.float32)).nbytes)

    def save(self, path: str | Path) -> list[Path]:
        """Write settings and fitted arrays beside ``path``; secrets apart, for the owner alone.

        Returns:
            ``path.defence.json``, and where there are such ``path.defence.safetensors`` and
            ``path.secret.safetensors`` (mode 0600).

        Raises:
            DataError: They cannot be written.
        """
        path = as_path(path)
        public = {k: getattr(self, k) for k in self.fitted if k not in self.secrets}
        secret = {k: getattr(self, k) for k in self.secrets}
        settings = {"format": _FORMAT, "defence": str(self), "about": self.describe()}
        description, open_to_all, key = beside(path)
        paths = [description]
        try:
            for arrays, file, mode in ((secret, key, _MODE), (public, open_to_all, None)):
                if arrays:
                    _write_arrays(file, arrays, mode)
                    paths.append(file)
            with atomic(description) as file:
                file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"a place to write {path}", str(error), "Choose another --out"
            ) from error
        return paths


def load_defence(path: str | Path, own: type[Defence] | None = None) -> Defence:
    """Read what `Defence.save` wrote beside a copy, with its secrets where they are there.

    Args:
        path: Of the copy.
        own: The class of a defence that is not shipped: no file says which code is run.

    Raises:
        DataError: Nothing there, or the files are damaged.
        ConfigError: A defence that is neither shipped nor ``own``.
    """
    description, *arrays = beside(as_path(path))
    try:
        settings = json.loads(description.read_text(encoding="utf-8"))
        if settings.get("format", _FORMAT) != _FORMAT:
            raise ValueError(f"format {settings['format']!r:.40}, of another version of unembed")
        name, *words = settings["defence"].split(":")
        if own is not None and name == own.__name__:
            defence = _make(own, name, words)
        elif name in SHIPPED:
            defence = _make(_shipped_class(name), name, words)
        else:
            raise ConfigError(
                f"a shipped defence beside {path}", repr(name), "Pass its class to load_defence"
            )
        for file in arrays:
            if file.is_file():
                there = load_file(file)
                for name in set(there) & set(defence.fitted):
                    setattr(defence, name, there[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(
            f"a defended copy's .defence.json beside {path}",
            str(error),
            "Write it with `unembed defend VECTORS --write DEFENCE --out COPY`",
        ) from error
    missing = [name for name in defence.fitted if name not in vars(defence)]
    if missing:
        raise DataError(
            f"{', '.join(missing)} of {defence}", "no file that has them", "Copy its files again"
        )
    return defence


def beside(path: Path) -> list[Path]:
    """Names of what `Defence.save` writes beside a copy: settings, public arrays, secret ones."""
    return [path.with_name(path.name + ending) for ending in _ENDINGS]


def _write_arrays(path: Path, arrays: dict[str, NDArray[Any]], mode: int | None) -> None:
    with atomic(path) as file:
        if mode is not None:
            file.chmod(mode)  # before anything is in it
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, file)
        if mode is not None:
            os.chmod(file, mode)  # noqa: PTH101 - save_file may have replaced it


def name_of(kind: type[Defence]) -> str:
    """The name of a kind of defence: a shipped one's, else that of its class."""
    names = {f"unembed.defences.{module}.{cls}": name for name, (module, cls) in SHIPPED.items()}
    return names.get(f"{kind.__module__}.{kind.__qualname__}", kind.__name__)


def parse_defence(text: str) -> Defence:
    """Make a defence of ``name:setting=value``, ``module:Class`` or ``file.py:Class``.

    Raises:
        ConfigError: No such defence or setting, or a value out of range.
    """
    _require_name(text)
    name, *words = text.strip().split(":")
    if name in SHIPPED:
        kind = _shipped_class(name)
    elif words:
        kind, words = _user_class(name, words[0]), words[1:]
    else:
        raise ConfigError(
            f"a defence ({', '.join(SHIPPED)}, all) or module:Class", repr(text), "Correct it"
        )
    return _make(kind, name, words)


def _require_name(text: Any) -> None:
    if not isinstance(text, str):
        expected = "the name of a defence, with its settings"
        raise ConfigError(expected, f"{type(text).__name__} {text!r:.80}", "Correct it")


def _shipped_class(name: str) -> type[Defence]:
    module, cls = SHIPPED[name]
    kind: type[Defence] = getattr(importlib.import_module(f"unembed.defences.{module}"), cls)
    return kind


def _make(kind: type[Defence], name: str, words: Sequence[str]) -> Defence:
    values: dict[str, Any] = {}
    own: Any = kind  # a user's class need be no dataclass
    defaults = {f.name: f.default for f in fields(own)} if is_dataclass(own) else {}
    for word in words:
        key, _, value = word.partition("=")
        values[key] = _value(name, key, value, defaults)
    try:
        return kind(**values)
    except UnembedError:
        raise
    except Exception as error:  # a user's own class
        raise ConfigError(
            f"{name} to be made", f"{type(error).__name__}: {error}", "Correct it"
        ) from error


def _value(name: str, key: str, text: str, defaults: dict[str, Any]) -> Any:
    if key not in defaults:
        there = ", ".join(defaults) or "none"
        raise ConfigError(f"a setting of {name} ({there})", repr(key), "Correct --defences")
    kind: Callable[[str], Any] = type(defaults[key])
    if defaults[key] is None or defaults[key] is MISSING:
        return _literal(text)
    try:
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{key} of {name} as {kind.__name__}", repr(text), "Correct --defences"
        ) from None


def _literal(text: str) -> Any:
    """A value of a setting without a default: None, a number, a switch, else the text itself."""
    words: dict[str, Any] = {"none": None, **_SWITCH}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _user_class(name: str, cls: str) -> type[Defence]:
    """A user's own class, from a module that can be imported or a file of Python."""
    try:
        module = _module(name)
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"a defence ({', '.join(SHIPPED)}) or a module {name!r}",
            f"{type(error).__name__}: {error}",
            "Correct --defences",
        ) from error
    kind = getattr(module, cls, None)
    if not (isinstance(kind, type) and issubclass(kind, Defence)):
        raise ConfigError(
            f"a class {cls!r} in {name} that derives from unembed.Defence",
            "none" if kind is None else repr(kind)[:80],
            "See docs/defences.md",
        )
    return kind


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python in {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def parse_defences(text: str) -> list[Defence]:
    """Make the defences of a list, ``all`` for those of ``ALL``; none stands first in any case.

    Raises:
        ConfigError: As `parse_defence`, or one stands twice.
    """
    _require_name(text)
    names = [
        part for word in text.split(",") for part in (ALL if word.strip() == "all" else [word])
    ]
    if not any(name.strip() for name in names):
        raise ConfigError("defences, or all", repr(text), "Correct --defences")
    return as_defences([parse_defence(name) for name in names if name.strip()])


def as_defence(defence: Any) -> Defence:
    """The defence that a caller hands over, made where it is a name.

    Raises:
        ConfigError: It is something else, or cannot be made.
    """
    if isinstance(defence, str):
        return parse_defence(defence)
    if not isinstance(defence, Defence):
        fix = "Make one of it: Class()" if isinstance(defence, type) else "See docs/defences.md"
        raise ConfigError("a defence, or its name", f"{defence!r:.80}", fix)
    return defence


def as_defences(defences: Any) -> list[Defence]:
    """The defences that a caller hands over, names of some among them; undefended vectors first.

    Raises:
        ConfigError: Something that is none, or one stands twice.
    """
    if isinstance(defences, str):
        return parse_defences(defences)
    if isinstance(defences, Defence):
        defences = [defences]
    if not isinstance(defences, Iterable) or isinstance(defences, (bytes, Mapping)):
        actual = f"{type(defences).__name__} {defences!r:.80}"
        raise ConfigError("defences, or their names", actual, "See docs/defences.md")
    rows = [as_defence(each) for each in defences]
    labels = [str(each) for each in rows]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ConfigError("each defence once", f"{', '.join(twice)} twice", "Correct --defences")
    return [NoDefence(), *(each for each in rows if not isinstance(each, NoDefence))]


def require_share(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Refuse a setting outside of (low, high].

    Raises:
        ConfigError: It is.
    """
    number: Any = value  # from Python anything may come
    real = isinstance(number, (float, Integral, np.floating)) and not isinstance(number, bool)
    if not real or not low < number <= high:
        raise ConfigError(f"{name} above {low:g}, up to {high:g}", f"{value!r:.80}", "Correct it")


def unit(rows: NDArray[Any]) -> Vectors:
    """Rows scaled to unit length, float32; a row of zeros stays zero."""
    scaled: Vectors = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    ).astype(np.float32)
    return scaled


@dataclass
class NoDefence(Defence):
    """The vectors as they are."""

    identity: ClassVar[bool] = True

    def apply(self, vectors: Vectors, random: np.random.Generator) -> Vectors:
        """The same vectors."""
        return vectors

    def invert(self, rows: Vectors) -> Vectors:
        """The same vectors."""
        return rows
