from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.prior import LanguagePrior, language_prior

from unembed.baselines.language_model import LanguageModel
from unembed.decoding.guided_search import search
from unembed.decoding.guided_search.edits import MaskedScores, single_edits
from unembed.tokenizer import word_tokenizer

WORDS = "cat dog bird fish".split()
IDS = word_tokenizer(WORDS)


class Alphabet:
    """Finds the word behind another likely if it is the next of the list."""

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, len(WORDS) + 1)
        return SimpleNamespace(logits=logits.scatter(2, ((ids + 1) % 5)[..., None], 6.0))


def tokenizer(text, add_special_tokens):
    word = text.strip()
    return SimpleNamespace(input_ids=[WORDS.index(word) if word in WORDS else 4])


def prior_of(weight, proposals):
    return LanguagePrior(LanguageModel(Alphabet(), tokenizer, 4), IDS, weight, proposals)


def scores_of(tokens, fillers):
    n = len(tokens)
    return MaskedScores(
        own=np.full(n, -1.0),
        fillers=np.tile(IDS.encode([fillers])[0], (n, 1)),
        filler_scores=np.tile(np.arange(0.0, -len(fillers.split()), -1.0), (n, 1)),
        gaps=np.zeros(0, dtype=np.int64),
        inserts=np.zeros((0, 2), dtype=np.int64),
        insert_scores=np.zeros((0, 2)),
    )


def test_language_prior_weighs_what_the_denoiser_proposes():
    tokens = tuple(IDS.encode(["cat fish"])[0])
    scores = scores_of(tokens, "bird dog")
    new = prior_of(0.5, 0)(tokens, scores)
    gains = new.filler_scores - scores.filler_scores
    # Behind nothing "cat" is likely, behind "cat" "dog": in place of "fish" it gains six nats
    np.testing.assert_allclose(gains, [[-3.0, -3.0], [0.0, 3.0]], atol=1e-6)
    np.testing.assert_array_equal(prior_of(0.0, 0)(tokens, scores).filler_scores,
                                  scores.filler_scores)  # fmt: skip


def test_language_prior_proposes_words_that_the_denoiser_did_not():
    tokens = tuple(IDS.encode(["cat fish"])[0])
    new = prior_of(1.0, 1)(tokens, scores_of(tokens, "bird cat"))
    (dog,) = IDS.encode(["dog"])[0]
    assert new.fillers[1].tolist()[-1] == dog
    assert new.filler_scores[1, -1] == pytest.approx(-1.0 + 6.0)
    edits = single_edits(new)
    written = edits.tokens[(edits.slots == 3).any(axis=1)][:, 0].tolist()
    assert written.count(dog) == 1


def test_language_prior_is_used_within_its_block_only():
    plain = search.masked_scores
    with language_prior(prior_of(1.0, 0)):
        assert search.masked_scores is not plain
    assert search.masked_scores is plain
