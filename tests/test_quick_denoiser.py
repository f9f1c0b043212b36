"""The denoiser at two speeds says the same as at one."""

import pytest
import torch
import torch.nn.functional as F

import unembed.quick_denoiser
from unembed.decoding.glance import TwoSpeeds
from unembed.denoiser import Denoiser, preset
from unembed.device import Compute
from unembed.quick_denoiser import quickest, two_speeds

CPU = torch.device("cpu")


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(preset("tiny", vocab_size=3000, embedding_dim=16, length=8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


def given(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 3000, (batch, 8), generator=generator)
    embedding = F.normalize(torch.randn(batch, 16, generator=generator), dim=-1)
    where = torch.rand(batch, 8, generator=generator) < 0.6
    return tokens, embedding, torch.rand(batch, generator=generator), where


@torch.no_grad()
def test_a_glance_is_rough_and_its_exact_logits_are_those_of_the_denoiser(denoiser):
    expected = denoiser(*given())
    two = two_speeds(denoiser, denoiser.token_table.weight.bfloat16())
    assert torch.equal(two(*given()), expected)
    glance = two.glance(*given())
    rows = torch.tensor([0, 2, 5])
    coarse = glance.coarse(rows)
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, expected[rows])
    torch.testing.assert_close(coarse, expected[rows], rtol=0.02, atol=0.1)
    torch.testing.assert_close(glance.exactly(rows, None), expected[rows])
    tokens = torch.randint(0, 3000, (3, 4), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(glance.exactly(rows, tokens), expected[rows].gather(1, tokens))


@pytest.mark.parametrize("quicker", [torch.bfloat16, torch.float32])
def test_float32_is_glanced_at_only_where_the_processor_is_quicker(denoiser, monkeypatch, quicker):
    monkeypatch.setattr(
        unembed.quick_denoiser, "choose_compute", lambda device: Compute(CPU, quicker)
    )
    form = quickest(denoiser, Compute(CPU, torch.float32))
    assert isinstance(form, TwoSpeeds) == (quicker == torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(form(*given()), denoiser(*given()))


def test_in_a_coarse_format_it_is_glanced_at_in_that_format(denoiser):
    form = quickest(denoiser, Compute(CPU, torch.bfloat16))
    assert isinstance(form, TwoSpeeds)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        glance = form.glance(*given())
        rows = torch.arange(int(given()[3].sum()))
        exact = glance.exactly(rows, None)
        tokens = exact.topk(3).indices
        torch.testing.assert_close(glance.exactly(rows, tokens), exact.gather(1, tokens))
    assert denoiser.coarse_table is None, "the network itself stays as it is"
