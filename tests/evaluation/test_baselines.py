import copy

import numpy as np
import pytest

from unembed.data import pairs as pairs_module
from unembed.data.pairs import CorpusSearch, Pairs
from unembed.encoders.base import FakeEncoder
from unembed.evaluation.evaluate import evaluate
from unembed.evaluation.rows import (
    RandomTokens,
    derangement,
    nearest_pairs,
    unconditional,
)


def test_unconditional_writes_the_same_whatever_the_vector(inverter, encoder):
    blind = unconditional(inverter)
    found = blind.invert(encoder.encode(["dog dog dog", "the river", "cat"]))
    assert len({item.text for item in found}) == 1
    seeing = inverter.invert(encoder.encode(["dog dog dog", "the river", "cat"]))
    assert len({item.text for item in seeing}) == 3, "the inverter itself sees as before"


def test_unconditional_is_blind_in_every_format(inverter, encoder):
    try:
        blind = unconditional(inverter.to("cpu", "bfloat16"))
        found = blind.invert(encoder.encode(["dog dog dog", "the river", "cat"]))
    finally:
        inverter.to("cpu")
    assert len({item.text for item in found}) == 1


def test_unconditional_is_given_the_zero_vector(inverter, encoder):
    seen = []

    class Watched:
        sizes = inverter.denoiser.sizes

        def __call__(self, tokens, embedding, *rest):
            seen.append(embedding.clone())
            return inverter.denoiser(tokens, embedding, *rest)

    watched = copy.copy(inverter)
    watched.denoiser = Watched()
    watched.invert(encoder.encode(["dog"]), steps=4)
    assert len(seen) == 4 and all(embedding.norm() > 0.9 for embedding in seen)
    seen.clear()
    unconditional(watched).invert(encoder.encode(["dog"]), steps=4)
    assert len(seen) == 4 and not any(embedding.any() for embedding in seen)


@pytest.mark.parametrize("count", [2, 3, 64, 1025])
def test_derangement_every_text_gets_another_one_s_vector(count):
    others = derangement(count)
    assert sorted(others) == list(range(count))
    assert (others != np.arange(count)).all()
    assert (np.abs(others - np.arange(count)) >= count // 2).all()


def test_random_tokens_have_the_frequencies_of_the_corpus(encoder):
    counts = np.zeros(encoder.tokenizer.size, dtype=np.int64)
    counts[[3, 7]] = 1, 3
    counts[list(encoder.tokenizer.special_ids)] = 1000
    drawing = RandomTokens(encoder.tokenizer, counts, seed=0)
    drawn = np.concatenate([drawing.draw(index, 10) for index in range(400)])
    assert set(drawn) == {3, 7}
    assert (drawn == 7).mean() == pytest.approx(0.75, abs=0.03)
    assert drawing.draw(5, 10) == RandomTokens(encoder.tokenizer, counts, 0).draw(5, 10)
    assert drawing.draw(5, 10) != RandomTokens(encoder.tokenizer, counts, 1).draw(5, 10)


def test_without_frequencies_random_tokens_are_any(encoder):
    drawing = RandomTokens(encoder.tokenizer, None, seed=0)
    drawn = {token for index in range(300) for token in drawing.draw(index, 10)}
    every = set(range(encoder.tokenizer.size)) - encoder.tokenizer.special_ids
    assert drawn <= every
    assert len(drawn) > 0.9 * len(every)


# The nearest training text


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_nearest_pairs_are_those_of_a_brute_force_search(pairs_folder, encoder, monkeypatch, chunk):
    monkeypatch.setattr(pairs_module, "_SEARCHED", chunk)
    pairs = Pairs.open(pairs_folder)
    tokens, embeddings = pairs.rows(np.arange(len(pairs)))
    queries = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    searched = []
    found, cosines = nearest_pairs(pairs, queries, searched.append)
    assert searched[-1] == len(pairs)
    for query, ids, cosine in zip(queries, found, cosines, strict=True):
        similarity = [float(query @ other) for other in embeddings]
        assert cosine == pytest.approx(max(similarity), abs=1e-5)
        rows = [row for row, s in enumerate(similarity) if s > max(similarity) - 1e-5]
        contents = [tokens[row].tolist() for row in rows]
        assert ids in [row[: row.index(pairs.tokenizer.end_id)] for row in contents]


class OppositePairs:
    """Three pairs whose vectors all point away."""

    tokenizer = FakeEncoder().tokenizer

    def __len__(self):
        return 3

    def rows(self, indices):
        tokens = self.tokenizer.pack([[1, 2]] * len(indices), 4).astype(np.int64)
        return tokens, np.tile(np.float32([[-1.0, 0.0]]), (len(indices), 1))


def test_nearest_pairs_a_best_cosine_below_zero_is_still_the_best():
    query = np.float32([[1.0, 0.0]])
    assert nearest_pairs(OppositePairs(), query, lambda done: None) == ([[1, 2]], [-1.0])


# A corpus to start from


@pytest.mark.parametrize("chunk", [1, 7, 100_000])
def test_corpus_search_gives_the_nearest_texts_in_order(pairs_folder, encoder, monkeypatch, chunk):
    monkeypatch.setattr(pairs_module, "_SEARCHED", chunk)
    pairs = Pairs.open(pairs_folder)
    tokens, embeddings = pairs.rows(np.arange(len(pairs)))
    queries = embeddings[[3, 11]] + np.float32(0.05)
    results = CorpusSearch(pairs, encoder.tokenizer, count=3)(queries)
    texts = pairs.tokenizer.decode(tokens)
    for query, ids in zip(queries, results, strict=True):
        similarity = np.sort(embeddings @ query)[::-1]
        again = encoder.encode(encoder.tokenizer.decode(encoder.tokenizer.pack(ids, 12))) @ query
        np.testing.assert_allclose(again, similarity[:3], atol=2e-3)  # stored in half precision
        assert set(encoder.tokenizer.decode(encoder.tokenizer.pack(ids, 12))) <= set(texts)


def test_corpus_search_is_known_by_its_corpus(pairs_folder, encoder):
    one, other = (CorpusSearch(Pairs.open(pairs_folder), encoder.tokenizer) for _ in range(2))
    assert repr(one) == repr(other)
    assert " at 0x" not in repr(one)


def test_evaluate_with_a_corpus_names_what_the_attacker_has(
    inverter, encoder, passages, pairs_folder
):
    spec = "guided-search:encoder_calls=4:rounds=0:limit=2"
    report = evaluate(
        inverter, encoder, passages, strategy=spec, limit=2, corpus=Pairs.open(pairs_folder)
    )
    assert report.settings["threat_model"] == "vector + encoder + corpus"
    assert report.settings["attacks"]["inverter"]["threat_model"] == "vector + encoder + corpus"
    cosine = report.rows["inverter"]["cosine"]
    assert cosine is not None and cosine.mean > 0.99  # the texts are in the corpus
