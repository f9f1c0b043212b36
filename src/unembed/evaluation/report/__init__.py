"""An evaluation as a folder: Markdown, JSON, plots, and a page that needs nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unembed.data.manifest import write_json
from unembed.errors import DataError
from unembed.evaluation.evaluate import Evaluation
from unembed.evaluation.frontier import Frontier
from unembed.evaluation.report.page import to_markdown, to_page
from unembed.evaluation.report.plots import draw_frontier, draw_plots
from unembed.files import atomic


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and ``plots/`` (PNG and SVG).

    Without matplotlib the plots are missing, and the notes of the report say so.

    Args:
        evaluation: What to report.
        folder: Made if it is not there; files of an earlier report are replaced.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        plots, missing = draw_plots(evaluation, folder / "plots")
        evaluation = replace(evaluation, notes=[*evaluation.notes, *missing])
        write_json(folder / "report.json", evaluation.to_dict())
        for name, text in (
            ("report.md", to_markdown(evaluation, list(plots))),
            ("report.html", to_page(evaluation, plots)),
        ):
            with atomic(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """Write ``frontier.json``, ``frontier.md`` and the curve as PNG and SVG.

    Args:
        frontier: What to report.
        folder: Made if it is not there.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = draw_frontier(frontier, folder)
        frontier = replace(frontier, notes=[*frontier.notes, *missing])
        write_json(folder / "frontier.json", frontier.to_dict())
        with atomic(folder / "frontier.md") as temporary:
            temporary.write_text(frontier.to_markdown(), encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error


__all__ = ["write_frontier", "write_report"]
