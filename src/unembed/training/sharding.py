"""Weights in parts: each process holds a share of every tensor (FSDP, PyTorch's `fully_shard`).

For denoisers of which a copy in every process, with gradient, moments and average, does not fit. A
block's weights are put together when it runs and dropped after it; those around the blocks stay
from the forward pass to the end of the backward one. Once a denoiser is sharded, its parameters,
and with them the optimiser's moments and the averages, are DTensors: operations on them work on the
share here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from unembed.denoiser import Denoiser


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
    register_fsdp_forward_method(denoiser, "features")


def exchange_gradients(module: nn.Module, now: bool) -> None:
    """Whether the backward passes to come exchange gradients or only add them up here.

    Args:
        module: With a sharded denoiser in it.
        now: The answer.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now, recurse=False)


def put_away(module: nn.Module) -> None:
    """Drop what a pass put together and no backward pass will drop: it is not the weights to come.

    Args:
        module: With or without a sharded denoiser in it.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shares, which takes all processes; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """This process's share of a whole tensor, on the device and cut as the example is."""
    tensor = tensor.to(example.device)
    if not isinstance(example, DTensor):
        return tensor
    # Every process has read the whole: nothing need be sent
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)
