"""A model that is served: an inverter, its encoder, and the workers that run them."""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.decoding import DEFAULT_STEPS, STRATEGIES, Decoding, DecodingStep, strategy_fields
from unembed.decoding.strategy import Inversion
from unembed.demo.events import Speller, figures, is_news, step_event
from unembed.demo.limits import Limits
from unembed.demo.middleware import Clients
from unembed.demo.queue import Job, Metrics, Worker, require_listener
from unembed.demo.schemas import MapOut, ModelOut, Option, ProblemError, StrategyOut
from unembed.encoders.alignment import Alignment
from unembed.encoders.base import Encoder, EncoderIdentity, Progress
from unembed.errors import ConfigError
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer
from unembed.vectors.words import WordProbe, shipped_probes

DEFAULT_CALLS = 128  # where a strategy asks the encoder and the request does not say how often
_OTHER_COMMAS = 1024  # of a body, beside those of its vectors or texts
_PART = 16  # texts that the shared encoder embeds before others have their turn


class _FairLock:
    """A lock that is given to those who wait in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def __enter__(self) -> None:
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            self._changed.wait_for(lambda: self._line[0] is ticket)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()


class SharedEncoder:
    """An encoder that several threads use, a few texts at a time and in turn.

    Args:
        encoder: The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._lock = encoder, _FairLock()
        self._work = threading.local()

    @property
    def identity(self) -> EncoderIdentity:
        """See `Encoder`."""
        return self._encoder.identity

    @property
    def tokenizer(self) -> TextTokenizer:
        """See `Encoder`."""
        return self._encoder.tokenizer

    @contextmanager
    def checked(self, check: Callable[[], None]) -> Iterator[None]:
        """Call ``check`` before each part that this thread embeds; what it raises ends the work."""
        self._work.check = check
        try:
            yield
        finally:
            del self._work.check

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """See `Encoder`."""
        parts = []
        for start in range(0, len(texts), _PART):
            check: Callable[[], None] | None = getattr(self._work, "check", None)
            if check is not None:
                check()
            with self._lock:
                parts.append(self._encoder.encode(texts[start : start + _PART], progress))
        return np.concatenate(parts) if parts else self._encoder.encode(texts)

    def word_embeddings(self) -> NDArray[np.float32] | None:
        """See `Encoder`."""
        return self._encoder.word_embeddings()


