"""The training and validation curves of one or several runs, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import ConfigError, DataError, TrainingError
from unembed.files import atomic, is_file, require_extra
from unembed.training.metrics_log import METRICS, Record, read_records

AXES = {"steps": "optimiser steps", "samples": "samples", "hours": "hours of training"}
# Okabe and Ito's colours, which most kinds of colour blindness keep apart; the yellow is too pale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_INK, _GRID = "#333333", "#DDDDDD"
_POINTS = 300  # a longer training curve is drawn as means of equal parts
_DECADE, _ROOM = 10.0, 1.05
_LEGEND_MARK, _LEGEND_LETTER = 0.7, 0.085  # inches


@dataclass(frozen=True)
class Panel:
    """Panel: one figure against training.

    Attributes:
        title: Above it.
        validation: Its name in a validation's record.
        training: Its name in a training record, where there is one.
        share: From 0 to 1, else a loss on a logarithmic axis.
    """

    title: str
    validation: str
    training: str | None = None
    share: bool = True


PANELS = (
    Panel("loss", "validation_loss", "loss", share=False),
    Panel("masked accuracy", "masked_accuracy", "masked_accuracy"),
    Panel("decoded token accuracy", "decoded_token_accuracy"),
)


@dataclass(frozen=True)
class Run:
    """Log of a run.

    Attributes:
        name: Of the run, as it stands in the legend.
        training: Records with a loss.
        validation: Records of validations.
    """

    name: str
    training: list[Record]
    validation: list[Record]


def read_run(folder: Path) -> tuple[Run, list[str]]:
    """Read the log of a run, with notes on what is missing in it.

    Raises:
        TrainingError: There is no run, or nothing was logged.
    """
    path = folder / METRICS
    if not is_file(path):
        raise TrainingError(
            f"a run of `unembed train` at {folder}", f"no {METRICS} there", "Correct the folder"
        )
    records, damaged = read_records(path)
    if not records:
        content = f"{damaged} damaged lines" if damaged else "an empty file"
        raise TrainingError(
            f"records of a training in {path}", content, "Train on, or choose another run"
        )
    name = folder.resolve().name
    notes = [f"{damaged} damaged lines of {path} were left out"] if damaged else []
    validation = [record for record in records if "validation_loss" in record]
    training = [record for record in records if "loss" in record]
    return Run(name, training, validation), notes


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read several runs, with names that tell them apart.

    Raises:
        TrainingError: As `read_run`.
    """
    logs = [read_run(folder) for folder in folders]
    names = [run.name for run, _ in logs]
    runs = []
    for folder, (run, _) in zip(folders, logs, strict=True):
        name = run.name if names.count(run.name) == 1 else str(folder)
        runs.append(Run(name, run.training, run.validation))
    return runs, [note for _, notes in logs for note in notes]


def save_curves(folders: Sequence[Path], path: Path, axis: str = "steps") -> list[str]:
    """Draw the curves of runs into a file.

    Args:
        folders: Of `unembed train`.
        path: ``.png`` or ``.svg``.
        axis: ``steps``, ``samples`` or ``hours``.

    Returns:
        Notes on what was left out, and why.

    Raises:
        ConfigError: Another axis, another kind of file, or Matplotlib is not installed.
        TrainingError: There is no such run, or nothing that could be drawn was logged.
        DataError: The file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError("a file that ends in .png or .svg", str(path), "Correct --out")
    runs, notes = read_runs(folders)
    picture, more = draw_curves(runs, axis, kind)
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(picture)
    except OSError as error:
        raise DataError(f"a place to write {path}", str(error), "Choose another --out") from error
    return notes + more


def draw_curves(
    runs: Sequence[Run], axis: str = "steps", kind: str = "png"
) -> tuple[bytes, list[str]]:
    """Draw curves of runs, one panel a figure, one colour and marker a run.

    Args:
        runs: At least one.
        axis: ``steps``, ``samples`` or ``hours``.
        kind: ``png`` or ``svg``.

    Returns:
        The picture (the same bytes for the same logs), and notes on what was left out.

    Raises:
        ConfigError: Another axis, or Matplotlib is not installed.
        TrainingError: Nothing that could be drawn was logged.
    """
    if axis not in AXES:
        raise ConfigError(f"an axis of {', '.join(AXES)}", repr(axis), "Correct --x")
    require_extra("plots", "the curves")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels, notes = [], []
    for panel in PANELS:
        lacking = [run.name for run in runs if not _has(run, panel)]
        if len(lacking) < len(runs):
            panels.append(panel)
        if lacking:
            what = "that panel is" if len(lacking) == len(runs) else "that curve is"
            notes.append(f"no {panel.title} in the log of {', '.join(lacking)}: {what} left out")
    if not panels:
        raise TrainingError(
            f"one of {', '.join(panel.title for panel in PANELS)} in the logs", "none", "Train on"
        )
    style = {"svg.hashsalt": "unembed", "svg.fonttype": "none", "font.size": 10}
    with rc_context(style):  # type: ignore[arg-type, unused-ignore]
        figure = Figure(figsize=(0.4 + 4.2 * len(panels), 3.9), layout="constrained")
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(row, panels, strict=True):
            _draw(axes, panel, runs, axis)
        end = max(x for axes in row for line in axes.get_lines() for x in line.get_xdata())
        for axes in row:
            axes.set_xlim(0, (end or 1.0) * _ROOM)
        _legend(figure, runs, panels)
        file = BytesIO()
        still = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(file, format=kind, dpi=150, metadata=still, facecolor="white")
    return file.getvalue(), notes


def _has(run: Run, panel: Panel) -> bool:
    """Check whether a run logged the figure at all."""
    return any(len(_points(part, name, run, "steps")[0]) for part, name in _records(run, panel))


def _records(run: Run, panel: Panel) -> list[tuple[list[Record], str]]:
    """List training, then validation: the records, and the figure's name in them."""
    training = [] if panel.training is None else [(run.training, panel.training)]
    return [*training, (run.validation, panel.validation)]


