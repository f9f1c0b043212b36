"""Memory that is free, on a GPU and in the machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_GROUP = Path("/sys/fs/cgroup")  # limits of a container (Linux, version 2)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine (a container's limit counts)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        facts = (_GROUP / "memory.stat").read_text(encoding="ascii").split()
        used -= int(facts[facts.index("inactive_file") + 1])  # files read, dropped when need be
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))
