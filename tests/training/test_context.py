import pytest
import torch
import torch.nn.functional as F

from tests.fakes import preset
from unembed.denoiser import Denoiser
from unembed.diffusion import WEIGHTS, LogLinear, corrupt_batch
from unembed.training.batch import with_own_samples

MASK = 0  # the first id, which a careless inverse of the distribution would pick


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser(preset("tiny", vocab_size=9, embedding_dim=16, length=10))


def corrupted_batch(size):
    x0 = torch.randint(1, 9, (size, 10))
    return corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], MASK, torch.Generator())


def replace_some(denoiser, batch, share):
    size = len(batch.xt)
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(2, size, 10, generator=generator)
    embedding = F.normalize(torch.randn(size, 16, generator=generator), dim=1)
    timestep = LogLinear().timestep
    return with_own_samples(
        denoiser, batch, embedding, draws[0] < share, draws[1], MASK, timestep
    ), (draws[0] < share)


def test_only_visible_tokens_that_were_chosen_change(denoiser):
    batch = corrupted_batch(64)
    mixed, chosen = replace_some(denoiser, batch, 0.5)
    changed = mixed.xt != batch.xt
    assert changed.any()
    assert not (changed & ~(chosen & ~batch.masked)).any()
    assert torch.equal(mixed.xt == MASK, batch.masked)
    for name in ("t", "masked", "index", "targets", "weights"):
        assert getattr(mixed, name) is getattr(batch, name)
    assert not mixed.xt.requires_grad


def test_samples_have_the_denoiser_s_distribution(denoiser):
    """A denoiser that knows nothing but its output bias."""
    with torch.no_grad():
        denoiser.token_table.weight.zero_()
        denoiser.output_bias.copy_(torch.linspace(2.0, -2.0, 9))
    batch = corrupted_batch(4000)
    mixed, chosen = replace_some(denoiser, batch, 1.0)
    samples = mixed.xt[chosen & ~batch.masked]
    found = torch.bincount(samples, minlength=9) / len(samples)
    bias = denoiser.output_bias.detach().clone()
    bias[MASK] = -torch.inf
    torch.testing.assert_close(found, bias.softmax(0), atol=0.02, rtol=0.0)


def test_nothing_chosen_is_nothing_done(denoiser):
    batch = corrupted_batch(8)
    assert torch.equal(replace_some(denoiser, batch, 0.0)[0].xt, batch.xt)


def test_the_denoiser_is_asked_even_where_nothing_is_chosen(denoiser):
    """Where its weights are shared out every process must take part in every pass."""
    asked, features = [], denoiser.features
    denoiser.features = lambda *given: asked.append(1) or features(*given)
    replace_some(denoiser, corrupted_batch(8), 0.0)
    del denoiser.features
    assert asked