class ServedModel:
    """Inverter as the server uses it.

    Three workers, so that nobody who wants an answer from a vector waits for those who want much:
    ``quick`` for few denoiser passes, ``bulk`` for many, ``search`` for strategies that ask the
    encoder.

    Args:
        name: By which requests choose it.
        inverter: Vectors → texts.
        encoder: The one it was trained for.
        limits: Of the server.
        metrics: Of the server.
        probe: Finds words in the encoder's vectors.

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
        probe: WordProbe | None = None,
    ) -> None:
        inverter.require_encoder(encoder)
        inverter.warm_up()  # the workers may ask for its fast form at once
        self.name, self.inverter, self.encoder = name, inverter, encoder
        self.probe = probe
        self.speller = Speller(inverter.tokenizer)
        self._limits, self._metrics = limits, metrics
        self.workers = {
            "quick": Worker(name, self.run, limits, metrics, limits.batch_passes),
            "bulk": Worker(f"{name} bulk", self.run, limits, metrics),
            "search": Worker(f"{name} search", self.run, limits, metrics),
        }

    def with_alignment(self, name: str, alignment: Alignment) -> ServedModel:
        """The same model for vectors of another encoder, with the same workers.

        Raises:
            CheckpointError: The alignment leads into the space of another encoder.
        """
        model = copy.copy(self)
        model.name, model.inverter = name, self.inverter.aligned(alignment)
        return model

    def submit(self, job: Job) -> Worker:
        """Queue a job with the worker for it; returns that worker.

        Raises:
            ProblemError: See `Worker.submit`.
        """
        kind = "quick" if job.passes <= self._limits.quick_passes else "bulk"
        if job.decoding is not None and job.decoding.strategy.needs_encoder:
            kind = "search"
        worker = self.workers[kind]
        worker.submit(job)
        return worker

    def drain(self) -> None:
        """See `Worker.drain`."""
        for worker in self.workers.values():
            worker.drain()

    def close(self, seconds: float | None = None) -> bool:
        """See `Worker.close`; the seconds are those of all workers together."""
        self.drain()
        return _close_all(self.workers.values(), seconds)

    def run(self, jobs: list[Job]) -> None:
        """Serve jobs with the same decoding, in a worker's thread.

        Raises:
            AbandonedError: Every client has left before the end.
        """
        decoding = jobs[0].decoding
        with self.encoder.checked(partial(require_listener, jobs)):
            vectors = self._vectors(jobs)
            for job, own in zip(jobs, vectors, strict=True):
                if job.watched or decoding is None:
                    job.tell("start", self._start(job, own))
            if decoding is not None:
                self._decode(jobs, np.concatenate(vectors), decoding)

    def _vectors(self, jobs: Sequence[Job]) -> list[NDArray[np.float32]]:
        """The vectors of each job; all texts are embedded together."""
        texts = [text for job in jobs for text in job.originals if text is not None]
        encoded = iter(self.encoder.encode(texts) if texts else ())
        return [
            job.inputs
            if isinstance(job.inputs, np.ndarray)
            else np.stack([next(encoded) for _ in job.inputs])
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
            "doubt": self._doubt(job),
        }

    def _doubt(self, job: Job) -> str | None:
        """Say why vectors that came without texts cannot be the encoder's."""
        fingerprint = self.inverter.fingerprint
        statistics = None if fingerprint is None else fingerprint.statistics
        if statistics is None or not isinstance(job.inputs, np.ndarray):
            return None
        return statistics.doubt(job.inputs, self.encoder.identity.name)

    def _decode(self, jobs: list[Job], vectors: NDArray[np.float32], decoding: Decoding) -> None:
        began = time.perf_counter()
        inversions = self.inverter.invert(
            vectors,
            decoding=decoding,
            encoder=self.encoder,
            batch_size=len(vectors),
            draws=[(job.seed, index) for job in jobs for index in range(len(job))],
            on_step=_Broadcast(jobs, self.speller, began),
            before_pass=partial(require_listener, jobs),
        )
        milliseconds = round(1000 * (time.perf_counter() - began), 1)
        calls = sum(item.encoder_calls for item in inversions)
        self._metrics.worked(self.name, sum(item.passes for item in inversions), calls)
        cosines = iter(self._cosines(inversions, vectors))
        each = iter(inversions)
        for job in jobs:
            results = [
                figures(next(each), text, next(cosines), self.speller) for text in job.originals
            ]
            facts = {"milliseconds": milliseconds, "seed": job.seed, "doubt": self._doubt(job)}
            job.tell("done", {"results": results, **facts})

    def _cosines(
        self, inversions: Sequence[Inversion], vectors: NDArray[np.float32]
    ) -> list[float | None]:
        """Compute each recovered text's cosine with its vector; None where nothing came back."""
        rows = [row for row, item in enumerate(inversions) if item.text]
        cosines: list[float | None] = [None] * len(inversions)
        if rows:
            again = self.encoder.encode([inversions[row].text for row in rows])
            for row, vector in zip(rows, again, strict=True):
                cosines[row] = float(vector @ vectors[row])
        return cosines


class _Broadcast:
    """Tells the steps of a batch to those who watch."""

    def __init__(self, jobs: list[Job], speller: Speller, began: float) -> None:
        self.jobs, self.speller, self.began = jobs, speller, began
        self.before: DecodingStep | None = None

    def __call__(self, step: DecodingStep) -> None:
        require_listener(self.jobs)
        seconds, row = time.perf_counter() - self.began, 0
        for job in self.jobs:
            if job.watched and not job.cancelled and is_news(step, self.before, row):
                job.tell("step", step_event(step, row, self.speller, seconds))
            row += len(job)
        self.before = step


