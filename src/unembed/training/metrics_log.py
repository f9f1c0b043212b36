"""The record of a run: its log (JSON lines, CSV, TensorBoard), and the speed that goes into it."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unembed.denoiser import DenoiserSizes
from unembed.device import Compute
from unembed.files import atomic, has_extra, install_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LogFn = Callable[[dict[str, float]], None]
Record = dict[str, float]

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"
EVENTS = "tensorboard"
_VALIDATION = "validation_"
_ROUNDS = 5
_PRODUCT = {"cpu": (768, 1), "cuda": (8192, 4)}  # side of the square matrices, products at once

# The log


class MetricsLog:
    """Appends records to ``metrics.jsonl``, and the same to a CSV beside it and to TensorBoard.

    A record of training has a ``loss``, a record of a validation a ``validation_loss``; what else
    is in them may change on the way, and the CSV gets a column for whatever comes. A resumed run
    first drops what came after its step, and lines that a kill cut short.

    Args:
        path: ``metrics.jsonl`` of a run.
        step: Step the run starts from.
        on_log: Called with every record as it was handed in.
        samples_per_step: When given, ``samples`` seen so far is added to every record.
        tensorboard: Write ``tensorboard/`` beside the file too, where that package is installed;
            where it is not, one line says so.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        on_log: LogFn | None = None,
        *,
        samples_per_step: int | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path, self.table = path, path.with_name(TABLE)
        self.on_log = on_log
        self.samples_per_step = samples_per_step
        records = []
        if path.exists() and step > 0:
            records = [record for record in read_records(path)[0] if record["step"] <= step]
        self._columns = _all_columns(records)
        _replace(path, "".join(json.dumps(record) + "\n" for record in records))
        _replace(self.table, _csv(self._columns, records, header=True))
        self._writer = _tensorboard(path.with_name(EVENTS), step) if tensorboard else None

    def close(self) -> None:
        """End TensorBoard's writer, which has a thread and a file of its own."""
        if self._writer is not None:
            self._writer.close()

    def write(self, record: Record) -> None:
        """Append one record."""
        full = dict(record)
        if self.samples_per_step is not None:
            full["samples"] = record["step"] * self.samples_per_step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(full) + "\n")
        if set(full) <= set(self._columns):
            with self.table.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv(self._columns, [full], header=False))
        else:  # some times in a run: the whole table is written again, wider
            records, _ = read_records(self.path)
            self._columns = _all_columns(records)
            _replace(self.table, _csv(self._columns, records, header=True))
        if self._writer is not None:
            _add_scalars(self._writer, full)
        if self.on_log is not None:
            self.on_log(record)


def read_records(path: Path) -> tuple[list[Record], int]:
    """Read the records of a ``metrics.jsonl``, and count the lines that are none.

    A line counts when it is a JSON object of numbers with a step: a killed process may leave half
    a line, a full disk an empty one.
    """
    records, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if _is_record(record):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _is_record(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    numbers = all(type(value) in (int, float) for value in record.values())
    return numbers and "step" in record and math.isfinite(record["step"])


def _all_columns(records: Iterable[Record]) -> list[str]:
    """List every key, in the order of its first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def _csv(columns: Sequence[str], records: Iterable[Record], *, header: bool) -> str:
    """Format rows with a cell for every column, empty where a record has no such figure."""
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header and columns:
        writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new one."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _tensorboard(folder: Path, step: int) -> SummaryWriter | None:
    """Open a writer whose viewers drop what came after the step; None without the package."""
    if not has_extra("tensorboard"):
        logging.getLogger(__name__).warning(
            "note: no curves for TensorBoard, which is not installed "
            f"({install_line('tensorboard')}, or --set training.tensorboard=false)"
        )
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _add_scalars(writer: SummaryWriter, record: Record) -> None:
    group = "validation" if "validation_loss" in record else "training"
    for name, value in record.items():
        if name != "step":
            tag = f"{group}/{name.removeprefix(_VALIDATION)}"
            writer.add_scalar(tag, value, int(record["step"]))
    writer.flush()  # a kill loses nothing that was logged


# Speed


def step_operations(
    sizes: DenoiserSizes, pairs: int, masked: float, table_is_trained: bool = True
) -> float:
    """Count the operations of the matrix products of one step, forward and backward.

    Those the model needs, whatever a loop does beside: a multiplication and an addition are two,
    and the backward pass takes twice the forward one.

    Args:
        sizes: Of the denoiser.
        pairs: Pairs of the step.
        masked: Masked positions of the step, the only ones projected onto the vocabulary.
        table_is_trained: Else the gradient of the table is not needed.
    """
    hidden, tokens = sizes.hidden, pairs * sizes.length
    block = 4 * hidden * hidden + 2 * hidden * sizes.feed_forward
    per_token = sizes.layers * (block + 2 * sizes.length * hidden)
    per_text = 1.0 * sizes.layers * 6 * hidden * hidden + 2 * hidden * hidden  # modulations
    per_text += 2 * sizes.embedding_dim * hidden + (1 + 1 + 256 / hidden) * hidden * hidden
    vocabulary = masked * hidden * sizes.vocab_size * (1.0 if table_is_trained else 2 / 3)
    return 3 * 2 * (tokens * per_token + pairs * per_text + vocabulary)


@cache
def product_rate(compute: Compute) -> float:
    """Measure the operations a second of a square matrix product, the best of a few (ms)."""
    size, together = _PRODUCT.get(compute.device.type, (1024, 1))
    generator = torch.Generator().manual_seed(0)  # zeros and ones take less power, and go faster
    matrix = torch.randn(size, size, generator=generator).to(compute.device, compute.dtype)
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(together):  # launching one takes a GPU a good part of its time
            product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * together / best


class Clock:
    """Seconds spent over all starts of a run, and speed since the last log.

    Args:
        step: Step the run starts from.
        seconds: Spent before.
        samples: Pairs a step sees.
        operations: Matrix-product operations of a step, over all processes.
        rate: Operations a second that all devices together reach in a plain product.
    """

    def __init__(
        self, step: int, seconds: float, samples: int, operations: float, rate: float
    ) -> None:
        self._began = time.monotonic() - seconds
        self._logged_at, self._logged_step = time.monotonic(), step
        self._samples, self._share = samples, operations / rate

    def total(self) -> float:
        """Count the seconds over all starts."""
        return time.monotonic() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block (validation, saving) out of the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._logged_at += time.monotonic() - began

    def speed(self, step: int) -> dict[str, float]:
        """Measure samples a second and the share of the peak since the last call."""
        now = time.monotonic()
        rate = (step - self._logged_step) / max(now - self._logged_at, 1e-9)  # steps a second
        self._logged_at, self._logged_step = now, step
        return {"samples_per_second": rate * self._samples, "share_of_peak": rate * self._share}
