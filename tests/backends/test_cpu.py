"""The denoiser in its fast form predicts what it predicts in its plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unembed.backends.cpu
from tests.fakes import preset
from unembed.backends.cpu import PackedDenoiser, PackedLinear, fast_form
from unembed.denoiser import Denoiser
from unembed.device import Compute

CPU, LENGTH = torch.device("cpu"), 8


def no_such_operator(*args):
    raise RuntimeError("an operator of this name takes other arguments")


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(preset("tiny", vocab_size=3000, embedding_dim=16, length=LENGTH))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 3000, (batch, LENGTH), generator=generator)
    embedding = F.normalize(torch.randn(batch, 16, generator=generator), dim=-1)
    positions = torch.rand(batch, LENGTH, generator=generator) < 0.6
    return tokens, embedding, torch.rand(batch, generator=generator), positions


@pytest.mark.parametrize("batch", [1, 3, 200])
@torch.no_grad()
def test_fast_form_in_float32_predicts_what_the_denoiser_does(denoiser, batch):
    form = fast_form(denoiser, Compute(CPU, torch.float32))
    assert isinstance(form, PackedDenoiser)
    torch.testing.assert_close(form(*inputs(batch)), denoiser(*inputs(batch)), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_fast_form_shares_the_parameters(denoiser):
    plain = [module for module in denoiser.modules() if type(module) is nn.Linear]
    form = fast_form(denoiser, Compute(CPU, torch.float32))
    packed = [m for m in form._network.modules() if isinstance(m, PackedLinear)]
    assert [type(m) for m in denoiser.modules()].count(nn.Linear) == len(plain) == len(packed)
    assert {m.weight.data_ptr() for m in packed} == {m.weight.data_ptr() for m in plain}


@torch.no_grad()
def test_fast_form_in_bfloat16_leaves_the_network_alone(denoiser):
    expected = denoiser(*inputs())
    form = fast_form(denoiser, Compute(CPU, torch.bfloat16))
    assert isinstance(form, PackedDenoiser)
    with torch.autocast("cpu", torch.bfloat16):
        logits = form(*inputs())
    assert logits.dtype == torch.float32 and not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=1.0)
    assert torch.equal(denoiser(*inputs()), expected)


def test_a_denoiser_can_be_copied_after_it_was_packed(denoiser):
    fast_form(denoiser, Compute(CPU, torch.float32))
    assert copy.deepcopy(denoiser).state_dict().keys() == denoiser.state_dict().keys()


# PackedLinear


def layer(inputs: int, outputs: int, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight, torch.randn(outputs, generator=generator) if bias else None


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (300, 48), (2, 9, 48), (0, 48)])
@torch.no_grad()
def test_packed_linear_is_a_linear_layer(monkeypatch, shape, bias, here):
    """Also in a build of PyTorch that cannot pack, and of rows that do not lie in order."""
    if not here:
        monkeypatch.setattr(unembed.backends.cpu, "_product", no_such_operator)
    weight, offset = layer(48, 130, bias)
    packed = PackedLinear(weight, offset)
    assert (packed.packed is not None) == (here and torch.backends.mkldnn.is_available())
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(x), F.linear(x, weight, offset))
    wide = torch.randn(*shape[:-1], 96, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(packed(wide[..., ::2]), F.linear(wide[..., ::2], weight, offset))


@pytest.mark.parametrize("rows", [1, 7, 300])
@torch.no_grad()
def test_packed_linear_in_bfloat16_differs_by_rounding_only(rows):
    weight, offset = layer(48, 130)
    packed = PackedLinear(weight, offset, torch.bfloat16)
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(1))
    product = packed(x)
    assert product.dtype == packed.weight.dtype == torch.bfloat16
    exact = F.linear(x.bfloat16().float(), weight.bfloat16().float(), offset.bfloat16().float())
    torch.testing.assert_close(product.float(), exact, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("sizes", [(384, 1536), (1536, 384), (64, 128), (16, 64)])
@torch.no_grad()
def test_packed_linear_of_a_row_does_not_depend_on_the_rows_beside_it(sizes):
    packed = PackedLinear(*layer(*sizes))
    if packed.packed is None:
        pytest.skip("this build of PyTorch does not pack")
    x = torch.randn(128, sizes[0], generator=torch.Generator().manual_seed(1))
    together = packed(x)
    for count in (1, 2, 5, 16, 31, 64, 65, 128):
        assert torch.equal(packed(x[:count]), together[:count])
