"""Weights on disk: safetensors in float16, bfloat16 or int8, in one file or in shards.

int8 is weight-only and symmetric: each row of a matrix (each output of a linear layer, each token
of a table) is stored as whole numbers from -127 to 127 with one float32 scale, under the matrix's
name and that name with ``_scale`` after it. What is no matrix (biases, positions) is stored as
float16 beside them. Everything becomes float32 again when it is loaded.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unembed.errors import CheckpointError, ConfigError
from unembed.files import atomic

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_SHARDS = "model-*-of-*.safetensors"
_SCALE = "_scale"
_LARGEST = 127  # of int8, symmetric: -128 is left out
_MATRIX = 2  # dimensions
_UNITS = ("B", "KB", "MB", "GB", "TB")
_SIZE = re.compile(rf"([0-9]+(?:\.[0-9]+)?) *({'|'.join(_UNITS)})")


@dataclass(frozen=True)
class Storage:
    """How weights are written.

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
        found = _SIZE.fullmatch(self.shard_size.strip().upper())
        return round(float(found[1]) * 1000 ** _UNITS.index(found[2])) if found else 0


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


def unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were stored → float32 weights.

    Raises:
        KeyError: Whole numbers without their scales.
    """
    weights = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            weights[name] = tensor.float() * stored[name + _SCALE][:, None]
        elif not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored):
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
    whole = (weights / scales[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return whole.to(torch.int8), scales


def save_weights(state: Mapping[str, Tensor], folder: Path, storage: Storage) -> None:
    """Write weights into a folder, in place of those that are there.

    Every file is written under a temporary name; the old ones go when all the new ones are whole.

    Raises:
        CheckpointError: The weights do not fit the format, or the disk refused.
    """
    tensors = pack(state, storage.number_format)
    split = split_torch_state_dict_into_shards(
        tensors,
        max_shard_size=storage.shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )
    old = [*folder.glob(_SHARDS), folder / WEIGHTS, folder / INDEX]
    try:
        with ExitStack() as stack:  # all are whole before the first takes its place
            metadata = {"format": "pt", "number_format": storage.number_format}
            for name, inside in split.filename_to_tensors.items():
                temporary = stack.enter_context(atomic(folder / name))
                write_tensors({key: tensors[key] for key in inside}, temporary, metadata)
        for path in old:
            if path.name not in split.filename_to_tensors:
                path.unlink(missing_ok=True)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
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
    stored: dict[str, Tensor] = {}
    try:
        shards = _shard_names(folder) if where.name == INDEX else {WEIGHTS: set[str]()}
        for name, expected in shards.items():
            where = folder / name
            found = load_file(where)
            if expected and set(found) != expected:
                raise ValueError(f"other tensors than {INDEX} lists")
            stored.update(found)
        return unpack(stored)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"whole weights in {where}", f"{type(error).__name__}: {error}", "Copy the file again"
        ) from error


def stored_as(folder: Path) -> Storage:
    """The number format of a folder's weights, to save them alike; float16 where it is unknown."""
    first = next(iter(sorted(folder.glob(_SHARDS))), folder / WEIGHTS)
    with safe_open(first, framework="pt") as file:
        name = (file.metadata() or {}).get("number_format", "float16")
    return Storage(name if name in FORMATS else "float16")


def _shard_names(folder: Path) -> dict[str, set[str]]:
    """File name → names of the tensors that the index says are in it."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    names: dict[str, set[str]] = {}
    for tensor, name in index["weight_map"].items():
        if Path(name).name != name:  # an index from elsewhere must not read outside its folder
            raise ValueError(f"{name!r}, which is not a file name")
        names.setdefault(name, set()).add(tensor)
    return names
