from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fakes import preset
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.diffusion import (
    WEIGHTS,
    CorruptedBatch,
    LogLinear,
    corrupt_batch,
    cross_entropy_of,
    diffusion_loss,
)
from unembed.training import loop, step
from unembed.training import loss as module
from unembed.training.checkpoint import LATEST
from unembed.training.loss import CandidateSampler, ChunkedCrossEntropy

from .helpers import CPU, make_config, records


@pytest.mark.parametrize("rows", [1, 3, 7, 10_000])
def test_chunked_cross_entropy_the_chunked_path_equals_the_plain_one(rows, monkeypatch):
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


def test_chunked_cross_entropy_in_bfloat16_it_stays_near_the_plain_path_in_float32(monkeypatch):
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


def test_chunked_cross_entropy_hits_are_counted_where_there_is_weight(monkeypatch):
    """The count of the plain path, over two batches and several chunks, until it is reset."""
    monkeypatch.setitem(module._CHUNK_LOGITS, "cpu", 180)
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    scorer, scored, hits = ChunkedCrossEntropy(denoiser), 0, 0
    for seed in range(2):
        x0 = torch.randint(0, 3, (9, 8))
        generator = torch.Generator().manual_seed(seed)
        batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], 59, generator)
        with torch.no_grad():
            denoiser.output_bias[:3] = 9.0
            embedding = torch.randn(9, 16)
            best = denoiser(batch.xt, embedding, batch.t, batch.index).argmax(dim=-1)
        batch.weights[::5] = 0.0
        scorer(batch.xt, embedding, batch.t, batch.index, batch.targets, batch.weights)
        scored += int((batch.weights > 0).sum())
        hits += int(((best == batch.targets) & (batch.weights > 0)).sum())
    assert scorer.tally.tolist() == [scored, hits] and 0 < hits < scored


def test_chunked_cross_entropy_a_frozen_table_gets_no_gradient():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    denoiser.token_table.weight.requires_grad_(False)
    x0 = torch.randint(0, 59, (2, 8))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], 59, torch.Generator())
    loss, _ = diffusion_loss(ChunkedCrossEntropy(denoiser), batch, torch.randn(2, 16))
    loss.backward()
    assert denoiser.token_table.weight.grad is None
    assert denoiser.output_bias.grad.abs().sum() > 0


def test_chunked_cross_entropy_no_masked_position_gives_zero_gradients():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    x0 = torch.zeros(2, 8, dtype=torch.long)
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    batch = CorruptedBatch.from_masks(x0, x0, nothing, torch.rand(2), torch.ones(2), 16)
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
def test_chunked_cross_entropy_with_a_large_vocabulary_no_tensor_is_as_large_as_the_logits(make):
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


# A softmax over part of the vocabulary

V = 400

COUNTS = (10_000 / np.arange(1, V + 1)).astype(np.int64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_candidate_sampler_every_target_and_the_most_frequent_tokens_are_candidates():
    targets = torch.tensor([399, 7, 7, 250])
    found = CandidateSampler(COUNTS, 40).draw(targets, seeded(0))
    ids = found.ids.tolist()
    assert ids == sorted(set(ids)) and {399, 7, 250, *range(20)} <= set(ids)
    assert 40 <= len(ids) <= 43
    assert torch.equal(found.ids, CandidateSampler(COUNTS, 40).draw(targets, seeded(0)).ids)
    assert not torch.equal(found.ids, CandidateSampler(COUNTS, 40).draw(targets, seeded(1)).ids)


def test_candidate_sampler_the_sum_over_candidates_estimates_the_sum_over_the_vocabulary():
    """sum over S of exp(l - log inclusion) is unbiased where targets follow the counts."""
    sampler, shares = CandidateSampler(COUNTS, 60), torch.from_numpy(COUNTS / COUNTS.sum())
    logits = torch.randn(V, generator=seeded(3))
    sums = []
    for seed in range(400):
        targets = torch.multinomial(shares, 50, replacement=True, generator=seeded(seed))
        found = sampler.draw(targets, seeded(seed))
        sums.append(float((logits[found.ids] - found.log_inclusion).exp().sum()))
    assert np.mean(sums) == pytest.approx(float(logits.exp().sum()), rel=0.02)
    assert np.std(sums) > 0


def test_candidate_sampler_with_every_token_a_candidate_it_is_the_whole_softmax():
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x0, embedding = torch.randint(0, 59, (5, 8)), F.normalize(torch.randn(5, 16), dim=1)
    plain = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], 59, seeded(1))
    every = CandidateSampler(np.ones(60, dtype=np.int64), 1000).draw(plain.targets, seeded(2))
    assert every.ids.tolist() == list(range(60))
    results = []
    for candidates in (None, every):
        denoiser.zero_grad()
        batch = replace(plain, candidates=candidates)
        loss, losses = diffusion_loss(ChunkedCrossEntropy(denoiser), batch, embedding)
        loss.backward()
        results.append([loss.detach(), losses, *(p.grad.clone() for p in denoiser.parameters())])
    for whole, sampled in zip(*results, strict=True):
        torch.testing.assert_close(sampled, whole, rtol=1e-4, atol=1e-6)


