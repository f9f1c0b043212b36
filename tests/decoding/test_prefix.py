"""Texts that end in a prefix and those that go on behind it, each on as many positions."""

from dataclasses import replace

import pytest
import torch

from tests.fakes import preset
from unembed.decoding import SequenceSpec
from unembed.decoding.prefix import split_by_prefix
from unembed.denoiser import Denoiser
from unembed.diffusion import LogLinear
from unembed.encoders.base import FakeEncoder
from unembed.inverter import Inverter

PAD, END, MASK = 0, 1, 9
SPEC = SequenceSpec(12, MASK, LogLinear(), END, PAD, prefix=5)


class Ends:
    """Says that text k has 10 times the first number of its vector tokens; word 4 before."""

    def __init__(self):
        self.widths = []

    def __call__(self, tokens, embedding, t, where):
        self.widths.append(tokens.shape[1])
        count = (embedding[:, :1] * 10).round()
        place = torch.arange(tokens.shape[1])
        wanted = torch.where(place < count, 4, torch.where(place == count, END, PAD))
        logits = torch.zeros(*tokens.shape, MASK + 1)
        return logits.scatter_(2, wanted[..., None], 20.0)[where]


def vectors(*counts):
    return torch.tensor([[count / 10, 0.0] for count in counts])


def test_split_by_prefix_parts_texts_that_go_on_from_those_that_end():
    denoiser = Ends()
    short, long = split_by_prefix(denoiser, vectors(4, 7, 2, 5, 11), SPEC)
    assert (short.rows, short.spec.length, short.passes) == ([0, 2], 5, 1)
    assert (long.rows, long.spec.length, long.passes) == ([1, 3, 4], 12, 1)
    assert denoiser.widths == [5], "the prefix alone is looked at"


def test_split_by_prefix_does_not_look_where_there_is_nothing_to_tell():
    (part,) = split_by_prefix(None, vectors(4, 7), replace(SPEC, prefix=0))
    assert (part.rows, part.spec.length, part.passes) == ([0, 1], 12, 0)
    for content, length in ((4, 5), (5, 12)):
        (part,) = split_by_prefix(None, vectors(4, 7), replace(SPEC, content=content))
        assert (part.rows, part.spec.length, part.passes) == ([0, 1], length, 0)


@pytest.fixture(scope="module")
def inverter():
    encoder = FakeEncoder()
    torch.manual_seed(0)
    sizes = preset("tiny", vocab_size=encoder.tokenizer.size, embedding_dim=32, length=12)
    network = Denoiser(replace(sizes, prefix=5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
        # A third of random vectors have texts that end
        network.output_bias[[encoder.tokenizer.end_id, encoder.tokenizer.pad_id]] += 5.0
    process = {"schedule": "log-linear", "rate": 5.0}
    return Inverter(network, encoder.tokenizer, encoder.identity, process)


@pytest.fixture(scope="module")
def mixed(inverter):
    """Vectors of which some go on and some do not, in turns."""
    random = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    random = torch.nn.functional.normalize(random, dim=1)
    short, long = split_by_prefix(inverter.denoiser, random, inverter.spec)
    assert len(short.rows) > 4 and len(long.rows) > 4
    return random[[row for two in zip(short.rows, long.rows, strict=False) for row in two]][:8]


@pytest.mark.parametrize("strategy", ["greedy", "euler-remask", "two-stage"])
def test_invert_gives_each_text_of_a_mixed_batch_what_it_gives_it_alone(inverter, mixed, strategy):
    together = inverter.invert(mixed, strategy=strategy, steps=3)
    for index, one in enumerate(together):
        (alone,) = inverter.invert(mixed[index], strategy=strategy, steps=3, first_index=index)
        assert alone.token_ids == one.token_ids
        assert alone.confidences == pytest.approx(one.confidences, abs=1e-5)
        assert alone.passes == one.passes
    assert {one.passes for one in together} <= {2, 3, 4}, "one more than the strategy's"
    assert max(len(one.token_ids) for one in together[::2]) <= 5


def test_invert_with_a_length_takes_the_positions_that_it_needs(inverter, mixed):
    for length in (3, 4, 5, 11):
        results = inverter.invert(mixed, length=length, steps=2)
        assert {len(one.token_ids) for one in results} == {length}
        assert {one.passes for one in results} == {2}


def test_invert_shows_steps_of_the_whole_batch(inverter, mixed):
    steps = []
    results = inverter.invert(mixed, steps=3, on_step=steps.append)
    ids = inverter.tokenizer
    assert {step.tokens.shape for step in steps} == {(len(mixed), 12)}
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    last = steps[-1].tokens.tolist()
    texts = [[row[k] for k in ids.content_positions(row)] for row in last]
    assert texts == [one.token_ids for one in results]
    assert not (steps[-1].tokens == ids.mask_id).any()
    first = steps[0].tokens
    assert (first[1::2] == ids.mask_id).all(), "those that go on wait"
    assert steps[-1].mask_ratio.tolist() == [0.0] * len(mixed)


def test_invert_counts_encoder_calls_by_the_index_of_the_vector(inverter, mixed):
    calls = []
    inverter.invert(
        mixed,
        strategy="best-of",
        samples=2,
        encoder_calls=2,
        encoder=FakeEncoder(),
        on_call=lambda index, ids, cosine, spent: calls.append((index, spent)),
    )
    assert {index for index, _ in calls} == set(range(len(mixed)))
    assert max(spent for _, spent in calls) <= 2
