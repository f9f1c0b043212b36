from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unembed.baselines import zero2text
from unembed.baselines.zero2text import Zero2Text
from unembed.decoding import STRATEGIES, Decoding, SequenceSpec
from unembed.diffusion import LogLinear
from unembed.encoders.base import FakeEncoder
from unembed.encoders.oracle import EncoderOracle
from unembed.errors import ConfigError

WORDS = "cat dog bird fish house river city road é 7 --".split()


class WordModel:
    """A language model of a word a token, which likes them in the order of the list."""

    def __init__(self):
        self.tokenizer = SimpleNamespace(
            all_special_ids=[len(WORDS)],
            batch_decode=lambda rows: [
                "".join(f" {[*WORDS, '<end>'][token]}" for token in row) for row in rows
            ],
        )
        self.token_table = torch.eye(len(WORDS) + 1)
        weight = SimpleNamespace(weight=torch.zeros(len(WORDS) + 1, 2))
        self.network = SimpleNamespace(get_output_embeddings=lambda: weight)

    def new_cache(self):
        return SimpleNamespace(reorder_cache=lambda rows: None)

    def next_logits(self, tokens, cache):
        return -0.1 * torch.arange(len(WORDS) + 1.0).expand(len(tokens), -1)


@pytest.fixture
def parts(monkeypatch):
    model, local = WordModel(), FakeEncoder(24)
    monkeypatch.setattr(zero2text, "load_language_model", lambda dtype: model)
    monkeypatch.setattr(zero2text, "load_local_embedder", lambda dtype: local.encode)
    return model


def recover(encoder, text, strategy, budget=None):
    ids = encoder.tokenizer
    spec = SequenceSpec(12, ids.mask_id, LogLinear(), ids.end_id, ids.pad_id)
    target = encoder.encode([text])
    calls = strategy.calls_at_most if budget is None else budget
    oracle = EncoderOracle(encoder, ids, target, calls)
    decoded = strategy(None, torch.from_numpy(target), spec, steps=1, generators=[], oracle=oracle)
    return ids.decode(decoded.tokens.tolist())[0], decoded


@pytest.mark.parametrize(
    ("queries", "beams", "calls"),
    [(50, 10, 2180), (40, 1, 284), (30, 1, 217), (20, 2, 238), (12, 3, 213), (5, 5, 205)],
)
def test_calls_at_most_is_the_budget_of_the_paper(queries, beams, calls):
    assert Zero2Text(queries=queries, beams=beams).calls_at_most == calls


def test_zero2text_finds_words_of_the_model_and_counts_its_calls(encoder, parts):
    strategy = Zero2Text(beams=4, candidates=8, queries=8, tokens=3)
    text, decoded = recover(encoder, "dog river cat", strategy)
    assert sorted(text.split()) == ["cat", "dog", "river"]
    vector = encoder.encode([text])[0] @ encoder.encode(["dog river cat"])[0]
    assert float(decoded.cosines[0]) == pytest.approx(float(vector), abs=1e-5)
    assert 3 < int(decoded.encoder_calls[0]) <= strategy.calls_at_most


def test_zero2text_stops_with_its_calls(encoder, parts):
    strategy = Zero2Text(beams=4, candidates=8, queries=8, tokens=6)
    text, decoded = recover(encoder, "dog river cat", strategy, budget=5)
    assert int(decoded.encoder_calls[0]) == 5
    assert text


def test_zero2text_writes_plain_text_that_starts_with_a_word(encoder, parts):
    plain = zero2text._plain_text(parts, first=False)
    first = zero2text._plain_text(parts, first=True)
    assert plain.isfinite().tolist() == [word != "é" for word in WORDS] + [False]
    lower = [word for word, value in zip(WORDS, first.tolist(), strict=False) if value == -5.0]
    assert lower == ["7", "--"]


def test_pool_fit_is_the_ridge_of_all_that_was_added():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((20, d)).astype(np.float32) for d in (6, 4))
    pool = zero2text._Pool(0.1, np.zeros((6, 6)), np.zeros((6, 4)))
    pool.add(x[:7], y[:7])
    pool.add(x[7:], y[7:])
    wide = x.astype(float)
    expected = np.linalg.inv(wide.T @ wide + 0.1 * np.eye(6)) @ wide.T @ y
    np.testing.assert_allclose(pool.fit(), expected, atol=1e-5)


def test_unlike_leaves_out_tokens_near_an_earlier_one():
    vectors = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [0.1, 0.99], [-1.0, 0.0]]), dim=1
    )
    assert zero2text._unlike(vectors, 0.9, 5) == [0, 2, 4]
    assert zero2text._unlike(vectors, 0.9, 2) == [0, 2]


def test_zero2text_is_a_strategy_by_name():
    decoding = Decoding.parse("zero2text:beams=1:queries=40:encoder_calls=284")
    assert decoding.strategy == Zero2Text(beams=1, queries=40)
    assert decoding.name == "zero2text"
    assert Decoding.parse(str(decoding)) == decoding
    assert "zero2text" not in STRATEGIES, "which is loaded with every command"
    with pytest.raises(ConfigError, match="beams of at least 1"):
        Decoding.parse("zero2text:beams=0")
    with pytest.raises(ConfigError, match="an encoder for the strategy zero2text"):
        Zero2Text()(None, torch.zeros(1, 2), None, steps=1, generators=[])
