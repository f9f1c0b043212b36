"""Maps between encoders' spaces: against brute force, few pairs, streams, files, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from unembed.encoders.alignment import (
    MEAN,
    PROCRUSTES,
    RIDGE,
    SETTINGS,
    SHIFT,
    WEIGHTS,
    Alignment,
    PairSums,
    fit_alignment,
)
from unembed.encoders.base import EncoderIdentity
from unembed.errors import CheckpointError, EmbeddingError

D = 6
TARGET = EncoderIdentity("own", None, D, "a" * 64, "")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def linear_pairs(count, dimension=8, noise=0.1, seed=0):
    """Pairs whose y are a noisy linear image of the x, both unit and off the origin."""
    random = np.random.default_rng(seed)
    x = unit(random.standard_normal((count, dimension)) + 0.5)
    matrix = np.random.default_rng(99).standard_normal((dimension, D))
    y = unit(x @ matrix + 0.3 + noise * random.standard_normal((count, D)))
    return x, y


def sums_of(x, y, parts=1, **options):
    sums = PairSums(**options)
    for some in np.array_split(np.arange(len(x)), parts):
        sums.add(x[some], y[some])
    return sums


def fit(x, y, **options):
    return fit_alignment(sums_of(x, y, **options), TARGET)


def ridge_by_hand(x, y, penalty, anchor=0.0):
    """W and means of the textbook's centred ridge, drawn towards a multiple of the identity."""
    mx, my = x.mean(axis=0), y.mean(axis=0)
    xc, toward = x - mx, anchor * np.eye(x.shape[1], y.shape[1])
    yc = y - my - xc @ toward
    return toward + np.linalg.solve(xc.T @ xc + penalty * np.eye(x.shape[1]), xc.T @ yc), mx, my


def predicted_from_others(x, y, predict):
    """Mean cosine of each y with what a map made of the other pairs predicts."""
    cosines = []
    for row in range(len(x)):
        others = np.delete(np.arange(len(x)), row)
        guess = predict(x[others], y[others], x[row])
        cosines.append(guess @ y[row] / np.linalg.norm(guess))
    return float(np.mean(cosines))


def test_fit_alignment_ridge_is_the_textbooks():
    x, y = linear_pairs(40)
    alignment = fit(x, y)
    assert alignment.method == RIDGE
    matrix, mx, my = ridge_by_hand(x, y, alignment.penalty)
    np.testing.assert_allclose(alignment.matrix, matrix, atol=1e-5)
    np.testing.assert_allclose(alignment(x), unit(my + (x - mx) @ matrix), atol=1e-5)


@pytest.mark.parametrize("dimension", [8, D])
@pytest.mark.parametrize("count", [3, 5, 9, 30])  # fewer pairs than dimensions, as many, more
def test_fit_alignment_leaves_one_out_as_by_hand(count, dimension):
    x, y = linear_pairs(count, dimension)
    if dimension == D:
        y = unit(y + x)  # akin
    alignment = fit(x, y)
    best = ridge_of(x, y)
    assert (best.anchor > 0) == (dimension == D)

    def ridge(xs, ys, new):
        matrix, mx, my = ridge_by_hand(xs, ys, best.penalty, best.anchor)
        return my + (new - mx) @ matrix

    by_hand = {
        RIDGE: predicted_from_others(x, y, ridge),
        MEAN: predicted_from_others(x, y, lambda xs, ys, new: ys.mean(axis=0)),
    }
    for name, cosine in by_hand.items():
        assert alignment.cosines[name] == pytest.approx(cosine, abs=1e-6)


def ridge_of(x, y):
    """The ridge that leaving one out prefers, whichever map is the best."""
    from unembed.encoders import alignment

    return alignment._ridge(sums_of(x, y))


def test_fit_alignment_draws_the_ridge_towards_the_identity_for_akin_spaces():
    random = np.random.default_rng(2)
    x = unit(random.standard_normal((12, D)))
    y = unit(x + 0.5 * x @ random.standard_normal((D, D)))
    best = ridge_of(x, y)
    assert best.anchor > 0
    matrix = ridge_by_hand(x, y, best.penalty, best.anchor)[0]
    np.testing.assert_allclose(best.matrix, matrix, atol=1e-9)


