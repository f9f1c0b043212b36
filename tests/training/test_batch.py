import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.fakes import preset
from unembed.config import DiffusionSection
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.diffusion import (
    WEIGHTS,
    corrupt_batch,
    diffusion_loss,
    make_schedule,
    mean_mask_ratio,
)
from unembed.training import loss as linear_cross_entropy
from unembed.training.batch import ScoredPadding, masked_batch, most_masked, rows_of
from unembed.training.loss import ChunkedCrossEntropy

from .helpers import make_config

CPU = torch.device("cpu")
MASK = 59


def draw(x0, own=slice(None), seed=0, count=0, name="log-linear"):
    process, schedule = DiffusionSection(schedule=name, weight="elbo"), make_schedule(name, 5.0)
    generator = torch.Generator().manual_seed(seed)
    return masked_batch(x0[own], own, len(x0), process, schedule, MASK, generator, count)


def test_it_is_the_corruption_whose_loss_is_tested_against_brute_force():
    x0 = torch.randint(0, MASK, (9, 12))
    generator = torch.Generator().manual_seed(0)
    plain = corrupt_batch(x0, make_schedule("log-linear", 5.0), WEIGHTS["elbo"], MASK, generator)
    ours = draw(x0)
    assert ours.positions == plain.positions
    for name in ("xt", "t", "masked", "index", "targets", "weights"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name


def test_parts_of_a_batch_are_cut_from_the_whole():
    x0 = torch.randint(0, MASK, (9, 12))
    whole, parts = draw(x0), [draw(x0, slice(0, 4)), draw(x0, slice(4, 9))]
    for name in ("xt", "t", "masked", "targets", "weights"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert [part.positions for part in parts] == [whole.positions] * 2  # the global normaliser


def test_padding_keeps_loss_and_gradients_and_makes_shapes_constant():
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=12))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x0, embedding = torch.randint(0, MASK, (9, 12)), F.normalize(torch.randn(9, 16), dim=1)
    results = []
    for count in (0, 108):
        denoiser.zero_grad()
        batch = draw(x0, count=count)
        loss, _ = diffusion_loss(ChunkedCrossEntropy(denoiser), batch, embedding)
        loss.backward()
        results.append((len(batch.index), loss, [p.grad.clone() for p in denoiser.parameters()]))
    (some, plain, gradients), (every, padded, others) = results
    assert some < every == 108
    torch.testing.assert_close(padded, plain)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["log-linear", "linear"])
def test_the_constant_number_is_never_exceeded_and_wastes_little(name, whole):
    x0 = torch.zeros(512, 32, dtype=torch.long)
    own = slice(None) if whole else slice(0, 256)
    pairs = len(x0[own])
    most = most_masked(pairs, 32, mean_mask_ratio(make_schedule(name, 5.0)), whole)
    found = [len(draw(x0, own, seed, name=name).index) for seed in range(60)]
    assert max(found) <= most <= pairs * 32
    assert most < 1.25 * np.mean(found)
    assert {len(draw(x0, own, seed, most, name).index) for seed in range(5)} == {most}


def test_a_sample_of_the_padding_gives_the_loss_of_all_of_it_on_average():
    """Content is scored as before, padding a quarter as often with four times the weight."""
    PAD = 58
    x0 = torch.randint(0, PAD, (9, 12))
    x0[:, 7:] = PAD
    process, schedule = DiffusionSection(weight="elbo"), make_schedule("log-linear", 5.0)
    shares, totals, plain_totals = [], [], []
    for seed in range(200):
        batches = [
            masked_batch(
                x0,
                slice(None),
                9,
                process,
                schedule,
                MASK,
                torch.Generator().manual_seed(seed),
                padding=padding,
            )
            for padding in (None, ScoredPadding(PAD, 0.25))
        ]
        plain, sampled = batches
        assert torch.equal(sampled.xt, plain.xt) and torch.equal(sampled.masked, plain.masked)
        content = [b.targets != PAD for b in batches]
        for name in ("index", "targets", "weights"):
            kept = [getattr(b, name)[c] for b, c in zip(batches, content, strict=True)]
            assert torch.equal(*kept), name
        shares.append(float((~content[1]).sum() / (~content[0]).sum()))
        plain_totals.append(float(plain.weights[~content[0]].sum()))
        totals.append(float(sampled.weights[~content[1]].sum()))
    assert 0.23 < np.mean(shares) < 0.27
    assert 0.9 < np.sum(totals) / np.sum(plain_totals) < 1.1


def test_processes_sample_the_same_padding_as_one():
    x0 = torch.full((9, 12), 58)
    process, schedule = DiffusionSection(), make_schedule("log-linear", 5.0)
    parts = [
        masked_batch(
            x0[own],
            own,
            9,
            process,
            schedule,
            MASK,
            torch.Generator().manual_seed(0),
            padding=ScoredPadding(58, 0.3),
        )
        for own in (slice(None), slice(0, 4), slice(4, 9))
    ]
    whole, first, second = parts
    assert 0 < len(whole.index) < 0.5 * whole.masked.sum()
    assert torch.equal(torch.cat([first.index, second.index + 4 * 12]), whole.index)


def test_resident_pairs_are_the_same_pairs(pairs):
    opened, rows = Pairs.open(pairs), np.array([5, 700, 3, 64, 63])
    stored = rows_of(opened, make_config(resident="never").training, CPU)(rows)
    resident = rows_of(opened, make_config(resident="always").training, CPU)(rows)
    assert torch.equal(resident[0], stored[0])
    torch.testing.assert_close(resident[1], stored[1])


def test_the_network_can_be_compiled_in_one_piece(monkeypatch):
    """One graph, no breaks; the kernels themselves are the compiler's business."""
    compile_ = torch.compile
    monkeypatch.setattr(
        linear_cross_entropy.torch,
        "compile",
        lambda function: compile_(function, backend="eager", fullgraph=True),
    )
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=12))
    batch, embedding = draw(torch.randint(0, MASK, (9, 12))), torch.randn(9, 16)
    losses = [
        diffusion_loss(ChunkedCrossEntropy(denoiser, compile=on), batch, embedding)[0]
        for on in (False, True)
    ]
    torch.testing.assert_close(*losses)
