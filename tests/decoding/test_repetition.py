import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unembed.decoding.lazy import LazyDenoiser

from tests.decoding.test_strategies import (
    END,
    MASK,
    PAD,
    VOCABULARY,
    WordDenoiser,
    canvas_of,
    every_variant,
    run,
)
from unembed.decoding import find_strategy
from unembed.decoding.logits import Repetition
from unembed.decoding.state import duplicate_tokens
from unembed.errors import ConfigError


class Zeros:
    """A vocabulary of which every token is alike."""

    def __call__(self, h):
        return torch.zeros(len(h), VOCABULARY)


def flat(tokens, embedding, t, where):
    """Every token is alike everywhere."""
    return torch.zeros(int(where.sum()), VOCABULARY)


def test_each_occurrence_of_a_token_costs_the_penalty():
    tokens = torch.tensor([[5, 5, 3, MASK], [MASK, MASK, END, PAD]])
    where = tokens == MASK
    logits = Repetition(1.5).wrap(flat, canvas_of(4))(tokens, torch.zeros(2, 3), None, where)
    wanted = torch.zeros(3, VOCABULARY)
    wanted[0, 5], wanted[0, 3] = -3.0, -1.5  # twice and once; end, padding and masks are free
    torch.testing.assert_close(logits, wanted)


def test_penalties_add_up():
    tokens, spec = torch.tensor([[5, 3, MASK, MASK]]), canvas_of(4)
    given = tokens, torch.zeros(1, 3), None, tokens == MASK
    lazy = LazyDenoiser(lambda *given: torch.zeros(2, 4), Zeros())
    for denoiser in (flat, lazy):
        twice = Repetition(1.0).wrap(Repetition(2.0).wrap(denoiser, spec), spec)
        assert twice(*given)[0, [3, 5]].tolist() == [-3.0, -3.0]
    some = twice.penalty.of_some(tokens[[0, 0]], torch.zeros(2, 2), torch.tensor([[5, 6], [6, 3]]))
    assert some.tolist() == [[-3.0, 0.0], [0.0, -3.0]]


def test_no_penalty_is_the_denoiser_itself():
    assert Repetition(0.0).wrap(flat, canvas_of(4)) is flat


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_penalty_below_zero_is_refused(bad):
    with pytest.raises(ConfigError, match="repetition of at least 0"):
        Repetition(bad)


@every_variant
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_every_strategy_keeps_its_promises_with_a_penalty(name, options, data):
    length = data.draw(st.integers(1, 8), "length")
    penalty = data.draw(st.floats(0.0, 20.0), "penalty")
    rows = data.draw(st.permutations(range(4)), "rows")[: data.draw(st.integers(1, 4), "batch")]
    strategy, spec = find_strategy(name, **options), canvas_of(length)

    def decode(rows):
        denoiser = Repetition(penalty).wrap(WordDenoiser(length), spec)
        return run(strategy, length, 4, 5, denoiser=denoiser, rows=rows)

    whole, part = decode(range(4)), decode(rows)
    assert not (whole.tokens == MASK).any()
    assert torch.equal(part.tokens, whole.tokens[list(rows)])


def test_a_high_penalty_says_nothing_twice():
    spec = canvas_of(5)
    denoiser = Repetition(50.0).wrap(WordDenoiser(5), spec)
    for row in run(find_strategy("greedy"), 5, 6, 5, denoiser=denoiser).tokens.tolist():
        words = [token for token in row if token not in (END, PAD)]
        assert len(set(words)) == len(words)


def test_of_equal_tokens_the_surest_comes_first():
    tokens = torch.tensor([[7, 7, 6, 7], [7, 7, 7, 6]])
    sureness = torch.tensor([[0.2, 0.9, 0.5, 0.3], [0.4, 0.4, 0.9, 0.1]])
    masked = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert duplicate_tokens(tokens, sureness, masked).tolist() == [
        [True, False, False, True],
        [False, True, False, False],  # the first of equals; what is not masked has no say
    ]


@pytest.mark.parametrize("name", ["greedy", "entropy-bounded"])
def test_a_pass_settles_different_tokens_first(name):
    """The five surest positions want token 5, the other three each another one."""

    def stubborn(tokens, embedding, t, where):
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        wanted = torch.tensor([5, 5, 5, 5, 5, 2, 3, 4]).expand_as(tokens)
        sureness = torch.arange(29.0, 21.0, -1.0).expand_as(tokens)
        return logits.scatter_(2, wanted[..., None], sureness[..., None].clone())[where]

    shown = []
    run(find_strategy(name), 8, 1, 2, denoiser=stubborn, on_step=shown.append)
    assert shown[0].tokens[0].tolist() == [5, MASK, MASK, MASK, MASK, 2, 3, 4]
    assert shown[-1].tokens[0].tolist() == [5] * 5 + [2, 3, 4]