def test_fit_alignment_shift_leaves_one_out_as_by_hand():
    x = linear_pairs(12, dimension=D)[0]
    y = unit(x + 0.4)
    cosine = predicted_from_others(
        x, y, lambda xs, ys, new: new + ys.mean(axis=0) - xs.mean(axis=0)
    )
    assert fit(x, y).cosines[SHIFT] == pytest.approx(cosine, abs=1e-9)


def test_fit_alignment_procrustes_leaves_folds_out_as_by_hand():
    x, y = linear_pairs(5)  # as many folds as pairs

    def rotation(xs, ys, new):
        mx, my = xs.mean(axis=0), ys.mean(axis=0)
        u, s, v = np.linalg.svd((xs - mx).T @ (ys - my), full_matrices=False)
        keep = s > s.max() * 1e-6
        return my + (new - mx) @ (u[:, keep] @ v[keep]) * s.sum() / ((xs - mx) ** 2).sum()

    cosine = predicted_from_others(x, y, rotation)
    assert fit(x, y).cosines[PROCRUSTES] == pytest.approx(cosine, abs=1e-6)


def test_fit_alignment_chooses_procrustes_for_a_rotation_from_few_pairs():
    random = np.random.default_rng(3)
    rotation = np.linalg.qr(random.standard_normal((D, D)))[0]
    x = unit(random.standard_normal((9, D)))
    alignment = fit(x, unit(x @ rotation + 0.02 * random.standard_normal((9, D))))
    assert alignment.method == PROCRUSTES
    new = unit(random.standard_normal((20, D)))
    assert (alignment(new) * (new @ rotation)).sum(axis=1).mean() > 0.9


def test_fit_alignment_leaves_spaces_as_they_are_that_are_only_moved():
    x = linear_pairs(4, dimension=D)[0]
    alignment = fit(x, x + 0.01)
    assert alignment.cosines[SHIFT] == pytest.approx(1.0)
    new = linear_pairs(9, dimension=D, seed=8)[0]
    np.testing.assert_allclose(alignment(new), unit(new + 0.01), atol=1e-3)


@pytest.mark.parametrize("dimension", [3, D, 20])
def test_fit_alignment_takes_any_dimension(dimension):
    x, y = linear_pairs(50, dimension)
    alignment = fit(x, y)
    assert alignment(x[:4]).shape == (4, D)
    assert np.linalg.norm(alignment(x), axis=1) == pytest.approx(1.0)
    assert (SHIFT in alignment.cosines) == (dimension == D)


def test_fit_alignment_from_two_pairs_is_finite_and_from_one_a_constant():
    x, y = linear_pairs(2)
    two = fit(x, y)
    assert two.method != MEAN and np.isfinite(two(x)).all() and np.isfinite(two.cosine)
    one = fit(x[:1], y[:1])
    assert (one.method, one.cosines) == (MEAN, {})
    np.testing.assert_allclose(one(x), np.repeat(y[:1], 2, axis=0), atol=1e-6)
    assert "1 pair cannot be checked" in one.doubt()


def test_fit_alignment_survives_equal_pairs():
    x, y = linear_pairs(1)
    alignment = fit(np.repeat(x, 5, axis=0), np.repeat(y, 5, axis=0))
    np.testing.assert_allclose(alignment(x), y, atol=1e-5)
    assert "predicts nothing" in alignment.doubt()


def test_fit_alignment_refuses_no_pairs():
    with pytest.raises(EmbeddingError, match="at least one pair"):
        fit_alignment(PairSums(), TARGET)


def test_fit_alignment_does_not_dip_where_pairs_meet_the_dimension():
    """Without a penalty the error explodes at n = D' (double descent); with one it does not."""
    test_x, test_y = linear_pairs(200, dimension=60, noise=1.0, seed=5)
    reached = {}
    for count in (30, 60, 120):
        x, y = linear_pairs(count, dimension=60, noise=1.0, seed=1)
        reached[count] = (fit(x, y)(test_x) * test_y).sum(axis=1).mean()
        bare = unit(test_x @ np.linalg.pinv(x) @ y)
        assert reached[count] > (bare * test_y).sum(axis=1).mean()
    assert reached[30] < reached[60] < reached[120]


def test_pair_sums_in_parts_are_those_of_all_at_once():
    x, y = linear_pairs(97)
    whole, parts = fit(x, y), fit(x, y, parts=7)
    np.testing.assert_allclose(parts.matrix, whole.matrix, atol=1e-6)
    assert parts.cosines == pytest.approx(whole.cosines)


