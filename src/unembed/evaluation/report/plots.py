"""The plots of a report, as PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unembed.evaluation.evaluate import LENGTH, Evaluation, Figures
from unembed.evaluation.metrics import ESSENTIAL
from unembed.files import install_line

_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_QUALITY = "token-set F1"


def draw_plots(evaluation: Evaluation, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Draw what the evaluation has into PNG and SVG files.

    Args:
        evaluation: What to draw.
        folder: Where the files go; it is there.

    Returns:
        Name → SVG for use inside a page, without prologue; and notes of what is missing.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        line = install_line("plots")
        return {}, [f"plots: not drawn, matplotlib is not installed ({line})"]
    pictures = {}
    for name, draw in _plots(evaluation).items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=[colormaps["tab20"](k) for k in range(20)])  # rows are many
        draw(axes)
        # Marks are numbered by a hash; another salt for each, as the page holds them all
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
            figure.savefig(folder / f"{name}.png", format="png", dpi=120)
        svg = buffer.getvalue()
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        pictures[name] = _inside_a_page(svg)
    return pictures, []


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
