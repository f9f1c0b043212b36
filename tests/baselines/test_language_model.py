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

    def __call__(self, ids, logits_to_keep=0):
        sums = ids.cumsum(dim=1).float()
        logits = torch.sin(sums[..., None] * (1 + torch.arange(11.0)))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


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
            logits = MODEL.next_logits(torch.tensor([ids[1:place]], dtype=torch.long))
            parts.append(float(logits.log_softmax(dim=-1)[0, ids[place]]))
        assert mean == pytest.approx(np.mean(parts) if parts else 0.0, abs=1e-5)


@pytest.mark.parametrize("load", [load_language_model, load_local_embedder])
def test_load_language_model_names_the_extra_that_is_missing(load, monkeypatch):
    load.cache_clear()
    monkeypatch.setitem(EXTRAS, "lm", ("no_such_package_at_all",))
    with pytest.raises(ConfigError, match="no_such_package_at_all is not installed"):
        load()


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
