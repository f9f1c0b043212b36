"""The one place that chooses a device and its number format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from unembed.errors import ConfigError


@dataclass(frozen=True)
class Compute:
    """Where tensors live, and the format matrix products run in.

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


def choose_compute(device: str = "auto", dtype: str = "auto") -> Compute:
    """Turn the user's words into a device and a number format.

    Args:
        device: ``auto`` (CUDA, then Apple's MPS, then the CPU) or any torch device name.
        dtype: ``auto``, ``float32`` or ``bfloat16``. ``auto`` is bfloat16 where the hardware has
            matrix units for it. A CPU with AVX-512 bfloat16 but no AMX is not such hardware: there
            bfloat16 products were measured at about half the float32 rate.

    Raises:
        ConfigError: The device or the format does not exist here.
    """
    if device == "auto":
        device = _best_device()
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "a device that PyTorch can use here (auto, cpu, cuda, mps)",
            f"{device!r} ({reason})",
            "Use --device auto or --device cpu",
        ) from error
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype == "auto":
        return Compute(chosen, torch.bfloat16 if _has_bfloat16_units(chosen) else torch.float32)
    if dtype not in formats:
        raise ConfigError("a dtype of auto, float32 or bfloat16", repr(dtype), "Correct the dtype")
    return Compute(chosen, formats[dtype])


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
