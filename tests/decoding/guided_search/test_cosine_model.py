"""The guess of the encoder's answers."""

import numpy as np

from unembed.decoding.guided_search import cosine_model as surrogate
from unembed.decoding.guided_search.cosine_model import predict_cosines

DIRECTIONS = np.eye(32, dtype=np.float32)  # of the words


def embed(texts, directions=DIRECTIONS):
    """Unit vectors, each the sum of the directions of a text's words."""
    sums = np.stack([directions[list(text)].sum(axis=0) for text in texts])
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def predict(known, candidates, target, vectors=None):
    vectors = embed(known) if vectors is None else vectors
    return predict_cosines(
        known, list(vectors), (vectors @ embed([target])[0]).tolist(), candidates
    )


def test_what_is_known_is_predicted_with_little_doubt():
    known = [(1, 2, 3), (4, 5, 6), (7, 8)]
    mean, spread = predict(known, [*known, (20, 21, 22)], (1, 2, 4))
    np.testing.assert_allclose(mean[:3], embed(known) @ embed([(1, 2, 4)])[0], atol=0.03)
    assert spread[:3].max() < 0.2
    assert mean[3] == 0.0 and spread[3] == 1.0


def test_words_that_helped_apart_are_predicted_to_help_together():
    base, target = (1, 2, 3, 4, 5, 6), (11, 2, 3, 4, 5, 12)
    known = [base, (11, *base[1:]), (*base[:5], 12), (*base[:3], 7, *base[4:])]
    both, one, worse = (11, *base[1:5], 12), (11, *base[1:]), (11, *base[1:3], 7, *base[4:])
    mean, _ = predict(known, [both, one, worse], target)
    assert mean[0] > mean[1] + 0.02 and mean[1] > mean[2] + 0.02


def test_a_word_by_itself_tells_what_it_is_worth_in_a_text():
    known = [(1, 2, 3), (4,), (5,)]
    mean, _ = predict(known, [(1, 2, 4), (1, 2, 5)], (1, 2, 4))
    assert mean[0] > mean[1] + 0.1


def test_what_is_said_already_does_not_help_again():
    """Words 4 and 5 mean the same, and 6 is what is missing, though less like the whole."""
    directions = DIRECTIONS.copy()
    directions[5] = directions[4]
    known = [(1, 4), (5,), (6,)]
    vectors = embed(known, directions)
    target = directions[1] + 2.0 * directions[4] + 1.2 * directions[6]
    cosines = vectors @ (target / np.linalg.norm(target))
    assert cosines[1] > cosines[2]
    mean, _ = predict_cosines(known, list(vectors), cosines.tolist(), [(1, 4, 5), (1, 4, 6)])
    assert mean[1] > mean[0]


def test_order_counts():
    known, vectors = [(1, 2, 3, 4), (4, 3, 2, 1)], np.array([[0.9, 0.44], [0.7, 0.71]])
    cosines = [0.9, 0.7]
    mean, _ = predict_cosines(known, list(vectors), cosines, [(1, 2, 3, 5), (5, 3, 2, 1)])
    assert mean[0] > mean[1]


def test_an_invisible_text_has_no_say():
    known, vectors = [(1, 2), (9,)], [embed([(1, 2)])[0], np.zeros(32, dtype=np.float32)]
    mean, _ = predict_cosines(known, vectors, [0.8, -1.0], [(1, 2), (9,)])
    np.testing.assert_allclose(mean, [0.8, 0.0], atol=0.03)


def test_the_first_the_latest_and_the_best_are_remembered(monkeypatch):
    for name, count in (("_FIRST", 2), ("_LATEST", 3), ("_BEST", 4)):
        monkeypatch.setattr(surrogate, name, count)
    known, cosines = [(k,) for k in range(20)], np.full(20, 0.1)
    cosines[8:12] = 0.9
    _, spread = predict_cosines(known, list(np.eye(20)), cosines.tolist(), known)
    assert np.flatnonzero(spread < 0.5).tolist() == [0, 1, 8, 9, 10, 11, 17, 18, 19]
