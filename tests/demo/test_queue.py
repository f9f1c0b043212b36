import logging
import threading

import numpy as np
import pytest

from unembed.decoding import Decoding
from unembed.demo.limits import Limits
from unembed.demo.queue import AbandonedError, Job, Metrics, Worker
from unembed.demo.schemas import ProblemError
from unembed.errors import EncoderError

GREEDY = Decoding.of("greedy", steps=4)
EULER = Decoding.of("euler", steps=4)


class Heard(list):
    """Collects what a job is told; can be waited for."""

    def __init__(self):
        self.over = threading.Event()

    def __call__(self, name, data):
        self.append((name, data))
        if name in ("done", "error"):
            self.over.set()


def job(plan=GREEDY, vectors=1, client="a"):
    heard = Heard()
    return Job(plan, np.ones((vectors, 4), dtype=np.float32), 0, True, heard, client), heard


class Bench:
    """A worker whose work waits to be let go, and remembers its batches."""

    def __init__(self, **limits):
        self.batches, self.go, self.began = [], threading.Semaphore(0), threading.Semaphore(0)
        self.work = lambda jobs: [each.tell("done", len(jobs)) for each in jobs]
        self.metrics = Metrics()
        self.worker = Worker("tiny", self._run, Limits(**limits), self.metrics)

    def _run(self, jobs):
        self.batches.append(jobs)
        self.began.release()
        assert self.go.acquire(timeout=60)
        self.work(jobs)

    def occupy(self):
        """Put it to work on a job of its own, whose client is told nothing further."""
        first, heard = job()
        self.worker.submit(first)
        assert self.began.acquire(timeout=60)
        return first, heard

    def figure(self, name, **labels):
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def bench():
    made = []

    def make(**limits):
        made.append(Bench(**limits))
        return made[-1]

    yield make
    for each in made:
        each.go.release(100)
        each.worker.close()


def finish(bench, *heard):
    bench.go.release(len(heard) + 1)
    assert all(each.over.wait(60) for each in heard)


def test_worker_those_with_the_same_plan_go_together(bench):
    one = bench()
    first, heard_first = one.occupy()
    jobs = [job(GREEDY), job(EULER), job(GREEDY), job(EULER)]
    for each, _ in jobs:
        one.worker.submit(each)
    finish(one, heard_first, *(heard for _, heard in jobs))
    a, b, c, d = (each for each, _ in jobs)
    assert one.batches == [[first], [a, c], [b, d]]
    assert one.figure("unembed_batch_vectors_count", worker="tiny") == 3


def test_worker_a_batch_has_only_so_many_vectors(bench):
    one = bench(together=4)
    _, heard_first = one.occupy()
    jobs = [job(vectors=3), job(vectors=2), job(vectors=1), job(vectors=9)]
    for each, _ in jobs:
        one.worker.submit(each)
    finish(one, heard_first, *(heard for _, heard in jobs))
    assert [[len(each) for each in batch] for batch in one.batches] == [[1], [3, 1], [2], [9]]


def test_worker_they_are_told_how_many_are_before_them(bench):
    one = bench(together=1)
    _, heard_first = one.occupy()
    (a, heard_a), (b, heard_b) = job(), job()
    one.worker.submit(a)
    one.worker.submit(b)
    assert heard_first[0] == ("queued", {"position": 0})
    assert (heard_a, heard_b) == ([("queued", {"position": 1})], [("queued", {"position": 2})])
    assert one.worker.counts == (2, 1)
    one.worker.leave(a)
    assert heard_b[-1] == ("queued", {"position": 1})
    assert one.worker.counts == (1, 1)
    finish(one, heard_first, heard_b)
    assert len(one.batches) == 2, "who left is not served"


def test_worker_a_full_queue_refuses_with_a_time(bench):
    one = bench(queue=2)
    one.occupy()
    for _ in range(2):
        one.worker.submit(job()[0])
    with pytest.raises(ProblemError, match="2 requests are waiting already") as caught:
        one.worker.submit(job()[0])
    assert caught.value.status == 503
    assert 1 <= caught.value.retry_after <= 60
    assert one.figure("unembed_refused_total", reason="queue") == 1


