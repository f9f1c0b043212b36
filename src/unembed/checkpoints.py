"""An inverter's folder: configuration, tokenizer, weights, card, curves.

Weights are safetensors in float16, bfloat16 or int8, in one file or in shards. int8 is weight-only
and symmetric: each row of a matrix (each output of a linear layer, each token of a table) is stored
as whole numbers from -127 to 127 with one float32 scale, under the matrix's name and that name with
``_scale`` after it. What is no matrix (biases, positions) is stored as float16 beside them.
Everything becomes float32 again when it is loaded.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint
from unembed.errors import CheckpointError, ConfigError
from unembed.files import atomic, flush, is_file, read_bounded, read_json, require_weights
from unembed.tokenizer import TextTokenizer

FORMAT, SCALED_OR_SHARDED = 1, 2  # a folder gets the lower number that can read it
CONFIG, TOKENIZER, CARD, CURVES = "config.json", "tokenizer.json", "README.md", "curves.png"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_SHARDS = "model-*-of-*.safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_SIZE = 1 << 31  # of a network, in any direction
_MOST_CHARS = 400  # letters of a fault
_SCALE = "_scale"
_LARGEST = 127  # of int8, symmetric: -128 is left out
_MATRIX = 2  # dimensions
_UNITS = ("B", "KB", "MB", "GB", "TB")
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?) *({'|'.join(_UNITS)})")


@dataclass(frozen=True)
class Storage:
    """Format in which weights are written.

    Attributes:
        number_format: ``float16``, ``bfloat16`` or ``int8``.
        shard_size: Weights larger than this are cut into several files: ``500MB``, ``4GB``
            (powers of ten). A tensor is never cut.

    Raises:
        ConfigError: Another number format, or a size that is none.
    """

    number_format: str = "float16"
    shard_size: str = "4GB"

    def __post_init__(self) -> None:
        if self.number_format not in FORMATS:
            raise ConfigError(
                f"weights in {', '.join(FORMATS)}", repr(self.number_format), "Correct --weights"
            )
        if self.shard_bytes < 1:
            raise ConfigError(
                "a shard size such as 500MB or 4GB", repr(self.shard_size), "Correct --shard-size"
            )

    @property
    def shard_bytes(self) -> int:
        """The shard size in bytes; 0 if it is no size."""
        match = _SIZE.fullmatch(str(self.shard_size).strip().upper())
        return round(float(match[1]) * 1000 ** _UNITS.index(match[2])) if match else 0


class _TokenIds(BaseModel):
    model_config = ConfigDict(strict=True)

    size: PositiveInt
    mask_id: NonNegativeInt
    pad_id: NonNegativeInt
    end_id: NonNegativeInt
    kept: str | None = None


class _Diffusion(BaseModel):
    model_config = ConfigDict(strict=True)

    schedule: Literal["log-linear", "linear"]
    rate: float = Field(gt=0, allow_inf_nan=False)


class _Settings(BaseModel):
    """What is read of an inverter's config.json."""

    denoiser_sizes: dict[str, Any]
    encoder_identity: EncoderIdentity
    token_ids: _TokenIds
    diffusion_process: _Diffusion
    training: dict[str, Any] | None = None
    encoder_fingerprint: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """Contents of an inverter's folder.

    Attributes:
        denoiser: The network with its weights.
        tokenizer: Of its vocabulary.
        encoder: The encoder whose vectors it inverts.
        diffusion: ``{"schedule": ..., "rate": ...}`` of its training.
        trained: Facts about the training, for the record.
        card: Model card, Markdown.
        fingerprint: The encoder's vectors of the probe texts, where they are known.
        storage: How the weights are written.
        curves: Picture of the training (PNG), where there is one.
    """

    denoiser: Denoiser
    tokenizer: TextTokenizer
    encoder: EncoderIdentity
    diffusion: dict[str, Any]
    trained: dict[str, Any] = field(default_factory=dict)
    card: str | None = None
    fingerprint: Fingerprint | None = None
    storage: Storage = field(default_factory=Storage)
    curves: bytes | None = None


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write weights, tokenizer, card, and the configuration, without which nothing loads.

    All files are whole on the disk before the first takes the place of an older one.

    Raises:
        CheckpointError: The weights do not fit the format, or the disk refused; what was in the
            folder is as it was.
    """
    if not isinstance(checkpoint.storage, Storage):
        raise CheckpointError("storage as a Storage", repr(checkpoint.storage), "Correct storage")
    files = {TOKENIZER: checkpoint.tokenizer.definition.encode()}
    if checkpoint.card is not None:
        files[CARD] = checkpoint.card.encode()
    if checkpoint.curves is not None:
        files[CURVES] = checkpoint.curves
    config = {
        "format": SCALED_OR_SHARDED,
        "denoiser_sizes": checkpoint.denoiser.sizes.to_dict(),
        "encoder_identity": checkpoint.encoder.to_dict(),
        "token_ids": checkpoint.tokenizer.ids_to_dict(),
        "diffusion_process": checkpoint.diffusion,
        "training": checkpoint.trained,
    }
    if checkpoint.fingerprint is not None:
        config["encoder_fingerprint"] = checkpoint.fingerprint.to_dict()

    def make_files(sharded: bool) -> dict[str, bytes]:
        if checkpoint.storage.number_format != "int8" and not sharded:
            config["format"] = FORMAT
        # The first to be whole is the last to take its place
        return {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), **files}

    save_weights(checkpoint.denoiser.state_dict(), folder, checkpoint.storage, make_files)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read an inverter's folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the files do not fit together.
    """
    try:
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict) or config.get("format") not in (FORMAT, SCALED_OR_SHARDED):
            version = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise CheckpointError(
                f"format {FORMAT} or {SCALED_OR_SHARDED} in {folder / CONFIG}",
                str(version)[:100],
                "Upgrade unembed, or export the inverter again",
            )
        settings = _Settings.model_validate(config)
        sizes = DenoiserSizes.from_dict(settings.denoiser_sizes)
        _require_fitting(settings, sizes)
        entry = settings.encoder_fingerprint
        fingerprint = None if entry is None else Fingerprint.from_dict(entry)
        card, curves = (
            read_bounded(path) if path.is_file() else None
            for path in (folder / CARD, folder / CURVES)
        )
    except (OSError, ValueError) as error:
        a_run = is_file(folder / "best.safetensors")
        fix = f"Run `unembed export {folder} OUT` and use OUT" if a_run else "Copy the folder again"
        raise CheckpointError(
            f"an inverter's config.json in {folder}", _first_line(error), fix
        ) from error
    return Checkpoint(
        denoiser=_load_denoiser(folder, sizes),
        tokenizer=TextTokenizer.load(
            folder / TOKENIZER, settings.token_ids.model_dump(exclude_none=True)
        ),
        encoder=settings.encoder_identity,
        diffusion=settings.diffusion_process.model_dump(),
        trained=settings.training or {},
        card=None if card is None else card.decode("utf-8", errors="replace"),
        fingerprint=fingerprint,
        storage=stored_as(folder),
        curves=curves,
    )


