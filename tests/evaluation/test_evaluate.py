import json

import numpy as np
import pytest

from unembed.data.pairs import Pairs
from unembed.data.pieces import cut_pieces
from unembed.encoders.base import FakeEncoder
from unembed.errors import DataError, EncoderError
from unembed.evaluation import evaluate as module
from unembed.evaluation.evaluate import METRICS, evaluate, nearest_pairs
from unembed.evaluation.metrics import token_set_f1
from unembed.inverter import Inversion


class LookupInverter:
    """Recovers every text it knows, perfectly; what it does not know comes back empty."""

    def __init__(self, encoder, config, texts):
        self.encoder = encoder.identity
        self.tokenizer = encoder.tokenizer
        self.length = config.data.length
        self.trained = {"config": config.model_dump()}
        self.known = {encoder.encode([text])[0].tobytes(): text for text in texts}
        self.calls = []

    def require_encoder(self, encoder):
        self.encoder.require_same(encoder.identity, "vectors")

    def invert(self, vectors, **options):
        self.calls.append((len(vectors), options))
        texts = [self.known.get(vector.tobytes(), "") for vector in vectors]
        return [
            Inversion(text, ids, [1.0] * len(ids), passes=1, encoder_calls=0)
            for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True)
        ]


@pytest.fixture(scope="module")
def pieces(passages, encoder, tiny_config):
    found = cut_pieces(passages, encoder.tokenizer, tiny_config.data)
    assert len({piece.text for piece in found}) == len(found), "the lookup needs distinct texts"
    return found


@pytest.fixture
def lookup(encoder, tiny_config, pieces):
    return LookupInverter(encoder, tiny_config, [piece.text for piece in pieces])


def test_a_perfect_inverter_scores_one_and_the_shuffled_control_does_not(
    lookup, encoder, passages, pieces
):
    report = evaluate(lookup, encoder, passages, limit=None)
    perfect = report.rows["inverter"]
    assert {name: figure.mean for name, figure in perfect.items()} == pytest.approx(
        dict.fromkeys(METRICS, 1.0), abs=1e-6
    )
    shuffled = report.rows["shuffled embedding"]
    assert shuffled["exact match"].mean == 0.0
    for name in METRICS:
        assert shuffled[name].high < 0.9
        assert shuffled[name].n == perfect[name].n == len(pieces)


def test_the_shuffled_control_is_the_recovery_of_another_text(lookup, encoder, passages, pieces):
    report = evaluate(lookup, encoder, passages, limit=None)
    ids = [piece.token_ids for piece in pieces]
    others = ids[-1:] + ids[:-1]
    by_hand = [token_set_f1(a, b) for a, b in zip(ids, others, strict=True)]
    figure = report.rows["shuffled embedding"]["token-set F1"]
    assert figure.mean == pytest.approx(np.mean(by_hand))


def test_an_empty_recovery_has_no_cosine(encoder, tiny_config, passages, pieces):
    half = [piece.text for piece in pieces[::2]]
    inverter = LookupInverter(encoder, tiny_config, half)
    report = evaluate(inverter, encoder, passages, limit=None)
    row = report.rows["inverter"]
    assert row["cosine"].n == len(half)
    assert row["cosine"].mean == pytest.approx(1.0, abs=1e-6), "an empty text is not a zero"
    assert row["exact match"].n == len(pieces)
    assert row["exact match"].mean == pytest.approx(len(half) / len(pieces))
    assert [example.cosine is None for example in report.examples[:4]] == [
        False,
        True,
        False,
        True,
    ]
    assert report.examples[1].recovered == ""


def test_an_inverter_that_recovers_nothing_has_no_cosine_at_all(encoder, tiny_config, passages):
    report = evaluate(LookupInverter(encoder, tiny_config, []), encoder, passages)
    assert report.rows["inverter"]["cosine"] is None
    assert report.rows["inverter"]["token accuracy"].mean == 0.0
    assert json.loads(json.dumps(report.to_dict()))["rows"]["inverter"]["cosine"] is None


def test_the_nearest_training_text_is_a_row_of_its_own(lookup, encoder, passages, pairs_folder):
    report = evaluate(lookup, encoder, passages, train_pairs=Pairs.open(pairs_folder))
    row = report.rows["nearest training text"]
    assert row["exact match"].mean == 1.0, "the pairs hold these very texts"
    assert row["cosine"].mean == pytest.approx(1.0, abs=1e-3)
    assert report.notes == []


