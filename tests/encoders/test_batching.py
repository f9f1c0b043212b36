import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unembed.encoders.batching import one_ahead, plan_batches, run_batches
from unembed.errors import EncoderError


@pytest.fixture
def _threads():
    """Leaves PyTorch with as many threads as it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_plan_batches_batches_hold_every_text_once_within_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= budget


def test_plan_batches_batches_put_texts_of_like_length_together():
    assert plan_batches([9, 1, 8, 1, 10], 20) == [[4, 0], [2, 1], [3]]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_run_batches_every_batch_runs_and_the_number_of_threads_is_restored(threads):
    torch.set_num_threads(threads)
    done = []
    assert list(run_batches(done.append, [[0, 1], [2], [3, 4, 5]], threads)) == [2, 1, 3]
    assert torch.get_num_threads() == threads
    assert sorted(done) == [[0, 1], [2], [3, 4, 5]]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_run_batches_an_error_in_a_batch_reaches_the_caller(threads):
    def work(batch):
        if batch == [2]:
            raise EncoderError("a", "b", "C")

    with pytest.raises(EncoderError):
        list(run_batches(work, [[0, 1], [2], [3, 4, 5]], threads))


def test_plan_batches_a_batch_may_have_a_number_of_texts_in_place_of_a_budget():
    assert plan_batches([9, 1, 8, 1, 10], 1, 3) == [[4, 0, 2], [1, 3]]


def test_one_ahead_an_item_is_made_while_the_one_before_is_in_use():
    begun = [threading.Event() for _ in range(3)]

    def make():
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in one_ahead(make()):
        assert begun[min(number + 1, 2)].wait(60)


def test_one_ahead_an_error_in_making_an_item_comes_in_its_turn():
    def make():
        yield 1
        raise EncoderError("a", "b", "C")

    items = one_ahead(make())
    assert next(items) == 1
    with pytest.raises(EncoderError):
        next(items)
