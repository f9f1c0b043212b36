"""The models of a server, from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from unembed.demo.asking import Demo
from unembed.demo.guard import Clients
from unembed.demo.limits import Limits
from unembed.demo.metrics import Metrics
from unembed.demo.model import ServedModel, SharedEncoder
from unembed.encoders.base import Encoder
from unembed.errors import ConfigError
from unembed.inverter import Inverter


def load_demo(
    checkpoints: Sequence[str],
    limits: Limits,
    load_inverter: Callable[[str], Inverter],
    load_encoder: Callable[[Inverter], Encoder],
    log_texts: bool = False,
) -> Demo:
    """Load each model once; those of the same encoder share it.

    Args:
        checkpoints: Shipped names, folders or Hub repositories; the first is the default.
        limits: Of the server.
        load_inverter: A checkpoint → its inverter.
        load_encoder: An inverter → the encoder that it inverts.
        log_texts: Write texts and recoveries to the log.

    Raises:
        ConfigError: Two checkpoints have the same name, or the rate is not one.
        UnembedError: A checkpoint or an encoder cannot be loaded, or they do not fit together.
    """
    metrics = Metrics()
    clients = Clients(limits.rate, metrics)
    names = [Path(checkpoint).resolve().name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        raise ConfigError(
            "checkpoints whose names differ", ", ".join(checkpoints), "Rename or leave one out"
        )
    encoders: dict[tuple[str, str], SharedEncoder] = {}
    models: dict[str, ServedModel] = {}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        inverter = load_inverter(checkpoint)
        which = inverter.encoder.key
        if which not in encoders:
            encoders[which] = SharedEncoder(load_encoder(inverter))
        models[name] = ServedModel(name, inverter, encoders[which], limits, metrics)
    return Demo(models, limits, metrics, clients, log_texts)
