"""Calls of the encoder: counted for each vector, limited, and none for what is known."""

import numpy as np
import pytest
import torch

from unembed.encoders.oracle import EncoderOracle

TEXTS = ["the cat runs", "a dog sleeps"]


class Counting:
    """The fake encoder, with the texts it was handed."""

    def __init__(self, encoder):
        self.encoder, self.handed = encoder, []

    def encode(self, texts, progress=None):
        self.handed.extend(texts)
        return self.encoder.encode(texts)


@pytest.fixture
def counting(encoder):
    return Counting(encoder)


@pytest.fixture
def scorer(counting, encoder):
    return EncoderOracle(counting, encoder.tokenizer, encoder.encode(TEXTS), budget=3)


@pytest.fixture
def packed(encoder):
    """Texts as target sequences of 8 tokens."""

    def pack(*texts):
        return torch.from_numpy(
            encoder.tokenizer.pack(encoder.tokenizer.encode(texts), 8).astype(np.int64)
        )

    return pack


def test_encoder_oracle_cosines_are_those_with_the_vector_of_the_row(scorer, packed, encoder):
    found = scorer([1, 0, 0], packed("the cat runs", "the cat runs", "a bird eats"))
    targets = encoder.encode(TEXTS)
    hypotheses = encoder.encode(["the cat runs", "the cat runs", "a bird eats"])
    expected = (hypotheses * targets[[1, 0, 0]]).sum(axis=1)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found[1] == pytest.approx(1.0)
    assert scorer.calls.tolist() == [2, 1]
    assert [scorer.remaining(row) for row in (0, 1)] == [1, 2]


def test_encoder_oracle_what_reads_the_same_is_embedded_once(scorer, counting, packed):
    rows = packed("the cat runs", "the cat runs", "the cat runs")
    rows[1, 5:] = rows[1, 0]  # behind the end nothing is read
    first = scorer([0, 0, 0], rows)
    assert torch.equal(first, first[:1].expand(3))
    assert torch.equal(scorer([0], rows[:1].tolist()), first[:1])
    assert scorer.calls.tolist() == [1, 0]
    assert counting.handed == ["the cat runs"]


def test_encoder_oracle_another_vector_pays_for_itself(scorer, packed):
    scorer([0, 1], packed("rain", "rain"))
    assert scorer.calls.tolist() == [1, 1]


def test_encoder_oracle_the_budget_ends_in_the_middle_of_a_call(scorer, counting, packed):
    texts = ["rain", "snow", "rain", "sun", "moon", "snow"]
    found = scorer([0] * 6, packed(*texts))
    assert found[:4].isfinite().all() and found[5].isfinite()
    assert found[4] == -torch.inf
    assert scorer.remaining(0) == 0 and scorer.calls.tolist() == [3, 0]
    assert counting.handed == ["rain", "snow", "sun"]
    assert scorer([0, 1], packed("moon", "moon"))[0] == -torch.inf
    assert scorer.calls.tolist() == [3, 1]


def test_encoder_oracle_nothing_to_read_costs_nothing(scorer, counting, packed):
    empty = packed("rain")
    empty[0, 0] = empty[0, 1]  # the end comes first
    assert scorer([0], empty).tolist() == [-1.0]
    assert scorer.calls.tolist() == [0, 0] and counting.handed == []


def test_encoder_oracle_embeddings_of_what_was_scored_cost_nothing(
    scorer, counting, packed, encoder
):
    known = packed("the cat runs", "a bird eats")
    scorer([0, 0], known)
    asked = list(counting.handed)
    rows = torch.cat([known, packed("a dog sleeps")])
    vectors = scorer.vectors([0, 0, 0], rows)
    np.testing.assert_array_equal(vectors[:2], encoder.encode(["the cat runs", "a bird eats"]))
    assert not vectors[2].any()
    assert not scorer.vectors([1], known[:1]).any(), "it was embedded for another vector"
    assert counting.handed == asked
