"""Calls of the encoder: counted for each vector, limited, and none for what is known."""

import numpy as np
import pytest
import torch

from unembed.device import choose_compute
from unembed.encoders.oracle import EncoderOracle, token_gains
from unembed.encoders.sentence import load_encoder
from unembed.errors import EncoderError

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


def test_on_call_hears_every_text_that_was_embedded_once(counting, encoder, packed):
    heard = []
    oracle = EncoderOracle(
        counting,
        encoder.tokenizer,
        encoder.encode(TEXTS),
        budget=2,
        on_call=lambda *call: heard.append(call),
    )
    rows = packed("the cat runs", "the cat runs", "a bird eats", "the dog runs").tolist()
    cosines = oracle([0, 1, 0, 0], rows).tolist()
    assert [call[0] for call in heard] == [0, 1, 0]  # the fourth was one too many
    assert [list(call[1]) for call in heard] == [rows[0], rows[1], rows[2]]
    assert [call[2] for call in heard] == pytest.approx(cosines[:3])
    assert [call[3] for call in heard] == [1, 1, 2]
    oracle([0], rows[:1])
    assert len(heard) == 3


def test_starts_are_those_of_the_row(encoder):
    near = [[[5, 6]], []]
    targets = encoder.encode(TEXTS)
    oracle = EncoderOracle(encoder, encoder.tokenizer, targets, 3, corpus=lambda vectors: near)
    assert [oracle.starts(row) for row in (0, 1)] == near
    plain = EncoderOracle(encoder, encoder.tokenizer, encoder.encode(TEXTS), 3)
    assert list(plain.starts(1)) == []


def test_token_gains_are_the_slopes_of_the_cosine(minilm):
    texts = ["the court ruled against the bank.", "i lost my keys"]
    targets = minilm.encode(["The court ruled for the bank.", "She found her wallet."])
    gains = token_gains(minilm, texts, targets)
    ids = minilm.tokenizer.encode(texts)
    assert [of_text.shape for of_text in gains] == [(len(t), minilm.tokenizer.size) for t in ids]
    for of_text, own in zip(gains, ids, strict=True):
        np.testing.assert_allclose(of_text[np.arange(len(own)), own], 0.0, atol=1e-5)
    # Nudge one input embedding towards another token's
    table = minilm.differentiable[0].auto_model.get_input_embeddings()
    place, other, step = 1, ids[1][1], 0.05
    towards = (table.weight[other] - table.weight[ids[0][place]]).detach()

    def nudge(module, inputs, output):
        output = output.clone()
        output[0, place + 1] += step * towards  # behind the first special token
        return output

    before = minilm.encode(texts[:1])[0] @ targets[0]
    handle = table.register_forward_hook(nudge)
    after = minilm.encode(texts[:1])[0] @ targets[0]
    handle.remove()
    assert (after - before) / step == pytest.approx(gains[0][place, other], rel=0.25)


def test_token_gains_count_as_two_calls(minilm):
    targets = minilm.encode(["The court ruled.", "She found her wallet."])
    oracle = EncoderOracle(minilm, minilm.tokenizer, targets, budget=3)
    rows = minilm.tokenizer.pack(minilm.tokenizer.encode(["the court", "her wallet"]), 8).tolist()
    first = oracle.token_gains([0, 1], rows)
    assert [of_text.shape[0] for of_text in first] == [2, 2]
    assert oracle.calls.tolist() == [2, 2]
    assert oracle.token_gains([0], rows[:1]) == [None]  # one call is left
    oracle([0], rows[:1])
    assert oracle.calls.tolist() == [3, 2]


def test_token_gains_refuses_an_encoder_whose_weights_are_not_open(encoder):
    with pytest.raises(EncoderError, match="open_weights"):
        token_gains(encoder, TEXTS, encoder.encode(TEXTS))


@pytest.mark.slow
def test_token_gains_of_an_encoder_in_bfloat16_are_float32(minilm):
    compute = choose_compute("cpu", "bfloat16")
    encoder = load_encoder("all-MiniLM-L6-v2", compute=compute)
    with torch.autocast("cpu", torch.bfloat16):  # as while the denoiser decodes
        (gains,) = token_gains(encoder, TEXTS[:1], minilm.encode(TEXTS[1:]))
    (wanted,) = token_gains(minilm, TEXTS[:1], minilm.encode(TEXTS[1:]))
    assert gains.dtype == np.float32
    assert np.corrcoef(gains.ravel(), wanted.ravel())[0, 1] > 0.95
