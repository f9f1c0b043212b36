"""Settings of decoding, as one value: strategy, options, passes, and what changes the logits.

The same value goes into the command line, Python, evaluation, demo and benchmarks:

    >>> decoding = Decoding.parse("euler:steps=16:temperature=0.5")
    >>> decoding.steps, decoding.strategy.temperature
    (16, 0.5)
    >>> str(Decoding.of("greedy", lengths=3))
    'greedy:steps=8:lengths=3'
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NoReturn, cast

import numpy as np

from unembed.decoding.best_of import BestOf
from unembed.decoding.euler import Euler, EulerRemask, TwoStage
from unembed.decoding.guided_search.search import GuidedSearch
from unembed.decoding.logits import REPETITION_PENALTY
from unembed.decoding.residual import Residual
from unembed.decoding.sequential import EntropyBounded, Sequential
from unembed.decoding.strategy import Strategy
from unembed.errors import ConfigError

STRATEGIES: dict[str, type[Strategy]] = {
    "greedy": Sequential,
    "entropy-bounded": EntropyBounded,
    "euler": Euler,
    "euler-remask": EulerRemask,
    "two-stage": TwoStage,
    "best-of": BestOf,
    "residual": Residual,
    "guided-search": GuidedSearch,
}
# Strategies of other systems, whose modules stand on this one: imported when they are asked for
PEERS = {"zero2text": ("unembed.baselines.zero2text", "Zero2Text")}
DEFAULT_STEPS = 8  # as good as one a position, and four times as fast (docs/results.md)
MOST_STEPS = 4096
MOST_CALLS = 1_000_000
MOST_TOKENS = 65_536
FORM = (
    "NAME[:steps=N][:guidance=FIRST/LAST][:repetition=X][:encoder_calls=N][:length=N]"
    "[:OPTION=VALUE]…"
)

_STRONGEST = 100.0  # of guidance and repetition penalty
# Options by the names they had before 0.2, and those that are gone, which have no effect
ALIASES = {"enough": "stop_cosine"}
WITHDRAWN = ("curiosity", "exploration", "likelihood", "probes", "refills")


@dataclass(frozen=True)
class Decoding:
    """Settings of decoding vectors into texts; checked when it is made.

    Attributes:
        strategy: With its options.
        steps: Denoiser passes at most for each hypothesis, from 1.
        guidance: Strength of classifier-free guidance at the first and at the last pass, say
            (0, 1); none when None. Each pass then runs the denoiser twice.
        repetition_penalty: Nats taken off a token's logit for each time the text has it already;
            0 is the denoiser's own distribution.
        encoder_calls: Texts that may be embedded for each vector; 0 is the threat model *vector
            only*.
        length: Content tokens of every text; found by the strategy when None.

    Raises:
        ConfigError: A number out of range.
    """

    strategy: Strategy = field(default_factory=Sequential)
    steps: int = DEFAULT_STEPS
    guidance: tuple[float, float] | None = None
    repetition_penalty: float = REPETITION_PENALTY
    encoder_calls: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strategy, (str, type)) or not callable(self.strategy):
            fix = "Make one with Decoding.of(NAME)"
            raise ConfigError("a strategy", f"{self.strategy!r:.80}", fix)
        numbers: dict[str, Any] = {
            "steps": _whole("steps", self.steps, 1, MOST_STEPS),
            "encoder_calls": _whole("encoder_calls", self.encoder_calls, 0, MOST_CALLS),
            "repetition_penalty": _strength("repetition", self.repetition_penalty),
        }
        if self.length is not None:
            numbers["length"] = _whole("length", self.length, 1, MOST_TOKENS)
        if self.guidance is not None:
            strengths: Any = self.guidance  # from Python anything may come
            if not isinstance(strengths, (tuple, list)) or len(strengths) != 2:  # noqa: PLR2004
                _refuse("guidance as two strengths, say (0, 1)", strengths, "guidance")
            numbers["guidance"] = tuple(_strength("guidance", value) for value in strengths)
        for name, number in numbers.items():  # those of NumPy as Python's, which JSON can write
            object.__setattr__(self, name, number)

    @classmethod
    def of(
        cls,
        strategy: str = "greedy",
        *,
        steps: int | None = None,
        guidance: tuple[float, float] | None = None,
        repetition: float | None = None,
        encoder_calls: int = 0,
        length: int | None = None,
        **options: Any,
    ) -> Decoding:
        """Make one from the name of a strategy.

        Args:
            strategy: A key of `STRATEGIES`.
            steps: `DEFAULT_STEPS` when not given.
            guidance: See `Decoding`.
            repetition: The ``repetition_penalty``; its default when not given.
            encoder_calls: See `Decoding`.
            length: See `Decoding`.
            **options: Of the strategy; a value may also be text, as the command line has it.

        Raises:
            ConfigError: No such strategy or option, or a value of the wrong type or out of range.
        """
        return cls(
            make_strategy(strategy, options),
            DEFAULT_STEPS if steps is None else steps,
            guidance,
            REPETITION_PENALTY if repetition is None else repetition,
            encoder_calls,
            length,
        )

    @classmethod
    def parse(cls, text: str, steps: int | None = None) -> Decoding:
        """Read ``greedy:steps=8`` or ``euler:temperature=0.5``.

        Args:
            text: ``NAME[:steps=N][:guidance=FIRST/LAST][:repetition=X][:encoder_calls=N]
                [:length=N][:OPTION=VALUE]…``.
            steps: For one that does not say.

        Raises:
            ConfigError: Not of that form, or as `of`.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a decoding as {FORM}", repr(text), "Correct it")
        name, *settings = text.strip().split(":")
        values: dict[str, Any] = {}
        for setting in settings:
            key, equals, value = (part.strip() for part in setting.partition("="))
            if not (key and equals and value) or key in values:
                raise ConfigError(f"a decoding as {FORM}", repr(text), "Correct it")
            values[key] = value
        for key in ("steps", "encoder_calls", "length"):
            if key in values:
                values[key] = _convert(key, values[key], int)
        if "repetition" in values:
            values["repetition"] = _convert("repetition", values["repetition"], float)
        if "guidance" in values:
            values["guidance"] = parse_guidance(values["guidance"])
        return cls.of(name, **{"steps": steps, **values})

    @property
    def name(self) -> str:
        """The strategy's name; of one that is not registered, its class's."""
        kind = type(self.strategy)
        names = {strategy: name for name, strategy in STRATEGIES.items()}
        peers = {place: name for name, place in PEERS.items()}
        return names.get(kind) or peers.get((kind.__module__, kind.__name__), kind.__name__)

    @property
    def threat_model(self) -> str:
        """Threat model: only the vector, calls of the encoder too, or its weights."""
        if getattr(self.strategy, "open_weights", False):
            return "vector + encoder's weights"
        return "vector + encoder" if self.encoder_calls else "vector only"

    def check(self, has_encoder: bool, has_corpus: bool = False) -> None:
        """Refuse a strategy that lacks what it needs, before anything is decoded.

        Args:
            has_encoder: Whether there is an encoder to call.
            has_corpus: Whether there are texts to start from.

        Raises:
            ConfigError: The strategy calls the encoder, and there is none or no call is allowed;
                or there is a corpus that it would not look at.
        """
        if has_corpus and not isinstance(self.strategy, GuidedSearch):
            raise ConfigError("a corpus with guided-search only", self.name, "Leave corpus out")
        if self.strategy.needs_encoder and (not has_encoder or self.encoder_calls < 1):
            raise ConfigError(
                f"an encoder and at least 1 encoder call for the strategy {self.name}",
                f"{self.encoder_calls} encoder calls" if has_encoder else "no encoder",
                "Allow calls (--encoder-calls), or choose a strategy that needs the vector only",
            )

    def __str__(self) -> str:
        """The text that `parse` reads back; what is as by default is left out, but the steps."""
        settings: dict[str, Any] = {"steps": self.steps}
        if self.guidance is not None:
            settings["guidance"] = "/".join(map(_spell, self.guidance))
        if self.repetition_penalty != REPETITION_PENALTY:
            settings["repetition"] = self.repetition_penalty
        if self.encoder_calls:
            settings["encoder_calls"] = self.encoder_calls
        if self.length is not None:
            settings["length"] = self.length
        for item in dataclasses.fields(cast(Any, self.strategy)):
            value = getattr(self.strategy, item.name)
            if value != item.default:
                settings[item.name] = value
        return ":".join([self.name, *(f"{key}={_spell(value)}" for key, value in settings.items())])


