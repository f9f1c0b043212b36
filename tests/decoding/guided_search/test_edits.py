"""Edits say what they do, and combine without touching each other."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding.guided_search.edits import (
    Edit,
    Outlook,
    apply_edits,
    combined_edits,
    crossings,
    single_edits,
)

texts = st.lists(st.integers(1, 6), min_size=1, max_size=9).map(tuple)


def outlook_of(tokens):
    n = len(tokens)
    return Outlook(
        own=np.linspace(-5.0, -1.0, n),
        fillers={j: ([7, 8], [-0.5, -1.0]) for j in range(n)},
        insertions={j: ([9], [-2.0]) for j in (0, n)},
        words=np.array([10, 11]),
        weights=np.array([0.9, 0.1]),
    )


@pytest.mark.parametrize(
    ("edits", "wanted"),
    [
        ([Edit(1, 2, (9,), 0.0)], (1, 9, 3, 4)),
        ([Edit(4, 4, (9,), 0.0)], (1, 2, 3, 4, 9)),
        ([Edit(0, 1, (), 0.0)], (2, 3, 4)),
        ([Edit(0, 1, (), 0.0), Edit(3, 4, (8, 9), 0.0)], (2, 3, 8, 9)),
        ([Edit(3, 4, (8, 9), 0.0), Edit(0, 1, (), 0.0)], (2, 3, 8, 9)),  # in any order
        ([Edit(0, 2, (2, 1), 0.0), Edit(1, 2, (9,), 0.0)], None),  # the second token twice
        ([Edit(2, 2, (8,), 0.0), Edit(2, 2, (9,), 0.0)], None),  # which would come first?
        ([Edit(2, 2, (8,), 0.0), Edit(2, 3, (9,), 0.0)], None),
    ],
)
def test_edits_are_made_together_or_not_at_all(edits, wanted):
    assert apply_edits((1, 2, 3, 4), edits) == wanted


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 2**32 - 1))
def test_every_single_edit_changes_the_text_by_little(tokens, seed):
    for edit in single_edits(tokens, outlook_of(tokens), np.random.default_rng(seed)):
        result = apply_edits(tokens, [edit])
        assert result is not None and result != tokens
        assert abs(len(result) - len(tokens)) <= 1
        gone, new = Counter(tokens) - Counter(result), Counter(result) - Counter(tokens)
        assert gone.total() <= 1 and new.total() <= 1


def test_a_doubted_token_is_the_likeliest_to_go():
    tokens = (1, 2, 3)
    gains = {
        edit.start: edit.gain
        for edit in single_edits(tokens, outlook_of(tokens), np.random.default_rng(0))
        if edit.tokens == (7,)
    }
    assert gains == pytest.approx({0: 4.5, 1: 2.5, 2: 0.5})


def test_combinations_prefer_likely_edits():
    edits = [Edit(0, 1, (7,), 5.0), Edit(1, 2, (7,), 5.0), Edit(2, 3, (7,), -25.0)]
    drawn = combined_edits(edits, 200, np.random.default_rng(0))
    counts = Counter(edit.start for several in drawn for edit in several)
    assert Counter(map(len, drawn)) == {2: 150, 3: 50}
    assert counts[2] == 0 and min(counts[0], counts[1]) > 150


@settings(max_examples=60, deadline=None)
@given(texts, texts, st.integers(0, 2**32 - 1))
def test_a_crossing_starts_like_one_and_ends_like_the_other(one, other, seed):
    for tokens, _ in crossings([one, other], 8, np.random.default_rng(seed)):
        ends = {one[len(one) - k :] for k in range(len(one) + 1)}
        ends |= {other[len(other) - k :] for k in range(len(other) + 1)}
        heads = [k for k in range(1, len(tokens) + 1) if tokens[:k] in (one[:k], other[:k])]
        assert any(tokens[k:] in ends for k in heads)


def test_nothing_crosses_with_itself():
    assert crossings([(1, 2, 3)], 8, np.random.default_rng(0)) == []
