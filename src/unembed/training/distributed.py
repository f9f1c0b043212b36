"""The processes of a run, by Hugging Face Accelerate: one, or as many as a launcher started.

Accelerate finds out who is there (``accelerate launch`` or ``torchrun``), picks each process's
device, wraps the network for data-parallel training (DDP) and adds up over processes. Number
formats stay with `unembed.device`: Accelerate's mixed precision is off. Weights are shared out by
PyTorch itself (`shard`): Accelerate's way is for GPUs alone, where our tests do not run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.errors import TrainingError

_T = TypeVar("_T")
_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Processes:
    """The processes that take part in a run, and what they exchange.

    Args:
        compute: What this process would use alone.
        shard: Give each of several processes a share of every tensor in place of a copy.

    Raises:
        TrainingError: The launcher brings a way of its own to share a network (FSDP, DeepSpeed).

    Attributes:
        count: Processes of the run.
        rank: This one's number; the main process, 0, logs and saves.
        compute: Device of this process, and the number format of the main one.
        sharded: Whether each holds a share of the weights only. Then all of them must take part
            in whatever uses these.
    """

    def __init__(self, compute: Compute, shard: bool = False) -> None:
        cpu = compute.device.type == "cpu"
        self._accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        if self._accelerator.distributed_type not in _SUPPORTED:
            raise TrainingError(
                "one process, or several with a copy of the network each (DDP)",
                str(self._accelerator.distributed_type),
                "Launch with `torchrun` or `accelerate launch --multi_gpu`, and for FSDP add "
                "--set training.shard=true",
            )
        self.sharded = shard and self.count > 1
        if self.count > 1:
            # Each would measure for itself which format is quicker, and they might disagree
            dtype = self.broadcast(compute.dtype)
            compute = replace(compute, device=self._accelerator.device, dtype=dtype)
        self.compute = compute

    @property
    def is_main(self) -> bool:
        """True in the process that logs and saves."""
        return self.rank == 0

    def alone(self) -> Processes:
        """Make a view of this process as if it were the only one, on the same device."""
        single = copy(self)
        single.count, single.rank, single.sharded = 1, 0, False
        return single

    def local_slice(self, batch: int) -> slice:
        """Find which samples of a batch are this process's."""
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

    def place(self, denoiser: Denoiser) -> None:
        """Move a denoiser to this process's device, as a share of it where it is to be sharded."""
        denoiser.to(self.compute.device)
        if self.sharded:
            shard(denoiser, self.compute.device, self.count)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that gradients are averaged; returns itself where they are anyway."""
        if self.count == 1 or self.sharded:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module, device_placement=False)
        return wrapped

    def gradients(self, module: nn.Module, exchange: bool) -> AbstractContextManager[Any]:
        """Surround a backward pass: exchange gradients at its end, or only add them up here."""
        if self.sharded:
            exchange_gradients(module, exchange)
        if exchange or self.count == 1 or self.sharded:
            return nullcontext()
        inside: AbstractContextManager[Any] = self._accelerator.no_sync(module)
        return inside

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum a tensor over processes, without waiting for it."""
        if self.count == 1:
            return value
        summed: Tensor = self._accelerator.reduce(value, reduction="sum")
        return summed

    def broadcast(self, value: _T) -> _T:
        """Send the main process's value to all; the others wait for it."""
        if self.count == 1:
            return value
        values: list[_T] = broadcast_object_list([value], from_process=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Check whether the flag is true in any process; all wait for each other."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.compute.device)
        return bool(self.all_reduce(flags).item())

    def min(self, value: int) -> int:
        """Find the smallest of the processes' values."""
        if self.count == 1:
            return value
        local = torch.tensor([value], device=self.compute.device)
        return int(self._accelerator.gather(local).min())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()


# Sharding: each process holds a part of every tensor


def shard(denoiser: Denoiser, device: torch.device, processes: int) -> None:
    """Replace the parameters of a denoiser by this process's share of them.

    Args:
        denoiser: The same in every process, on the device; an optimiser is made afterwards.
        device: Of this process.
        processes: How many there are.
    """
    mesh = init_device_mesh(device.type, (processes,))
    modules = [*denoiser.blocks, denoiser]
    for module in modules:
        sharded = fully_shard(module, mesh=mesh)
        # gloo can add, but not average
        sharded.set_force_sum_reduction_for_comms(device.type == "cpu")
    register_fsdp_forward_method(denoiser, "hidden_states")


def exchange_gradients(module: nn.Module, now: bool) -> None:
    """Set whether the backward passes to come exchange gradients or only add them up here.

    Args:
        module: With a sharded denoiser in it.
        now: Whether they exchange.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now, recurse=False)


def reshard(module: nn.Module) -> None:
    """Drop what a pass gathered and no backward pass will drop: it is not the weights to come.

    Args:
        module: With or without a sharded denoiser in it.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor from its shares, which takes all processes; return others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(tensor: Tensor, example: Tensor) -> Tensor:
    """Cut this process's share of a whole tensor, on the device and as the example is."""
    tensor = tensor.to(example.device)
    if not isinstance(example, DTensor):
        return tensor
    # Every process has read the whole: nothing need be sent
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