def as_decoding(decoding: Decoding | str | None, settings: dict[str, Any]) -> Decoding:
    """Read a `Decoding` from whatever a caller says in its place.

    Args:
        decoding: One, its text, or None for the keywords.
        settings: Keywords of `Decoding.of`, the strategy's options also in ``options``.

    Raises:
        ConfigError: Both, or no valid decoding.
    """
    if decoding is None:
        plain = {key: value for key, value in settings.items() if key != "options"}
        options = settings.get("options") or {}
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            _refuse("options as a dict of the strategy's", options, "options")
        if both := ", ".join(sorted(plain.keys() & options.keys())):
            _refuse("each option once", f"{both} twice", "options")
        return Decoding.of(**plain, **options)
    if settings:
        raise ConfigError(
            "either decoding or its keywords", f"both, {', '.join(settings)}", "Leave one out"
        )
    if isinstance(decoding, Decoding):
        return decoding
    if isinstance(decoding, str):
        return Decoding.parse(decoding)
    raise ConfigError(
        "a Decoding, or the text of one", type(decoding).__name__, "Pass decoding='greedy:steps=8'"
    )


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """Make the strategy registered under a name, with its options.

    Args:
        name: A key of `STRATEGIES` or `PEERS`.
        options: Name → value, of the option's type or as text.

    Raises:
        ConfigError: No such strategy or option, or a value of the wrong type or out of range.
    """
    if name not in (*STRATEGIES, *PEERS):
        _refuse(f"a strategy among {', '.join(STRATEGIES)}", name, "the strategy")
    defaults = {item.name: item.default for item in strategy_fields(name)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if name == "guided-search" and key in WITHDRAWN:
            logging.getLogger(__name__).warning("note: guided-search has no %s any more", key)
            continue
        current = ALIASES.get(key, key)
        if current not in defaults:
            names = ", ".join(defaults) or "none"
            _refuse(f"an option of the strategy {name} ({names})", key, "the option")
        if current in values:
            _refuse(f"the option {current} once", options, "the option")
        values[current] = _convert(key, value, type(defaults[current]))
    return _strategy_type(name)(**values)


def _strategy_type(name: str) -> type[Strategy]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, kind = PEERS[name]
    peer: type[Strategy] = getattr(importlib.import_module(module), kind)
    return peer


def strategy_fields(name: str) -> tuple[dataclasses.Field[Any], ...]:
    """The options of a strategy, as `unembed.decoding.strategy.option` declares them."""
    return dataclasses.fields(cast(Any, _strategy_type(name)))


def parse_guidance(text: str) -> tuple[float, float]:
    """Read ``FIRST/LAST``.

    Raises:
        ConfigError: Not two numbers.
    """
    first, _, last = text.partition("/")
    try:
        return float(first), float(last)
    except ValueError:
        _refuse("guidance as FIRST/LAST, say 0/1", text, "guidance")


_ABSTRACT: dict[type, tuple[type, ...]] = {  # NumPy's numbers are such as well
    bool: (bool, np.bool_), int: (Integral,), float: (Real,), str: (str,),
}  # fmt: skip
_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _convert(name: str, value: Any, kind: type) -> Any:
    """Turn text, or a number of that type, into the type of the option's default."""
    try:
        if isinstance(value, str):
            return _SWITCH[value.lower()] if kind is bool else kind(value)
        if isinstance(value, _ABSTRACT[kind]) and _is_switch(value) == (kind is bool):
            return kind(value)
    except (ValueError, KeyError, OverflowError):
        pass
    _refuse(f"{name} of type {kind.__name__}", value, f"the option {name}")


def _is_switch(value: Any) -> bool:
    return isinstance(value, _ABSTRACT[bool])


def _whole(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, Integral) and not _is_switch(value)
    if not whole or not low <= value <= high:
        expected = f"{name} as a whole number of at least {low} and at most {high}"
        _refuse(expected, value, f"the strategy's {name}")
    return int(value)


def _strength(name: str, value: Any) -> float:
    number = isinstance(value, Real) and not _is_switch(value)
    if not number or not math.isfinite(value) or not 0.0 <= value <= _STRONGEST:
        _refuse(f"{name} of at least 0 and at most {_STRONGEST:g}", value, name)
    return value if type(value) is int else float(value)


def _refuse(expected: str, value: object, what: str) -> NoReturn:
    raise ConfigError(expected, repr(value), f"Correct {what}")


def _spell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
