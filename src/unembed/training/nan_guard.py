"""A guard against bad steps: seen on the device, never applied, reported when the host asks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unembed.errors import TrainingError

if TYPE_CHECKING:
    from unembed.config import TrainingSection

_WINDOW = 100  # steps in the running average
_WARMUP = 20  # good steps before a loss can be said to explode
_FLOOR = 0.1  # a lower average, in nats, may jump about without anything being wrong
_MOST_IN_A_ROW = 100  # bad steps in a row


@dataclass(frozen=True)
class GuardReport:
    """What the guard knows of a run.

    Attributes:
        good: Steps applied, over the whole run.
        skipped: Steps not applied.
        in_a_row: Of these, since the last good one.
        loss: Of the last bad step.
        norm: Gradient norm of the last bad step.
    """

    good: int
    skipped: int
    in_a_row: int
    loss: float
    norm: float


class LossGuard:
    """Tells whether a step's loss and gradient are finite and the loss of the usual size.

    Everything is a tensor on the device, so that a step need not wait for the answer: the
    optimiser is handed it and leaves weights and moments alone.

    Args:
        settings: ``on_bad_loss`` and ``explosion``.
        device: Of the run.
    """

    def __init__(self, settings: TrainingSection, device: torch.device) -> None:
        self._stops = settings.on_bad_loss == "stop"
        self._explosion = settings.explosion
        # Running average, good steps, skipped, skipped in a row, norm of the last good step
        self.state = torch.zeros(5, device=device)
        self._bad = torch.zeros(2, device=device)  # loss and norm of the last bad step, not saved
        self._reported = 0

    @property
    def norm(self) -> Tensor:
        """Gradient norm of the last good step."""
        return self.state[4]

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step: 1.0 if it is bad, 0.0 if it is good, on the device."""
        average, good, skipped, row, last = self.state.unbind()
        exploded = (good >= _WARMUP) & (loss > self._explosion * average.clamp_min(_FLOOR))
        bad = ~torch.isfinite(loss) | ~torch.isfinite(norm) | exploded
        share = 1.0 / (good + 1.0).clamp(max=_WINDOW)
        self.state = torch.stack(
            [
                torch.where(bad, average, average + share * (loss - average)),
                good + ~bad,
                skipped + bad,
                torch.where(bad, row + 1.0, 0.0),
                torch.where(bad, last, norm),
            ]
        )
        self._bad = torch.where(bad, torch.stack([loss, norm]), self._bad)
        return bad.float()

    def report(self) -> GuardReport:
        """Read what the guard knows; waits for the device."""
        values, (loss, norm) = self.state.tolist(), self._bad.tolist()
        return GuardReport(int(values[1]), int(values[2]), int(values[3]), loss, norm)

    def restore(self, state: Tensor) -> None:
        """Restore a saved ``state``, whose bad steps were reported when they happened."""
        self.state = state.to(self.state.device)
        self._reported = self.report().skipped

    def check(self, step: int, latest: Path) -> GuardReport:
        """Check for bad steps since the last check, and end the run when it should end.

        Args:
            step: Steps done.
            latest: Where the last good state is, if one was saved, for the message.

        Raises:
            TrainingError: There was one and ``on_bad_loss`` is ``stop``, or a hundred in a row.
        """
        report = self.report()
        stop = self._stops and report.skipped > self._reported
        if stop or report.in_a_row >= _MOST_IN_A_ROW:
            finite = math.isfinite(report.loss) and math.isfinite(report.norm)
            size = f" of at most {self._explosion:g} times its running average"
            raise TrainingError(
                f"a finite loss{size if finite else ''}",
                f"loss {report.loss:g}, gradient norm {report.norm:g} by step {step} "
                f"({report.skipped} bad steps in all, none applied)",
                f"{_advice(latest)}, or set training.on_bad_loss=skip",
            )
        self._reported = report.skipped
        return report


def _advice(latest: Path) -> str:
    if latest.exists():
        return f"The last good state is in {latest}; lower training.lr and resume"
    return "No state was saved yet; lower training.lr and start again"
