"""Edits write what they say, and combine without touching each other."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding.guided_search import edits
from unembed.decoding.guided_search.edits import (
    NOTHING,
    Edits,
    MaskedScores,
    apply_edits,
    moves,
    pack,
    single_edits,
)

LENGTH = 12

texts = st.lists(st.integers(1, 6), min_size=1, max_size=9).map(tuple)


def scores_of(tokens):
    n = len(tokens)
    return MaskedScores(
        own=np.linspace(-5.0, -1.0, n),
        fillers=np.tile([7, 8], (n, 1)),
        filler_scores=np.tile([-0.5, -1.0], (n, 1)),
        gaps=np.array([0, n]),
        inserts=np.array([[9], [9]]),
        insert_scores=np.array([[-2.0], [-2.0]]),
    )


def texts_of(rows):
    return [tuple(row[row != NOTHING].tolist()) for row in rows]


def edits_of(*writes):
    """Edits from lists of (slot, token)."""
    slots, tokens = (np.array([[w[k] for w in edit] for edit in writes]) for k in (0, 1))
    return Edits(slots, tokens, np.zeros(len(writes)))


@pytest.mark.parametrize(
    ("writes", "wanted"),
    [
        ([(3, 9)], (1, 9, 3, 4)),
        ([(8, 9)], (1, 2, 3, 4, 9)),
        ([(1, NOTHING)], (2, 3, 4)),
        ([(1, NOTHING), (6, 8), (7, 9)], (2, 3, 8, 9)),
        ([(1, 4), (7, 1)], (4, 2, 3, 1)),
        ([(0, 3), (5, NOTHING)], (3, 1, 2, 4)),
        ([(0, 7), (2, 8), (4, 9)], ()),  # seven tokens are too many
    ],
)
def test_apply_edits_writes_into_gaps_and_tokens(writes, wanted):
    rows = apply_edits((1, 2, 3, 4), edits_of(writes), 6)
    assert rows.shape == (1, 6)
    assert texts_of(rows) == [wanted]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(NOTHING, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_pack_moves_tokens_to_the_start_in_their_order(grid):
    for row, packed in zip(grid, pack(np.array(grid), 6), strict=True):
        wanted = [token for token in row if token != NOTHING]
        assert packed.tolist() == wanted + [NOTHING] * (6 - len(wanted))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(texts)
def test_single_edits_change_a_text_by_little(tokens):
    singles = single_edits(scores_of(tokens))
    for result in texts_of(apply_edits(tokens, singles, LENGTH)):
        assert abs(len(result) - len(tokens)) <= 1
        gone, new = Counter(tokens) - Counter(result), Counter(result) - Counter(tokens)
        assert gone.total() <= 1 and new.total() <= 1


def test_single_edits_like_to_replace_a_doubted_token():
    tokens = (1, 2, 3)
    singles = single_edits(scores_of(tokens))
    gains = {
        result.index(7): gain
        for result, gain in zip(
            texts_of(apply_edits(tokens, singles, LENGTH)), singles.gains, strict=True
        )
        if 7 in result
    }
    assert gains == pytest.approx({0: 4.5, 1: 2.5, 2: 0.5})


def test_single_edits_never_write_what_cannot_be():
    tokens = (1, 2, 3)
    scores = scores_of(tokens)
    impossible = np.full_like(scores.filler_scores, -np.inf)
    singles = single_edits(replace(scores, filler_scores=impossible))
    assert np.isfinite(singles.gains).all()
    assert len(singles.gains) < len(single_edits(scores).gains)


def moved_of(tokens):
    rows, gains = moves(tokens, scores_of(tokens), LENGTH, np.random.default_rng(0))
    return texts_of(rows), gains


def test_moves_exchanges_every_two_neighbouring_spans_once():
    tokens = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    wanted = {
        (*tokens[:a], *tokens[b:c], *tokens[a:b], *tokens[c:])
        for a in range(9)
        for b in range(a + 1, 9)
        for c in range(b + 1, 10)
        if min(b - a, c - b) <= edits._LONGEST_MOVE
    }
    results, _ = moved_of(tokens)
    assert set(results) == wanted and len(results) == len(wanted)


def test_moves_prefers_seams_before_unlikely_tokens():
    tokens = (1, 2, 3)  # of which the first is the least likely
    results, gains = moved_of(tokens)
    worth = dict(zip(results, gains, strict=True))
    own = [-5.0, -3.0, -1.0]
    assert worth[2, 1, 3] == pytest.approx(edits._MOVE - sum(own))
    assert worth[1, 3, 2] == pytest.approx(edits._MOVE - own[1] - own[2])
    assert moved_of((4,))[0] == []


def test_moves_of_a_long_text_are_some_of_all(monkeypatch):
    monkeypatch.setattr(edits, "_MOST_MOVES", 7)
    results, gains = moved_of((1, 2, 3, 4, 5, 6))
    assert len(results) == len(set(results)) == len(gains) == 7
    assert all(sorted(text) == [1, 2, 3, 4, 5, 6] for text in results)
