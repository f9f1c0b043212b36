"""Linear layers that decode on a CPU with their weights packed once for oneDNN."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TEXT = 32  # rows that the packing is told of; it serves any number about as well
_MOST = 128  # rows from which on a layer gains little
_Network = TypeVar("_Network", bound=nn.Module)


class PackedLinear(nn.Module):
    """x [..., I] → x W^T + b [..., O] in float32, without gradients.

    Packed weights are 1.2 to 2.7 times as fast as `F.linear` at the few rows of one text
    (docs/results.md), and a row comes out the same whatever stands beside it (seen with AVX2). The
    operators are those of PyTorch's compiler for frozen linear layers; where a build lacks them,
    this is `F.linear`, and so it is for many rows. oneDNN keeps a kernel of about a megabyte for
    each number of rows, so few numbers are used: rows are added up to the next one.

    Args:
        weight: W [O, I], shared and not copied beside its packed form.
        bias: b [O].
        most: Rows up to which it is packed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, most: int = _MOST) -> None:
        super().__init__()
        self.most = most
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed: Tensor | None = None
        if can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _TEXT)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] → [..., O]."""
        rows = x.numel() // x.shape[-1]
        if self.packed is None or not 0 < rows <= self.most:
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.float(), self.weight, self.bias)
        flat, every = x.float().reshape(rows, -1), 4 if rows <= 2 * _TEXT else 16
        padded = F.pad(flat, (0, 0, 0, -rows % every)) if rows % every else flat
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            padded, self.packed, self.bias, "none", [], ""
        )
        return found[:rows].view(*x.shape[:-1], -1)


def can_pack(weight: Tensor) -> bool:
    """Whether this build of PyTorch packs such a weight."""
    there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and weight.device.type == "cpu" and weight.dtype == torch.float32


def with_packed_layers(network: _Network) -> _Network:
    """A copy that shares the parameters, with every linear layer packed."""
    copy = deepcopy(network, {id(p): p for p in network.parameters()})
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return copy
