"""What is remembered of a position bounds what can be said of it now."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding.memory import Memory
from unembed.denoiser import Denoiser, preset
from unembed.quick_denoiser import Vocabulary

HIDDEN, TOKENS, FORBIDDEN = 24, 300, [2]
SPOT = (torch.zeros(6, dtype=torch.long), torch.arange(6))


def vocabulary_of(seed, spread):
    torch.manual_seed(seed)
    network = Denoiser(preset("tiny", vocab_size=TOKENS, embedding_dim=8, hidden=HIDDEN))
    with torch.no_grad():
        network.token_table.weight.normal_(0.3, spread)
        network.output_bias.normal_()
    return Vocabulary(network, torch.float32)


def probabilities(vocabulary, h, penalties):
    logits = vocabulary.logits(h) + penalties
    logits[:, FORBIDDEN] = -torch.inf
    return logits.softmax(dim=-1).max(dim=-1)


def renew(memory, vocabulary, h, penalties):
    memory.recall(SPOT, h, vocabulary, lambda logits, tokens: logits)
    return memory.renew(SPOT, h, vocabulary.logits(h), lambda logits: logits.add_(penalties))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.05, 0.3, 1.0]),
    move=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
    cost=st.sampled_from([0.0, 2.0, 8.0]),
)
@torch.no_grad()
def test_nothing_is_ever_more_probable_than_it_can_be_at_most(seed, spread, move, cost):
    """Wherever features move, and whether penalties come or go."""
    vocabulary, memory = vocabulary_of(seed, spread), Memory(1, 6, FORBIDDEN)
    generator = torch.Generator().manual_seed(seed)
    h = 2 * torch.randn(6, HIDDEN, generator=generator)

    def penalties():
        said = torch.rand(6, TOKENS, generator=generator) < 0.3
        return -cost * said.float()

    before, now = penalties(), penalties()
    found = renew(memory, vocabulary, h, before)
    expected = probabilities(vocabulary, h, before)
    torch.testing.assert_close(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)

    h = h + move * torch.randn(6, HIDDEN, generator=generator)
    seems, _, most = memory.recall(
        SPOT, h, vocabulary, lambda logits, tokens: logits + now.gather(1, tokens)
    )
    true = probabilities(vocabulary, h, now).values
    assert (true <= most * (1 + 1e-4)).all()
    assert (seems <= most * (1 + 1e-4)).all()


@torch.no_grad()
def test_the_bound_holds_where_it_is_met():
    """The one token that is not remembered has all but the best logit, and gains the most."""
    generator = torch.Generator().manual_seed(0)
    network = Denoiser(preset("tiny", vocab_size=34, embedding_dim=8, hidden=HIDDEN))
    table = network.token_table.weight
    table.copy_(0.3 + 0.3 * torch.randn(34, HIDDEN, generator=generator))
    network.output_bias.zero_()
    centre, radius = Vocabulary(network, torch.float32).ball
    far = (table - centre).norm(dim=1)
    farthest = int(far.argmax())
    assert farthest not in FORBIDDEN and far[farthest] > 0.99 * radius
    network.output_bias[farthest] = -1e-3
    vocabulary, spot = Vocabulary(network, torch.float32), (torch.tensor([0]), torch.tensor([0]))
    for direction in (table[farthest] - centre, centre):
        for length in (-2.0, -0.5, 0.5, 1.0, 3.0):
            memory, h = Memory(1, 1, FORBIDDEN), torch.zeros(1, HIDDEN)
            memory.recall(spot, h, vocabulary, lambda logits, tokens: logits)
            memory.renew(spot, h, vocabulary.logits(h), lambda logits: logits)
            h = length * direction[None] / direction.norm()
            most = memory.recall(spot, h, vocabulary, lambda logits, tokens: logits)[2]
            assert probabilities(vocabulary, h, torch.zeros(34)).values <= most


@torch.no_grad()
def test_what_has_not_moved_is_known_exactly():
    vocabulary, memory = vocabulary_of(0, 0.3), Memory(1, 6, FORBIDDEN)
    h = torch.randn(6, HIDDEN)
    expected = renew(memory, vocabulary, h, torch.zeros(TOKENS))
    seems, tokens, _ = memory.recall(SPOT, h, vocabulary, lambda logits, tokens: logits)
    torch.testing.assert_close(seems, expected[0])
    assert torch.equal(tokens, expected[1])


@torch.no_grad()
def test_of_what_was_never_seen_anything_is_possible():
    vocabulary, memory = vocabulary_of(0, 0.3), Memory(1, 6, FORBIDDEN)
    h = torch.randn(6, HIDDEN)
    most = memory.recall(SPOT, h, vocabulary, lambda logits, tokens: logits)[2]
    assert most.isinf().all()


@pytest.mark.parametrize("spread", [0.05, 1.0])
@torch.no_grad()
def test_the_ball_holds_every_row_and_is_smaller_than_one_around_the_mean(spread):
    vocabulary = vocabulary_of(3, spread)
    table = vocabulary._table
    table[7] += 3.0  # far from the others
    centre, radius = vocabulary.ball
    far = (table - centre).norm(dim=1).max()
    assert far <= radius * (1 + 1e-6)
    assert radius < 0.8 * (table - table.mean(dim=0)).norm(dim=1).max()
