"""Packed layers say what `F.linear` says, row by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unembed.backends.cpu
from unembed.backends.cpu import PackedLinear, with_packed_layers


def layer(inputs: int, outputs: int, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator) if bias else None


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (300, 48), (2, 9, 48), (0, 48)])
@torch.no_grad()
def test_it_is_a_linear_layer(monkeypatch, shape, bias, here):
    """Also in a build of PyTorch that cannot pack, and of rows that do not lie in order."""
    if not here:
        monkeypatch.setattr(unembed.backends.cpu, "can_pack", lambda weight: False)
    weight, offset = layer(48, 130, bias)
    packed = PackedLinear(weight, offset)
    assert (packed.packed is not None) == (here and torch.backends.mkldnn.is_available())
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(x), F.linear(x, weight, offset))
    wide = torch.randn(*shape[:-1], 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(wide[..., ::2]), F.linear(wide[..., ::2], weight, offset))


@pytest.mark.parametrize("sizes", [(384, 1536), (1536, 384), (64, 128), (16, 64)])
@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it(sizes):
    packed = PackedLinear(*layer(*sizes))
    if packed.packed is None:
        pytest.skip("this build of PyTorch does not pack")
    x = torch.randn(128, sizes[0], generator=torch.Generator().manual_seed(1))
    together = packed(x)
    for count in (1, 2, 5, 16, 31, 64, 65, 128):
        assert torch.equal(packed(x[:count]), together[:count])


@torch.no_grad()
def test_a_network_is_copied_without_its_parameters_being_copied():
    network = nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.GELU(), nn.Linear(6, 3, bias=False)))
    copy = with_packed_layers(network)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(copy(x), network(x))
    assert [type(m) for m in network.modules()].count(nn.Linear) == 2
    assert [type(m) for m in copy.modules()].count(PackedLinear) == 2
    assert copy[0].weight.data_ptr() == network[0].weight.data_ptr()
