"""Figures for Prometheus, in a registry of their own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_VECTORS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What one server counts."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "unembed_requests",
            "Requests answered.",
            ["method", "path", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "unembed_request_seconds",
            "From a request's head to the end of its answer.",
            ["path"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._refused = Counter(
            "unembed_refused", "Requests refused.", ["reason"], registry=registry
        )
        self._abandoned = Counter(
            "unembed_abandoned", "Requests whose client left.", ["worker"], registry=registry
        )
        self._batch = Histogram(
            "unembed_batch_vectors",
            "Vectors decoded together.",
            ["worker"],
            registry=registry,
            buckets=_VECTORS,
        )
        self._batch_seconds = Histogram(
            "unembed_batch_seconds",
            "Time of a batch.",
            ["worker"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._work = Counter(
            "unembed_work",
            "Denoiser passes and encoder calls made for vectors.",
            ["model", "kind"],
            registry=registry,
        )
        self._queue = Gauge(
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
        """What vectors cost."""
        self._work.labels(model, "denoiser passes").inc(passes)
        self._work.labels(model, "encoder calls").inc(encoder_calls)

    def page(self, counts: dict[str, tuple[int, int]]) -> bytes:
        """Everything in Prometheus's text format.

        Args:
            counts: Jobs waiting and running, by worker.
        """
        for worker, (waiting, running) in counts.items():
            self._queue.labels(worker, "waiting").set(waiting)
            self._queue.labels(worker, "running").set(running)
        return generate_latest(self.registry)
