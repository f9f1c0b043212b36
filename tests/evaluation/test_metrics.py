from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unembed.evaluation.metrics import (
    BLEU_PARTS,
    CALIBRATION_PARTS,
    COLUMNS,
    Recovery,
    calibration_error,
    calibration_sums,
    corpus_bleu,
    exact_match,
    informative_recall,
    make_ruler,
    rarity,
    token_accuracy,
    token_set_f1,
    token_set_precision,
    token_set_recall,
    word_f1,
)

tokens = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("original", "recovered", "accuracy", "exact", "f1"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0, 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], 0.0, 0.0, 1.0),
        ([1, 2, 3, 4], [1, 2], 0.5, 0.0, 2 / 3),
        ([1, 2], [1, 2, 3, 4], 1.0, 0.0, 2 / 3),
        ([1, 1, 2], [1, 1, 1], 2 / 3, 0.0, 2 / 3),
        ([1, 2, 3], [7, 8], 0.0, 0.0, 0.0),
        ([1, 2, 3], [], 0.0, 0.0, 0.0),
        ([5], [5], 1.0, 1.0, 1.0),
    ],
)
def test_token_accuracy_metrics_by_hand(original, recovered, accuracy, exact, f1):
    assert token_accuracy(original, recovered) == pytest.approx(accuracy)
    assert exact_match(original, recovered) == exact
    assert token_set_f1(original, recovered) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("The cat runs.", "the CAT, runs", 1.0), ("the cat", "a dog", 0.0), ("a b c", "a b", 0.8)],
)
def test_word_f1(one, other, expected):
    assert word_f1(one, other) == pytest.approx(expected)


def test_word_f1_of_nothing_is_zero():
    assert word_f1("", "") == word_f1("the", "") == 0.0


@given(tokens, st.lists(st.integers(0, 5), max_size=8))
def test_token_accuracy_metrics_by_brute_force(original, recovered):
    at = dict(enumerate(recovered))
    hits = [at.get(place) == token for place, token in enumerate(original)]
    assert token_accuracy(original, recovered) == pytest.approx(np.mean(hits))

    common = len([a for a, b in product(set(original), set(recovered)) if a == b])
    if common:
        precision, recall = common / len(set(recovered)), common / len(set(original))
        harmonic = 2 / (1 / precision + 1 / recall)
    else:
        harmonic = 0.0
    assert token_set_f1(original, recovered) == pytest.approx(harmonic)
    assert token_set_f1(original, original[::-1]) == 1.0
    if recovered:
        assert token_set_precision(original, recovered) == pytest.approx(
            common / len(set(recovered))
        )
    assert token_set_recall(original, recovered) == pytest.approx(common / len(set(original)))


def test_measure_says_whether_a_text_is_too_short_or_too_long(encoder):
    ruler, _ = make_ruler(encoder.tokenizer, None)
    ids = encoder.tokenizer.encode(["one two three four"])[0]
    for recovered, bias in ((ids, 0), (ids[:-1], -1), ([*ids, *ids], len(ids)), ([], -len(ids))):
        values, _ = ruler.measure("one two three four", ids, Recovery("", list(recovered)))
        assert values[COLUMNS.index("length bias")] == bias
        assert values[COLUMNS.index("length error")] == abs(bias)


def test_token_set_precision_nothing_recovered_has_no_precision():
    assert token_set_precision([1, 2], []) is None
    assert token_set_recall([1, 2], []) == 0.0


def test_rarity_rare_tokens_weigh_more():
    counts = np.array([97, 0, 1, 5, 5, 5], dtype=np.int64)
    weights = rarity(counts, SimpleNamespace(special_ids={3, 4, 5}))
    total = 98 + 1 + 2  # one more each, without the special tokens
    assert weights == pytest.approx(
        [-np.log(98 / total), np.log(total), -np.log(2 / total), 0, 0, 0]
    )
    assert informative_recall([0, 1], [0], weights) == pytest.approx(
        weights[0] / (weights[0] + weights[1])
    )
    assert informative_recall([0, 1, 1], [1], weights) > 0.98
    assert informative_recall([0, 1], [1, 0, 2], weights) == 1.0


