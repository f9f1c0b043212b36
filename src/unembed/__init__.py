"""unembed: how much text does an embedding give away?

The front door. Names are loaded when first used, so that importing the package costs nothing.

    >>> import unembed
    >>> print(*sorted(unembed.__all__))
    Defence Inverter UnembedError WordProbe audit defend evaluate load_encoder
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unembed.auditing.audit import audit
    from unembed.defences.comparison import defend
    from unembed.defences.defence import Defence
    from unembed.encoders import load_encoder
    from unembed.errors import UnembedError
    from unembed.evaluation.evaluate import evaluate
    from unembed.inverter import Inverter
    from unembed.vectors.words import WordProbe

__version__ = "0.1.0"

_WHERE = {
    "Defence": "unembed.defences.defence",
    "Inverter": "unembed.inverter",
    "UnembedError": "unembed.errors",
    "WordProbe": "unembed.vectors.words",
    "audit": "unembed.auditing.audit",
    "defend": "unembed.defences.comparison",
    "evaluate": "unembed.evaluation.evaluate",
    "load_encoder": "unembed.encoders",
}

__all__ = [
    "Defence",
    "Inverter",
    "UnembedError",
    "WordProbe",
    "audit",
    "defend",
    "evaluate",
    "load_encoder",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'unembed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
