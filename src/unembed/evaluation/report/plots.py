"""The plots of a report, as PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unembed.errors import DataError
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.evaluate import Evaluation, Figures
from unembed.evaluation.frontier import METRICS as FRONTIER_METRICS
from unembed.evaluation.frontier import Frontier
from unembed.evaluation.leaked import METRICS as CURVE_METRICS
from unembed.evaluation.leaked import SHUFFLED, AlignCurve
from unembed.evaluation.metrics import ESSENTIAL
from unembed.evaluation.samples import LENGTH
from unembed.files import atomic, install_line, write_json

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_QUALITY = "token-set F1"
_STYLES = ("o-", "s--", "^:", "v-.", "D-", "x--")  # of strategies
_NO_MATPLOTLIB = "plots: not drawn, matplotlib is not installed ({})"


def draw_plots(evaluation: Evaluation, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Draw what the evaluation has into PNG and SVG files.

    Args:
        evaluation: What to draw.
        folder: Where the files go; it is there.

    Returns:
        Name → SVG for use inside a page, without prologue; and notes of what is missing.
    """
    pictures, missing = {}, list[str]()
    for name, draw in _plots(evaluation).items():
        svg = _picture(draw, name, folder)
        if svg is None:
            return {}, [_NO_MATPLOTLIB.format(install_line("plots"))]
        pictures[name] = _inside_a_page(svg)
    return pictures, missing


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
        if _picture(lambda ax: _leak(ax, curve), "curve", out / "plots") is None:
            missing = _NO_MATPLOTLIB.format(install_line("plots"))
            curve = replace(curve, notes=[*curve.notes, missing])
        write_json(out / "curve.json", curve.to_dict())
        header, *rows = curve_table(curve)
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
        with atomic(out / "curve.md") as temporary:
            notes = [f"- {note}" for note in curve.notes]
            temporary.write_text("\n".join([*lines, "", *notes, ""]), encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {out}", str(error), "Choose another --out") from error


def curve_table(curve: AlignCurve) -> list[list[str]]:
    """The curve as rows of text, the header first; floors and ceiling after the points."""
    header = ["leaked pairs", "map", "cosine of the map", "promised", *CURVE_METRICS]
    rows = [[*header, f"{CURVE_METRICS[0]}, {SHUFFLED}"]]
    for point in curve.points:
        promised = "" if point.predicted is None else f"{point.predicted:.3f}"
        method = point.method + (" (predicts nothing)" if point.doubt else "")
        cells = [f"{point.pairs:,}", method, f"{point.reached:.3f}", promised]
        cells += [_cell(point.figures[name]) for name in CURVE_METRICS]
        rows.append([*cells, _cell(point.shuffled[CURVE_METRICS[0]])])
    for name, figures in curve.floors.items():
        rows.append([name, "", "", "", *(_cell(figures[metric]) for metric in CURVE_METRICS), ""])
    return rows


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "missing"
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _picture(draw: Callable[[Any], None], name: str, folder: Path) -> str | None:
    """One plot as PNG and SVG; returns the latter, None without matplotlib."""
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](k) for k in range(20)])  # rows are many
    draw(axes)
    # Marks are numbered by a hash; another salt for each, as the page holds them all
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
        figure.savefig(folder / f"{name}.png", format="png", dpi=120)
    (folder / f"{name}.svg").write_text(buffer.getvalue(), encoding="utf-8")
    return buffer.getvalue()


def _leak(ax: Any, curve: AlignCurve) -> None:
    metric = CURVE_METRICS[0]
    for label, of in (("aligned", "figures"), ("another text's vector", "shuffled")):
        points = [(p.pairs, getattr(p, of)[metric]) for p in curve.points]
        bars = [(pairs, figure) for pairs, figure in points if figure is not None]
        ax.errorbar(
            [pairs for pairs, _ in bars],
            [figure.mean for _, figure in bars],
            yerr=_errors([figure for _, figure in bars]),
            fmt="o-",
            capsize=3,
            label=label,
        )
    for (name, figures), style in zip(curve.floors.items(), (":", "-.", "--"), strict=True):
        figure = figures[metric]
        if figure is not None:
            ax.axhline(figure.mean, color="0.4", linestyle=style, linewidth=1, label=name)
    ax.set_xscale("log")
    title = f"{curve.settings['texts']} held-out texts, 95% interval"
    ax.set(xlabel="leaked pairs", ylabel=metric, ylim=(0, None), title=title)
    _legend(ax)