def test_shutting_down_finishes_what_runs(bench):
    one = bench()
    _, heard_first = one.occupy()
    waiting, heard = job()
    one.worker.submit(waiting)
    one.worker.drain()
    (name, problem) = heard[-1]
    assert (name, problem["status"], problem["retry_after"]) == ("error", 503, 5)
    with pytest.raises(ProblemError, match="shutting down"):
        one.worker.submit(job()[0])
    assert not heard_first.over.is_set()
    one.go.release()
    one.worker.close()
    assert heard_first[-1][0] == "done"


def broken(jobs):
    raise ValueError("secret words")


def refused(jobs):
    raise EncoderError("one thing", "another", "Do something")


def test_a_fault_is_told_without_its_words_and_the_worker_lives_on(bench, caplog):
    one = bench()
    one.work = broken
    _, heard = one.occupy()
    finish(one, heard)
    assert heard[-1][1]["status"] == 500
    assert "secret" not in str(heard[-1])
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage().startswith("tiny: ValueError in test_queue.py, line ")
    assert "secret" not in caplog.text
    one.work = refused
    second, heard = job()
    one.worker.submit(second)
    finish(one, heard)
    assert heard[-1][1]["status"] == 422
    assert heard[-1][1]["detail"] == "expected one thing; found another. Do something."


def abandoned(jobs):
    raise AbandonedError


def test_worker_an_abandoned_batch_ends_quietly(bench, caplog):
    one = bench()
    one.work = abandoned
    first, heard = one.occupy()
    one.worker.leave(first)
    assert one.worker.counts == (0, 1), "it runs until its batch knows"
    second, heard_second = job()
    one.worker.submit(second)
    one.go.release()
    assert one.began.acquire(timeout=60), "the thread lives on"
    one.work = lambda jobs: [each.tell("done", None) for each in jobs]
    finish(one, heard_second)
    assert [name for name, _ in heard] == ["queued"]
    assert not caplog.records


def test_submit_puts_the_first_of_each_client_before_the_second_of_any(bench):
    one = bench(together=1)
    _, heard_first = one.occupy()
    jobs = [job(client=name) for name in "aaabbc"]
    for each, _ in jobs:
        one.worker.submit(each)
    assert jobs[-1][1][0] == ("queued", {"position": 2}), "before those who have one running"
    finish(one, heard_first, *(heard for _, heard in jobs))
    assert [batch[0].client for batch in one.batches] == list("abcabaa")


def test_submit_to_a_full_queue_takes_the_place_of_the_client_with_most(bench):
    one = bench(queue=4)
    one.occupy()
    crowd = [job(client="a") for _ in range(4)]
    for each, _ in crowd:
        one.worker.submit(each)
    with pytest.raises(ProblemError, match="waiting already"):
        one.worker.submit(job(client="a")[0])
    for left in (3, 2):
        one.worker.submit(job(client="b")[0])
        (name, problem) = crowd[left][1][-1]
        assert (name, problem["status"]) == ("error", 503)
        assert problem["retry_after"] >= 1
    with pytest.raises(ProblemError, match="waiting already"):
        one.worker.submit(job(client="b")[0])
    assert one.worker.counts == (4, 1)


def test_submit_tells_a_time_that_counts_what_runs(bench, monkeypatch):
    one = bench(queue=2, seconds=600)
    one.occupy()
    for _ in range(2):
        one.worker.submit(job()[0])
    one.worker._began -= 20
    with pytest.raises(ProblemError) as caught:
        one.worker.submit(job()[0])
    assert 40 <= caught.value.retry_after < 600, "twenty more, and a batch of such"
    one.worker._began -= 1000
    with pytest.raises(ProblemError) as caught:
        one.worker.submit(job()[0])
    assert caught.value.retry_after == 600, "nobody waits any longer"


def test_worker_a_batch_has_only_so_many_passes():
    quick = Bench()
    quick.worker.close()
    quick.worker = Worker("quick", quick._run, Limits(), quick.metrics, passes=16)
    _, heard_first = quick.occupy()
    jobs = [job() for _ in range(5)]  # of 4 passes each
    for each, _ in jobs:
        quick.worker.submit(each)
    finish(quick, heard_first, *(heard for _, heard in jobs))
    quick.worker.close()
    assert [len(batch) for batch in quick.batches] == [1, 4, 1]


def test_close_waits_only_so_long(bench):
    one = bench()
    one.occupy()
    assert one.worker.close(0.05) is False
    one.go.release()
    assert one.worker.close(60) is True
