"""Embedding models: text → unit vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unembed.encoders.base import Encoder

API_PREFIX = "openai:"  # of the name of an encoder behind an API
_API = ("api_base", "cache", "max_calls", "price")
_LOCAL = ("backend", "pooling", "prompt_name", "revision")
_MACHINE = ("compute", "trust_remote_code")
_TEXTS, _COUNTS = ("prompt", "prompt_name", "pooling"), ("batch_size", "truncate_dim")


def load_encoder(name: str | Path = "all-MiniLM-L6-v2", **options: Any) -> Encoder:
    """Load an embedding model: the one place where a name becomes an encoder.

    Args:
        name: A catalogue name, a local folder, a Hub repository, or ``openai:MODEL`` for a model
            behind an OpenAI-compatible API.
        **options: Those of `encoders.sentence.load_encoder`, or, of a model behind an API, of
            `encoders.api.load_api_encoder`; None is as if left out.

    Raises:
        EncoderError: There is no such model, or it gives no usable vectors.
        ConfigError: An option is for the other kind of model, or the extra ``api`` is missing.
    """
    from unembed.errors import ConfigError
    from unembed.files import require_extra

    if not isinstance(name, (str, Path)):
        raise ConfigError("the name of an encoder", f"{name!r:.80}", "Correct encoder.name")
    name = str(name)
    is_remote = name.startswith(API_PREFIX)
    settings = {key: value for key, value in options.items() if value is not None}
    _check_options(settings)
    for key in _LOCAL if is_remote else _API:
        if key in settings:
            kind = "sentence-transformers" if is_remote else f"an API ({API_PREFIX}MODEL)"
            raise ConfigError(
                f"{key} for an encoder of {kind} only", f"it for {name}", "Leave it out"
            )
    if not is_remote:
        from unembed.device import Compute, choose_compute
        from unembed.encoders import sentence

        if not isinstance(settings.get("compute"), Compute | None):
            settings["compute"] = choose_compute(settings["compute"], "float32", training=False)
        return sentence.load_encoder(name, **settings)
    require_extra("api", "an encoder behind an API")
    from unembed.encoders.api import load_api_encoder

    for key in _MACHINE:  # of this machine, where nothing is computed
        settings.pop(key, None)
    return load_api_encoder(name, **settings)


def as_encoder(encoder: Any, **options: Any) -> Encoder | None:
    """The encoder that a caller hands over, loaded where it is a name; None for None.

    Raises:
        EncoderError: It is something else, or cannot be loaded.
    """
    from unembed.errors import EncoderError

    if isinstance(encoder, (str, Path)):
        return load_encoder(encoder, **options)
    if encoder is not None and not (hasattr(encoder, "identity") and hasattr(encoder, "encode")):
        actual = f"{type(encoder).__name__} {encoder!r:.80}"
        raise EncoderError("an encoder, or its name", actual, "Load it with unembed.load_encoder")
    model: Encoder | None = encoder
    return model


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that no encoder has, and values of another kind; raises ConfigError."""
    from unembed.errors import ConfigError

    names = dict.fromkeys((*_TEXTS, *_COUNTS, *_LOCAL, *_API, *_MACHINE))
    if unknown := [key for key in options if key not in names]:
        fix = "Leave it out"
        if "device" in unknown:
            fix = f"Pass compute={options['device']!r}"
        raise ConfigError(f"options among {', '.join(names)}", ", ".join(unknown), fix)
    for key, value in options.items():
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if key in _TEXTS and not isinstance(value, str):
            raise ConfigError(f"{key} as text", f"{value!r:.80}", f"Correct {key}")
        if key == "trust_remote_code" and not isinstance(value, bool):
            raise ConfigError(f"{key} as True or False", f"{value!r:.80}", f"Correct {key}")
        if key in _COUNTS and not number:
            raise ConfigError(f"{key} of at least 1", f"{value!r:.80}", f"Correct {key}")