def test_calibration_sums_calibration_by_hand():
    sums = calibration_sums([1, 2, 3], [1, 9, 3, 4], [0.95, 0.91, 0.35, 0.31])
    assert sums[9] == pytest.approx([2, 1.86, 1])
    assert sums[3] == pytest.approx([2, 0.66, 1])
    assert sums.sum(axis=0)[0] == 4
    parts = np.array([*(sums[:, 1] - sums[:, 2]), 4.0])
    assert calibration_error(parts) == pytest.approx((0.86 + 0.34) / 4)
    assert calibration_sums([1], [1], [1.0])[9] == pytest.approx([1, 1, 1]), "1 is in the last bin"


def test_make_ruler_bleu_is_that_of_the_library(minilm):
    from sacrebleu.metrics.bleu import BLEU

    ruler, _ = make_ruler(minilm.tokenizer, None)
    texts = ["The cat sat on the mat, didn't it?", "A dog was seen in the old city by the river."]
    wrong = ["the cat sat on a mat.", "a dog was seen by the old river in the city of glass."]
    tokens, got = minilm.tokenizer.encode(texts), minilm.tokenizer.encode(wrong)
    references = minilm.tokenizer.decode(tokens)
    sums = np.zeros(len(BLEU_PARTS))
    for text, ids, back, recovered, reference in zip(
        texts, tokens, got, wrong, references, strict=True
    ):
        values, _ = ruler.measure(text, ids, Recovery(recovered, back))
        found = dict(zip(COLUMNS, values, strict=True))
        expected = BLEU(effective_order=True).sentence_score(recovered, [reference]).score
        assert found["BLEU (sentence)"] == pytest.approx(expected)
        assert 0 < found["ROUGE-L"] < 1
        sums += [found[name] for name in BLEU_PARTS]
    assert corpus_bleu(sums) == pytest.approx(BLEU().corpus_score(wrong, [references]).score)


def test_what_cannot_be_measured_is_missing(encoder):
    ruler, notes = make_ruler(encoder.tokenizer, None)
    assert len(notes) == 1 and notes[0].startswith("informative recall")
    ids = encoder.tokenizer.encode(["the cat"])[0]
    values, bins = ruler.measure("the cat", ids, Recovery("the cat", ids))
    found = dict(zip(COLUMNS, values, strict=True))
    for name in ("informative recall", "numbers", "URLs", "cosine", "passes", *CALIBRATION_PARTS):
        assert np.isnan(found[name]), name
    assert not bins.any()
    assert found["exact match"] == 1.0


def test_rouge_is_missing_where_the_library_sees_no_word(encoder):
    ruler, _ = make_ruler(encoder.tokenizer, None)
    (ids,) = encoder.tokenizer.encode([". , ? !"])
    values, _ = ruler.measure(". , ? !", ids, Recovery("", []))
    assert np.isnan(values[COLUMNS.index("ROUGE-L")])


def test_an_exact_match_is_perfect_however_the_tokenizer_writes_it(minilm):
    ruler, _ = make_ruler(minilm.tokenizer, np.ones(minilm.tokenizer.size, dtype=np.int64))
    text = "I saw Zoë O'Brien (age 41.5) at www.example.org/a, not bob.smith@example.com."
    ids = minilm.tokenizer.encode([text])[0]
    (back,) = minilm.tokenizer.decode([ids])
    assert back != text
    values, _ = ruler.measure(text, ids, Recovery(back, ids, [1.0] * len(ids)))
    found = dict(zip(COLUMNS, values, strict=True))
    assert found["BLEU (sentence)"] == pytest.approx(100.0)
    for name in ("numbers", "e-mail addresses", "URLs", "names", "ROUGE-L", "informative recall"):
        assert found[name] == 1.0, name