def test_candidate_sampler_gradients_over_some_candidates_are_those_of_the_plain_path():
    """With the token table both the input embedding and, in part, the output."""
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=V, embedding_dim=16, length=8))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x0, embedding = torch.randint(0, V - 1, (5, 8)), F.normalize(torch.randn(5, 16), dim=1)
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], V - 1, seeded(1))
    batch = replace(batch, candidates=CandidateSampler(COUNTS, 40).draw(batch.targets, seeded(2)))
    ids, log_inclusion = batch.candidates.ids, batch.candidates.log_inclusion

    def plain(xt, embedding, t, index, targets, weights, candidates):
        logits = denoiser(xt, embedding, t, index)[:, ids] - log_inclusion
        places = torch.searchsorted(ids, targets)
        losses = F.cross_entropy(logits, places, reduction="none")
        return (losses * weights).sum(), losses.detach()

    results = []
    for path in (plain, ChunkedCrossEntropy(denoiser)):
        denoiser.zero_grad()
        for _ in range(2):  # the second adds to the gradients of the first
            loss, losses = diffusion_loss(path, batch, embedding)
            loss.backward()
        results.append([loss.detach(), losses, *(p.grad.clone() for p in denoiser.parameters())])
    assert len(ids) < V and denoiser.token_table.weight.grad.layout is torch.strided
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_train_a_run_with_candidates_resumes_exactly_and_differs_from_one_without(pairs, tmp_path):
    config = make_config(sampled_vocabulary=8)
    loop.train(config, pairs, tmp_path / "whole", CPU)
    stops = iter([False] * 4 + [True] + [False] * 100)
    loop.train(config, pairs, tmp_path / "cut", CPU, should_stop=lambda: next(stops))
    loop.train(config, pairs, tmp_path / "cut", CPU, resume=True)
    loop.train(make_config(), pairs, tmp_path / "plain", CPU)
    whole, cut, plain = (load_file(tmp_path / n / LATEST) for n in ("whole", "cut", "plain"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert not torch.equal(whole["ema.positions"], plain["ema.positions"])
    logged = {n: [r for r in records(tmp_path / n) if "loss" in r] for n in ("whole", "plain")}
    assert all("masked_accuracy" not in r for r in logged["whole"])
    assert all("masked_accuracy" in r for r in logged["plain"])


def test_make_sampler_padding_of_which_little_is_scored_is_as_rare_a_target():
    """Each candidate stands for 1 / its chance tokens: together for the whole vocabulary."""
    counts = (1e6 / np.arange(1, 2001)).astype(np.int64)
    counts[0] = before = counts.sum()  # padding
    pairs = SimpleNamespace(token_counts=counts, tokenizer=SimpleNamespace(pad_id=0))
    sampler = step.make_sampler(
        pairs, make_config(sampled_vocabulary=64, scored_padding=0.1).training
    )
    scored = torch.from_numpy(counts.astype(np.float64))
    scored[0] *= 0.1
    stands_for = []
    for seed in range(200):
        targets = torch.multinomial(scored, 165, replacement=True, generator=seeded(seed))
        found = sampler.draw(targets, seeded(seed))
        stands_for.append(float((-found.log_inclusion).exp().sum()))
    assert np.mean(stands_for) == pytest.approx(2000, rel=0.02)
    assert counts[0] == before, "the counts of the pairs are left alone"
