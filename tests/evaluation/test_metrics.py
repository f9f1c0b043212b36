from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unembed.evaluation.metrics import (
    Figure,
    exact_match,
    summarise,
    token_accuracy,
    token_set_f1,
)

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("original", "recovered", "accuracy", "exact", "f1"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0, 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.0, 0.0, 1.0),
        ([1, 2, 3, 4], [1, 2], 0.5, 0.0, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 1.0, 0.0, 2 / 3),
        ([1, 1, 2], [1, 1, 1], 2 / 3, 0.0, 2 / 3),
        ([1, 2, 3], [7, 8], 0.0, 0.0, 0.0),
        ([1, 2, 3], [], 0.0, 0.0, 0.0),
        ([5], [5], 1.0, 1.0, 1.0),
    ],
)
def test_metrics_by_hand(original, recovered, accuracy, exact, f1):
    assert token_accuracy(original, recovered) == pytest.approx(accuracy)
    assert exact_match(original, recovered) == exact
    assert token_set_f1(original, recovered) == pytest.approx(f1)


@given(tokens, st.lists(st.integers(0, 5), max_size=8))
def test_metrics_by_brute_force(original, recovered):
    at = dict(enumerate(recovered))
    hits = [at.get(place) == token for place, token in enumerate(original)]
    assert token_accuracy(original, recovered) == pytest.approx(np.mean(hits))

    common = len([a for a, b in product(set(original), set(recovered)) if a == b])
    if common:
        precision, recall = common / len(set(recovered)), common / len(set(original))
        harmonic = 2 / (1 / precision + 1 / recall)
    else:
        harmonic = 0.0
    assert token_set_f1(original, recovered) == pytest.approx(harmonic)
    assert token_set_f1(original, original[::-1]) == 1.0


def test_a_mean_by_hand():
    figure = summarise([0.0, 1.0, 1.0, 1.0])
    assert figure.mean == 0.75
    assert figure.n == 4
    assert (figure.low, figure.high) == (0.25, 1.0)


def test_missing_values_are_left_out_not_zero():
    assert summarise([0.5, None, 1.0, None]) == summarise([0.5, 1.0])
    assert summarise([0.5, None, 1.0, None]).n == 2


@pytest.mark.parametrize("values", [[], [None], [None, None]])
def test_without_any_value_there_is_no_figure(values):
    assert summarise(values) is None


def test_one_value_is_its_own_interval():
    assert summarise([0.3]) == Figure(0.3, 0.3, 0.3, 1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 3))
def test_the_interval_contains_the_mean_and_stays_within_the_values(values, seed):
    figure = summarise(values, seed, resamples=200)
    assert figure.mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= figure.low <= figure.mean + 1e-9
    assert figure.mean - 1e-9 <= figure.high <= max(values) + 1e-9


def test_the_interval_is_that_of_the_seed():
    values = np.random.default_rng(0).random(50).tolist()
    assert summarise(values, seed=1) == summarise(values, seed=1)
    assert summarise(values, seed=1).low != summarise(values, seed=2).low


def test_the_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).random(400)
    half = 1.96 * values.std() / 20
    figure = summarise(values.tolist())
    assert figure.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_figures_leave_the_global_random_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    summarise([0.1, 0.2])
    assert np.array_equal(np.random.get_state()[1], before)