def _require_fitting(settings: _Settings, sizes: DenoiserSizes) -> None:
    """Refuse sizes that do not belong together, or that no network has.

    Raises:
        ValueError: They do not.
    """
    largest = max(sizes.to_dict().values())
    if largest > _LARGEST_SIZE:
        raise ValueError(f"a size of {largest}")
    network = sizes.vocab_size, sizes.embedding_dim
    others = settings.token_ids.size, settings.encoder_identity.dimension
    if network != others:
        raise ValueError(f"a network of {network} tokens and dimensions, where others say {others}")


def _first_line(error: Exception) -> str:
    """A validation error by its first fault, another as it is, in one line of some length."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:_MOST_CHARS]
    return " ".join(str(error).split())[:_MOST_CHARS] or type(error).__name__


def _load_denoiser(folder: Path, sizes: DenoiserSizes) -> Denoiser:
    weights = load_weights(folder)
    try:
        if sizes.layers > len(weights):  # building millions of them would take hours
            raise RuntimeError(f"{sizes.layers} layers, but {len(weights)} tensors")
        with torch.device("meta"):
            denoiser = Denoiser(sizes)
        denoiser.load_state_dict(weights, assign=True)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"weights that fit config.json in {folder}",
            " ".join(str(error).split())[:300],
            "Copy the files again",
        ) from error
    broken = next((name for name, w in weights.items() if not bool(w.isfinite().all())), None)
    if broken is not None:
        raise CheckpointError(
            f"finite weights in {folder}", f"NaN or infinity in {broken}", "Copy the files again"
        )
    return denoiser


def shipped_inverters() -> dict[str, Path]:
    """The weights that come with the package, name → folder."""
    folder = Path(str(resources.files("unembed") / "pretrained"))
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def is_inverter(folder: Path) -> bool:
    """Tell whether a folder has the configuration of an inverter, whatever else is in it."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "denoiser_sizes" in config


