import itertools
import math

import pytest
import torch

from tests.fakes import preset
from unembed.config import TrainingSection
from unembed.denoiser import Denoiser
from unembed.training.step import learning_rate, make_optimizer

SETTINGS = TrainingSection(steps=1000, warmup_steps=100, lr=1e-3, final_lr=0.1)


def test_warm_up_then_cosine():
    rates = [learning_rate(step, SETTINGS) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    halfway = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[550] == pytest.approx(halfway)
    assert rates[999] == pytest.approx(1e-4, rel=1e-2)


def test_only_matrices_decay_and_the_table_has_its_own_rate():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    optimizer = make_optimizer(denoiser, SETTINGS.model_copy(update={"table_lr": 0.1}))
    names = {id(p): name for name, p in denoiser.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.0]
    assert [group["share"] for group in optimizer.param_groups] == [1.0, 1.0, 0.1]
    assert groups[2] == {"token_table.weight"}
    for name, parameter in denoiser.named_parameters():
        is_table = name in ("token_table.weight", "positions")
        assert (name in groups[0]) == (parameter.ndim == 2 and not is_table), name
    assert sorted(names.values()) == sorted(set().union(*groups))


def test_a_frozen_table_is_left_out():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    optimizer = make_optimizer(denoiser, SETTINGS.model_copy(update={"table_lr": 0.0}))
    assert len(optimizer.param_groups) == 2
    assert not denoiser.token_table.weight.requires_grad


def test_one_step_equals_adamw_by_hand():
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    optimizer = make_optimizer(denoiser, SETTINGS)
    weight = denoiser.embedding_mlp[0].weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    g = weight.grad
    # Bias-corrected first step: m / (1 - b1) = g and v / (1 - b2) = g^2
    expected = before * (1 - SETTINGS.lr * SETTINGS.weight_decay)
    expected -= SETTINGS.lr * g / (g.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-7)
