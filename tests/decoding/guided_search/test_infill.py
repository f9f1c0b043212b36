"""Holes are made in hypotheses where asked, and filled by the denoiser alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import SequenceSpec
from unembed.decoding.guided_search.infill import PASSES, Hole, fill_holes, make_hole
from unembed.diffusion import Linear

PAD, END, MASK, VOCABULARY, LENGTH = 0, 1, 9, 10, 8
CANVAS = SequenceSpec(LENGTH, MASK, Linear(), END, PAD)

texts = st.lists(st.integers(2, 8), min_size=1, max_size=LENGTH - 1).map(tuple)


def says(*wanted, sureness=6.0):
    """A denoiser that wants these tokens at the positions of every sequence."""
    table = torch.zeros(LENGTH, VOCABULARY)
    table[torch.arange(len(wanted)), torch.tensor(wanted)] = sureness
    table[:, [PAD, END, MASK]] = 20.0
    return lambda tokens, embedding, t, where: table.expand(len(tokens), -1, -1)[where].clone()


def fill(holes, denoiser, favoured=None, seed=0):
    rows = {hole.row for hole in holes}
    rngs = {row: np.random.default_rng([seed, row]) for row in rows}
    favoured = {row: {} for row in rows} | (favoured or {})
    return fill_holes(denoiser, torch.zeros(3, 4), CANVAS, holes, favoured, rngs)


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(0, 2**32 - 1))
def test_a_hole_leaves_the_rest_as_it_was(tokens, seed):
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


def test_a_hole_is_where_the_doubt_is():
    tokens, own = (2, 3, 4, 5, 6, 7, 8), np.full(7, -1.0)
    rng, hits = np.random.default_rng(0), np.zeros(7)
    for _ in range(300):
        hole = make_hole(0, tokens, own, np.array([0, 0, 0, 0, 0, 0, 1.0]), CANVAS, rng)
        hits += [token not in hole.tokens for token in tokens]
    assert hits[6] > 290 and hits[0] < 60


@settings(max_examples=40, deadline=None)
@given(texts, st.integers(0, 1000))
def test_only_the_masks_change_and_none_is_left(tokens, seed):
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


def test_the_gain_is_the_likelihood_won():
    ((tokens, gain),), _ = fill([Hole(0, (5, MASK, 4), lost=-7.0)], says(2, 3, 4, sureness=30.0))
    assert tokens == (5, 3, 4)
    assert gain == pytest.approx(7.0, abs=1e-3)


def test_favoured_words_are_drawn_but_not_thought_likelier():
    hole = Hole(0, (MASK,), lost=0.0)
    ((tokens, gain),), _ = fill([hole], says(2, sureness=0.0), {0: {7: 50.0}})
    assert tokens == (7,)
    assert gain == pytest.approx(np.log(1 / 7), abs=1e-4)  # seven words, all alike


def test_a_filled_hole_does_not_depend_on_its_company():
    holes = [Hole(row, (MASK, 4, MASK, MASK), lost=-1.0) for row in range(3)]
    favoured = {0: {5: 1.0}, 1: {6: 2.0, 7: 1.0}, 2: {}}
    together, _ = fill(holes, says(2, 3, 4, 5, sureness=1.0), favoured)
    apart = [
        fill([h], says(2, 3, 4, 5, sureness=1.0), {h.row: favoured[h.row]})[0][0] for h in holes
    ]
    assert together == apart
