"""Processors change logits as their equations say; tokens are read from them exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import WordDenoiser
from unembed.decoding import Decoding, SequenceSpec
from unembed.decoding.logits import (
    Guidance,
    RepetitionPenalty,
    argmax,
    most_probable,
    with_processors,
)
from unembed.decoding.sequential import Sequential
from unembed.diffusion import Linear

from .test_strategies import (
    END,
    MASK,
    PAD,
    VOCABULARY,
    canvas_of,
    every_variant,
    run,
)


def uniform(tokens, embedding, t, positions):
    """Every token is alike everywhere."""
    return torch.zeros(int(positions.sum()), VOCABULARY)


def penalised(denoiser, spec, penalty):
    return with_processors(denoiser, [RepetitionPenalty(spec, penalty)])


# Repetition penalty


def test_repetition_penalty_charges_each_occurrence():
    tokens = torch.tensor([[5, 5, 3, MASK], [MASK, MASK, END, PAD]])
    logits = penalised(uniform, canvas_of(4), 1.5)(
        tokens, torch.zeros(2, 3), torch.ones(2), tokens == MASK
    )
    expected = torch.zeros(3, VOCABULARY)
    expected[0, 5], expected[0, 3] = -3.0, -1.5  # twice and once; special tokens are free
    torch.testing.assert_close(logits, expected)


def test_with_processors_applies_them_in_order():
    tokens, spec = torch.tensor([[5, 3, MASK, MASK]]), canvas_of(4)
    inputs = tokens, torch.zeros(1, 3), torch.ones(1), tokens == MASK
    twice = with_processors(uniform, [RepetitionPenalty(spec, 1.0), lambda x, _: x * 2])
    assert twice(*inputs)[0, [3, 5]].tolist() == [-2.0, -2.0]
    reverse = with_processors(uniform, [lambda x, _: x * 2, RepetitionPenalty(spec, 1.0)])
    assert reverse(*inputs)[0, [3, 5]].tolist() == [-1.0, -1.0]
    assert with_processors(uniform, []) is uniform


@every_variant
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_repetition_penalty_leaves_every_strategy_its_promises(name, options, data):
    length = data.draw(st.integers(1, 8), "length")
    penalty = data.draw(st.floats(0.0, 20.0), "penalty")
    rows = data.draw(st.permutations(range(4)), "rows")[: data.draw(st.integers(1, 4), "batch")]
    strategy, spec = Decoding.of(name, **options).strategy, canvas_of(length)

    def decode(rows):
        denoiser = penalised(WordDenoiser(length), spec, penalty)
        return run(strategy, length, 4, 5, denoiser=denoiser, rows=rows)

    whole, part = decode(range(4)), decode(rows)
    assert not (whole.tokens == MASK).any()
    assert torch.equal(part.tokens, whole.tokens[list(rows)])


def test_repetition_penalty_when_high_lets_nothing_be_said_twice():
    denoiser = penalised(WordDenoiser(5), canvas_of(5), 50.0)
    for row in run(Sequential(), 5, 6, 5, denoiser=denoiser).tokens.tolist():
        words = [token for token in row if token not in (END, PAD)]
        assert len(set(words)) == len(words)


# Guidance


def linear(tokens, embedding, t, positions):
    """Logits that depend on the position, the vector and the time."""
    place = torch.arange(tokens.shape[1])[None, :, None] * 0.1
    logits = place + embedding[:, None, :1] * torch.arange(5) + t[:, None, None]
    return logits[positions]


def inputs():
    embedding = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    positions = torch.tensor([[True, False, True], [True, True, True]])
    return torch.full((2, 3), 4), embedding, torch.tensor([1.0, 0.25]), positions


SPEC = SequenceSpec(3, 4, Linear())


def guided(early, late):
    return with_processors(linear, [Guidance(linear, SPEC, early, late)])


def test_guidance_pushes_away_from_the_unconditional_logits():
    tokens, embedding, t, positions = inputs()
    conditional = linear(tokens, embedding, t, positions)
    unconditional = linear(tokens, torch.zeros_like(embedding), t, positions)
    w = torch.tensor([0.5, 0.5, 1.25, 1.25, 1.25])[:, None]  # 0.5 + alpha_t, alpha = 0 and 0.75
    logits = guided(0.5, 1.5)(tokens, embedding, t, positions)
    torch.testing.assert_close(logits, (1 + w) * conditional - w * unconditional)


def test_guidance_of_no_strength_changes_nothing():
    torch.testing.assert_close(guided(0.0, 0.0)(*inputs()), linear(*inputs()))


def test_guidance_is_usable_with_a_strategy():
    decoded = Sequential()(guided(0.0, 2.0), inputs()[1], SPEC, steps=3)
    assert decoded.tokens.tolist() == [[3, 3, 3]] * 2


# Reading tokens


@pytest.mark.parametrize("columns", [9, 64, 400, 2500])
def test_argmax_is_the_first_of_equals(columns):
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(50, columns, generator=generator)
    ties = torch.randint(0, 4, (50, columns), generator=generator).float()
    nothing = torch.full((1, columns), -torch.inf)
    for rows in (logits, ties, nothing):
        assert torch.equal(argmax(rows), rows.argmax(dim=1, keepdim=True))


@pytest.mark.parametrize("columns", [9, 2500])
def test_most_probable_is_that_of_the_softmax(columns):
    logits = 4 * torch.randn(7, columns, generator=torch.Generator().manual_seed(columns))
    logits[:, 3] = -torch.inf
    expected = logits.softmax(dim=-1).max(dim=-1)
    probabilities, tokens = most_probable(logits)
    torch.testing.assert_close(probabilities, expected.values)
    assert torch.equal(tokens, expected.indices)


@pytest.mark.parametrize("columns", [9, 2500])
def test_most_probable_of_no_position_is_empty(columns):
    probabilities, tokens = most_probable(torch.empty(0, columns))
    assert probabilities.shape == tokens.shape == (0,)
