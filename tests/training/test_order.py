import numpy as np
import torch

from unembed.training.step import step_generator, training_rows


def test_an_epoch_is_a_permutation_and_the_next_one_differs():
    first = training_rows(0, 50, 50, seed=1)
    second = training_rows(50, 50, 50, seed=1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, training_rows(0, 50, 50, seed=2))


def test_any_cut_of_the_order_is_the_same_order():
    whole = training_rows(0, 170, 50, seed=3)
    parts = [training_rows(start, 17, 50, seed=3) for start in range(0, 170, 17)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_step_draws_the_same_again_and_others_do_not():
    def draw(seed: int, step: int) -> torch.Tensor:
        return torch.rand(4, generator=step_generator(seed, step))

    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))
