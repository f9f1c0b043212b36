"""The one place that chooses a device and its number format."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch

from unembed.errors import ConfigError

_PLAINLY_FASTER, _HOPELESS = 1.5, 5
_PROBE_SIZE, _PROBE_ROUNDS = 384, 5
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# oneDNN keeps a kernel of some megabytes for each shape, 1,024 of them unless told otherwise: a
# training run, whose number of masked positions differs from step to step, came to 10 GB.
_KERNEL_CACHE, _KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"
_FLOAT16_UNITS = (7, 0)  # CUDA capability from which there are tensor cores


@dataclass(frozen=True)
class Compute:
    """Device that tensors live on, and the format matrix products run in.

    Attributes:
        device: The torch device.
        dtype: The format of matrix products; parameters and reductions stay in float32.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for this device; does nothing when the format is float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def describe(self) -> str:
        """Describe the device by its name, and the format, for the record."""
        kind = self.device.type
        name = f"CPU ({torch.get_num_threads()} threads)" if kind == "cpu" else kind
        if kind == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


def choose_compute(device: str = "auto", dtype: str = "auto", *, training: bool = True) -> Compute:
    """Turn the user's words into a device and a number format.

    Args:
        device: ``auto`` (CUDA, then Apple's MPS, then the CPU) or any torch device name.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``. ``auto`` is bfloat16 where it is
            quicker: on a GPU with units for it, and on a CPU that multiplies it plainly faster than
            float32, which is measured (some milliseconds, once): of two processors with AVX-512
            bfloat16 one was four times as fast with it, the other half as fast.
        training: With gradients, for which float16 is too narrow; without, ``auto`` is float16 on
            a GPU that has units for it and none for bfloat16.

    Raises:
        ConfigError: The device or the format does not exist here.
    """
    os.environ.setdefault(_KERNEL_CACHE, _KERNELS)  # read at the process's first product
    if device == "auto":
        device = _best_device()
    dtype = str(dtype).removeprefix("torch.")
    try:
        torch_device = torch.device(device)
        torch.empty(1, device=_own(torch_device))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "a device that PyTorch can use here (auto, cpu, cuda, mps)",
            f"{device!r} ({reason})",
            "Use --device auto or --device cpu",
        ) from error
    if dtype == "auto":
        return Compute(torch_device, _quickest_format(torch_device, training))
    if dtype not in _FORMATS:
        names = ", ".join(_FORMATS)
        raise ConfigError(f"a dtype of auto, {names}", repr(dtype), "Correct the dtype")
    return Compute(torch_device, _FORMATS[dtype])


def _own(device: torch.device) -> torch.device:
    """The device that a process of a launcher has for itself, where all have the same name."""
    rank = os.environ.get("LOCAL_RANK", "")
    if str(device) == "cuda" and rank.isdecimal() and int(rank) < torch.cuda.device_count():
        return torch.device("cuda", int(rank))
    return device


def replica_devices(device: torch.device) -> list[torch.device]:
    """List devices for copies of a model: every CUDA device, if ``cuda`` had no number.

    The device given comes first.
    """
    if str(device) != "cuda":
        return [device]
    return [torch.device("cuda", index) for index in range(max(torch.cuda.device_count(), 1))]


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _quickest_format(device: torch.device, training: bool) -> torch.dtype:
    if _bfloat16_is_quicker(device):
        return torch.bfloat16
    if training or device.type != "cuda":
        return torch.float32
    has_units = torch.cuda.get_device_capability(device) >= _FLOAT16_UNITS
    return torch.float16 if has_units else torch.float32


def _bfloat16_is_quicker(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_speedup() > _PLAINLY_FASTER


@cache
def _cpu_speedup() -> float:
    """Measure how many times as fast this CPU multiplies bfloat16 matrices as float32 ones."""
    sides = [torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=d) for d in (torch.float32, torch.bfloat16)]
    best = [float("inf"), float("inf")]
    for turn in range(_PROBE_ROUNDS):  # in turn, the best of each: other work slows both alike
        for side, matrix in enumerate(sides):
            began = time.perf_counter()
            matrix @ matrix
            best[side] = min(best[side], time.perf_counter() - began)
        if turn and best[1] > _HOPELESS * best[0]:  # emulated: fifty times as slow
            break
    return best[0] / best[1]


_GROUP = Path("/sys/fs/cgroup")  # limits of a container (Linux, version 2)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; from pinned memory to a GPU, so that the host need not wait for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine (a container's limit counts)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        usage = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        facts = (_GROUP / "memory.stat").read_text(encoding="ascii").split()
        usage -= int(facts[facts.index("inactive_file") + 1])  # files read, dropped when need be
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - usage))
