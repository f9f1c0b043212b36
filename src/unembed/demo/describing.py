"""What a model can do, for `GET /models`."""

from __future__ import annotations

import inspect
import re
from functools import cache

from unembed.decoding import STRATEGIES, strategy_options
from unembed.decoding.greedy import ORDERS
from unembed.demo.asking import DEFAULT_CALLS
from unembed.demo.limits import Limits
from unembed.demo.model import ServedModel
from unembed.demo.schemas import ModelOut, Option, StrategyOut

_CHOICES = {"order": list(ORDERS)}


def describe_model(model: ServedModel, limits: Limits) -> ModelOut:
    """Everything a client has to know before it asks."""
    identity, inverter = model.encoder.identity, model.inverter
    trained = inverter.trained.get("config", {}).get("training", {})
    return ModelOut(
        name=model.name,
        encoder=identity.name,
        dimension=identity.dimension,
        length=inverter.length,
        max_text_chars=limits.text_chars,
        max_vectors=limits.vectors,
        strategies={name: _strategy(name) for name in STRATEGIES},
        default_steps=inverter.length,
        max_steps=limits.steps,
        default_encoder_calls=min(DEFAULT_CALLS, limits.encoder_calls),
        max_encoder_calls=limits.encoder_calls,
        guidance=float(trained.get("condition_dropout", 0.0)) > 0.0,
    )


@cache
def _strategy(name: str) -> StrategyOut:
    told = _told(STRATEGIES[name])
    options = {
        option: Option(
            default=default,
            type=type(default).__name__,
            description=told.get(option),
            choices=_CHOICES.get(option),
        )
        for option, default in strategy_options(name).items()
    }
    return StrategyOut(options=options, needs_encoder=STRATEGIES[name].needs_encoder)


def _told(strategy: type) -> dict[str, str]:
    """Option → its line in the docstring of the strategy, or of the one it refines."""
    found: dict[str, str] = {}
    for kind in reversed(strategy.__mro__):
        _, _, attributes = (inspect.cleandoc(kind.__doc__ or "")).partition("Attributes:\n")
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            found[match[1]] = re.sub(r"``|`", "", " ".join(match[2].split()))
    return found