def draw_frontier(frontier: Frontier, folder: Path) -> list[str]:
    """Draw ``frontier.png`` and ``frontier.svg``: each metric against the encoder calls.

    Args:
        frontier: What to draw: a line for each strategy and length bucket.
        folder: Where the files go; it is there.

    Returns:
        Notes of what is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return [f"plots: not drawn, matplotlib is not installed ({install_line('plots')})"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    for metric, ax in zip(FRONTIER_METRICS, grid.flat, strict=True):
        for style, (name, buckets) in zip(_STYLES, frontier.points.items(), strict=False):
            for number, (bucket, marks) in enumerate(buckets.items()):
                cells = [(mark, figures[metric]) for mark, figures in marks.items()]
                bars = [(mark, figure) for mark, figure in cells if figure is not None]
                ax.errorbar(
                    [mark for mark, _ in bars],
                    [figure.mean for _, figure in bars],
                    yerr=_errors([figure for _, figure in bars]),
                    fmt=style,
                    color=f"C{number}",
                    capsize=2,
                    label=_plain(f"{name}, {bucket} tokens"),
                )
        ax.set_xscale("symlog", linthresh=2)
        ax.set(xlabel="encoder calls", ylabel=metric)
    grid[0, 1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier"}):
        figure.savefig(folder / "frontier.svg", metadata=_NO_METADATA)
        figure.savefig(folder / "frontier.png", dpi=120)
    return []


def _inside_a_page(svg: str) -> str:
    """Strip prologue and metadata, whose addresses a page must not even name."""
    return re.sub(r"<metadata>.*?</metadata>", "", _HEAD.sub("", svg, count=1), flags=re.DOTALL)


def _plots(evaluation: Evaluation) -> dict[str, Callable[[Any], None]]:
    plots: dict[str, Callable[[Any], None]] = {"quality": lambda ax: _quality(ax, evaluation)}
    for label, groups in evaluation.breakdowns.items():
        if len(groups) > 1:
            plots[f"by-{label}"] = _by_group(label, groups)
    if evaluation.calibration:
        plots["calibration"] = lambda ax: _calibration(ax, evaluation)
    attacks = evaluation.settings["attacks"]
    if len(attacks) > 1:
        plots["passes"] = _against("passes", evaluation)
        if any(attack["encoder_calls"] for attack in attacks.values()):
            plots["encoder-calls"] = _against("encoder calls", evaluation)
    return plots


def _plain(text: str) -> str:
    """Matplotlib reads dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _legend(ax: Any) -> None:
    """Beside the axes, since the rows may be many."""
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bars(ax: Any, rows: dict[str, Figures], metrics: Sequence[str]) -> None:
    width = 0.8 / len(rows)
    for place, (name, figures) in enumerate(rows.items()):
        cells = [(i, figures[m]) for i, m in enumerate(metrics)]
        bars = [(i, figure) for i, figure in cells if figure is not None]
        ax.bar(
            [i + place * width for i, _ in bars],
            [figure.mean for _, figure in bars],
            width * 0.9,
            yerr=_errors([figure for _, figure in bars]),
            label=_plain(name),
        )
    ax.set_xticks([i + 0.4 - width / 2 for i in range(len(metrics))], metrics)


def _errors(figures: Sequence[Any]) -> list[list[float]]:
    """Lengths below and above; the interval of a biased metric may leave its mean outside."""
    return [
        [max(figure.mean - figure.low, 0.0) for figure in figures],
        [max(figure.high - figure.mean, 0.0) for figure in figures],
    ]


def _quality(ax: Any, evaluation: Evaluation) -> None:
    _bars(ax, evaluation.rows, ESSENTIAL)
    ax.set(ylabel="mean, 95% interval", title=f"{evaluation.settings['texts']} texts")
    _legend(ax)


def _by_group(label: str, groups: dict[str, dict[str, Figures]]) -> Callable[[Any], None]:
    def draw(ax: Any) -> None:
        names = list(groups)
        for row in next(iter(groups.values())):
            figures = [(i, groups[name][row][_QUALITY]) for i, name in enumerate(names)]
            points = [(i, figure) for i, figure in figures if figure is not None]
            ax.errorbar(
                [i for i, _ in points],
                [figure.mean for _, figure in points],
                yerr=_errors([figure for _, figure in points]),
                fmt="o-" if label == LENGTH else "o",
                capsize=3,
                label=_plain(row),
            )
        rotation = 0 if label == LENGTH else 45
        ax.set_xticks(range(len(names)), [_plain(name) for name in names], rotation=rotation)
        ax.set(xlabel="tokens" if label == LENGTH else label, ylabel=_QUALITY)
        _legend(ax)

    return draw


def _calibration(ax: Any, evaluation: Evaluation) -> None:
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for row, bins in evaluation.calibration.items():
        if row in evaluation.settings["attacks"]:
            points = [(tenth["confidence"], tenth["accuracy"]) for tenth in bins]
            ax.plot(*zip(*points, strict=True), "o-", label=_plain(row))
    ax.set(xlabel="confidence", ylabel="share of tokens that is right", xlim=(0, 1), ylim=(0, 1))
    _legend(ax)


def _against(cost: str, evaluation: Evaluation) -> Callable[[Any], None]:
    def draw(ax: Any) -> None:
        for row in evaluation.settings["attacks"]:
            quality, effort = evaluation.rows[row][_QUALITY], evaluation.rows[row][cost]
            if quality is not None and effort is not None:
                ax.errorbar(
                    effort.mean,
                    quality.mean,
                    yerr=_errors([quality]),
                    fmt="o",
                    capsize=3,
                    label=_plain(row),
                )
        # Searches spend hundreds of what others spend a few of, or none
        ax.set_xscale("symlog" if cost == "encoder calls" else "log")
        ax.set(xlabel=f"{cost} per text", ylabel=_QUALITY)
        _legend(ax)

    return draw
