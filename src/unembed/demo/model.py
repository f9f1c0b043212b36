"""A model that is served: an inverter, its encoder, and the workers that run them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.decoding import DecodingStep
from unembed.demo.batching import AbandonedError, Job, Plan, Worker
from unembed.demo.events import Speller, figures, is_news, step_event
from unembed.demo.limits import Limits
from unembed.demo.metrics import Metrics
from unembed.encoders.base import Encoder, EncoderIdentity, Progress
from unembed.encoders.tokenizer import TextTokenizer
from unembed.inverter import Inversion, Inverter


class SharedEncoder:
    """An encoder that several threads ask, one at a time.

    Args:
        encoder: The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._lock = encoder, threading.Lock()

    @property
    def identity(self) -> EncoderIdentity:
        """See `Encoder`."""
        return self._encoder.identity

    @property
    def tokenizer(self) -> TextTokenizer:
        """See `Encoder`."""
        return self._encoder.tokenizer

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """See `Encoder`."""
        with self._lock:
            return self._encoder.encode(texts, progress)

    def word_embeddings(self) -> NDArray[np.float32] | None:
        """See `Encoder`."""
        return self._encoder.word_embeddings()


class ServedModel:
    """What the server does with one inverter.

    Strategies that ask the encoder take long, so they have a worker of their own: a search never
    keeps those waiting who want an answer from the vector alone.

    Args:
        name: By which requests choose it.
        inverter: Vectors → texts.
        encoder: The one it was trained for.
        limits: Of the server.
        metrics: Of the server.

    Raises:
        EncoderError: The inverter belongs to another encoder.
    """

    def __init__(
        self,
        name: str,
        inverter: Inverter,
        encoder: SharedEncoder,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        inverter.require_encoder(encoder)
        self.name, self.inverter, self.encoder = name, inverter, encoder
        self.speller = Speller(inverter.tokenizer)
        self._metrics = metrics
        self.workers = {
            asks: Worker(f"{name}{' with encoder' if asks else ''}", self.run, limits, metrics)
            for asks in (False, True)
        }

    def submit(self, job: Job) -> Worker:
        """Queue a job with the worker for it; returns that worker.

        Raises:
            ProblemError: See `Worker.submit`.
        """
        worker = self.workers[job.plan is not None and job.plan.strategy.needs_encoder]
        worker.submit(job)
        return worker

    def drain(self) -> None:
        """See `Worker.drain`."""
        for worker in self.workers.values():
            worker.drain()

    def close(self) -> None:
        """See `Worker.close`."""
        for worker in self.workers.values():
            worker.close()

    def run(self, jobs: list[Job]) -> None:
        """Serve jobs with the same plan, in a worker's thread."""
        vectors = self._vectors(jobs)
        plan = jobs[0].plan
        for job, own in zip(jobs, vectors, strict=True):
            if job.watched or plan is None:
                job.tell("start", self._start(job, own))
        if plan is not None:
            self._decode(jobs, np.concatenate(vectors), plan)

    def _vectors(self, jobs: Sequence[Job]) -> list[NDArray[np.float32]]:
        """The vectors of each job; all texts are embedded together."""
        texts = [text for job in jobs for text in job.originals if text is not None]
        encoded = iter(self.encoder.encode(texts) if texts else ())
        return [
            job.given
            if isinstance(job.given, np.ndarray)
            else np.stack([next(encoded) for _ in job.given])
            for job in jobs
        ]

    def _start(self, job: Job, vectors: NDArray[np.float32]) -> dict[str, Any]:
        (text,) = job.originals
        tokens = None if text is None else self.speller.all(text)
        return {
            "model": self.name,
            "encoder": self.encoder.identity.name,
            "dimension": self.encoder.identity.dimension,
            "length": self.inverter.length,
            "embedding": [float(str(value)) for value in vectors[0]],  # shortest that is exact
            "tokens": tokens,
            "truncated": tokens is not None and len(tokens) >= self.inverter.length,
        }

    def _decode(self, jobs: list[Job], vectors: NDArray[np.float32], plan: Plan) -> None:
        began = time.perf_counter()
        found = self.inverter.invert(
            vectors,
            strategy=plan.name,
            options=dataclasses.asdict(plan.strategy),  # type: ignore[call-overload]
            guidance=plan.guidance,
            encoder=self.encoder,
            encoder_calls=plan.encoder_calls,
            steps=plan.steps,
            batch_size=len(vectors),
            draws=[(job.seed, index) for job in jobs for index in range(len(job))],
            on_step=_Broadcast(jobs, self.speller, began),
        )
        milliseconds = round(1000 * (time.perf_counter() - began), 1)
        calls = sum(item.encoder_calls for item in found)
        self._metrics.worked(self.name, sum(item.passes for item in found), calls)
        cosines = iter(self._cosines(found, vectors))
        each = iter(found)
        for job in jobs:
            results = [
                figures(next(each), text, next(cosines), self.speller) for text in job.originals
            ]
            job.tell("done", {"results": results, "milliseconds": milliseconds, "seed": job.seed})

    def _cosines(
        self, found: Sequence[Inversion], vectors: NDArray[np.float32]
    ) -> list[float | None]:
        """Of each recovered text's embedding with the vector; None where nothing came back."""
        rows = [row for row, item in enumerate(found) if item.text]
        cosines: list[float | None] = [None] * len(found)
        if rows:
            again = self.encoder.encode([found[row].text for row in rows])
            for row, vector in zip(rows, again, strict=True):
                cosines[row] = float(vector @ vectors[row])
        return cosines


class _Broadcast:
    """Tells the steps of a batch to those who watch; ends it when everybody has left."""

    def __init__(self, jobs: list[Job], speller: Speller, began: float) -> None:
        self.jobs, self.speller, self.began = jobs, speller, began
        self.before: DecodingStep | None = None

    def __call__(self, step: DecodingStep) -> None:
        if all(job.gone for job in self.jobs):
            raise AbandonedError
        seconds, row = time.perf_counter() - self.began, 0
        for job in self.jobs:
            if job.watched and not job.gone and is_news(step, self.before, row):
                job.tell("step", step_event(step, row, self.speller, seconds))
            row += len(job)
        self.before = step
