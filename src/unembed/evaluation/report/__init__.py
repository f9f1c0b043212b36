"""An evaluation as a folder: Markdown, JSON, plots, and a page that needs nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unembed.data.manifest import write_json
from unembed.errors import DataError
from unembed.evaluation.evaluate import Evaluation
from unembed.evaluation.leaked import AlignCurve, curve_table
from unembed.evaluation.report.page import to_markdown, to_page
from unembed.evaluation.report.plots import draw_curve, draw_plots
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


def write_curve(curve: AlignCurve, out: Path) -> None:
    """Write a curve of leaked pairs: to ``.json``, or as a folder of JSON, Markdown and a plot.

    Args:
        curve: What to write.
        out: The file, or the folder, made if it is not there.

    Raises:
        DataError: It cannot be written.
    """
    try:
        if out.suffix == ".json":
            write_json(out, curve.to_dict())
            return
        (out / "plots").mkdir(parents=True, exist_ok=True)
        missing = draw_curve(curve, out / "plots")
        curve = replace(curve, notes=[*curve.notes, *missing])
        write_json(out / "curve.json", curve.to_dict())
        header, *rows = curve_table(curve)
        lines = [header, ["---"] * len(header), *rows]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        notes = "".join(f"\n- {note}" for note in curve.notes)
        with atomic(out / "curve.md") as temporary:
            temporary.write_text(f"{text}\n{notes}\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {out}", str(error), "Choose another --out") from error


__all__ = ["write_curve", "write_report"]
