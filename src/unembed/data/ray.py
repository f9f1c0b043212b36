"""Making shards with Ray Data: the same functions in several processes or on several machines.

The driver holds the folder's lock and alone gives files their names and lists them; a worker reads
the source, cuts, encodes and writes under names of its own. So a worker may die at any moment, and
two may even make the same shard.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from unembed import errors
from unembed.data.pairs import shard_names
from unembed.data.readers import count_texts
from unembed.data.shards import (
    Job,
    MadeShard,
    PassageReader,
    Report,
    Runner,
    ShardTask,
    cut_shard,
    make_shard,
)
from unembed.encoders.base import Encoder
from unembed.encoders.fingerprint import Fingerprint
from unembed.errors import ConfigError, DataError, UnembedError
from unembed.files import require_extra

_ATTEMPTS, _PAUSE = 4, 1.0
_CONNECT_SECONDS = 5.0
_OBJECT_STORE = 2**27  # bytes; what passes through it are a shard's number and its manifest entry
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what matters is raised
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}

Load = Callable[[], Encoder]


@dataclass(frozen=True)
class Share:
    """Share of the cluster that each worker gets."""

    workers: int
    cpus: int
    gpus: int


@contextmanager
def ray_runner(
    address: str, workers: int | None, load: Load, *, gpus: bool = True
) -> Iterator[Runner]:
    """Connect to a Ray cluster, or start one on this machine, for one call of `prepare_pairs`.

    Args:
        address: ``local`` for a cluster of this machine that ends with the block, ``auto`` for the
            one running here, or ``HOST:PORT`` of a cluster this machine belongs to.
        workers: Processes that encode; one for each GPU, or each machine, when not given.
        load: Loads the encoder, in each worker once. It is sent there, so it must be a function of
            an installed module or a `functools.partial` of one.
        gpus: Give each worker a GPU where the cluster has any.

    Yields:
        The ``run`` of `prepare_pairs`. Source and output must be in folders that all machines
        share, under the same paths.

    Raises:
        ConfigError: Ray is not installed, nothing answers at the address, or the cluster is too
            small for so many workers.
    """
    with _environment(address), redirect_stdout(sys.stderr):  # Ray prints what its workers meet
        ray = _import_ray()
        _require_answer(address)
        before = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
        temporary = tempfile.mkdtemp(prefix="ray-") if address == "local" else None
        try:
            _connect(ray, address, workers, temporary)
            share = plan_share([n["Resources"] for n in ray.nodes() if n["Alive"]], workers, gpus)
            yield partial(_make_on_ray, ray, share, load)
        finally:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _environment(address: str) -> Iterator[None]:
    """Ray reads its settings from the environment, which is put back afterwards."""
    settings = dict(_QUIET)
    if address == "local":  # else Ray leaves a token in the home folder
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]  # Ray sets more
        os.environ.update(before)


def _import_ray() -> Any:
    require_extra("distributed", "--ray")
    import ray
    import ray.data

    return ray


def _require_answer(address: str) -> None:
    """Ray itself tries for minutes before it gives up."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if address in ("local", "auto"):
        return
    if not (separator and host and port.isdigit()):
        raise ConfigError(
            "--ray local, auto or HOST:PORT", repr(address), "Pass the address `ray start` printed"
        )
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ConfigError(
        f"a Ray cluster at {address}",
        reason,
        "Start one with `ray start --head`, on its machines run `ray start --address HOST:PORT`; "
        "--ray local needs none",
    )


def _connect(ray: Any, address: str, workers: int | None, temporary: str | None) -> None:
    if ray.is_initialized():
        raise ConfigError("a process without Ray", "a connection", "Call ray.shutdown() first")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if temporary is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        options |= {
            "num_cpus": max(cores, workers or 1),
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
            "_temp_dir": temporary,
        }
    try:
        ray.init(address, **options)
    except Exception as error:  # of many kinds: version, token, network, no such process
        raise _no_cluster(address, error) from error