@dataclass(frozen=True)
class Demo:
    """State that the routes share.

    Attributes:
        models: By name, the default first.
        limits: Of the server.
        metrics: Where it counts.
        clients: Who sends how much.
        log_texts: Write texts and recoveries to the log.
        parser: The one thread in which large bodies are read.
    """

    models: dict[str, ServedModel]
    limits: Limits
    metrics: Metrics
    clients: Clients
    log_texts: bool
    parser: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="unembed bodies")
    )

    @cached_property
    def most_commas(self) -> int:
        """Count the commas that a body with as many vectors or texts as are taken may have."""
        widest = max(model.encoder.identity.dimension for model in self.models.values())
        return self.limits.vectors * (max(widest, self.limits.text_chars) + 1) + _OTHER_COMMAS

    def find(self, name: str | None) -> ServedModel:
        """A model by its name; the default one without.

        Raises:
            ProblemError: There is none of that name.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ProblemError(422, f"expected a model among {', '.join(self.models)}")
        return self.models[name]

    def drain(self) -> None:
        """Take no more work and send those that wait away."""
        for model in self.models.values():
            model.drain()

    def close(self, seconds: float | None = None) -> bool:
        """End the workers, within so many seconds; returns whether they all ended."""
        self.drain()
        return _close_all(self.models.values(), seconds)


def _close_all(parts: Iterable[Worker | ServedModel], seconds: float | None) -> bool:
    end = None if seconds is None else time.monotonic() + seconds
    return all(
        [part.close(None if end is None else max(0.0, end - time.monotonic())) for part in parts]
    )


def describe_model(model: ServedModel, limits: Limits) -> ModelOut:
    """Describe a model: all that a client has to know before it asks."""
    identity, inverter = model.encoder.identity, model.inverter
    alignment = inverter.alignment
    trained = inverter.trained.get("config", {}).get("training", {})
    return ModelOut(
        name=model.name,
        encoder=identity.name if alignment is None else alignment.name,
        dimension=inverter.dimension,
        map=None if alignment is None else _describe_map(alignment),
        length=inverter.length,
        max_text_chars=limits.text_chars,
        max_vectors=limits.vectors,
        strategies={name: _strategy(name) for name in STRATEGIES},
        default_steps=min(DEFAULT_STEPS, limits.steps),
        max_steps=limits.steps,
        default_encoder_calls=min(DEFAULT_CALLS, limits.encoder_calls),
        max_encoder_calls=limits.encoder_calls,
        guidance=float(trained.get("condition_dropout", 0.0)) > 0.0,
        words=None if model.probe is None else len(model.probe.words),
    )


def _describe_map(alignment: Alignment) -> MapOut:
    scored = bool(alignment.cosines)
    return MapOut(
        into=alignment.target.name,
        method=alignment.method,
        pairs=alignment.pairs,
        cosine=alignment.cosine if scored else None,
        floor=alignment.floor if scored else None,
        doubt=alignment.doubt(),
    )


def _strategy(name: str) -> StrategyOut:
    options = {
        item.name: Option(
            default=item.default,
            type=type(item.default).__name__,
            description=item.metadata["help"],
            minimum=item.metadata["low"],
            maximum=item.metadata["high"],
            choices=list(item.metadata["choices"]) or None,
        )
        for item in strategy_fields(name)
    }
    return StrategyOut(options=options, needs_encoder=STRATEGIES[name].needs_encoder)


def load_demo(
    checkpoints: Sequence[str],
    limits: Limits,
    load_inverter: Callable[[str], Inverter],
    load_encoder: Callable[[Inverter], Encoder],
    log_texts: bool = False,
    alignments: Sequence[str] = (),
    probes: Sequence[str] = (),
) -> Demo:
    """Load each model once; those of the same encoder share it.

    A map into the space of a model's encoder makes another of that model, named ``MODEL + MAP``.

    Args:
        checkpoints: Shipped names, folders or Hub repositories; the first is the default.
        limits: Of the server.
        load_inverter: A checkpoint → its inverter.
        load_encoder: An inverter → the encoder that it inverts.
        log_texts: Write texts and recoveries to the log.
        alignments: Folders of maps for vectors of other encoders.
        probes: Shipped word probes, or folders; of two for an encoder the last counts.

    Raises:
        ConfigError: Two checkpoints have the same name, the rate is not one, or a folder's probe
            is of an encoder that no checkpoint inverts.
        UnembedError: A checkpoint or an encoder cannot be loaded, or they do not fit together.
    """
    metrics = Metrics()
    clients = Clients(limits.rate, metrics)
    names = [Path(checkpoint).resolve().name for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        raise ConfigError(
            "checkpoints whose names differ", ", ".join(checkpoints), "Rename or leave one out"
        )
    encoders: dict[tuple[str, ...], SharedEncoder] = {}
    models: dict[str, ServedModel] = {}
    loaded = {name: WordProbe.from_pretrained(name) for name in probes}
    by_encoder = {probe.encoder.key: probe for probe in loaded.values()}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        inverter = load_inverter(checkpoint)
        which = inverter.encoder.key
        if which not in encoders:
            encoders[which] = SharedEncoder(load_encoder(inverter))
        models[name] = ServedModel(
            name, inverter, encoders[which], limits, metrics, by_encoder.get(which)
        )
    for name, probe in loaded.items():
        if probe.encoder.key not in encoders and name not in shipped_probes():
            served = ", ".join(sorted({m.encoder.identity.name for m in models.values()}))
            raise ConfigError(
                f"a word probe for {served}",
                f"{name} for {probe.encoder.name}",
                "Leave out --probe",
            )
    for folder in alignments:
        alignment = Alignment.load(folder)
        fitting = [m for m in models.values() if m.inverter.encoder.key == alignment.target.key]
        base = next(iter(fitting or models.values()))
        name = f"{base.name} + {Path(folder).resolve().name}"
        if name in models:
            raise ConfigError("maps whose names differ", name, "Rename or leave one out")
        models[name] = base.with_alignment(name, alignment)
    return Demo(models, limits, metrics, clients, log_texts)