def pack(state: Mapping[str, Tensor], number_format: str) -> dict[str, Tensor]:
    """Weights → the tensors that are stored.

    Args:
        state: Name → weights, of any floating-point format.
        number_format: A key of `FORMATS`.

    Raises:
        CheckpointError: A weight is not finite, or is too large for the format.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        weights = tensor.detach().float().cpu()
        if number_format == "int8" and name.endswith(".weight") and weights.ndim == _MATRIX:
            packed[name], packed[name + _SCALE] = quantise(weights)
        else:
            plain = torch.float16 if number_format == "int8" else FORMATS[number_format]
            packed[name] = weights.to(plain).contiguous()
        if not all(packed[n].isfinite().all() for n in (name, name + _SCALE) if n in packed):
            raise CheckpointError(
                f"finite weights within the range of {number_format}",
                f"others in {name}",
                "Use another state of the run, or --weights bfloat16, which has the range of "
                "float32",
            )
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were stored → float32 weights.

    Raises:
        KeyError: Whole numbers without their scales.
        ValueError: Scales of another shape, or numbers that are no weights.
    """
    weights = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            scales = tensors[name + _SCALE]
            if tensor.ndim != _MATRIX or scales.shape != tensor.shape[:1]:
                raise ValueError(f"{name} of shape {[*tensor.shape]}, scales {[*scales.shape]}")
            weights[name] = tensor.float() * scales.float()[:, None]
        elif tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} in {str(tensor.dtype).removeprefix('torch.')}")
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors):
            weights[name] = tensor.float()
    return weights


def quantise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to multiples of its largest magnitude / 127.

    Args:
        weights: float32 [rows, columns].

    Returns:
        int8 [rows, columns] and float32 scales [rows]; an error of at most half a scale a weight.
    """
    scales = weights.abs().amax(dim=1) / _LARGEST  # [rows]
    scales[scales == 0] = 1.0
    rounded = (weights / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return rounded.to(torch.int8), scales


def save_weights(
    state: Mapping[str, Tensor],
    folder: Path,
    storage: Storage,
    make_files: Callable[[bool], Mapping[str, bytes]] = lambda sharded: {},
) -> None:
    """Write weights into a folder, and what goes with them, in place of what is there.

    Every file is written under a temporary name; the old ones go when all the new ones are whole.

    Args:
        state: Name → weights.
        folder: Where.
        storage: How.
        make_files: Whether the weights are in several files → further files by name.

    Raises:
        CheckpointError: The weights do not fit the format, or the disk refused.
    """
    tensors = pack(state, storage.number_format)
    split = split_torch_state_dict_into_shards(
        tensors,
        max_shard_size=storage.shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [*folder.glob(_SHARDS), folder / WEIGHTS, folder / INDEX]
        with ExitStack() as stack:  # all are whole before the first takes its place
            files = dict(make_files(split.is_sharded))
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                files[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
            for name, content in files.items():
                temporary = stack.enter_context(atomic(folder / name))
                temporary.write_bytes(content)
                flush(temporary)
            metadata = {"format": "pt", "number_format": storage.number_format}
            for name, inside in split.filename_to_tensors.items():
                temporary = stack.enter_context(atomic(folder / name))
                write_tensors({key: tensors[key] for key in inside}, temporary, metadata)
                flush(temporary)
        for path in old:
            if path.name not in files and path.name not in split.filename_to_tensors:
                path.unlink(missing_ok=True)
    except (OSError, SafetensorError, ValueError) as error:  # the last: a name with a NUL
        raise CheckpointError(
            f"room to save {folder}", str(error), "Free some space, or choose another folder"
        ) from error


def write_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that others may read as any new file; `save_file` keeps it to us.

    Raises:
        OSError, SafetensorError: The disk refused.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata)
    path.chmod(mode)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder in float32, whatever they are stored as.

    Raises:
        CheckpointError: A file is missing or damaged, or the index does not fit the files.
    """
    where = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
    weights: dict[str, Tensor] = {}
    try:
        shards = _shard_names(folder) if where.name == INDEX else {WEIGHTS: set[str]()}
        for name, expected in shards.items():
            where = folder / name
            tensors = load_file(require_weights(where))
            if expected and set(tensors) != expected:
                raise ValueError(f"other tensors than {INDEX} lists")
            weights.update(tensors)
        return unpack(weights)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"whole weights in {where}", f"{type(error).__name__}: {error}", "Copy the file again"
        ) from error


def stored_as(folder: Path) -> Storage:
    """The number format of a folder's weights, to save them alike; float16 where it is unknown."""
    first = min(_shard_names(folder)) if (folder / INDEX).is_file() else WEIGHTS
    with safe_open(folder / first, framework="pt") as file:
        name = (file.metadata() or {}).get("number_format", "float16")
    return Storage(name if name in FORMATS else "float16")


def _shard_names(folder: Path) -> dict[str, set[str]]:
    """File name → names of the tensors that the index says are in it."""
    index = read_json(folder / INDEX)
    names: dict[str, set[str]] = {}
    for tensor, name in index["weight_map"].items():
        if Path(name).name != name:  # an index from elsewhere must not read outside its folder
            raise ValueError(f"{name!r}, which is not a file name")
        names.setdefault(name, set()).add(tensor)
    return names
