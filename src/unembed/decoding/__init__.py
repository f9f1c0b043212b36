"""Ways from a fully masked sequence to text: one file per strategy, one registry.

To add a strategy, write a frozen dataclass of the `Strategy` shape in a file of its own and name
it here. Its fields are its options.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from unembed.decoding.best_of import BestOf
from unembed.decoding.entropy_bounded import EntropyBounded
from unembed.decoding.euler import Euler, EulerRemask
from unembed.decoding.guided_search.search import GuidedSearch
from unembed.decoding.sequential import Greedy
from unembed.decoding.strategy import Canvas, Decoded, DecodingStep, Scorer, Strategy
from unembed.decoding.two_stage import TwoStage
from unembed.errors import ConfigError

STRATEGIES: dict[str, type[Strategy]] = {
    "greedy": Greedy,
    "entropy-bounded": EntropyBounded,
    "euler": Euler,
    "euler-remask": EulerRemask,
    "two-stage": TwoStage,
    "best-of": BestOf,
    "guided-search": GuidedSearch,
}


def find_strategy(name: str, /, **options: Any) -> Strategy:
    """The strategy registered under a name, with its options.

    Args:
        name: A key of `STRATEGIES`.
        **options: Its options; a value may also be text, as the command line gives it.

    Raises:
        ConfigError: No such strategy or option, or a value of the wrong type or out of range.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"a strategy among {', '.join(STRATEGIES)}", repr(name), "Correct --strategy"
        )
    defaults = strategy_options(name)
    for option in options:
        if option not in defaults:
            known = ", ".join(defaults) or "none"
            raise ConfigError(
                f"an option of the strategy {name} ({known})", repr(option), "Correct the option"
            )
    given = {key: _convert(key, value, type(defaults[key])) for key, value in options.items()}
    return STRATEGIES[name](**given)


def strategy_options(name: str) -> dict[str, int | float | bool | str]:
    """The options of a strategy with their defaults."""
    strategy: Any = STRATEGIES[name]
    return {field.name: cast(Any, field.default) for field in dataclasses.fields(strategy)}


_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _convert(option: str, value: Any, kind: type) -> Any:
    """A value as the type of the option's default, from text or from a number of that type."""
    try:
        if isinstance(value, str):
            return _SWITCH[value.lower()] if kind is bool else kind(value)
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    except (ValueError, KeyError):
        pass
    raise ConfigError(
        f"{option} of type {kind.__name__}", repr(value), f"Correct the option {option}"
    )


__all__ = [
    "STRATEGIES",
    "Canvas",
    "Decoded",
    "DecodingStep",
    "Scorer",
    "Strategy",
    "find_strategy",
    "strategy_options",
]
