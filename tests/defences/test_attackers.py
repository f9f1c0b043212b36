"""Attackers who know of a defence undo what can be undone, and nothing else."""

import copy

import numpy as np
import pytest

from tests.defences.conftest import like_an_encoder
from unembed.defences.attackers import (
    Case,
    Denoising,
    Realignment,
    Unaware,
    code_centroids,
    fit_width,
    match_unpaired,
    mean_cosine,
    wiener,
)
from unembed.defences.defence import parse_defence
from unembed.defences.noise import Gaussian
from unembed.defences.product import ProductQuantisation
from unembed.encoders.base import EncoderIdentity

ENCODER = EncoderIdentity("shaped", None, 48, "", "")
CLEAN = like_an_encoder(900, seed=5)


def case_of(text):
    """Rows 0 to 99 are attacked, 100 to 399 leak, the attacker's own are others."""
    defence = parse_defence(text)
    recipe = copy.deepcopy(defence)
    defence.fit(CLEAN, np.random.default_rng(11))
    stored = defence.apply(CLEAN, np.random.default_rng(12))
    return Case(
        defence=defence,
        recipe=recipe,
        store=stored,
        held_out=stored[:100],
        public=like_an_encoder(700, seed=6),
        pairs_stored=stored[100:400],
        pairs_clean=CLEAN[100:400],
        encoder=ENCODER,
        seed=0,
    )


def reached(attacker, case):
    return mean_cosine(attacker.estimate(case), CLEAN[:100])


def test_wiener_comes_nearer_than_the_noisy_vectors():
    noise = Gaussian(cosine=0.8)
    stored = noise.apply(CLEAN, np.random.default_rng(1))
    estimate = wiener(like_an_encoder(700, seed=6), noise.sigma(48))(stored)
    assert mean_cosine(estimate, CLEAN) > mean_cosine(stored, CLEAN) + 0.02


def test_wiener_without_noise_changes_nothing():
    estimate = wiener(like_an_encoder(700, seed=6), 0.0)(CLEAN)
    assert np.allclose(estimate, CLEAN, atol=1e-5)


def test_realignment_breaks_a_rotation_at_as_many_pairs_as_dimensions():
    case = case_of("rotation")
    assert reached(Unaware(), case) < 0.5
    assert reached(Denoising(), case) < 0.7  # the mean of all, and no more
    few, many = reached(Realignment(10), case), reached(Realignment(60), case)
    assert few < 0.9 < 0.999 < many


def test_realignment_breaks_a_cut_rotation_with_fewer_pairs():
    case = case_of("rotation:keep=0.5")
    assert reached(Realignment(30), case) > reached(Realignment(12), case)
    assert reached(Realignment(300), case) == pytest.approx(
        reached(Denoising(), case_of("cut:keep=0.5")), abs=0.02
    )


def test_realignment_breaks_a_permutation_with_far_fewer_pairs_than_dimensions():
    assert reached(Realignment(30), case_of("permutation")) > 0.99


def test_match_unpaired_finds_a_permutation_without_a_pair():
    case = case_of("permutation")
    order = match_unpaired(case.store, case.public)
    assert (case.defence.order[order] == np.arange(48)).mean() > 0.9
    assert reached(Denoising(), case) > 0.9


def test_denoising_undoes_what_is_public_exactly():
    assert reached(Denoising(), case_of("mean")) > 0.9999
    assert reached(Unaware(), case_of("mean")) < 0.996


def test_denoising_of_a_quantiser_is_no_worse_than_its_codes():
    case = case_of("binary")
    assert reached(Denoising(), case) > reached(Unaware(), case) + 0.02


def test_code_centroids_move_towards_the_clean_parts():
    pq = ProductQuantisation(parts=8)
    pq.fit(CLEAN[:100], np.random.default_rng(0))  # 64 centroids, learned from few
    stored = pq.apply(CLEAN, np.random.default_rng(0))
    estimate = code_centroids(pq, stored[100:], CLEAN[100:])
    assert mean_cosine(estimate(stored[:100]), CLEAN[:100]) > 0.5
    unseen = code_centroids(pq, stored[:0], CLEAN[:0])(stored[:100])
    assert np.allclose(unseen, fit_width(stored[:100], 48), atol=1e-6)


def test_no_attacker_reads_the_secret():
    one, other = case_of("rotation"), case_of("rotation")
    del other.defence.matrix
    for attacker in (Unaware(), Denoising(), Realignment(60)):
        assert np.array_equal(attacker.estimate(one), attacker.estimate(other))


def test_estimate_of_the_encoders_own_vectors_is_that_of_the_unaware():
    case = case_of("none")
    assert Denoising().estimate(case) is None
    assert Realignment(10).estimate(case) is None
    assert np.allclose(Unaware().estimate(case), CLEAN[:100], atol=1e-6)


def test_fit_width_fills_up_and_cuts():
    assert fit_width(CLEAN[:3, :20], 48).shape == (3, 48)
    assert np.allclose(np.linalg.norm(fit_width(CLEAN[:3], 20), axis=1), 1, atol=1e-6)
