import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unembed.evaluation.bootstrap import (
    Figure,
    Tally,
    block_count,
    draw_blocks,
    put_in_words,
    summarise,
)
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


def figures(recall, exact=0.0, half=0.02, **spans):
    means = {"token-set recall": recall, "exact match": exact, **spans}
    return {name: Figure(mean, mean - half, mean + half, 200) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("recall", "exact", "words"),
    [
        (0.01, 0.0, "Hardly any of the words come back (1%, n = 200), no text whole"),
        (0.33, 0.0, "About a third of the words come back (33%, n = 200), no text whole"),
        (0.51, 0.032, "About half of the words come back (51%, n = 200), one text in 31 whole"),
        (0.90, 0.8, "Nearly all of the words come back (90%, n = 200), 80% of the texts whole"),
        (1.0, 1.0, "All of the words come back (100%, n = 200), every text whole"),
    ],
)
def test_put_in_words_begins_with_how_much_came_back(recall, exact, words):
    assert put_in_words({"inverter": figures(recall, exact)}, ["inverter"], []).startswith(words)


def test_put_in_words_compares_with_guessing_and_search():
    rows = {
        "greedy": figures(0.4),
        "best-of": figures(0.6, names=0.3),
        "shuffled embedding": figures(0.1),
        "nearest training text": figures(0.35),
    }
    text = put_in_words(rows, ["greedy", "best-of"], [])
    assert text.startswith("About three fifths of the words come back with best-of (60%")
    assert "30% of the names" in text
    assert "the vector of another text gives 10%" in text and "no leak" not in text
    assert "the nearest training text has 35%" in text
    rows["shuffled embedding"] = figures(0.59)
    assert "no leak beyond guessing" in put_in_words(rows, ["greedy", "best-of"], [])
    assert put_in_words({"a": {"token-set recall": None}}, ["a"], []).startswith("Nothing")
