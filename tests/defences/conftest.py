"""Records of the fake encoder for the comparison, and vectors shaped like an encoder's."""

import random

import numpy as np
import pytest

from tests.conftest import _NAMES, _QUALITIES, _VERBS
from unembed.defences.defence import unit
from unembed.defences.records import Records


def texts_of(count, seed=0):
    """Distinct short sentences in the fake encoder's words."""
    draw, texts = random.Random(seed), {}
    while len(texts) < count:
        words = ["the", *draw.sample(_QUALITIES, 2), draw.choice(_NAMES), draw.choice(_VERBS)]
        texts[" ".join([*words, "at", "the", draw.choice(_NAMES)])] = None
    return list(texts)


@pytest.fixture(scope="session")
def records(encoder):
    texts = texts_of(160)
    return Records([f"r{i}" for i in range(len(texts))], texts, encoder.encode(texts))


def like_an_encoder(count, dimension=48, seed=0):
    """Unit vectors with a mean and an uneven spectrum, as encoders make them.

    The directions are those of seed 0 whatever the seed of the rows.
    """
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((dimension, dimension)))[0]
    scale = np.linspace(2.0, 0.3, dimension)
    rows = np.random.default_rng([seed, 99]).standard_normal((count, dimension)) * scale
    return unit(rows @ basis.T + 0.5 * basis[:, 0] + 0.2 * np.arange(dimension) / dimension)


@pytest.fixture(scope="session")
def vectors():
    return like_an_encoder(400)
