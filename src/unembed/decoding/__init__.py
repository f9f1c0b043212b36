"""Ways from a fully masked sequence to text: one file per strategy, one value for how to decode.

To add a strategy, write a frozen dataclass of the `Strategy` shape in a file of its own and name
it in `settings.STRATEGIES`. Its fields are its options.
"""

from __future__ import annotations

from unembed.decoding.settings import DEFAULT_STEPS, STRATEGIES, Decoding, strategy_fields
from unembed.decoding.strategy import Decoded, DecodingStep, Oracle, SequenceSpec, Strategy

__all__ = [
    "DEFAULT_STEPS",
    "STRATEGIES",
    "Decoded",
    "Decoding",
    "DecodingStep",
    "Oracle",
    "SequenceSpec",
    "Strategy",
    "strategy_fields",
]
