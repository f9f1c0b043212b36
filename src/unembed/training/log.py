"""The record of a run: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

LogFn = Callable[[dict[str, float]], None]


class MetricsLog:
    """Appends records to a file; a resumed run first drops what came after its step.

    Args:
        path: ``metrics.jsonl`` of a run.
        step: Step the run starts from.
        on_log: Called with every record too.
    """

    def __init__(self, path: Path, step: int, on_log: LogFn | None = None) -> None:
        self.path = path
        self.on_log = on_log
        kept: list[str] = []
        if path.exists() and step > 0:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write(self, record: dict[str, float]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.on_log is not None:
            self.on_log(record)
