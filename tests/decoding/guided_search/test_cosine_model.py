"""The guess of the encoder's answers: the plain formula, and what it means for texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding.guided_search import cosine_model
from unembed.decoding.guided_search.cosine_model import Candidates, CosineModel
from unembed.decoding.guided_search.edits import to_rows

DIRECTIONS = np.eye(32, dtype=np.float32)  # of the words
LENGTH = 9


def embed(texts, directions=DIRECTIONS):
    """Unit vectors, each the sum of the directions of a text's words."""
    sums = np.stack([directions[list(text)].sum(axis=0) for text in texts])
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def predict(known, candidates, target, directions=DIRECTIONS):
    vectors = embed(known, directions)
    cosines = vectors @ (target / np.linalg.norm(target))
    return model_of(known, vectors, cosines).predict([candidates_of(candidates)])


def candidates_of(some):
    return Candidates(to_rows(some, LENGTH), np.zeros(len(some)), np.zeros(len(some), dtype=bool))


def model_of(known, vectors, cosines, first=None):
    """A model that learned the first texts at once, then the others."""
    model = CosineModel()
    for some in (slice(0, first), slice(len(known) if first is None else first, None)):
        model.learn(
            to_rows(known, LENGTH)[some],
            np.asarray(vectors, dtype=np.float32)[some],
            np.asarray(cosines, float)[some],
        )
    return model


def kernel(one, other):
    """Likeness of two texts, by counting."""
    parts = []
    for text in (one, other):
        words, pairs, places = Counter(text), Counter(zip((None, *text), text, strict=False)), None
        places = Counter((j // 2, word) for j, word in enumerate(text))
        parts.append((words, pairs, places))

    def dot(a, b):
        shares = (cosine_model._WORDS, cosine_model._PAIRS, cosine_model._PLACES)
        return sum(
            share * sum(n * q[key] for key, n in p.items())
            for share, p, q in zip(shares, a, b, strict=True)
        )

    a, b = parts
    return dot(a, b) / np.sqrt(dot(a, a) * dot(b, b))


texts = st.lists(st.integers(1, 7), min_size=1, max_size=LENGTH).map(tuple)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.lists(texts, min_size=1, max_size=8), st.lists(texts, min_size=1, max_size=5))
def test_predict_is_the_gaussian_process_formula(known, candidates):
    rng = np.random.default_rng(len(known))
    vectors = rng.standard_normal((len(known) + 1, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    target, vectors = vectors[0].astype(float), vectors[1:]
    model = model_of(known, vectors, vectors @ target, first=len(known) // 2)
    groups = [candidates_of(some) for some in (candidates[:2], candidates[2:]) if some]
    mean = model.predict(groups)
    k = np.array([[kernel(a, b) for b in known] for a in candidates])
    k_known = np.array([[kernel(a, b) for b in known] for a in known])
    weights = k @ np.linalg.inv(k_known + cosine_model._NOISE * np.eye(len(known)))
    embeddings = weights @ vectors
    lengths = np.linalg.norm(embeddings, axis=1)
    apart = lengths > 1e-3  # else there is no direction to speak of
    wanted = (embeddings @ target)[apart] / lengths[apart]
    np.testing.assert_allclose(mean[apart], wanted, atol=2e-3)


def test_predict_says_again_what_is_known_and_nothing_of_what_is_not():
    known = [(1, 2, 3), (4, 5, 6), (7, 8)]
    mean = predict(known, [*known, (20, 21, 22)], embed([(1, 2, 4)])[0])
    np.testing.assert_allclose(mean[:3], embed(known) @ embed([(1, 2, 4)])[0], atol=0.03)
    assert mean[3] == 0.0


def test_predict_adds_up_what_helped_apart():
    base, target = (1, 2, 3, 4, 5, 6), (11, 2, 3, 4, 5, 12)
    known = [base, (11, *base[1:]), (*base[:5], 12), (*base[:3], 7, *base[4:])]
    both, one, worse = (11, *base[1:5], 12), (11, *base[1:]), (11, *base[1:3], 7, *base[4:])
    mean = predict(known, [both, one, worse], embed([target])[0])
    assert mean[0] > mean[1] + 0.02 and mean[1] > mean[2] + 0.02


def test_predict_knows_from_a_word_by_itself_what_it_is_worth_in_a_text():
    known = [(1, 2, 3), (4,), (5,)]
    mean = predict(known, [(1, 2, 4), (1, 2, 5)], embed([(1, 2, 4)])[0])
    assert mean[0] > mean[1] + 0.1


def test_predict_expects_nothing_of_what_is_said_already():
    """Words 4 and 5 mean the same, and 6 is what is missing, though less like the whole."""
    directions = DIRECTIONS.copy()
    directions[5] = directions[4]
    target = directions[1] + 2.0 * directions[4] + 1.2 * directions[6]
    known = [(1, 4), (5,), (6,)]
    cosines = embed(known, directions) @ target
    assert cosines[1] > cosines[2]
    mean = predict(known, [(1, 4, 5), (1, 4, 6)], target, directions)
    assert mean[1] > mean[0]


def test_predict_minds_the_order():
    known, vectors = [(1, 2, 3, 4), (4, 3, 2, 1)], np.array([[0.9, 0.44], [0.7, 0.71]])
    mean = model_of(known, vectors, [0.9, 0.7]).predict(
        [candidates_of([(1, 2, 3, 5), (5, 3, 2, 1)])]
    )
    assert mean[0] > mean[1]


def test_predict_gives_an_invisible_text_no_say():
    known, vectors = [(1, 2), (9,)], [embed([(1, 2)])[0], np.zeros(32, dtype=np.float32)]
    mean = model_of(known, vectors, [0.8, -1.0]).predict([candidates_of(known)])
    np.testing.assert_allclose(mean, [0.8, 0.0], atol=0.03)


def test_cosine_model_remembers_the_first_the_latest_and_the_best(monkeypatch):
    for name, count in (("_FIRST", 2), ("_LATEST", 3), ("_BEST", 4)):
        monkeypatch.setattr(cosine_model, name, count)
    known, cosines = [(k,) for k in range(20)], np.full(20, 0.1)
    cosines[8:12] = 0.9
    mean = model_of(known, np.eye(20), cosines).predict([candidates_of(known)])
    assert np.flatnonzero(mean).tolist() == [0, 1, 8, 9, 10, 11, 17, 18, 19]


def test_predict_of_the_same_candidates_sees_what_was_learned_since():
    known, candidates = [(1, 2), (3, 4), (1, 4)], [(1, 5), (3, 2)]
    vectors = embed(known)
    cosines = vectors @ embed([(1, 4, 2)])[0]
    model, kept = model_of(known[:1], vectors[:1], cosines[:1]), candidates_of(candidates)
    before = model.predict([kept])
    model.learn(to_rows(known[1:], LENGTH), vectors[1:], cosines[1:])
    fresh = model_of(known, vectors, cosines).predict([candidates_of(candidates)])
    np.testing.assert_allclose(model.predict([kept]), fresh, atol=1e-6)
    assert np.abs(before - fresh).max() > 0.01
