"""The state of a batch in the middle of decoding, and the order of unmasking."""

import pytest
import torch

from unembed.decoding import Decoding
from unembed.decoding.state import duplicate_tokens

from .test_strategies import MASK, VOCABULARY, run


def test_duplicate_tokens_spares_the_most_confident_of_equals():
    tokens = torch.tensor([[7, 7, 6, 7], [7, 7, 7, 6]])
    scores = torch.tensor([[0.2, 0.9, 0.5, 0.3], [0.4, 0.4, 0.9, 0.1]])
    masked = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert duplicate_tokens(tokens, scores, masked).tolist() == [
        [True, False, False, True],
        [False, True, False, False],  # the first of equals; what is not masked has no say
    ]


@pytest.mark.parametrize("name", ["greedy", "entropy-bounded"])
def test_decoding_a_pass_unmasks_different_tokens_first(name):
    """The five most confident positions want token 5, the other three each another one."""

    def stubborn(tokens, embedding, t, where):
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        wanted = torch.tensor([5, 5, 5, 5, 5, 2, 3, 4]).expand_as(tokens)
        scores = torch.arange(29.0, 21.0, -1.0).expand_as(tokens)
        return logits.scatter_(2, wanted[..., None], scores[..., None].clone())[where]

    shown = []
    strategy = Decoding.of(name, lengths=0).strategy  # no end among the eight
    run(strategy, 8, 1, 2, denoiser=stubborn, on_step=shown.append)
    assert shown[0].tokens[0].tolist() == [5, MASK, MASK, MASK, MASK, 2, 3, 4]
    assert shown[-1].tokens[0].tolist() == [5] * 5 + [2, 3, 4]
