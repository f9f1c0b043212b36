"""Coarse logits first: the same tokens in the same order as float32 alone would give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import Canvas
from unembed.decoding.glance import Glance, TwoSpeeds, likeliest
from unembed.decoding.greedy import Greedy
from unembed.decoding.repetition import Repetition
from unembed.decoding.two_stage import TwoStage
from unembed.diffusion import LogLinear

VOCABULARY, LENGTH = 400, 12
PAD, END, MASK = 0, 1, 2
CANVAS = Canvas(LENGTH, MASK, LogLinear(), END, PAD)


class Stub:
    """Logits that depend on the tokens around, as float32 numbers and rounded to coarse ones.

    Args:
        spread: Of the logits; small: every position is about as sure as the next.
    """

    def __init__(self, seed: int, spread: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(LENGTH, VOCABULARY, generator=generator) + 8
        self.table[:, END] -= 2 * spread
        self.context = 0.1 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.whole, self.looked = 0, 0

    def exact(self, tokens, embedding, t, where):
        return (self.table + self.context[tokens].sum(dim=1, keepdim=True))[where]

    def glance(self, tokens, embedding, t, where):
        logits = self.exact(tokens, embedding, t, where)

        def exactly(rows, wanted):
            self.whole += len(rows) if wanted is None else 0
            return logits[rows] if wanted is None else logits[rows].gather(1, wanted)

        def coarse(rows):
            self.looked += len(rows)
            return logits[rows].bfloat16().float()

        return Glance(coarse, exactly)


def decode(strategy, denoiser, steps, batch=3):
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    return strategy(denoiser, torch.zeros(batch, 2), CANVAS, steps=steps, generators=generators)


@pytest.mark.parametrize("repetition", [0.0, 2.0])
@pytest.mark.parametrize("steps", [3, LENGTH])
@pytest.mark.parametrize("spread", [0.02, 0.5, 2.0])
def test_tokens_and_order_are_those_of_the_exact_logits(spread, steps, repetition):
    for seed in range(20):
        stub = Stub(seed, spread)
        wrap = Repetition(repetition).wrap
        expected = decode(Greedy(), wrap(stub.exact, CANVAS), steps)
        found = decode(Greedy(), wrap(TwoSpeeds(stub.exact, stub.glance), CANVAS), steps)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.order, expected.order)
        assert torch.equal(found.passes, expected.passes)
        torch.testing.assert_close(found.confidences, expected.confidences, rtol=0.02, atol=0)
        assert stub.looked


def two_of_three(by_glance):
    """Three places, the last two for one token, surer in truth than a glance shows the third."""
    table = torch.full((LENGTH, VOCABULARY), -20.0)
    table[:3, PAD] = -30.0
    table[0, 10], table[1, 11], table[2, 11] = -0.9, -0.91, -0.8985
    for row, token in enumerate((10, 11, 11)):  # the others share what is left
        rest = (1 - table[row, token].exp()).log() - torch.tensor(300.0).log()
        table[row, 50:350] = rest
        if by_glance and row == 2:
            table[row, 50:350] += 0.04
    return table


def test_a_place_that_seems_to_come_after_its_twin_is_doubted_too():
    canvas = Canvas(3, MASK, LogLinear())
    exact, rough = two_of_three(False)[:3], two_of_three(True)[:3]

    def glance(tokens, embedding, t, where):
        logits = exact.expand(len(tokens), -1, -1)[where]
        seen = rough.expand(len(tokens), -1, -1)[where]
        return Glance(
            lambda rows: seen[rows].clone(),
            lambda rows, wanted: (
                logits[rows].clone() if wanted is None else logits[rows].gather(1, wanted)
            ),
        )

    def plain(tokens, embedding, t, where):
        return exact.expand(len(tokens), -1, -1)[where].clone()

    orders = [
        Greedy()(denoiser, torch.zeros(1, 2), canvas, steps=3).order.tolist()
        for denoiser in (plain, TwoSpeeds(plain, glance))
    ]
    assert orders == [[[2, 3, 1]]] * 2


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.sampled_from([1, 3, 5, LENGTH]),
    spread=st.sampled_from([0.02, 0.3, 1.0]),
    error=st.floats(0.0, 0.04),
)
def test_any_errors_within_the_margins_change_neither_tokens_nor_order(seed, steps, spread, error):
    stub = Stub(seed, spread)
    stub.table -= 12.0  # small logits: the margins do not grow
    stub.table[:, 40:50] += 3.0  # likely ones, the same everywhere: twins
    noise = torch.Generator().manual_seed(seed)

    def glance(tokens, embedding, t, where):
        plain = stub.glance(tokens, embedding, t, where)
        every = torch.arange(int(where.sum()))
        off = error * (2 * torch.rand(len(every), VOCABULARY, generator=noise) - 1)
        off += error * torch.randint(-1, 2, (len(every), 1), generator=noise)
        return Glance(lambda rows: plain.exactly(rows, None) + off[rows] / 2, plain.exactly)

    expected = decode(Greedy(), stub.exact, steps)
    found = decode(Greedy(), TwoSpeeds(stub.exact, glance), steps)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.order, expected.order)


def test_lengths_are_ranked_by_exact_confidences():
    stub = Stub(2, 0.5)
    expected = decode(Greedy(lengths=3), stub.exact, LENGTH)
    found = decode(Greedy(lengths=3), TwoSpeeds(stub.exact, stub.glance), LENGTH)
    assert torch.equal(found.confidences, expected.confidences) and not stub.looked


def test_coarse_logits_alone_would_change_the_order():
    """What the test above would show if nothing were looked at again."""
    changed = 0
    for seed in range(20):
        stub = Stub(seed, 0.5)

        def rounded(*given, stub=stub):
            return stub.exact(*given).bfloat16().float()

        expected = decode(Greedy(), stub.exact, LENGTH)
        changed += not torch.equal(decode(Greedy(), rounded, LENGTH).order, expected.order)
    assert changed > 5


def test_only_positions_in_doubt_are_worked_out_whole():
    clear = torch.full((LENGTH, VOCABULARY), -5.0)
    clear[torch.arange(LENGTH), 10 + torch.arange(LENGTH)] = 0.5 * torch.arange(LENGTH)
    stub = Stub(0, 1.0)
    stub.table, stub.context = clear, torch.zeros(VOCABULARY, VOCABULARY)
    found = decode(Greedy(), TwoSpeeds(stub.exact, stub.glance), LENGTH, batch=1)
    assert found.tokens[0].tolist() == [10 + i for i in range(LENGTH)]
    assert stub.whole == 0 and stub.looked == sum(range(1, LENGTH + 1))

    stub.table[3, 13] = stub.table[5, 15]  # nothing tells which of the two is surer
    found = decode(Greedy(), TwoSpeeds(stub.exact, stub.glance), LENGTH, batch=1)
    assert stub.whole == 2
    assert found.order[0, 3] + 1 == found.order[0, 5], "the first of equals"


def test_a_token_the_coarse_logits_miss_is_found():
    stub = Stub(0, 1.0)
    stub.context = torch.zeros(VOCABULARY, VOCABULARY)
    stub.table[:] = -5.0
    stub.table[:, 10:30] = 8.0 + 0.001 * torch.arange(20)  # all the same in bfloat16
    found = decode(Greedy(), TwoSpeeds(stub.exact, stub.glance), LENGTH, batch=1)
    assert found.tokens.tolist() == [[29] * LENGTH]


@pytest.mark.parametrize("strategy", [Greedy(order="margin"), Greedy(lengths=2), TwoStage()])
def test_every_strategy_takes_such_a_denoiser(strategy):
    stub = Stub(1, 0.5)
    expected = decode(strategy, stub.exact, LENGTH)
    found = decode(strategy, TwoSpeeds(stub.exact, stub.glance), LENGTH)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("columns", [9, 400, 1024, 2500])
def test_the_likeliest_are_those_of_topk(columns):
    logits = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns))
    values, places = likeliest(logits, 8)
    expected = logits.topk(8, dim=1)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)
