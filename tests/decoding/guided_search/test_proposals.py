"""The denoiser's scores of masked tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import SequenceSpec
from unembed.decoding.guided_search import proposals
from unembed.decoding.guided_search.proposals import (
    draw_masks,
    infill,
    length_scores,
    masked_scores,
    steer,
)
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
    hypotheses = [tokens, (4, 4)]
    results, passes = masked_scores(denoiser, torch.zeros(2, 4), CANVAS, hypotheses, rngs)
    normaliser = np.log(np.exp(3.0) + 6)
    for text, scores, spent in zip(hypotheses, results, passes, strict=True):
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
    hypotheses = [(2, 5, 4), (3, 3, 8, 2, 6)]

    def score(some):
        rngs = [np.random.default_rng(len(tokens)) for tokens in some]
        vectors = torch.zeros(len(some), 4)
        results, _ = masked_scores(says(2, 3, 4), vectors, CANVAS, some, rngs)
        return results

    for together, (apart,) in zip(
        score(hypotheses), [score([one]) for one in hypotheses], strict=True
    ):
        for name, values in vars(together).items():
            np.testing.assert_allclose(values, getattr(apart, name), atol=1e-6)


def test_steer_moves_by_a_step_of_one_length_towards_what_is_missing():
    target = torch.eye(3)[:2]
    near = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.5, 1.0, 0.5]]), dim=1)
    steered = steer(target, near, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(steered.norm(dim=1), torch.ones(2))
    before, after = ((vectors * near).sum(dim=1) for vectors in (target, steered))
    assert (after < before).all()  # away from the hypothesis
    torch.testing.assert_close(steer(target, near, torch.zeros(2)), target)
    torch.testing.assert_close(steer(target, target, torch.ones(2)), target)  # nothing is missing


def test_masked_scores_adds_the_gains_of_open_weights_where_tokens_are_masked():
    tokens, plain = (2, 3, 4), np.zeros((3, VOCABULARY), dtype=np.float32)
    gains = plain.copy()
    gains[1, 7] = 0.1  # 5 nats
    results = []
    for given_gains in (plain, gains):
        rng = np.random.default_rng(0)
        (scores,), _ = masked_scores(
            says(2, 3, 4), torch.zeros(1, 4), CANVAS, [tokens], [rng], [given_gains]
        )
        results.append(scores)
    before, after = results
    at = [scores.filler_scores[1][scores.fillers[1] == 7][0] for scores in results]
    np.testing.assert_allclose(at[1] - at[0], 5.0, atol=1e-5)
    np.testing.assert_array_equal(before.filler_scores[[0, 2]], after.filler_scores[[0, 2]])
    np.testing.assert_array_equal(before.insert_scores, after.insert_scores)


def test_infill_writes_at_the_masks_alone_and_what_the_denoiser_says():
    texts = [(7, MASK, 7, MASK), (MASK, MASK)]
    results, passes = infill(says(2, 3, 4, 5), torch.zeros(2, 4), CANVAS, texts, [[6, 6], [8, 8]])
    assert results == [(7, 3, 7, 5), (2, 3)]
    assert passes == [2, 2]


def test_infill_writes_the_tokens_that_were_removed_where_they_fit():
    table = torch.zeros(LENGTH, VOCABULARY)
    table[0, 4], table[0, 8], table[1, 8], table[1, 4] = 2.0, 1.9, 2.0, 1.0
    table[:2, [5, 6]] = 4.0

    def denoiser(tokens, embedding, t, where):
        return table.expand(len(tokens), -1, -1)[where].clone()

    ((first, _), (plain, _)) = (
        infill(denoiser, torch.zeros(1, 4), CANVAS, [(MASK, MASK, 2)], [removed])
        for removed in ([4, 8], [3, 3])
    )
    assert first == [(4, 8, 2)]  # each once, in its likelier place
    assert set(plain[0][:2]) <= {5, 6} and plain[0][2] == 2


def test_infill_of_a_text_does_not_depend_on_the_others():
    texts, removed = [(2, MASK, 4), (MASK,) * 6, (3, MASK, MASK)], [[5], [2, 3, 4, 5, 6, 7], [8, 8]]
    denoiser = says(2, 3, 4, 5, 6, 7, sureness=2.0)
    together, _ = infill(denoiser, torch.zeros(3, 4), CANVAS, texts, removed)
    for k, text in enumerate(texts):
        apart, _ = infill(denoiser, torch.zeros(1, 4), CANVAS, [text], removed[k : k + 1])
        assert apart == together[k : k + 1]


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 1000))
def test_draw_masks_takes_out_two_tokens_to_all(tokens, seed):
    masked, removed = draw_masks(tokens, CANVAS, np.random.default_rng(seed))
    assert len(masked) == len(tokens)
    assert [t for t, m in zip(tokens, masked, strict=True) if m == MASK] == removed
    assert all(m in (MASK, t) for t, m in zip(tokens, masked, strict=True))
    assert min(2, len(tokens)) <= len(removed)


def test_length_scores_are_those_of_the_end_and_the_padding():
    over = torch.tensor([0.0, 0.1, 0.1, 0.5, 0.9, 1.0, 1.0, 1.0])  # P(at most l tokens)

    def denoiser(tokens, embedding, t, where):
        table = torch.full((LENGTH, VOCABULARY), -30.0)
        table[:, PAD] = table[:, END] = (over / 2).log().clamp_min(-30.0)
        table[:, 5] = (1.0 - over).log().clamp_min(-30.0)
        return table.expand(len(tokens), -1, -1)[where].clone()

    first, second = length_scores(denoiser, torch.zeros(2, 4), CANVAS)
    np.testing.assert_array_equal(first, second)
    wanted = np.maximum([0.0, 0.1, 0.0, 0.4, 0.4, 0.1, 0.0, 0.0, 0.0], proposals._RAREST)
    np.testing.assert_allclose(np.exp(first), wanted, atol=1e-5)
