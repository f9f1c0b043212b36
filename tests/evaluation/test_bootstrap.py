import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unembed.evaluation.bootstrap import Figure, Tally, block_count, draw_blocks, summarise
from unembed.evaluation.metrics import CALIBRATION, COLUMNS, CORPUS_BLEU, METRICS


def test_summarise_a_mean_by_hand():
    figure = summarise([0.0, 1.0, 1.0, 1.0])
    assert figure.mean == 0.75
    assert figure.n == 4
    assert (figure.low, figure.high) == (0.25, 1.0)


def test_summarise_missing_values_are_left_out_not_zero():
    assert summarise([0.5, None, 1.0, None]) == summarise([0.5, 1.0])
    assert summarise([0.5, None, 1.0, None]).n == 2


@pytest.mark.parametrize("values", [[], [None], [None, None]])
def test_without_any_value_there_is_no_figure(values):
    assert summarise(values) is None


def test_summarise_one_value_is_its_own_interval():
    assert summarise([0.3]) == Figure(0.3, 0.3, 0.3, 1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.integers(0, 3))
def test_summarise_the_interval_contains_the_mean_and_stays_within_the_values(values, seed):
    figure = summarise(values, seed, resamples=200)
    assert figure.mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= figure.low <= figure.mean + 1e-9
    assert figure.mean - 1e-9 <= figure.high <= max(values) + 1e-9


def test_summarise_the_interval_is_that_of_the_seed():
    values = np.random.default_rng(0).random(50).tolist()
    assert summarise(values, seed=1) == summarise(values, seed=1)
    assert summarise(values, seed=1).low != summarise(values, seed=2).low


def test_summarise_the_interval_is_near_the_normal_one():
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


def filled(values, column="token accuracy"):
    tally = Tally(len(values))
    for index, value in enumerate(values):
        row = np.full(len(COLUMNS), np.nan)
        row[COLUMNS.index(column)] = value
        tally.add(index, row)
    return tally


def test_a_tally_has_the_means_and_intervals_of_its_texts():
    values = np.random.default_rng(0).random(300)
    weights = draw_blocks(300, seed=4)
    figures = filled(values).figures(weights)
    assert list(figures) == list(METRICS)
    expected = summarise(values.tolist(), seed=4)
    found = figures["token accuracy"]
    assert (found.mean, found.low, found.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert found.n == 300
    assert figures["cosine"] is figures[CORPUS_BLEU] is figures[CALIBRATION] is None


def test_missing_numbers_are_left_out_of_a_tally():
    found = filled([0.5, np.nan, 1.0, np.nan]).figures(draw_blocks(4, 0))["token accuracy"]
    assert found.mean == 0.75
    assert found.n == 2


def test_block_count_many_texts_share_blocks_and_keep_their_interval():
    values = np.random.default_rng(1).random(20_000)
    tally = filled(values)
    assert len(tally.sums) == block_count(20_000) == 1000
    figure = tally.figures(draw_blocks(1000, 0))["token accuracy"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert figure.mean == pytest.approx(values.mean())
    assert figure.n == 20_000
    assert figure.high - figure.low == pytest.approx(2 * half, rel=0.15)


def test_draw_blocks_every_resample_draws_as_many_blocks_as_there_are():
    weights = draw_blocks(7, seed=3, resamples=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert np.array_equal(weights, draw_blocks(7, seed=3, resamples=50))