def test_without_training_pairs_the_report_says_what_is_missing(lookup, encoder, passages):
    report = evaluate(lookup, encoder, passages)
    assert set(report.rows) == {"inverter", "shuffled embedding"}
    assert report.notes == ["nearest training text: not measured, no training pairs were given"]


def test_the_report_says_how_it_was_made(lookup, encoder, passages):
    report = evaluate(lookup, encoder, passages, limit=10, steps=3, seed=5)
    assert report.settings == {
        "texts": 10,
        "encoder": encoder.identity.to_dict(),
        "strategy": "greedy",
        "passes": 1,
        "seed": 5,
        "threat_model": "vector only",
        "encoder_calls": 0,
    }
    assert len(report.examples) == 10
    assert all(options["steps"] == 3 for _, options in lookup.calls)
    assert all(options["strategy"] == "greedy" for _, options in lookup.calls)


def test_the_sample_is_that_of_the_seed(lookup, encoder, passages, pieces):
    def originals(seed):
        report = evaluate(lookup, encoder, passages, limit=10, seed=seed)
        return [example.original for example in report.examples]

    assert originals(0) == originals(0)
    assert originals(0) != originals(1)
    every = [piece.text for piece in pieces]
    assert len(set(originals(0)) & set(every)) == 10
    assert originals(0) == sorted(originals(0), key=every.index)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_a_generous_limit_takes_every_piece(lookup, encoder, passages, pieces, limit):
    report = evaluate(lookup, encoder, passages, limit=limit)
    assert [example.original for example in report.examples] == [piece.text for piece in pieces]


def test_texts_are_cut_as_in_training(lookup, encoder, tiny_config):
    lookup.trained["config"]["data"]["pack"] = 0.0
    lookup.trained["config"]["data"]["min_tokens"] = 4
    report = evaluate(lookup, encoder, ["the cat sleeps. a dog runs. is it."])
    assert [example.original for example in report.examples] == ["the cat sleeps.", "a dog runs."]


@pytest.mark.parametrize("texts", [[], ["", "no."], ["the cat sleeps."]])
def test_fewer_than_two_pieces_are_refused(lookup, encoder, texts):
    with pytest.raises(DataError, match="at least 2 pieces of 3 tokens or more"):
        evaluate(lookup, encoder, texts)


def test_another_encoder_is_refused(lookup, passages):
    with pytest.raises(EncoderError, match="vectors of the encoder fake"):
        evaluate(lookup, FakeEncoder(dimension=16), passages)
    assert lookup.calls == []


def test_training_pairs_of_another_encoder_are_refused(lookup, encoder, passages, pairs_folder):
    manifest = pairs_folder / "manifest.json"
    text = manifest.read_text(encoding="utf-8").replace(encoder.identity.weights_digest, "0" * 64)
    manifest.write_text(text, encoding="utf-8")
    with pytest.raises(EncoderError, match="training pairs of the encoder fake"):
        evaluate(lookup, encoder, passages, train_pairs=Pairs.open(pairs_folder))


def test_progress_reaches_the_total_of_every_stage(lookup, encoder, passages, pieces, pairs_folder):
    last = {}

    def note(stage, done, total):
        last[stage] = (done, total)

    pairs = Pairs.open(pairs_folder)
    evaluate(lookup, encoder, passages, train_pairs=pairs, limit=None, progress=note)
    assert last == {
        "inverting": (len(pieces), len(pieces)),
        "inverting shuffled embeddings": (len(pieces), len(pieces)),
        "searching the training texts": (len(pairs), len(pairs)),
    }


def test_a_real_inverter_beats_its_shuffled_control(inverter, encoder, passages):
    report = evaluate(inverter, encoder, passages, limit=60, steps=4)
    found, chance = report.rows["inverter"], report.rows["shuffled embedding"]
    assert found["token-set F1"].mean > chance["token-set F1"].high
    assert found["cosine"].low > chance["cosine"].high
    again = evaluate(inverter, encoder, passages, limit=60, steps=4)
    assert again == report


# The nearest training text


@pytest.mark.parametrize("chunk", [1, 7, 64, 100_000])
def test_nearest_pairs_are_those_of_a_brute_force_search(pairs_folder, encoder, monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK_ROWS", chunk)
    pairs = Pairs.open(pairs_folder)
    tokens, embeddings = pairs.rows(np.arange(len(pairs)))
    queries = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found, cosines = nearest_pairs(pairs, queries, lambda *step: None)
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


def test_a_best_cosine_below_zero_is_still_the_best():
    query = np.float32([[1.0, 0.0]])
    assert nearest_pairs(OppositePairs(), query, lambda *step: None) == ([[1, 2]], [-1.0])
