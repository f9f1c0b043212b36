from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unembed.baselines.language_model import (
    LanguageModel,
    load_language_model,
    load_local_embedder,
)
from unembed.errors import ConfigError
from unembed.files import EXTRAS, has_extra


class Counting:
    """Logits that depend on all tokens so far; as a causal network, on none that follow."""

    def __call__(self, ids, past_key_values=None, logits_to_keep=0):
        cache = past_key_values
        before = 0 if cache is None else cache.add(ids)
        sums = (before + ids.cumsum(dim=1)).float()
        logits = torch.sin(sums[..., None] * (1 + torch.arange(11.0)))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


class Sums:
    """In place of keys and values the sum of the tokens of each row."""

    def __init__(self):
        self.sums, self.length = 0, 0

    def get_seq_length(self):
        return self.length

    def add(self, ids):
        before, self.length = self.sums, self.length + ids.shape[1]
        self.sums = before + ids.sum(dim=1, keepdim=True)
        return before

    def reorder_cache(self, rows):
        self.sums = self.sums[rows]


def tokenizer(text, add_special_tokens):
    assert not add_special_tokens
    return SimpleNamespace(input_ids=[int(sign) for sign in text])


MODEL = LanguageModel(Counting(), tokenizer, 10)


def test_log_likelihoods_are_those_of_each_text_alone():
    texts = ["123", "", "9", "4567890", *["12"] * 40]
    together = MODEL.log_likelihoods(texts)
    assert together[1] == 0.0
    for text, mean in zip(texts, together, strict=True):
        ids = [10, *map(int, text)]
        parts = []
        for place in range(1, len(ids)):
            logits = MODEL.next_logits(torch.tensor([ids[1:place]], dtype=torch.long), Sums())
            parts.append(float(logits.log_softmax(dim=-1)[0, ids[place]]))
        assert mean == pytest.approx(np.mean(parts) if parts else 0.0, abs=1e-5)


def test_next_logits_with_a_cache_are_those_without():
    cache = Sums()
    tokens = torch.zeros(1, 0, dtype=torch.long)
    for new, rows in ([3, 5, 7], [0, 0, 0]), ([1, 2], [2, 0]), ([4, 4], [1, 1]):
        logits = MODEL.next_logits(tokens, cache)
        torch.testing.assert_close(logits, MODEL.next_logits(tokens, Sums()))
        tokens = torch.cat([tokens[rows], torch.tensor(new)[:, None]], dim=1)
        cache.reorder_cache(rows)
    assert cache.length == 3, "each token goes through the network once"


@pytest.mark.slow
@pytest.mark.skipif(not has_extra("lm"), reason="needs the extra lm")
def test_next_logits_of_smollm2_with_a_cache_are_those_without():
    model = load_language_model()
    cache, tokens = model.new_cache(), torch.zeros(1, 0, dtype=torch.long)
    for new, rows in ([300, 500], [0, 0]), ([700, 701], [1, 0]), ([900, 901], [1, 1]):
        logits = model.next_logits(tokens, cache)
        plain = model.next_logits(tokens, model.new_cache())
        torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)
        tokens = torch.cat([tokens[rows], torch.tensor(new)[:, None]], dim=1)
        cache.reorder_cache(torch.tensor(rows))


@pytest.mark.parametrize("load", [load_language_model, load_local_embedder])
def test_load_language_model_names_the_extra_that_is_missing(load, monkeypatch):
    monkeypatch.setitem(EXTRAS, "lm", ("no_such_package_at_all",))
    with pytest.raises(ConfigError, match="no_such_package_at_all is not installed"):
        load.__wrapped__()


@pytest.mark.slow
@pytest.mark.skipif(not has_extra("lm"), reason="needs the extra lm")
def test_load_language_model_prefers_english_in_its_order():
    texts = ["She lives in a small house near the river.", "river house a near lives the in small"]
    likely, unlikely = load_language_model().log_likelihoods(texts)
    assert likely > unlikely + 1.0


@pytest.mark.slow
@pytest.mark.skipif(not has_extra("lm"), reason="needs the extra lm")
def test_load_local_embedder_puts_alike_texts_near_each_other():
    vectors = load_local_embedder()(["A cat sleeps.", "The cat is asleep.", "Interest rates rose."])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
