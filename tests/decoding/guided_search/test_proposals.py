"""The denoiser's scores of masked tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import SequenceSpec
from unembed.decoding.guided_search.proposals import masked_scores
from unembed.diffusion import Linear

PAD, END, MASK, VOCABULARY, LENGTH = 0, 1, 9, 10, 8
CANVAS = SequenceSpec(LENGTH, MASK, Linear(), END, PAD)

texts = st.lists(st.integers(2, 8), min_size=1, max_size=LENGTH - 1).map(tuple)


def says(*wanted, sureness=6.0):
    """A denoiser that wants these tokens at the positions of every sequence."""
    table = torch.zeros(LENGTH, VOCABULARY)
    table[torch.arange(len(wanted)), torch.tensor(wanted)] = sureness
    table[:, [PAD, END, MASK]] = 20.0
    return lambda tokens, embedding, t, where: table.expand(len(tokens), -1, -1)[where].clone()


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 1000))
def test_masked_scores_say_of_each_position_what_the_denoiser_says(tokens, seed):
    rngs = [np.random.default_rng([seed, row]) for row in range(2)]
    denoiser = says(2, 3, 4, 5, 6, 7, 8, sureness=3.0)
    hypotheses = [(1, tokens), (0, (4, 4))]
    results, passes = masked_scores(denoiser, torch.zeros(2, 4), CANVAS, hypotheses, rngs)
    normaliser = np.log(np.exp(3.0) + 6)
    for (_, text), scores, spent in zip(hypotheses, results, passes, strict=True):
        wanted = np.where(np.array(text) == np.arange(2, 2 + len(text)), 3.0, 0.0) - normaliser
        np.testing.assert_allclose(scores.own, wanted, atol=1e-5)
        assert scores.fillers[:, 0].tolist() == list(range(2, 2 + len(text)))
        assert not {PAD, END, MASK} & set(scores.fillers[:, :7].ravel().tolist())
        np.testing.assert_allclose(scores.filler_scores[:, 0], 3.0 - normaliser, atol=1e-5)
        assert len(set(scores.gaps)) == len(scores.gaps) == len(scores.inserts)
        assert set(scores.gaps) <= set(range(len(text) + 1))
        assert (len(scores.gaps) > 0) == (len(text) < LENGTH - 1)
        assert spent >= min(4, len(text))


def test_masked_scores_do_not_depend_on_the_company():
    hypotheses = [(0, (2, 5, 4)), (1, (3, 3, 8, 2, 6))]

    def score(some):
        rngs = [np.random.default_rng(row) for row in range(2)]
        found, _ = masked_scores(says(2, 3, 4), torch.zeros(2, 4), CANVAS, some, rngs)
        return found

    for together, (apart,) in zip(
        score(hypotheses), [score([one]) for one in hypotheses], strict=True
    ):
        for name, values in vars(together).items():
            np.testing.assert_allclose(values, getattr(apart, name), atol=1e-6)
