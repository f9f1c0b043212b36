import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unembed.denoiser import Denoiser, DenoiserSizes, preset
from unembed.diffusion import WEIGHTS, LogLinear, corrupt_batch, cross_entropy_of, diffusion_loss
from unembed.training import loss as module
from unembed.training.loss import ChunkedCrossEntropy


@pytest.mark.parametrize("rows", [1, 3, 7, 10_000])
def test_the_chunked_path_equals_the_plain_one(rows, monkeypatch):
    """Loss, per-token losses and every gradient, whatever the size of a chunk."""
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", rows * 60)
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
    for make in (cross_entropy_of, ChunkedCrossEntropy):
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


def test_in_bfloat16_it_stays_near_the_plain_path_in_float32(monkeypatch):
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", 60)  # a row at a time: many partial sums
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(std=0.1)
    x0 = torch.randint(0, 59, (5, 8))
    embedding = F.normalize(torch.randn(5, 16), dim=-1)
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], 59, torch.Generator())
    results = []
    for make, half in ((cross_entropy_of, False), (ChunkedCrossEntropy, True)):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss, _ = diffusion_loss(make(denoiser), batch, embedding)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in denoiser.named_parameters()}))
    (plain, gradients), (half_loss, halves) = results
    assert half_loss == pytest.approx(plain, rel=1e-2)
    for name, gradient in gradients.items():
        assert halves[name].dtype is torch.float32
        off = (halves[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert off < 0.1, name


def test_hits_are_counted_where_there_is_weight(monkeypatch):
    """The count of the plain path, over two batches and several chunks, until it is reset."""
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", 180)
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    oracle, scored, hits = ChunkedCrossEntropy(denoiser), 0, 0
    for seed in range(2):
        x0 = torch.randint(0, 3, (9, 8))
        generator = torch.Generator().manual_seed(seed)
        batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], 59, generator)
        with torch.no_grad():
            denoiser.output_bias[:3] = 9.0
            embedding = torch.randn(9, 16)
            best = denoiser(batch.xt, embedding, batch.t, batch.index).argmax(dim=-1)
        batch.weights[::5] = 0.0
        oracle(batch.xt, embedding, batch.t, batch.index, batch.targets, batch.weights)
        scored += int((batch.weights > 0).sum())
        hits += int(((best == batch.targets) & (batch.weights > 0)).sum())
    assert oracle.tally.tolist() == [scored, hits] and 0 < hits < scored


def test_a_frozen_table_gets_no_gradient():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    denoiser.token_table.weight.requires_grad_(False)
    x0 = torch.randint(0, 59, (2, 8))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], 59, torch.Generator())
    loss, _ = diffusion_loss(ChunkedCrossEntropy(denoiser), batch, torch.randn(2, 16))
    loss.backward()
    assert denoiser.token_table.weight.grad is None
    assert denoiser.output_bias.grad.abs().sum() > 0


def test_no_masked_position_gives_zero_gradients():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    x0 = torch.zeros(2, 8, dtype=torch.long)
    batch = corrupt_batch(
        x0, LogLinear(), WEIGHTS["elbo"], 59, torch.Generator(), torch.zeros(2, 8, dtype=torch.bool)
    )
    total, losses = ChunkedCrossEntropy(denoiser)(
        batch.xt, torch.randn(2, 16), batch.t, batch.index, batch.targets, batch.weights
    )
    total.backward()
    assert float(total.detach()) == 0.0 and len(losses) == 0
    assert float(denoiser.token_table.weight.grad.abs().sum()) == 0.0


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *found, 0)
        return made


@pytest.mark.parametrize("make", [cross_entropy_of, ChunkedCrossEntropy])
def test_with_a_large_vocabulary_no_tensor_is_as_large_as_the_logits(make):
    """262 K tokens: the logits [B, L, V] would be 17 M numbers, the table is 2 M."""
    batch_size, length, vocabulary = 8, 8, 262_144
    sizes = DenoiserSizes(vocabulary, 8, length, hidden=8, layers=1, heads=1, feed_forward=8)
    denoiser = Denoiser(sizes)
    x0 = torch.randint(0, vocabulary - 1, (batch_size, length))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], vocabulary - 1, torch.Generator())
    with LargestTensor() as largest:
        diffusion_loss(make(denoiser), batch, torch.randn(batch_size, 8))[0].backward()
    if make is cross_entropy_of:  # what the probe sees where they are made, for the masked alone
        assert largest.numbers >= len(batch.index) * vocabulary
    else:
        assert largest.numbers <= 1 << 23 < batch_size * length * vocabulary / 1.9
