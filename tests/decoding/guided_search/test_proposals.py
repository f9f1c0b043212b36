"""The denoiser's scores of masked tokens, and holes that it fills."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import SequenceSpec
from unembed.decoding.guided_search.proposals import Hole, infill, make_hole, masked_scores
from unembed.diffusion import Linear

PAD, END, MASK, VOCABULARY, LENGTH = 0, 1, 9, 10, 8
PASSES = 2
CANVAS = SequenceSpec(LENGTH, MASK, Linear(), END, PAD)

texts = st.lists(st.integers(2, 8), min_size=1, max_size=LENGTH - 1).map(tuple)


def says(*wanted, sureness=6.0):
    """A denoiser that wants these tokens at the positions of every sequence."""
    table = torch.zeros(LENGTH, VOCABULARY)
    table[torch.arange(len(wanted)), torch.tensor(wanted)] = sureness
    table[:, [PAD, END, MASK]] = 20.0
    return lambda tokens, embedding, t, where: table.expand(len(tokens), -1, -1)[where].clone()


def fill(holes, denoiser, favoured=None, seed=0):
    rngs = [np.random.default_rng([seed, row]) for row in range(3)]
    ids, nats = torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2)
    for row, words in (favoured or {}).items():
        ids[row, : len(words)] = torch.tensor(list(words))
        nats[row, : len(words)] = torch.tensor(list(words.values()))
    return infill(denoiser, torch.zeros(3, 4), CANVAS, holes, (ids, nats), rngs, PASSES)


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(0, 2**32 - 1))
def test_make_hole_leaves_the_rest_as_it_was(tokens, seed):
    own = np.linspace(-3.0, -1.0, len(tokens))
    rng = np.random.default_rng(seed)
    hole = make_hole(1, tokens, own, 1.0 - np.exp(own), CANVAS, rng)
    masks = hole.tokens.count(MASK)
    assert masks >= 1
    assert 1 <= len(hole.tokens) < LENGTH
    assert abs(len(hole.tokens) - len(tokens)) <= 1
    kept = [token for token in hole.tokens if token != MASK]
    rest = iter(tokens)
    assert all(token in rest for token in kept), "in their order"
    assert hole.lost <= own.max()


def test_make_hole_goes_where_the_doubt_is():
    tokens, own = (2, 3, 4, 5, 6, 7, 8), np.full(7, -1.0)
    rng, hits = np.random.default_rng(0), np.zeros(7)
    for _ in range(300):
        hole = make_hole(0, tokens, own, np.array([0, 0, 0, 0, 0, 0, 1.0]), CANVAS, rng)
        hits += [token not in hole.tokens for token in tokens]
    assert hits[6] > 290 and hits[0] < 60


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(0, 1000))
def test_infill_changes_the_masks_alone_and_leaves_none(tokens, seed):
    own = np.full(len(tokens), -1.0)
    rng = np.random.default_rng(seed)
    holes = [make_hole(row, tokens, own, -own, CANVAS, rng) for row in (0, 2)]
    found, passes = fill(holes, says(2, 3, 4, sureness=1.0), seed=seed)
    for hole, (filled, gain), spent in zip(holes, found, passes, strict=True):
        assert len(filled) == len(hole.tokens)
        assert all(a == b for a, b in zip(filled, hole.tokens, strict=True) if b != MASK)
        assert not {MASK, PAD, END} & set(filled)
        assert np.isfinite(gain)
        assert spent == min(PASSES, hole.tokens.count(MASK))


def test_infill_gains_the_likelihood_won():
    ((tokens, gain),), _ = fill([Hole(0, (5, MASK, 4), lost=-7.0)], says(2, 3, 4, sureness=30.0))
    assert tokens == (5, 3, 4)
    assert gain == pytest.approx(7.0, abs=1e-3)


def test_infill_draws_favoured_words_but_thinks_them_no_likelier():
    hole = Hole(0, (MASK,), lost=0.0)
    ((tokens, gain),), _ = fill([hole], says(2, sureness=0.0), {0: {7: 50.0}})
    assert tokens == (7,)
    assert gain == pytest.approx(np.log(1 / 7), abs=1e-4)  # seven words, all alike


def test_infill_does_not_depend_on_the_company():
    holes = [Hole(row, (MASK, 4, MASK, MASK), lost=-1.0) for row in range(3)]
    favoured = {0: {5: 1.0}, 1: {6: 2.0, 7: 1.0}}
    together, _ = fill(holes, says(2, 3, 4, 5, sureness=1.0), favoured)
    apart = [fill([h], says(2, 3, 4, 5, sureness=1.0), favoured)[0][0] for h in holes]
    assert together == apart


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 1000))
def test_masked_scores_say_of_each_position_what_the_denoiser_says(tokens, seed):
    rngs = [np.random.default_rng([seed, row]) for row in range(2)]
    denoiser = says(2, 3, 4, 5, 6, 7, 8, sureness=3.0)
    hypotheses = [(1, tokens), (0, (4, 4))]
    results, passes = masked_scores(denoiser, torch.zeros(2, 4), CANVAS, hypotheses, rngs)
    normaliser = np.log(np.exp(3.0) + 6)
    for (_, text), scores, spent in zip(hypotheses, results, passes, strict=True):
        wanted = np.where(np.array(text) == np.arange(2, 2 + len(text)), 3.0, 0.0) - normaliser
        np.testing.assert_allclose(scores.own, wanted, atol=1e-5)
        assert scores.fillers[:, 0].tolist() == list(range(2, 2 + len(text)))
        assert not {PAD, END, MASK} & set(scores.fillers[:, :7].ravel().tolist())
        np.testing.assert_allclose(scores.filler_scores[:, 0], 3.0 - normaliser, atol=1e-5)
        assert len(set(scores.gaps)) == len(scores.gaps) == len(scores.inserts)
        assert set(scores.gaps) <= set(range(len(text) + 1))
        assert (len(scores.gaps) > 0) == (len(text) < LENGTH - 1)
        assert spent >= min(4, len(text))


def test_masked_scores_do_not_depend_on_the_company():
    hypotheses = [(0, (2, 5, 4)), (1, (3, 3, 8, 2, 6))]

    def score(some):
        rngs = [np.random.default_rng(row) for row in range(2)]
        found, _ = masked_scores(says(2, 3, 4), torch.zeros(2, 4), CANVAS, some, rngs)
        return found

    for together, (apart,) in zip(
        score(hypotheses), [score([one]) for one in hypotheses], strict=True
    ):
        for name, values in vars(together).items():
            np.testing.assert_allclose(values, getattr(apart, name), atol=1e-6)