def plan_share(nodes: Sequence[dict[str, float]], workers: int | None, gpus: bool = True) -> Share:
    """Split a cluster among its workers.

    Args:
        nodes: ``CPU`` and ``GPU`` of each machine.
        workers: How many there shall be; one for each GPU, or each machine, when not given.
        gpus: Whether a worker gets a GPU where there are any.

    Raises:
        ConfigError: There is not a GPU, or not a CPU, for each.
    """
    devices = sum(int(node.get("GPU", 0)) for node in nodes) if gpus else 0
    cores = [int(node.get("CPU", 0)) for node in nodes]
    number = workers or devices or sum(1 for count in cores if count)
    if devices:
        _require_enough(number, devices, "GPUs")
        return Share(number, 1, 1)
    _require_enough(number, sum(cores), "CPUs")
    each = max(c for c in range(1, max(cores) + 1) if sum(n // c for n in cores) >= number)
    return Share(number, each, 0)


def _require_enough(workers: int, there: int, what: str) -> None:
    if not 0 < workers <= there:
        raise ConfigError(
            f"--workers of at most {there}, the {what} of the Ray cluster", str(workers), "Lower it"
        )


def _make_on_ray(
    ray: Any, share: Share, load: Load, job: Job, tasks: Iterable[ShardTask], report: Report
) -> Generator[MadeShard]:
    """Have the workers make shards; yields them in order, however they finish."""
    total = count_texts(job.source)
    todo = list(takewhile(lambda task: task.first <= total, tasks))
    if not todo:
        return
    job = replace(job, source=job.source.resolve(), out=job.out.resolve())
    job = replace(job, temporary=f".{uuid.uuid4().hex[:8]}.tmp")
    finished: dict[int, dict[str, Any]] = {}
    try:
        rows = iter(_dataset(ray, share, load, job, todo).iter_rows())
        for task in todo:
            while task.index not in finished:
                row = next(rows)
                finished[row["index"]] = row
            yield _receive(finished.pop(task.index))
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise DataError(
            "Ray workers that make shards",
            lines[-1].strip()[:300],
            "See Ray's logs; what is finished is kept, and the same command goes on",
        ) from error
    finally:
        ray.shutdown()  # ends the workers, so that nobody writes when this is over


def _dataset(ray: Any, share: Share, load: Load, job: Job, todo: list[ShardTask]) -> Any:
    """A block for each shard: the unit of retrying; two at most wait for each worker."""
    blocks = ray.data.from_items([asdict(task) for task in todo], override_num_blocks=len(todo))
    pool = ray.data.ActorPoolStrategy(
        size=min(share.workers, len(todo)), max_tasks_in_flight_per_actor=2
    )
    return blocks.map(
        ShardWorker,
        fn_constructor_args=(job, load),
        compute=pool,
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
    )


def _receive(row: dict[str, Any]) -> MadeShard:
    if row["error"]:
        name, *parts = json.loads(row["error"])
        raise getattr(errors, name)(*parts)
    return MadeShard(row["index"], json.loads(row["entry"]), row["temporary"])


class ShardWorker:
    """Makes shards in a process of its own; loads the encoder once, for the first.

    Args:
        job: What the preparation works on.
        load: Loads the encoder.
    """

    def __init__(self, job: Job, load: Load) -> None:
        self.run = job.temporary.removesuffix(".tmp")
        self.job = replace(job, temporary=f"{self.run}-{uuid.uuid4().hex[:8]}.tmp")
        self.load = load
        self.reader = PassageReader(job.source, job.column)
        self.encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make a shard; an error the user can act on is a result, as any other would be retried.

        Args:
            row: The fields of a `ShardTask`.
        """
        task = ShardTask(**row)
        answer = {"index": task.index, "entry": "", "temporary": self.job.temporary, "error": ""}
        try:
            shard = self._make(task)
        except UnembedError as error:
            parts = [type(error).__name__, error.expected, error.actual, error.fix]
            return {**answer, "error": json.dumps(parts)}
        return {**answer, "entry": json.dumps(shard.entry)}

    def _make(self, task: ShardTask) -> MadeShard:
        """Make a shard; again after a moment when a file could not be read or written."""
        reason = "its worker ended without a word"
        while True:
            attempts = self._count_attempt(task, reason)
            try:
                cut = cut_shard(self.job, self.reader, task)
                shard = make_shard(self.job, self._proven_encoder(), cut)
            except OSError as error:
                reason = str(error)
                time.sleep(_PAUSE)
                continue
            for path in attempts:
                path.unlink(missing_ok=True)
            return shard

    def _count_attempt(self, task: ShardTask, reason: str) -> list[Path]:
        """Leave a mark that outlives this process: what kills each worker must not go on for ever.

        Returns:
            The marks of this shard.
        """
        name = shard_names(task.index)[0]
        marks = [self.job.out / f"{name}{self.run}-try{n}.tmp" for n in range(_ATTEMPTS)]
        for mark in marks:
            with suppress(FileExistsError):
                try:
                    mark.touch(exist_ok=False)
                except FileNotFoundError as error:
                    raise DataError(
                        f"the folder {self.job.out} on {socket.gethostname()}",
                        "no such folder",
                        "Choose an --out folder that all machines share",
                    ) from error
                return marks
        raise DataError(
            f"shard {task.index} after {_ATTEMPTS} attempts", reason, "See Ray's logs for the cause"
        )

    def _proven_encoder(self) -> Encoder:
        if self.encoder is None:
            encoder = self.load()
            self.job.identity.require_same(encoder.identity, "pairs")
            assert self.job.fingerprint is not None, "the driver has taken it"
            Fingerprint.from_dict(self.job.fingerprint).require_same(encoder, "pairs")
            self.encoder = encoder
        return self.encoder
