import json

import numpy as np
import pytest

from unembed.encoders.vectors import VectorStatistics, typical_rows
from unembed.errors import EncoderError

D = 96


@pytest.fixture
def own():
    """Unit vectors whose variance falls off over the directions, as an encoder's do."""
    draws = np.random.default_rng(0).normal(size=(3000, D)) / np.sqrt(1 + np.arange(D))
    turned = draws @ np.linalg.qr(np.random.default_rng(1).normal(size=(D, D)))[0]
    return turned / np.linalg.norm(turned, axis=1, keepdims=True)


@pytest.fixture
def statistics(own):
    return VectorStatistics.measure(own[:2000])


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_doubt_leaves_the_encoders_own_vectors_alone(own, statistics, rows):
    batches = [own[2000 + i : 2000 + i + rows] for i in range(0, 900, max(3, rows))]
    assert [statistics.doubt(batch * 7, "it") for batch in batches].count(None) == len(batches)


@pytest.mark.parametrize("rows", [8, 100])
def test_doubt_names_the_figures_of_others(own, statistics, rows):
    random = np.random.default_rng(2).normal(size=(rows, D))
    permuted = own[:rows, np.random.default_rng(3).permutation(D)]
    for other in (random, permuted):
        said = statistics.doubt(other, "it")
        assert f"of {rows} vectors do not look like it's" in said
        assert "main directions (it " in said
        assert "mean cosine between rows" in said


@pytest.mark.parametrize("length", [1e-310, 1e-200, 1e200, 1e307])
def test_doubt_knows_vectors_of_any_length(own, statistics, length):
    assert statistics.doubt(own[2000:2100] * length, "it") is None


def test_doubt_notices_a_tenth_of_another_encoder(own, statistics):
    mixed = own[2000:2100].copy()
    assert statistics.doubt(mixed, "it") is None
    mixed[:15] = np.random.default_rng(4).normal(size=(15, D))
    assert "of 100 vectors do not look like" in statistics.doubt(mixed, "it")


def test_measure_needs_many_vectors_and_to_dict_keeps_all(own, statistics):
    assert VectorStatistics.measure(own[:255]) is None
    again = VectorStatistics.from_dict(json.loads(json.dumps(statistics.to_dict())))
    assert np.array_equal(again.directions, statistics.directions)
    assert again.threshold == statistics.threshold
    with pytest.raises(EncoderError, match="statistics of an encoder's vectors"):
        VectorStatistics.from_dict({"int8": "AAAA", "shape": [2, 2]})


@pytest.mark.parametrize(
    "damage",
    [
        {"share": float("nan")},
        {"shape": [-1]},
        {"int8": "AAAA", "shape": [1, 3]},
        {"shape": [0, D]},
    ],
)
def test_from_dict_refuses_statistics_of_nothing(statistics, damage):
    with pytest.raises(EncoderError, match="statistics of an encoder's vectors"):
        VectorStatistics.from_dict(statistics.to_dict() | damage)


def test_typical_rows_takes_one_of_each_cluster_and_no_odd_one(own):
    centres = own[:5]
    noise = np.random.default_rng(2).normal(size=(5, 40, D)) * 0.02
    rows = (centres[:, None] + noise).reshape(-1, D).astype(np.float32)
    rows = np.concatenate([rows, centres]).astype(np.float32)  # the last five are the centres
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    hits = [typical_rows(rows, 5, seed).tolist() for seed in range(8)]
    assert any(hit == list(range(200, 205)) for hit in hits)
    assert all(len(set(hit)) == 5 and hit == sorted(hit) for hit in hits)
    assert hits[3] == typical_rows(rows, 5, 3).tolist()


def test_typical_rows_of_equal_vectors_are_as_many_as_asked_for():
    rows = np.tile(np.eye(1, D, dtype=np.float32), (6, 1))
    assert len(set(typical_rows(rows, 4).tolist())) == 4
    assert typical_rows(rows, 6).tolist() == list(range(6))
