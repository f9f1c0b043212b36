"""The denoiser in its quickest form says the same as in its plain one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from unembed.decoding.lazy import LazyDenoiser

import unembed.backends.cpu
from unembed.backends.cpu import (
    LoneTextFeatures,
    Vocabulary,
    in_format,
    quickest,
)
from unembed.denoiser import Denoiser, preset
from unembed.device import Compute
from unembed.diffusion import LogLinear

CPU, LENGTH = torch.device("cpu"), 8


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    network = Denoiser(preset("tiny", vocab_size=3000, embedding_dim=16, length=LENGTH))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


def given(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 3000, (batch, LENGTH), generator=generator)
    embedding = F.normalize(torch.randn(batch, 16, generator=generator), dim=-1)
    where = torch.rand(batch, LENGTH, generator=generator) < 0.6
    return tokens, embedding, torch.rand(batch, generator=generator), where


@torch.no_grad()
def test_in_float32_it_says_what_the_denoiser_says(denoiser):
    expected = denoiser(*given())
    form = quickest(denoiser, Compute(CPU, torch.float32), LogLinear())
    assert isinstance(form, LazyDenoiser)
    torch.testing.assert_close(form(*given()), expected, rtol=1e-4, atol=1e-3)
    h = form.hidden_states(*given())
    tokens = torch.randint(0, 3000, (len(h), 4), generator=torch.Generator().manual_seed(2))
    some = form.vocabulary.of(tokens, h)
    torch.testing.assert_close(some, expected.gather(1, tokens), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("packs", [True, False])
def test_in_a_coarse_format_its_likeliest_logits_are_exact(denoiser, monkeypatch, packs):
    if not packs:
        monkeypatch.setattr(unembed.backends.cpu, "can_pack", lambda weight: False)
    form = quickest(denoiser, Compute(CPU, torch.bfloat16), LogLinear())
    assert isinstance(form, LazyDenoiser)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = form.hidden_states(*given()).float()
        exact = form.vocabulary.logits(h)
        assert exact.dtype == torch.float32
        tokens = exact.topk(3).indices
        torch.testing.assert_close(form.vocabulary.of(tokens, h), exact.gather(1, tokens))
        refined = form(*given())
    assert refined.dtype == torch.float32 and not torch.equal(refined, exact)
    torch.testing.assert_close(refined.amax(dim=-1), exact.amax(dim=-1))


@pytest.mark.parametrize("rows", [0, 1, 40])
@torch.no_grad()
def test_a_coarse_table_finds_the_likeliest_whose_logits_are_exact(rows):
    generator = torch.Generator().manual_seed(0)
    network = Denoiser(preset("tiny", vocab_size=9000, embedding_dim=16, hidden=24))
    for parameter in (network.token_table.weight, network.output_bias):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    h = torch.randn(rows, 24, generator=generator)
    expected = F.linear(h, network.token_table.weight, network.output_bias)
    vocabulary = Vocabulary(network, torch.bfloat16)
    torch.testing.assert_close(vocabulary.logits(h), expected)
    found = vocabulary.refined(h)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.1)
    assert rows == 0 or not torch.equal(found, expected)
    best, at = expected.max(dim=-1)
    assert torch.equal(found.argmax(dim=-1), at)
    torch.testing.assert_close(found.amax(dim=-1), best)
    torch.testing.assert_close(
        found.logsumexp(dim=-1), expected.logsumexp(dim=-1), rtol=0, atol=0.02
    )


@torch.no_grad()
def test_a_text_alone_has_its_modulations_worked_out_once(denoiser, monkeypatch):
    tokens, embedding, t, where = given()
    schedule, asked, plain = LogLinear(), [], denoiser.modulations
    features = LoneTextFeatures(denoiser, schedule)
    monkeypatch.setattr(
        denoiser, "modulations", lambda *args: asked.append(len(args[1])) or plain(*args)
    )

    def same(*now: torch.Tensor) -> None:
        expected = denoiser.hidden_states(*now)
        torch.testing.assert_close(features(*now), expected, rtol=1e-4, atol=1e-3)

    def at(row: int, masked: int) -> tuple[torch.Tensor, ...]:
        ratio = (torch.arange(LENGTH)[None] < masked).float().mean(dim=1)
        alone = slice(row, row + 1)
        return tokens[alone], embedding[alone], schedule.timestep(ratio), where[alone]

    for row in (0, 1, 0):  # one after another, and an earlier one again
        for masked in range(LENGTH, 0, -1):
            same(*at(row, masked))
    assert asked == [LENGTH] * 3
    same(tokens[:1], embedding[:1], t[:1], where[:1])  # a timestep of no share
    same(tokens, embedding, t, where)  # not alone
    same(*at(1, 3))  # not begun here
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.no_grad()(same), *at(2, LENGTH)).result()
    assert asked == [LENGTH] * 4
    same(*at(0, 2))
    assert asked == [LENGTH] * 4, "what another thread does is not noticed"


def test_a_copy_in_another_format_leaves_the_network_alone(denoiser):
    with torch.no_grad():
        expected = denoiser(*given())
        quick = in_format(denoiser, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found = quick(*given())
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert torch.equal(denoiser(*given()), expected)
    assert quick.state_dict().keys() == denoiser.state_dict().keys()
