"""The denoiser as it decodes quickest: converted once to a format, and packed for oneDNN.

It predicts what the denoiser predicts, to rounding.
"""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import DenoiserFn

_TEXT = 32  # rows that the packing is made for; it serves any number about as well
_MOST_ROWS = 128  # from which on a layer gains little
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative; formats that are packed
_MOST_LOGITS = 512  # rows of the product with the token table, which gains more than a layer


def fast_form(denoiser: Denoiser, compute: Compute) -> DenoiserFn:
    """Put a denoiser into the form to decode with.

    Args:
        denoiser: With the weights that it has now.
        compute: Where it is, and the format of its products.
    """
    plain = compute.device.type != "cpu" and compute.dtype == torch.float32
    return denoiser if plain else PackedDenoiser(denoiser, compute.dtype)


class PackedDenoiser:
    """A denoiser whose linear layers and output are of one format and packed, without gradients.

    To be used under autocast to the format.

    Args:
        denoiser: Its parameters are shared where they are of the format already; their packed
            forms take as much memory again.
        dtype: The format; logits come back in float32.
    """

    def __init__(self, denoiser: Denoiser, dtype: torch.dtype = torch.float32) -> None:
        self._network = deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})
        for module in list(self._network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child.weight, child.bias, dtype))
        table, bias = denoiser.token_table.weight, denoiser.output_bias.detach()
        exact = dtype == torch.float32
        self._output = PackedLinear(table, bias if exact else None, dtype, _MOST_LOGITS)
        self._bias = None if exact else bias  # a narrow format would round it

    def __call__(self, tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor) -> Tensor:
        """Predict as `Denoiser.forward` does."""
        logits: Tensor = self._output(self._network.output_states(tokens, embedding, t, positions))
        return logits if self._bias is None else logits.float().add_(self._bias)


class PackedLinear(nn.Module):
    """x [..., I] → x W^T + b [..., O] in one format, without gradients.

    Packed weights are 1.2 to 2.7 times as fast as `F.linear` at the few rows of one text
    (docs/results.md; 1.5 to 2 times in bfloat16), and a row comes out the same whatever stands
    beside it (seen with AVX2, in float32). The operators are those of PyTorch's compiler for frozen
    linear layers; where a build lacks them, this is `F.linear`, and so it is for many rows. oneDNN
    keeps a kernel of about a megabyte for each number of rows, so few numbers are used: rows are
    added up to the next one.

    Args:
        weight: W [O, I], shared where it is of the format, and not copied beside its packed form.
        bias: b [O].
        dtype: The format.
        most: Rows up to which it is packed.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
        most: int = _MOST_ROWS,
    ) -> None:
        super().__init__()
        self.most = most
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.packed = _pack(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [..., I]: [..., O]."""
        rows = x.numel() // x.shape[-1]
        if self.packed is None or not 0 < rows <= self.most:
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.to(self.weight), self.weight, self.bias)
        flat, multiple = x.to(self.weight).reshape(rows, -1), 4 if rows <= 2 * _TEXT else 16
        padded = F.pad(flat, (0, 0, 0, -rows % multiple)) if rows % multiple else flat
        return _product(padded, self.packed, self.bias)[:rows].view(*x.shape[:-1], -1)


def _pack(weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Pack a weight [O, I]; None where this build of PyTorch cannot, or multiplies otherwise."""
    if weight.device.type != "cpu" or weight.dtype not in _TOLERANCES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _TEXT)
            x = torch.linspace(-1.0, 1.0, 4 * weight.shape[1]).view(4, -1).to(weight)
            product, plain = _product(x, packed, bias), F.linear(x, weight, bias)
            same = torch.allclose(product, plain, rtol=_TOLERANCES[weight.dtype], atol=1e-3)
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or one that has changed
        return None
    return packed if same else None


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product