def _points(
    records: list[Record], name: str, run: Run, axis: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find where and what a figure is, [N] each; what is not finite is left out.

    Raises:
        TrainingError: The log does not say where on this axis its records are.
    """
    records = [record for record in records if math.isfinite(record.get(name, math.nan))]
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    values = np.array([record[name] for record in records], dtype=np.float64)
    if axis == "samples":
        if not all("samples" in record for record in records):
            raise TrainingError(
                f"samples in the log of {run.name}", "none", "Choose --x steps or hours"
            )
        steps = np.array([record["samples"] for record in records], dtype=np.float64)
    if axis == "hours":
        timed = [record for record in run.training if "seconds" in record]
        if not timed:
            raise TrainingError(
                f"seconds in the log of {run.name}", "none", "Choose --x steps or samples"
            )
        # A validation's record has no time of its own: it is between those around it
        at = [record["step"] for record in timed]
        steps = np.interp(steps, at, [record["seconds"] / 3600 for record in timed])
    return steps, values


def _draw(axes: Any, panel: Panel, runs: Sequence[Run], axis: str) -> None:
    """Draw one panel: training pale, validation dark with its points marked."""
    for index, run in enumerate(runs):
        colour, marker = _look(index)
        if panel.training is not None:
            x, y = _points(run.training, panel.training, run, axis)
            axes.plot(*_means(x, y), color=colour, alpha=0.45, linewidth=1.2, zorder=2)
        x, y = _points(run.validation, panel.validation, run, axis)
        axes.plot(
            *(x, y, marker),
            linestyle="-",
            color=colour,
            linewidth=2,
            markersize=5,
            markevery=max(1, len(x) // 12),
            markeredgecolor="white",
            zorder=3,
        )
    axes.set_title(panel.title, fontsize=11, color=_INK)
    axes.set_xlabel(AXES[axis], color=_INK)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(which="both", colors=_INK)
    if axis != "hours":
        axes.xaxis.set_major_formatter(_thousands)
    axes.xaxis.set_major_locator(_locator())
    if panel.share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        top = max(value for line in axes.get_lines() for value in line.get_ydata())
        axes.set_ylim(0, (top or 1.0) * _ROOM)
    else:
        _log_axis(axes)


def _look(index: int) -> tuple[str, str]:
    """Choose colour and marker of a run; a pair comes again after 49."""
    turn, colour = divmod(index, len(_COLOURS))
    return _COLOURS[colour], _MARKERS[(colour + turn) % len(_MARKERS)]


def _locator() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def _log_axis(axes: Any) -> None:
    """Make a loss's axis logarithmic: it falls by less and less, and its end stays readable."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if min(values) <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(min(values) / _ROOM, max(values) * _ROOM)
    low, high = axes.get_ylim()
    if high / low < _DECADE:
        axes.yaxis.set_major_locator(_locator())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _thousands(value: float, _: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _means(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Thin out a curve to at most 300 points, each the mean of neighbouring ones."""
    if len(x) <= _POINTS:
        return x, y
    parts = [np.array_split(values, _POINTS) for values in (x, y)]
    means = [np.array([part.mean() for part in values]) for values in parts]
    return means[0], means[1]


def _legend(figure: Any, runs: Sequence[Run], panels: Sequence[Panel]) -> None:
    """Draw below the panels: the runs by colour and marker, and what pale and dark mean."""
    from matplotlib.lines import Line2D

    handles = []
    if len(runs) > 1:
        for index, run in enumerate(runs):
            colour, marker = _look(index)
            handles.append(
                Line2D([], [], color=colour, marker=marker, label=f" {run.name}", linewidth=2)
            )
    else:
        figure.suptitle(runs[0].name, fontsize=12, color=_INK, parse_math=False)
    neutral = _COLOURS[0] if len(runs) == 1 else "#666666"
    if any(panel.training for panel in panels):
        handles.append(Line2D([], [], color=neutral, alpha=0.45, linewidth=1.2, label="training"))
    marker = _MARKERS[0] if len(runs) == 1 else ""
    held_out = "held out, averaged weights"
    handles.append(Line2D([], [], color=neutral, marker=marker, linewidth=2, label=held_out))
    widths = [_LEGEND_MARK + _LEGEND_LETTER * len(str(handle.get_label())) for handle in handles]
    room = figure.get_figwidth()
    columns = len(handles) if sum(widths) <= room else max(1, int(room / max(widths)))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=_INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
