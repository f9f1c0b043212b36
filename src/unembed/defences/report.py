"""The comparison as a folder: a page that needs nothing else, Markdown, JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from unembed.defences.leak import DETAILS, EXACT, F1
from unembed.defences.result import NOT_PROTECTED, DefenceReport, DefenceRow
from unembed.defences.utility import NDCG, OVERLAP, RECALL
from unembed.errors import DataError
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.report import escape_markdown
from unembed.files import atomic, make_folder, write_json

FILES = ("report.html", "report.md", "report.json")

# Nothing is loaded and no script runs, whatever stands in a name
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --point: #b3401d; --alone: #2f6690; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }
svg .axis { stroke: currentColor; stroke-opacity: .4; }
svg .floor, svg .budget { stroke: currentColor; stroke-dasharray: 4 4; stroke-opacity: .6; }
svg .bar { stroke: var(--point); stroke-opacity: .45; }
svg .point { fill: var(--point); } svg .alone { fill: none; stroke: var(--alone); }
svg .link { stroke: var(--alone); stroke-opacity: .35; }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900.0, 420.0, 60.0, 15.0, 20.0, 45.0
_TICKS = 5

HOW_TO_READ = (
    "Mean [95% bootstrap interval] (texts or queries). Leak is the token F1 of the attacker who "
    "gets most, among all that were asked; names and numbers is the share of a text's that "
    "came back. The floor knows nothing of the vector: what it reaches is no leak. Loss is the "
    "share of the undefended utility that is gone; the budget is compared with its mean. Named: "
    "the text is told from those of all records, where an attacker has it among his."
)


def write_report(report: DefenceReport, folder: Path) -> list[Path]:
    """Write every form of a report.

    Raises:
        DataError: The folder cannot be written.
    """
    make_folder(folder)
    try:
        for name, text in ((FILES[0], to_page(report)), (FILES[1], to_markdown(report))):
            with atomic(folder / name) as file:
                file.write_text(text, encoding="utf-8", errors="backslashreplace")
        write_json(folder / FILES[2], report.to_dict())
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error
    return [folder / name for name in FILES]


# Rows that the page and Markdown share


def utility_names(report: DefenceReport) -> list[str]:
    """The metrics of utility that were measured."""
    return [name for name in (NDCG, RECALL, OVERLAP) if name in report.rows[0].utility]


def summary_table(report: DefenceReport) -> list[list[str]]:
    """A defence a row, the header first: leak, utility, price."""
    names = utility_names(report)
    header = ["", "defence", f"leak: {F1}", "by", "without pairs", DETAILS, "named", "by"]
    rows = [[*header, *names, "loss", "cosine", "bytes", "ms a query"]]
    for number, row in enumerate(report.rows):
        alone = "" if row.without_pairs is None else cell(row.leak[row.without_pairs][F1])
        cells = [str(number), row.defence, cell(row.f1()), row.strongest, alone]
        cells += [
            cell(row.leak[row.strongest][DETAILS]),
            cell(row.identification),
            row.identifier or "",
        ]
        cells += [cell(row.utility[name]) for name in names]
        loss = "" if row.loss is None else f"{row.loss.mean:.1%}"
        cosine = "" if row.cosine is None else f"{row.cosine:.3f}"
        rows.append([*cells, loss, cosine, f"{row.bytes_each:,}", f"{row.milliseconds:g}"])
    return rows


def attacker_table(report: DefenceReport) -> list[list[str]]:
    """Token F1 of each attacker on each defence, the header first; floors below."""
    names = [name for name in report.attackers if any(name in row.leak for row in report.rows)]
    rows = [["defence", *names]]
    for row in report.rows:
        cells = [cell(row.leak[n][F1]) if n in row.leak else "as U" for n in names]
        rows.append([row.defence, *cells])
    for name, figures in report.floors.items():
        rows.append([f"floor: {name}", cell(figures[F1]), *([""] * (len(names) - 1))])
    return rows


def exact_table(report: DefenceReport) -> list[list[str]]:
    """Texts that came back whole, for the strongest attacker of each defence."""
    rows = [["defence", "by", EXACT]]
    for row in report.rows:
        rows.append([row.defence, row.strongest, cell(row.leak[row.strongest][EXACT])])
    return rows


def cell(figure: Figure | None) -> str:
    """A figure with its interval and what it counts; "none" where nothing has it."""
    if figure is None:
        return "none"
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}] ({figure.n})"


def _facts(report: DefenceReport) -> list[list[str]]:
    names = {key: key.replace("_", " ") for key in report.settings}
    return [[names[key], str(value)] for key, value in report.settings.items() if value is not None]


# Markdown


def to_markdown(report: DefenceReport) -> str:
    """The report's text."""
    lines = ["# What each protection of these vectors is worth", ""]
    lines += [_plain(sentence) for sentence in report.recommendation()]
    lines += ["", f"## Leak against {report.metric}", "", HOW_TO_READ, ""]
    for title, table in _tables(report):
        lines += [f"### {title}", "", *_markdown_table(table), ""]
    lines += ["## What none of this protects against", ""]
    lines += [f"- {_plain(line)}" for line in NOT_PROTECTED]
    lines += [f"- note: {_plain(line)}" for line in _notes(report)]
    return "\n".join(lines).rstrip() + "\n"


