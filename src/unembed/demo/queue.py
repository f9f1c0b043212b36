"""Requests that wait, and the threads that serve those with the same settings together."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.decoding import Decoding
from unembed.demo.limits import Limits
from unembed.demo.metrics import Metrics
from unembed.demo.problems import ProblemError, refusal
from unembed.errors import UnembedError

_LONGEST_WAIT = 60  # seconds that a client is told to wait at most

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One request.

    Attributes:
        plan: None: the texts are only embedded.
        given: Texts to embed, or unit vectors [N, D].
        seed: Of the request; vector i draws from (seed, i), as it would alone.
        watched: Somebody wants to see the steps.
        tell: Takes the name of an event and its data; called from any thread.
        gone: The client has left; nobody reads what it is told.
    """

    plan: Decoding | None
    given: Sequence[str] | NDArray[np.float32]
    seed: int
    watched: bool
    tell: Callable[[str, Any], None]
    gone: bool = False

    def __len__(self) -> int:
        """Texts or vectors."""
        return len(self.given)

    @property
    def originals(self) -> list[str | None]:
        """The texts; None for each vector that came without."""
        if isinstance(self.given, np.ndarray):
            return [None] * len(self.given)
        return list(self.given)


class AbandonedError(Exception):
    """Every client of a batch has left."""


class Worker:
    """A thread with a bounded queue of jobs before it; started at once, ended by `close`.

    Args:
        name: For metrics and messages.
        work: Serves some jobs with the same plan and tells them their result.
        limits: Length of the queue, vectors of a batch.
        metrics: Where it counts.
    """

    def __init__(
        self, name: str, work: Callable[[list[Job]], None], limits: Limits, metrics: Metrics
    ) -> None:
        self.name, self._work, self._limits, self._metrics = name, work, limits, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._closing = False
        self._seconds = 1.0  # of a batch, a running average
        self._thread = threading.Thread(target=self._serve, name=f"unembed {name}", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs waiting and jobs being served."""
        with self._changed:
            return len(self._waiting), sum(not job.gone for job in self._running)

    def submit(self, job: Job) -> None:
        """Queue a job; it is told its place at once.

        Raises:
            ProblemError: The queue is full, or the server is shutting down.
        """
        with self._changed:
            if self._closing:
                raise shutting_down()
            if len(self._waiting) >= self._limits.queue:
                self._metrics.refused("queue")
                raise ProblemError(
                    503,
                    f"{len(self._waiting)} requests are waiting already, which is the limit",
                    self._wait(),
                )
            self._waiting.append(job)
            self._tell_places(only=job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """A client has gone: its place in the queue is free at once, in a batch by the next step.

        A job that is over is left without effect.
        """
        with self._changed:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_places()

    def drain(self) -> None:
        """Take no more jobs and send those that wait away; what runs is finished."""
        with self._changed:
            self._closing = True
            while self._waiting:
                self._waiting.popleft().tell("error", shutting_down().to_dict())
            self._changed.notify()

    def close(self) -> None:
        """`drain`, and wait for what runs."""
        self.drain()
        self._thread.join()

    def _wait(self) -> int:
        batches = len(self._waiting) / self._limits.together + 1
        return max(1, min(_LONGEST_WAIT, math.ceil(batches * self._seconds)))

    def _tell_places(self, only: Job | None = None) -> None:
        """How many requests are before each that waits."""
        running = sum(not job.gone for job in self._running)
        for place, job in enumerate(self._waiting):
            if only in (None, job):
                job.tell("queued", {"position": place + running})

    def _take(self) -> list[Job]:
        """The job that waited longest and those behind it that fit; none when it is all over."""
        with self._changed:
            self._running = []
            self._tell_places()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            room, taken = self._limits.together, list[Job]()
            for job in list(self._waiting):
                if not taken or (job.plan == taken[0].plan and len(job) <= room):
                    self._waiting.remove(job)
                    taken.append(job)
                    room -= len(job)
            self._running = taken
            self._tell_places()
            return taken

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
    """What failed and where, in one line without the message, which may quote somebody's text."""
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
