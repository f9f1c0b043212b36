"""A fair queue of requests, the threads that serve those of the same settings together, figures."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prometheus_client as prometheus
from numpy.typing import NDArray

from unembed.decoding import Decoding
from unembed.demo.limits import Limits
from unembed.demo.schemas import ProblemError, refusal
from unembed.errors import UnembedError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """Job: a request in the queue.

    Attributes:
        decoding: None: the texts are only embedded.
        inputs: Texts to embed, or unit vectors [N, D].
        seed: Of the request; vector i draws from (seed, i), as it would alone.
        watched: Somebody wants to see the steps.
        tell: Takes the name of an event and its data; called from any thread.
        client: Who sent it, for a fair order.
        cancelled: The client has left, or its time is over; nobody reads what it is told.
    """

    decoding: Decoding | None
    inputs: Sequence[str] | NDArray[np.float32]
    seed: int
    watched: bool
    tell: Callable[[str, Any], None]
    client: str = ""
    cancelled: bool = False

    def __len__(self) -> int:
        """Count the texts or vectors."""
        return len(self.inputs)

    @property
    def passes(self) -> int:
        """Denoiser passes over all its vectors, about: what it costs beside other jobs."""
        if self.decoding is None:
            return len(self)
        lengths: int = max(1, getattr(self.decoding.strategy, "lengths", 1))
        guided = 1 if self.decoding.guidance is None else 2
        return len(self) * self.decoding.steps * lengths * guided

    @property
    def originals(self) -> list[str | None]:
        """The texts; None for each vector that came without."""
        if isinstance(self.inputs, np.ndarray):
            return [None] * len(self.inputs)
        return list(self.inputs)


class AbandonedError(Exception):
    """Error that ends a batch all of whose clients have left."""


def require_listener(jobs: Sequence[Job]) -> None:
    """End the work on a batch whose clients have all left.

    Raises:
        AbandonedError: They have.
    """
    if all(job.cancelled for job in jobs):
        raise AbandonedError


class Worker:
    """A thread with a bounded queue of jobs before it; started at once, ended by `close`.

    The order is fair by client: the first job of each comes before the second of any, and where
    the queue is full the client with most jobs in it makes room for one with fewer.

    Args:
        name: For metrics and messages.
        work: Serves some jobs with the same decoding and tells them their result.
        limits: Length of the queue, vectors of a batch, time of a request.
        metrics: Where it counts.
        passes: Denoiser passes of a batch, beyond its first job; None: any.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Job]], None],
        limits: Limits,
        metrics: Metrics,
        passes: int | None = None,
    ) -> None:
        self.name, self._work, self._limits, self._metrics = name, work, limits, metrics
        self._passes = passes
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._turns: Counter[str] = Counter()  # jobs of each client served since all was idle
        self._began = 0.0  # of the batch that runs
        self._closing = False
        self._seconds = 1.0  # of a batch, a running average
        self._thread = threading.Thread(target=self._serve, name=f"unembed {name}", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs waiting, and jobs being worked on, those whose client has left among them."""
        with self._changed:
            return len(self._waiting), len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a job; it is told its place at once.

        Raises:
            ProblemError: The queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise shutting_down()
            if len(self._waiting) >= self._limits.queue:
                self._make_room(job.client)
            self._waiting.append(job)
            self._tell_places(only=job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Take a job out whose client has gone: of the queue at once, of a batch by the next pass.

        A job that is over is left without effect.
        """
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_places()

    def drain(self) -> None:
        """Take no more jobs and send those that wait away; what runs is finished."""
        with self._changed:
            self._closing = True
            while self._waiting:
                self._waiting.pop().tell("error", shutting_down().to_dict())
            self._changed.notify()

    def close(self, seconds: float | None = None) -> bool:
        """`drain`, and wait for what runs, at most so long; returns whether it ended."""
        self.drain()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _make_room(self, client: str) -> None:
        """Send away the newest job of the client with most, if it has more than this one would.

        Raises:
            ProblemError: It has not.
        """
        counts = Counter(job.client for job in self._waiting)
        busiest, most = counts.most_common(1)[0]
        self._metrics.refused("queue")
        problem = ProblemError(
            503,
            f"{len(self._waiting)} requests are waiting already, which is the limit",
            self._retry_after(),
        )
        if most <= counts[client] + 1:
            raise problem
        newest = next(job for job in reversed(self._waiting) if job.client == busiest)
        self._waiting.remove(newest)
        newest.tell("error", problem.to_dict())

    def _retry_after(self) -> int:
        """Estimate the seconds until all that waits was served; none waits beyond its time."""
        elapsed = time.perf_counter() - self._began if self._running else 0.0
        usual = max(self._seconds, elapsed)
        rest = self._seconds - elapsed if elapsed < self._seconds else elapsed
        alike: dict[Decoding | None, list[Job]] = {}
        for job in self._waiting:
            alike.setdefault(job.decoding, []).append(job)
        batches = sum(math.ceil(self._fullness(jobs)) for jobs in alike.values())
        return max(1, math.ceil(min(rest + batches * usual, self._limits.seconds)))

    def _fullness(self, jobs: Sequence[Job]) -> float:
        """Count the batches that some jobs with the same decoding would fill."""
        fullness = sum(map(len, jobs)) / self._limits.together
        if self._passes is not None:
            fullness = max(fullness, sum(job.passes for job in jobs) / self._passes)
        return fullness

    def _order(self) -> list[Job]:
        """Sort the waiting jobs: the first of each client before the second of any.

        Jobs served since the queue was last empty count.
        """
        turns = Counter(self._turns)
        ranked = []
        for job in self._waiting:
            ranked.append((turns[job.client], job))
            turns[job.client] += 1
        return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]

    def _tell_places(self, only: Job | None = None) -> None:
        """Tell how many requests are before each that waits."""
        for place, job in enumerate(self._order()):
            if only in (None, job):
                job.tell("queued", {"position": place + len(self._running)})

    def _take(self) -> list[Job]:
        """Take the job whose turn it is and those like it that fit; none when it is all over."""
        with self._changed:
            self._running = []
            self._tell_places()
            if not self._waiting:
                self._turns.clear()
                self._changed.wait_for(lambda: self._waiting or self._closing)
            order = self._order()
            batch = list[Job]()
            for job in order:
                if not batch or (
                    job.decoding == batch[0].decoding and self._fullness([*batch, job]) <= 1.0
                ):
                    batch.append(job)
            self._waiting = [job for job in self._waiting if job not in batch]
            self._running, self._began = batch, time.perf_counter()
            self._turns.update(job.client for job in batch)
            self._tell_places()
            return batch

    def _serve(self) -> None:
        while jobs := self._take():
            began = time.perf_counter()
            self._metrics.batch(self.name, sum(map(len, jobs)))
            problem = self._attempt(jobs)
            if problem is not None:
                for job in jobs:
                    job.tell("error", problem.to_dict())
            seconds = time.perf_counter() - began
            self._metrics.served(self.name, seconds)
            self._seconds += 0.2 * (seconds - self._seconds)

    def _attempt(self, jobs: list[Job]) -> ProblemError | None:
        """Serve a batch; whatever happens, the thread lives on."""
        try:
            require_listener(jobs)
            self._work(jobs)
        except AbandonedError:
            return None
        except UnembedError as error:
            return refusal(error)
        except Exception as error:
            log.error("%s: %s", self.name, describe(error))
            return failure()
        return None


