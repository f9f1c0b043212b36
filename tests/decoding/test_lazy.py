"""Logits made only where they can matter: the same tokens, order and confidences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unembed.decoding import Canvas, greedy
from unembed.decoding.entropy_bounded import EntropyBounded
from unembed.decoding.euler import Euler, EulerRemask
from unembed.decoding.greedy import Greedy
from unembed.decoding.guidance import Guidance
from unembed.decoding.lazy import LazyDenoiser, survey
from unembed.decoding.repetition import Repetition
from unembed.decoding.state import State
from unembed.decoding.two_stage import TwoStage
from unembed.denoiser import Denoiser, preset
from unembed.diffusion import LogLinear
from unembed.quick_denoiser import Vocabulary

TOKENS, HIDDEN, LENGTH = 400, 16, 12
PAD, END, MASK = 0, 1, 2
CANVAS = Canvas(LENGTH, MASK, LogLinear(), END, PAD)
VECTORS = torch.eye(4)


class Counted(Vocabulary):
    """A vocabulary that counts the positions whose logits were all made."""

    made = rounds = 0

    def logits(self, h):
        self.made += len(h)
        self.rounds += 1
        return super().logits(h)


class Network:
    """Features that depend on the place, the vector and, a little, on the tokens around.

    Args:
        spread: Of the features; small: every position is about as sure as the next.
        move: How much the tokens around change.
        twins: Whether pairs of places say the same.
        size: Tokens.
    """

    def __init__(self, seed, spread=0.5, move=0.05, twins=False, size=TOKENS):
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return torch.randn(*shape, generator=generator)

        network = Denoiser(preset("tiny", vocab_size=size, embedding_dim=4, hidden=HIDDEN))
        with torch.no_grad():
            network.token_table.weight.copy_(drawn(size, HIDDEN))
            network.output_bias.zero_()
            network.output_bias[END] = -2 * spread
        self.table, self.bias = network.token_table.weight, network.output_bias
        self.places, self.context = spread * drawn(LENGTH, HIDDEN), move * drawn(size, HIDDEN)
        self.vectors = 0.3 * spread * drawn(4, HIDDEN)
        if twins:
            self.places[1::2] = self.places[::2]
        self.vocabulary = Counted(network, torch.float32)

    def features(self, tokens, embedding, t, where):
        around = self.context[tokens].sum(dim=1) + embedding @ self.vectors  # [B, H]
        return (self.places + around[:, None])[where]

    def plain(self, *given):
        return F.linear(self.features(*given), self.table, self.bias)

    def lazy(self):
        return LazyDenoiser(self.features, self.vocabulary)


@torch.no_grad()
def decode(strategy, denoiser, steps, vectors=VECTORS):
    generators = [torch.Generator().manual_seed(i) for i in range(len(vectors))]
    return strategy(denoiser, vectors, CANVAS, steps=steps, generators=generators)


def assert_same(found, expected):
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.passes, expected.passes)
    torch.testing.assert_close(found.confidences, expected.confidences, rtol=1e-4, atol=0)


@pytest.fixture
def always_lazy(monkeypatch):
    """Also where many positions are settled in a pass."""
    monkeypatch.setattr(greedy, "_FEW", LENGTH)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([8, 35, TOKENS]),
    steps=st.sampled_from([1, 3, 5, 6, LENGTH]),
    spread=st.sampled_from([0.02, 0.3, 1.0]),
    move=st.sampled_from([0.0, 0.02, 0.3]),
    twins=st.booleans(),
    penalty=st.sampled_from([0.0, 2.0, 8.0]),
    guided=st.booleans(),
)
@torch.no_grad()
def test_the_outcome_is_that_of_all_logits(
    always_lazy, seed, size, steps, spread, move, twins, penalty, guided
):
    """Pass by pass, and when part is masked again and penalties that were counted are gone."""
    network, outcomes = Network(seed, spread, move, twins, size), []
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 4, LENGTH, generator=generator) < 0.5
    for denoiser in (network.plain, network.lazy()):
        wrapped = Guidance(0.5, 2.0).wrap(denoiser, CANVAS.schedule) if guided else denoiser
        wrapped = Repetition(penalty).wrap(wrapped, CANVAS)
        state, passes = State(VECTORS, CANVAS), []
        for chosen in masks:
            for left in range(steps, 0, -1):
                Greedy().fill(state, wrapped, left)
                passes.append(state.decoded())
            state.remask(chosen)
        outcomes.append(passes)
    for expected, found in zip(*outcomes, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("steps", [6, LENGTH])
def test_what_turns_out_less_sure_than_it_seemed_has_the_others_looked_at(always_lazy, steps):
    again = 0
    for seed in range(40):
        network = Network(seed, spread=0.1, move=0.02, twins=seed % 2 == 0, size=35)
        wrap = Repetition(8.0).wrap
        expected = decode(Greedy(), wrap(network.plain, CANVAS), steps)
        assert_same(decode(Greedy(), wrap(network.lazy(), CANVAS), steps), expected)
        again += network.vocabulary.rounds > int(expected.passes.max())
    assert again > 5, "hardly ever more than one product in a pass"


@pytest.mark.parametrize("number", [-torch.inf, torch.nan])
@torch.no_grad()
def test_a_token_with_no_logit_does_not_end_the_search(number):
    network = Network(5)
    network.bias[0] = number
    expected = decode(Greedy(), network.plain, LENGTH)
    found = decode(Greedy(), network.lazy(), LENGTH)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.confidences.isnan(), expected.confidences.isnan())


@torch.no_grad()
def test_more_may_be_asked_for_than_there_is():
    network, state = Network(6), State(VECTORS[:2], CANVAS)
    where = state.masked.clone()
    where[0, 3:] = False
    for count in ([5, LENGTH], [LENGTH + 1, 1]):
        probabilities, _ = survey(state, network.lazy(), where, torch.tensor(count))
        logits = network.plain(state.tokens, VECTORS[:2], None, where)
        logits[:, MASK] = -torch.inf
        expected = logits.softmax(dim=-1).amax(dim=1)
        torch.testing.assert_close(probabilities[:3], expected[:3])


def test_no_vectors_are_no_texts():
    for denoiser in (Network(0).plain, Network(0).lazy()):
        assert decode(Greedy(), denoiser, LENGTH, VECTORS[:0]).tokens.shape == (0, LENGTH)


def test_trusting_the_memory_would_change_the_outcome(monkeypatch):
    """What the test above would show if no position were looked at again."""
    plain = Vocabulary.ball.func
    nowhere = property(lambda self: (plain(self)[0], 0.0))
    changed = {"bounded": 0, "trusted": 0}
    for seed in range(20):
        network = Network(seed, spread=0.3, move=0.3)
        expected = decode(Greedy(), network.plain, LENGTH)
        for name, ball in (("bounded", Vocabulary.ball), ("trusted", nowhere)):
            monkeypatch.setattr(Counted, "ball", ball)
            found = decode(Greedy(), network.lazy(), LENGTH)
            changed[name] += not torch.equal(found.order, expected.order)
    assert changed["bounded"] == 0 and changed["trusted"] > 3


def test_few_logits_are_made_where_little_changes():
    network = Network(0, spread=1.0, move=0.003)
    decode(Greedy(), network.lazy(), LENGTH, VECTORS[:1])
    every = LENGTH * (LENGTH + 1) // 2
    # All in the first pass, then at least the one that is settled
    assert 2 * LENGTH - 1 <= network.vocabulary.made < every / 2


def test_what_else_is_in_the_batch_changes_nothing():
    network = Network(1)
    whole = decode(Greedy(), network.lazy(), LENGTH)
    for row in range(4):
        alone = decode(Greedy(), network.lazy(), LENGTH, VECTORS[row : row + 1])
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert torch.equal(alone.order[0], whole.order[row])


@pytest.mark.parametrize(
    "strategy",
    [
        Greedy(order="margin"),
        Greedy(order="left-to-right"),
        Greedy(lengths=3),
        EntropyBounded(),
        Euler(),
        EulerRemask(),
        TwoStage(noise=0.9),
    ],
)
def test_strategies_of_the_vector_alone_take_such_a_denoiser(strategy):
    network = Network(2)
    wrap = Repetition(2.0).wrap
    expected = decode(strategy, wrap(network.plain, CANVAS), LENGTH)
    assert_same(decode(strategy, wrap(network.lazy(), CANVAS), LENGTH), expected)


def test_guided_features_are_guided_logits():
    network = Network(3)
    guidance, tokens = Guidance(0.5, 1.5), CANVAS.blank(4, torch.device("cpu"))
    tokens[:, ::2] = 7
    given = tokens, VECTORS, torch.tensor([1.0, 0.5, 0.3, 0.0]), tokens == MASK
    plainly = guidance.wrap(network.plain, CANVAS.schedule)
    lazily = guidance.wrap(network.lazy(), CANVAS.schedule)
    with torch.no_grad():
        torch.testing.assert_close(lazily(*given), plainly(*given))
    assert isinstance(lazily, LazyDenoiser), "one product with the vocabulary for both"
    expected = decode(Greedy(), Repetition(2.0).wrap(plainly, CANVAS), LENGTH)
    assert_same(decode(Greedy(), Repetition(2.0).wrap(lazily, CANVAS), LENGTH), expected)
