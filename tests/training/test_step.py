import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.fakes import preset
from unembed.config import TrainingSection
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.errors import TrainingError
from unembed.training import loop
from unembed.training.distributed import Processes
from unembed.training.step import (
    EMA,
    draw_batch,
    learning_rate,
    make_optimizer,
    step_generator,
    training_rows,
)

from .helpers import CPU, with_prefix

# The optimiser and its schedule

SETTINGS = TrainingSection(steps=1000, warmup_steps=100, lr=1e-3, final_lr=0.1)


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    rates = [learning_rate(step, SETTINGS) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    halfway = 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[550] == pytest.approx(halfway)
    assert rates[999] == pytest.approx(1e-4, rel=1e-2)


def test_learning_rate_of_wsd_is_constant_until_the_decay():
    wsd = SETTINGS.model_copy(update={"schedule": "wsd", "decay_steps": 200})
    rates = [learning_rate(step, wsd) for step in range(1001)]
    assert rates[:100] == [learning_rate(step, SETTINGS) for step in range(100)]
    assert rates[100:801] == [1e-3] * 701
    assert all(a > b for a, b in itertools.pairwise(rates[800:]))
    assert rates[850] == pytest.approx(1e-3 * (0.1 + 0.9 * (1 - math.sqrt(50 / 200))))
    assert rates[1000] == pytest.approx(1e-4)
    longer = wsd.model_copy(update={"steps": 5000})
    assert [learning_rate(step, longer) for step in range(801)] == rates[:801]


def test_learning_rate_of_wsd_decays_over_a_tenth_unless_told():
    wsd = TrainingSection(steps=1000, warmup_steps=100, schedule="wsd")
    assert learning_rate(900, wsd) == wsd.lr > learning_rate(901, wsd)
    for given, message in (
        ({"decay_steps": 50}, "decay_steps \\(50\\) needs schedule: wsd"),
        ({"schedule": "wsd", "decay_steps": 901}, "at most steps \\(1000\\)"),
    ):
        with pytest.raises(ValidationError, match=message):
            TrainingSection(steps=1000, warmup_steps=100, **given)


def test_make_optimizer_decays_matrices_only_and_the_table_has_its_own_rate():
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


def test_make_optimizer_leaves_a_frozen_table_out():
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=8))
    optimizer = make_optimizer(denoiser, SETTINGS.model_copy(update={"table_lr": 0.0}))
    assert len(optimizer.param_groups) == 2
    assert not denoiser.token_table.weight.requires_grad


# Averaged weights


def test_ema_applied_swaps_and_restores_even_after_an_error():
    module = torch.nn.Linear(3, 2)
    ema = EMA(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
    try:
        with ema.applied():
            assert not (module.weight == 7.0).any()
            raise KeyError
    except KeyError:
        pass
    assert (module.weight == 7.0).all()


def test_ema_averages_are_float32_whatever_the_module_is():
    module = torch.nn.Linear(3, 2).bfloat16()
    ema = EMA(module, decay=0.9)
    ema.update(1)
    assert all(average.dtype == torch.float32 for average in ema.averages)


# The order of the data


def test_training_rows_of_an_epoch_are_a_permutation_and_the_next_one_differs():
    first = training_rows(0, 50, 50, seed=1)
    second = training_rows(50, 50, 50, seed=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, training_rows(0, 50, 50, seed=2))


def test_training_rows_of_any_cut_is_the_same_order():
    whole = training_rows(0, 170, 50, seed=3)
    parts = [training_rows(start, 17, 50, seed=3) for start in range(0, 170, 17)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_step_generator_draws_the_same_again_and_others_do_not():
    def draw(seed: int, step: int) -> torch.Tensor:
        return torch.rand(4, generator=step_generator(seed, step))

    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))


def test_draw_batch_of_a_prefix_is_short_but_where_texts_go_on(pairs, tmp_path):
    config = with_prefix(5, batch_size=6)
    opened = Pairs.open(pairs)
    processes = Processes(CPU, False)
    state = loop.initial_state(config, opened, processes, None)
    pad_id, widths = opened.tokenizer.pad_id, []
    for step in range(40):
        generator = step_generator(0, step)
        batch, embedding = draw_batch(state, 6 * step, generator)
        again, same = draw_batch(state, 6 * step, step_generator(0, step))
        assert torch.equal(batch.xt, again.xt) and torch.equal(embedding, same)
        widths.append(batch.xt.shape[1])
        if widths[-1] == 12:
            assert (batch.xt[:, 5] != pad_id).all(), "all of these go on"
    assert set(widths) == {5, 12}
    assert 5 < widths.count(12) < 16
    assert min(state.long_rows) >= 16, "none that is held out"


def test_make_state_needs_texts_that_go_on_behind_the_prefix(pairs):
    opened = Pairs.open(pairs)
    for prefix in (11, 12, 100):
        with pytest.raises(TrainingError, match=rf"of at least denoiser\.prefix = {prefix} tokens"):
            loop.initial_state(with_prefix(prefix), opened, Processes(CPU, False), None)