def test_pair_sums_hold_a_bounded_sample_of_a_long_stream(monkeypatch):
    monkeypatch.setattr("unembed.encoders.alignment.SCORED", 50)
    x, y = linear_pairs(1000)
    sums = sums_of(x, y, parts=13)
    assert (sums.count, len(sums.x)) == (1000, 50)
    order = [np.flatnonzero((x == row).all(axis=1))[0] for row in sums.x]
    assert order == sorted(order) and 300 < np.median(order) < 700  # from the whole stream
    assert np.abs(y[order] - sums.y).max() == 0
    matrix = ridge_by_hand(x, y, fit_alignment(sums, TARGET).penalty)[0]
    np.testing.assert_allclose(fit_alignment(sums, TARGET).matrix, matrix, atol=1e-5)


# Knowing that it knows nothing


def test_alignment_doubt_of_pairs_that_do_not_belong_together():
    random = np.random.default_rng(0)
    x, y = unit(random.standard_normal((60, 8))), unit(random.standard_normal((60, D)) + 1.0)
    doubt = fit(x, y).doubt()
    assert "predicts nothing" in doubt and "60 pairs" in doubt and "constant output" in doubt


def test_alignment_doubt_is_none_of_a_good_map():
    assert fit(*linear_pairs(60)).doubt() is None


# Files


@pytest.fixture
def saved(tmp_path):
    x, y = linear_pairs(30)
    facts = {"source": {"name": "unseen"}, "norms": (0.9, 1.0, 1.1), "left_out": {"no text": 2}}
    alignment = fit_alignment(sums_of(x, y), TARGET, inverter="f" * 64, **facts)
    alignment.save(tmp_path / "map")
    return alignment, tmp_path / "map"


def test_alignment_save_and_load_agree(saved):
    alignment, folder = saved
    again = Alignment.load(folder)
    assert again.digest == alignment.digest
    names = (
        "method pairs penalty anchor cosines error target inverter source norms left_out".split()
    )
    for name in names:
        assert getattr(again, name) == getattr(alignment, name), name
    x = linear_pairs(5, seed=4)[0]
    np.testing.assert_array_equal(again(x), alignment(x))
    assert sorted(path.name for path in folder.iterdir()) == [SETTINGS, WEIGHTS]


@pytest.mark.parametrize("damage", ["weights", "json", "matrix", "key"])
def test_alignment_load_refuses_what_is_damaged(saved, damage):
    alignment, folder = saved
    if damage == "weights":
        (folder / WEIGHTS).write_bytes(b"no tensors")
    elif damage == "json":
        (folder / SETTINGS).write_text("{")
    elif damage == "matrix":
        other = replace(alignment, matrix=alignment.matrix + 1)
        other.save(folder.parent / "other")
        (folder / WEIGHTS).write_bytes((folder.parent / "other" / WEIGHTS).read_bytes())
    else:
        data = json.loads((folder / SETTINGS).read_text())
        del data["target"]
        (folder / SETTINGS).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="files of an alignment"):
        Alignment.load(folder)


def test_alignment_load_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="unembed align PAIRS"):
        Alignment.load(tmp_path)


def test_alignment_require_target_refuses_another_encoder(saved):
    alignment, _ = saved
    alignment.require_target(TARGET)
    with pytest.raises(CheckpointError, match="into the space of other"):
        alignment.require_target(replace(TARGET, name="other", weights_digest="b" * 64))


@pytest.mark.parametrize("shape", [(9,), (3, 7), ()])
def test_alignment_refuses_another_dimension(saved, shape):
    with pytest.raises(EmbeddingError, match=r"8 dimensions.*unseen"):
        saved[0](np.ones(shape))


def test_alignment_takes_one_vector_of_any_length(saved):
    alignment, _ = saved
    x = linear_pairs(1)[0]
    np.testing.assert_allclose(alignment(x[0] * 1e6), alignment(x), atol=1e-6)
    np.testing.assert_allclose(alignment(x[0].tolist()), alignment(x), atol=1e-6)


def test_repr_of_an_alignment_has_no_matrix():
    alignment = fit(*linear_pairs(60))
    assert repr(alignment) == f"Alignment({alignment.describe()})"
