"""What several commands load: an encoder, an inverter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import unembed
from unembed.errors import ConfigError

if TYPE_CHECKING:
    from unembed.decoding import Decoding


def make_encoder(
    settings: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    dtype: str = "float32",
    only_on: str | None = None,
) -> Any:
    """The encoder; in float32, as a vector store's owner would run it, unless speed matters.

    With ``only_on``, the number format is for that type of device, and chosen on others.
    """
    from unembed.device import choose_compute

    compute = choose_compute(device, dtype, training=False)
    if only_on not in (None, compute.device.type):
        compute = choose_compute(device, training=False)
    name, options = settings["name"], {k: v for k, v in settings.items() if k != "name"}
    return unembed.load_encoder(
        name, **options, trust_remote_code=trust_remote_code, compute=compute
    )


def encoder_settings(inverter: unembed.Inverter, where: str | None = None) -> dict[str, Any]:
    """What `make_encoder` needs to load the encoder that an inverter inverts.

    With ``where`` it is taken from there; whether it is the same one shows its digest.
    """
    identity = inverter.encoder
    found = {"name": identity.name, "revision": identity.revision}
    if where is not None:
        found = {"name": where, "revision": None}
    return {**found, "prompt": identity.prompt}


def make_inverter(
    checkpoint: str | None, config: str | None, device: str, dtype: str | None = None
) -> unembed.Inverter:
    """The inverter of a checkpoint, of a configuration's name, or the one that ships."""
    from unembed.config import load_config

    if config is not None:
        load_config(config)
    name = checkpoint or (Path(config).stem if config is not None else "minilm")
    return unembed.Inverter.from_pretrained(name).to(device, dtype)


def read_decoding(
    strategy: str,
    options: list[str] | None = None,
    steps: int | None = None,
    guidance: tuple[float, float] | None = None,
    repetition: float | None = None,
    encoder_calls: int = 0,
) -> Decoding:
    """How to decode: the text of ``--strategy`` with what other options add to it.

    Raises:
        ConfigError: No such strategy or option, one said twice, or a value out of range.
    """
    from unembed.decoding import Decoding

    settings = {
        "steps": steps,
        "guidance": None if guidance is None else "{!r}/{!r}".format(*guidance),
        "repetition": repetition,
        "encoder_calls": encoder_calls or None,
    }
    words = [f"{name}={value}" for name, value in settings.items() if value is not None]
    for option in options or []:
        name, equals, _ = option.partition("=")
        if not equals or not name:
            raise ConfigError("an option of the form name=value", repr(option), "Correct --option")
    return Decoding.parse(":".join([strategy, *words, *(options or [])]))
