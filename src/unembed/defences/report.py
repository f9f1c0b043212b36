"""The comparison as a folder: a page that needs nothing else, Markdown, JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from unembed.defences.leak import DETAILS, EXACT, F1
from unembed.defences.result import NOT_PROTECTED, DefenceReport, DefenceRow, attacker_label
from unembed.defences.utility import NDCG, OVERLAP, RECALL
from unembed.errors import DataError
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.report import escape_markdown
from unembed.files import as_path, atomic, make_folder, write_json

FILES = ("report.html", "report.md", "report.json")

# Nothing is loaded and no script runs, whatever stands in a name
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --point: #b3401d; --alone: #2f6690; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { font-size: 1.15rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td.figure { font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor; }
svg .axis { stroke: currentColor; stroke-opacity: .4; }
svg .floor, svg .budget { stroke: currentColor; stroke-dasharray: 4 4; stroke-opacity: .6; }
svg .bar { stroke: var(--point); stroke-opacity: .45; }
svg .point { fill: var(--point); } svg .alone { fill: none; stroke: var(--alone); }
svg .link { stroke: var(--alone); stroke-opacity: .35; }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900.0, 420.0, 60.0, 15.0, 20.0, 45.0
_STEPS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # between ticks
_MOST_TICKS = 8
_NEAR = 12.0  # between points that share a label, in the picture's units
_MOST_NAMES = 6  # of a label
_SIGN, _LINE = 6.6, 13  # width of a sign and height of a line
_SHIFTS = (4, *(way * step for step in range(12, 200, 8) for way in (-1, 1)))  # of a label's line

HOW_TO_READ = (
    "Leak is a token F1: 1 where every word of a text came back and nothing else, 0 where none "
    "did, and at the floor what guessing gives that knows nothing of the vector. The attacker who "
    "gets most decides a row. Loss is the share of the undefended search quality that is gone; "
    "the budget is compared with its mean. Means of {held_out} texts and {queries} queries with "
    "95% bootstrap intervals."
)
WHAT_COMES_BACK = (
    "Of the strongest attacker: texts that came back whole, word for word, and the share of a "
    "text's names and numbers (in brackets how many texts have any). Identified: the right record "
    "is found among all, by an attacker who has its text among others and asks which vector it is."
)


def write_report(report: DefenceReport, folder: str | Path) -> list[Path]:
    """Write every form of a report.

    Raises:
        DataError: The folder cannot be written.
    """
    if not isinstance(report, DefenceReport):
        raise DataError("the report of defend", f"{report!r:.80}", "Make it with unembed.defend")
    folder = as_path(folder)
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


def defence_table(report: DefenceReport) -> list[list[str]]:
    """What each defence is, the header first."""
    rows = [["defence", "what it does", "rests on a secret"]]
    rows += [[r.defence, r.about, "yes" if r.secret else "no"] for r in report.rows]
    return rows


def summary_table(report: DefenceReport) -> list[list[str]]:
    """A defence a row, the header first: leak against the utility that decides."""
    allowed = f"within {report.budget:.0%}"
    rows = [["defence", "leak", "by", "without pairs", "by", report.metric, "loss", allowed]]
    for row in report.rows:
        alone = ["", ""]
        if row.without_pairs is not None:
            alone = [cell(row.f1(row.without_pairs)), attacker_label(row.without_pairs)]
        loss, within = "", ""
        if row.loss is not None:
            loss = f"{row.loss.mean:.1%} [{row.loss.low:.1%}, {row.loss.high:.1%}]"
            within = "yes" if row.loss.mean <= report.budget else "no"
        cells = [row.defence, cell(row.f1()), attacker_label(row.strongest), *alone]
        rows.append([*cells, cell(row.utility[report.metric]), loss, within])
    return rows


def detail_table(report: DefenceReport) -> list[list[str]]:
    """Whole texts, names and numbers, and whose they are, the header first."""
    rows = [["defence", EXACT, DETAILS, "by", "identified", "by"]]
    for row in report.rows:
        leak = row.leak[row.strongest]
        details = leak[DETAILS]
        count = "" if details is None else f" ({details.n})"
        cells = [row.defence, cell(leak[EXACT]), cell(details) + count]
        cells += [attacker_label(row.strongest), cell(row.identification)]
        rows.append([*cells, "" if row.identifier is None else attacker_label(row.identifier)])
    return rows


def price_table(report: DefenceReport) -> list[list[str]]:
    """Search quality, size and time, the header first."""
    names = utility_names(report)
    rows = [["defence", *names, "cosine to plain", "bytes a vector", "ms a query"]]
    for row in report.rows:
        cosine = "" if row.cosine is None else f"{row.cosine:.3f}"
        cells = [row.defence, *(cell(row.utility[name]) for name in names), cosine]
        rows.append([*cells, f"{row.bytes_each:,}", f"{row.milliseconds:g}"])
    return rows


def attacker_table(report: DefenceReport) -> list[list[str]]:
    """Token F1 of each attacker on each defence, the header first; floors below."""
    names = [name for name in report.attackers if any(name in row.leak for row in report.rows)]
    rows = [["defence", *map(attacker_label, names)]]
    for row in report.rows:
        cells = [cell(row.leak[n][F1]) if n in row.leak else "as unaware" for n in names]
        rows.append([row.defence, *cells])
    for name, figures in report.floors.items():
        rows.append([f"floor: {name}", cell(figures[F1]), *([""] * (len(names) - 1))])
    return rows


def cell(figure: Figure | None) -> str:
    """A figure with its interval; "none" where nothing has it."""
    if figure is None:
        return "none"
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def _facts(report: DefenceReport) -> list[list[str]]:
    names = {key: key.replace("_", " ") for key in report.settings}
    return [[names[key], str(value)] for key, value in report.settings.items() if value is not None]


# Markdown


def to_markdown(report: DefenceReport) -> str:
    """The report's text."""
    lines = ["# What each protection of these vectors is worth", ""]
    lines += [_plain(sentence) for sentence in report.recommendation()]
    lines += [""]
    for title, text, table in _tables(report):
        lines += [f"## {title}", "", *([text, ""] if text else []), *_markdown_table(table), ""]
    lines += ["## What none of this protects against", ""]
    lines += [f"- {_plain(line)}" for line in NOT_PROTECTED]
    lines += [f"- note: {_plain(line)}" for line in _notes(report)]
    return "\n".join(lines).rstrip() + "\n"