def _tables(report: DefenceReport) -> Iterator[tuple[str, list[list[str]]]]:
    yield "Defences", summary_table(report)
    yield f"{F1} of each attacker", attacker_table(report)
    yield "Whole texts", exact_table(report)
    yield "Attackers", [["", "has"], *([n, text] for n, text in report.attackers.items())]
    yield "How it was made", [["", ""], *_facts(report)]


def _notes(report: DefenceReport) -> list[str]:
    notes = [*report.notes, *(f"{r.defence}: {note}" for r in report.rows for note in r.notes)]
    longer = report.settings["longer_than_the_inverter_writes"]
    if longer:
        notes.append(
            f"{longer} of {report.settings['held_out']} texts are longer than the inverter writes: "
            "their F1 is that of the window it fits best, and an inverter of longer texts may get "
            "more"
        )
    return notes


def _markdown_table(table: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *rows = table
    yield f"| {' | '.join(map(_plain, header))} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(_plain, row))} |"


def _plain(text: str) -> str:
    return escape_markdown("".join(sign if sign.isprintable() else " " for sign in text))


# The page


def to_page(report: DefenceReport) -> str:
    """The whole page, the picture inside; what comes from a user's names is escaped."""
    first, second = report.recommendation()
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>What each protection of these vectors is worth</title>",
        f"<style>{_STYLE}</style></head><body>",
        "<h1>What each protection of these vectors is worth</h1>",
        f'<p class="lead">{_text(first)} {_text(second)}</p>',
        f"<h2>Leak against {_text(report.metric)}</h2>",
        *picture(report),
        "<p><small>A point a defence, numbered as in the table: filled, the strongest attacker; "
        "open, the strongest without a leaked pair. Better is lower and further right.</small></p>",
    ]
    for place, (title, table) in enumerate(_tables(report)):
        parts += [f"<h2>{_text(title)}</h2>", *_html_table(table)]
        if place == 0:
            parts.append(f"<p><small>{_text(HOW_TO_READ)}</small></p>")
    parts += ["<h2>What none of this protects against</h2><ul>"]
    parts += [f"<li>{_text(line)}</li>" for line in NOT_PROTECTED]
    parts += ["</ul>", *(f"<p>Note: {_text(line)}</p>" for line in _notes(report))]
    return "\n".join([*parts, "</body></html>\n"])


def picture(report: DefenceReport) -> Iterator[str]:
    """The trade-off as SVG: utility to the right, leak upwards, a point a defence."""
    points = [(n, row, f) for n, row in enumerate(report.rows) if (f := row.utility[report.metric])]
    most_x = max(1e-9, *(f.high for _, _, f in points)) * 1.02
    most_y = max(report.floor, *(row.f1().high for _, row, _ in points)) * 1.1

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * max(value, 0.0) / most_x

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * max(value, 0.0) / most_y

    yield f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="Leak against utility">'
    yield _line("axis", x(0), y(0), x(most_x), y(0)) + _line("axis", x(0), y(0), x(0), y(most_y))
    for k in range(_TICKS + 1):
        at, up = most_x * k / _TICKS, most_y * k / _TICKS
        yield f'<text x="{x(at):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{at:.2f}</text>'
        yield f'<text x="{x(0) - 6:.1f}" y="{y(up) + 4:.1f}" text-anchor="end">{up:.2f}</text>'
    middle = (x(0) + x(most_x)) / 2
    yield (
        f'<text x="{middle:.1f}" y="{_HEIGHT - 8:.1f}" text-anchor="middle">'
        f"{_text(report.metric)}</text>"
    )
    yield f'<text x="{x(0) + 6:.1f}" y="{_TOP + 8:.1f}">{_text(F1)}</text>'
    yield _line("floor", x(0), y(report.floor), x(most_x), y(report.floor))
    yield f'<text x="{x(0) + 6:.1f}" y="{y(report.floor) - 4:.1f}">floor</text>'
    limit = (1.0 - report.budget) * points[0][2].mean if points else 0.0
    yield _line("budget", x(limit), y(0), x(limit), y(most_y))
    for number, row, utility in points:
        yield from _point(row, number, (x(utility.mean), x(utility.low), x(utility.high)), y)
    yield "</svg>"


def _point(row: DefenceRow, number: int, at: tuple[float, float, float], y) -> Iterator[str]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    middle, low, high = at
    leak = row.f1()
    title = f"<title>{_text(row.defence)}</title>"
    if row.without_pairs is not None and row.without_pairs != row.strongest:
        alone = y(row.f1(row.without_pairs).mean)
        yield _line("link", middle, y(leak.mean), middle, alone)
        yield f'<circle class="alone" cx="{middle:.1f}" cy="{alone:.1f}" r="4">{title}</circle>'
    yield _line("bar", low, y(leak.mean), high, y(leak.mean))
    yield _line("bar", middle, y(leak.low), middle, y(leak.high))
    yield f'<circle class="point" cx="{middle:.1f}" cy="{y(leak.mean):.1f}" r="4">{title}</circle>'
    yield f'<text x="{middle + 6:.1f}" y="{y(leak.mean) - 6:.1f}">{number}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _html_table(table: Iterable[Sequence[str]]) -> Iterator[str]:
    header, *rows = table
    yield '<div class="wide"><table>'
    if any(header):
        yield f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in header)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>"
    yield "</table></div>"


def _text(text: str) -> str:
    return escape(_CONTROL.sub("\ufffd", text))