def describe(error: BaseException) -> str:
    """Say what failed and where, in one line without the message, which may quote a text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" in {Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}"
    return f"{type(error).__name__}{where}"


def failure() -> ProblemError:
    """An error of the program: the client learns that it is one, and nothing else."""
    return ProblemError(500, "the server failed; the fault is in its log")


def shutting_down() -> ProblemError:
    """No new work."""
    return ProblemError(503, "the server is shutting down", 5)


# Figures for Prometheus, in a registry of their own

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_VECTORS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        registry = self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            "unembed_requests",
            "Requests answered.",
            ["method", "path", "status"],
            registry=registry,
        )
        self._seconds = prometheus.Histogram(
            "unembed_request_seconds",
            "From a request's head to the end of its answer.",
            ["path"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._refused = prometheus.Counter(
            "unembed_refused", "Requests refused.", ["reason"], registry=registry
        )
        self._abandoned = prometheus.Counter(
            "unembed_abandoned", "Requests whose client left.", ["worker"], registry=registry
        )
        self._batch = prometheus.Histogram(
            "unembed_batch_vectors",
            "Vectors decoded together.",
            ["worker"],
            registry=registry,
            buckets=_VECTORS,
        )
        self._batch_seconds = prometheus.Histogram(
            "unembed_batch_seconds",
            "Time of a batch.",
            ["worker"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._work = prometheus.Counter(
            "unembed_work",
            "Denoiser passes and encoder calls made for vectors.",
            ["model", "kind"],
            registry=registry,
        )
        self._queue = prometheus.Gauge(
            "unembed_jobs", "Requests waiting or running.", ["worker", "state"], registry=registry
        )

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request is over."""
        self._requests.labels(method, path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was sent away: ``queue``, ``rate``, ``host``."""
        self._refused.labels(reason).inc()

    def abandoned(self, worker: str) -> None:
        """A client left before its result."""
        self._abandoned.labels(worker).inc()

    def batch(self, worker: str, vectors: int) -> None:
        """A batch begins."""
        self._batch.labels(worker).observe(vectors)

    def served(self, worker: str, seconds: float) -> None:
        """A batch is over."""
        self._batch_seconds.labels(worker).observe(seconds)

    def worked(self, model: str, passes: int, encoder_calls: int) -> None:
        """Count what vectors cost."""
        self._work.labels(model, "denoiser passes").inc(passes)
        self._work.labels(model, "encoder calls").inc(encoder_calls)

    def page(self, counts: dict[str, tuple[int, int]]) -> bytes:
        """Write all figures in Prometheus's text format.

        Args:
            counts: Jobs waiting and running, by worker.
        """
        for worker, (waiting, running) in counts.items():
            self._queue.labels(worker, "waiting").set(waiting)
            self._queue.labels(worker, "running").set(running)
        return prometheus.generate_latest(self.registry)