def _tables(report: DefenceReport) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Title, how to read it, rows."""
    reading = HOW_TO_READ.format(**report.settings)
    yield f"Leak against {report.metric}", reading, summary_table(report)
    yield "What comes back", WHAT_COMES_BACK, detail_table(report)
    yield "What it costs", "", price_table(report)
    yield f"Leak ({F1}) to each attacker", "", attacker_table(report)
    yield "Defences", "", defence_table(report)
    names = ([n, attacker_label(n), text] for n, text in report.attackers.items())
    yield "Attackers", "", [["--attackers", "", "has"], *names]
    yield "How it was made", "", [["", ""], *_facts(report)]


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
        *picture(report),
        "<p><small>Filled: the strongest attacker; open: the strongest without a leaked pair. "
        "Better is lower and further right; bars are 95% intervals.</small></p>",
    ]
    for title, text, table in _tables(report):
        parts += [f"<h2>{_text(title)}</h2>", f"<p>{_text(text)}</p>" if text else ""]
        parts += _html_table(table)
    parts += ["<h2>What none of this protects against</h2><ul>"]
    parts += [f"<li>{_text(line)}</li>" for line in NOT_PROTECTED]
    parts += ["</ul>", *(f"<p>Note: {_text(line)}</p>" for line in _notes(report))]
    return "\n".join([*filter(None, parts), "</body></html>\n"])


def picture(report: DefenceReport) -> Iterator[str]:
    """The trade-off as SVG: utility kept to the right, leak upwards, a point a defence."""
    points = [(row, f) for row in report.rows if (f := _utility(row)) is not None]
    limit = 100.0 * (1.0 - report.budget)
    x_ticks = _ticks(min(limit, *(f.mean for _, f in points)), max(f.mean for _, f in points))
    leaks = [row.f1() for row, _ in points]
    y_ticks = _ticks(0.0, max(report.floor, *(leak.high for leak in leaks)))

    def x(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max(share, 0.0), 1.0)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / y_ticks[-1]

    left, right, bottom, top = x(x_ticks[0]), x(x_ticks[-1]), y(0.0), y(y_ticks[-1])
    yield f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="Leak against utility">'
    yield _line("axis", left, bottom, right, bottom) + _line("axis", left, bottom, left, top)
    for value in x_ticks:
        yield _label(x(value), bottom + 16, f"{value:g}%", "middle")
    for value in y_ticks:
        yield _label(left - 6, y(value) + 4, f"{value:g}", "end")
    name = f"{report.metric}, of the undefended"
    yield _label((left + right) / 2, _HEIGHT - 8, name, "middle")
    yield _label(left + 6, _TOP + 8, f"leak ({F1})")
    yield _line("floor", left, y(report.floor), right, y(report.floor))
    yield _label(left + 6, y(report.floor) - 4, "floor: guessing")
    yield _line("budget", x(limit), bottom, x(limit), top)
    yield _label(x(limit) - 4, bottom - 6, f"loss of {report.budget:.0%}", "end")
    groups: list[tuple[float, float, list[str]]] = []  # x, y and names of points that are near
    for row, utility in points:
        leak, middle = row.f1(), x(utility.mean)
        if row.without_pairs is not None and row.without_pairs != row.strongest:
            alone = y(row.f1(row.without_pairs).mean)
            yield _line("link", middle, y(leak.mean), middle, alone)
            yield f'<circle class="alone" cx="{middle:.1f}" cy="{alone:.1f}" r="4"/>'
        yield _line("bar", x(utility.low), y(leak.mean), x(utility.high), y(leak.mean))
        yield _line("bar", middle, y(leak.low), middle, y(leak.high))
        yield f'<circle class="point" cx="{middle:.1f}" cy="{y(leak.mean):.1f}" r="4"/>'
        _add(groups, middle, y(leak.mean), row.defence)
    yield from _names(groups)
    yield "</svg>"


def _utility(row: DefenceRow) -> Figure | None:
    """Per cent of the undefended utility that is left, the same queries compared."""
    if row.loss is None:
        return None
    mean, low, high = (100.0 * (1.0 - v) for v in (row.loss.mean, row.loss.high, row.loss.low))
    return Figure(mean, low, high, row.loss.n)


def _add(groups: list[tuple[float, float, list[str]]], x: float, y: float, name: str) -> None:
    """Put a name to those of a point that is near, else begin a group."""
    for across, up, names in groups:
        if abs(across - x) < _NEAR and abs(up - y) < _NEAR:
            names.append(name)
            return
    groups.append((x, y, [name]))


def _names(groups: Sequence[tuple[float, float, list[str]]]) -> Iterator[str]:
    """Labels of groups of points where nothing else is, with a line to those that are not near."""
    boxes = [(across - 7, across + 7, up - 7, up + 7) for across, up, _ in groups]
    for across, up, names in sorted(groups, key=lambda group: group[1]):
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        text = ", ".join(names[:_MOST_NAMES]) + more
        size = _SIGN * len(text)
        sides = [(across + 9, "start"), (across - 9 - size, "end")]  # left end of the label
        if across > _WIDTH / 2:
            sides.reverse()
        places = [(low, up + shift, anchor) for shift in _SHIFTS for low, anchor in sides]
        free = [
            (low, y, anchor)
            for low, y, anchor in places
            if _LEFT < low < _WIDTH - size
            and y - _LINE > _TOP
            and y < _HEIGHT - _BOTTOM
            and all(b < low or a > low + size or d < y - _LINE or c > y for a, b, c, d in boxes)
        ]
        low, y, anchor = (free or places)[0]
        boxes.append((low, low + size, y - _LINE, y))
        end = low if anchor == "start" else low + size
        if abs(y - up) > _LINE:
            yield _line("link", across, up, end, y - 4)
        yield _label(end, y, text, anchor)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below ``low`` to above ``high``."""
    step = next((s for s in _STEPS if (high - low) / s <= _MOST_TICKS), _STEPS[-1])
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(k * step, 3) for k in range(first, last + 1)]


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _html_table(table: Iterable[Sequence[str]]) -> Iterator[str]:
    header, *rows = table
    yield '<div class="wide"><table>'
    if any(header):
        yield f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in header)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(map(_html_cell, row))}</tr>"
    yield "</table></div>"


def _html_cell(value: str) -> str:
    kind = ' class="figure"' if "[" in value else ""
    return f"<td{kind}>{_text(value)}</td>"


def _text(text: str) -> str:
    return escape(_CONTROL.sub("\ufffd", text))
