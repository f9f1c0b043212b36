import pytest
import torch
import torch.nn.functional as F

from unembed.denoiser import Denoiser, preset
from unembed.diffusion import WEIGHTS, LogLinear, corrupt_batch, cross_entropy_of, diffusion_loss
from unembed.training import linear_cross_entropy as module
from unembed.training.linear_cross_entropy import chunked_cross_entropy_of


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_the_chunked_path_equals_the_plain_one(rows, monkeypatch):
    """Loss, per-token losses and every gradient, whatever the size of a chunk."""
    monkeypatch.setattr(module, "_CHUNK_LOGITS", rows * 60)
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.1)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 59, (5, 8), generator=generator)
    embedding = F.normalize(torch.randn(5, 16, generator=generator), dim=-1)
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], 59, generator)

    results = []
    for make in (cross_entropy_of, chunked_cross_entropy_of):
        denoiser.zero_grad()
        loss, losses = diffusion_loss(make(denoiser), batch, embedding)
        (3.0 * loss).backward()
        gradients = {n: p.grad.clone() for n, p in denoiser.named_parameters()}
        results.append((loss.detach(), losses, gradients))
    plain, chunked = results
    torch.testing.assert_close(chunked[0], plain[0])
    torch.testing.assert_close(chunked[1], plain[1])
    assert set(plain[2]) == set(chunked[2])
    for name, gradient in plain[2].items():
        torch.testing.assert_close(chunked[2][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_frozen_table_gets_no_gradient():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    denoiser.token_table.weight.requires_grad_(False)
    x0 = torch.randint(0, 59, (2, 8))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], 59, torch.Generator())
    loss, _ = diffusion_loss(chunked_cross_entropy_of(denoiser), batch, torch.randn(2, 16))
    loss.backward()
    assert denoiser.token_table.weight.grad is None
    assert denoiser.output_bias.grad.abs().sum() > 0


def test_no_masked_position_gives_zero_gradients():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    x0 = torch.zeros(2, 8, dtype=torch.long)
    batch = corrupt_batch(
        x0, LogLinear(), WEIGHTS["elbo"], 59, torch.Generator(), torch.zeros(2, 8, dtype=torch.bool)
    )
    total, losses = chunked_cross_entropy_of(denoiser)(
        batch.xt, torch.randn(2, 16), batch.t, batch.index, batch.targets, batch.weights
    )
    total.backward()
    assert float(total.detach()) == 0.0 and len(losses) == 0
    assert float(denoiser.token_table.weight.grad.abs().sum()) == 0.0
