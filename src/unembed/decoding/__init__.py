"""Ways from a fully masked sequence to text: one file per strategy, one registry.

To add a strategy, write a function of the `Strategy` shape in a file of its own and name it here.
"""

from __future__ import annotations

from unembed.decoding.base import Canvas, Decoded, DecodingStep, Strategy
from unembed.decoding.greedy import greedy
from unembed.errors import ConfigError

STRATEGIES: dict[str, Strategy] = {"greedy": greedy}


def find_strategy(name: str) -> Strategy:
    """The strategy registered under a name.

    Raises:
        ConfigError: There is none.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"a strategy among {', '.join(STRATEGIES)}", repr(name), "Correct --strategy"
        )
    return STRATEGIES[name]


__all__ = ["STRATEGIES", "Canvas", "Decoded", "DecodingStep", "Strategy", "find_strategy"]
