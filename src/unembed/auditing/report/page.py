"""The report as one HTML page: two minutes for a manager, the rest to drill into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape

from unembed.auditing.findings import Finding
from unembed.auditing.report.tables import (
    HOW_TO_READ,
    METRIC_TABLES,
    PROTECTION,
    Row,
    best_figure,
    breakdown,
    defend_command,
    facts,
    figure_rows,
    guess,
    headline,
    length_note,
    unscored_rows,
)
from unembed.auditing.result import AuditReport, ShownRecord
from unembed.auditing.scoring import ANY, COSINE, EXACT, F1, ROUGE
from unembed.auditing.sensitive import KINDS
from unembed.evaluation.bootstrap import Figure

# Nothing is loaded and no script runs, whatever stands in a record
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COLOURS = {
    "critical": "#8e1c1c",
    "high": "#b3401d",
    "medium": "#8a6100",
    "low": "#2f6690",
    "none": "#5a6470",
}

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a1f26; --soft: #5b6672;
  --line: #dfe3e8; --right: #bfe8cd; --bar: #b3401d; --track: #e9ecf0; --floor: #7b8794; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --card: #1c2127; --ink: #e6e9ed;
  --soft: #9aa5b1; --line: #303842; --right: #1f5a37; --bar: #e0673d; --track: #2b323a; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .6rem; } small, .soft { color: var(--soft); font-size: .85rem; }
.lead { font-size: 1.2rem; margin: 1rem 0 1.2rem; }
.badge { border-radius: .3em; color: #fff; display: inline-block; font-size: .8rem;
  font-weight: 600; min-width: 3.6rem; padding: .05em .5em; text-align: center; }
.card, details { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  margin: .5rem 0; padding: .8rem 1rem; }
.tiles, .two { display: grid; gap: .8rem; grid-template-columns: repeat(4, 1fr); }
.two { grid-template-columns: 1fr 1fr; margin-top: .8rem; } article .two { margin-top: .2rem; }
.tiles .card, .two .card { margin: 0; }
.tiles strong { display: block; font-size: 1.9rem; line-height: 1.2; }
@media (max-width: 45rem) { .tiles { grid-template-columns: 1fr 1fr; }
  .two { grid-template-columns: 1fr; } }
.bars { align-items: center; display: grid; font-size: .85rem; gap: .3rem .7rem;
  grid-template-columns: fit-content(9.5rem) 1fr max-content; }
.bars > div { background: var(--track); border-radius: .2rem; height: .8rem; position: relative; }
.bars > div > div { background: var(--bar); border-radius: .2rem; height: 100%; }
.bars > .floor > div { background: var(--floor); }
.bars i { background: var(--ink); height: 1.2rem; position: absolute; top: -.2rem; width: 2px; }
.bars span { font-variant-numeric: tabular-nums; }
.finding { border-left: .35rem solid var(--of); } summary { cursor: pointer; }
.finding .soft { display: block; margin: .15rem 0 0 1.1rem; }
article { border-top: 1px solid var(--line); padding: .5rem 0; }
.card > article { border-top: 0; padding: 0; }
article p, details p { margin: .3rem 0; overflow-wrap: anywhere; }
b { background: var(--right); border-radius: .2em; font-weight: inherit; padding: 0 .15em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
td:first-child { min-width: 9rem; overflow-wrap: normal; }
code { font-size: .85rem; overflow-wrap: anywhere; }
@media print { body { background: none; } details, .card { break-inside: avoid; } }
"""


def to_page(report: AuditReport) -> str:
    """The whole page; everything that comes from the store is escaped."""
    store, reading = report.store, report.read
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Vector store audit: {_text(store.collection)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            "<h1>What this vector store gives away</h1>",
            f'<p class="soft">{_text(store.kind)} · {_text(store.collection)} · '
            f"{store.count:,} vectors, {reading['rows']:,} of them read · "
            f"{_text(report.identity.encoder or 'encoder not known')}</p>",
            f'<p class="lead">{_text(headline(report))}</p>',
            *_tiles(report),
            *_charts(report),
            *_example(report),
            "<h2>Findings</h2>",
            *map(_finding, report.findings),
            *_next_step(report),
            *_records(report),
            *_details(report),
            "</body></html>\n",
        ]
    )


def _text(text: str) -> str:
    return escape(_CONTROL.sub("\ufffd", text))


def _badge(severity: str) -> str:
    return f'<span class="badge" style="background:{_COLOURS[severity]}">{_text(severity)}</span>'


def _tiles(report: AuditReport) -> Iterator[str]:
    """The figures to remember: how bad, and how much came back beside what guessing reaches."""
    yield '<div class="tiles">'
    colour = _COLOURS[report.severity]
    yield (
        f'<div class="card"><strong style="color:{colour}">{_text(report.severity)}</strong>'
        f"the most severe finding{_leak(report)}</div>"
    )
    for metric, title in (
        (F1, "overlap of the words (token F1; 1 is all of them)"),
        (ANY, "of names, numbers and other details that hurt"),
        (EXACT, "of texts come back whole"),
    ):
        figure = best_figure(report, metric)
        if figure is not None:
            most = _number(metric, guess(report, metric))
            yield (
                f'<div class="card"><strong>{_number(metric, figure.mean)}</strong>{_text(title)}'
                f"<br><small>guessing: at most {most}</small></div>"
            )
    if report.leak is None:
        yield '<div class="card"><strong>not measured</strong>whether text comes back</div>'
    yield "</div>"


def _leak(report: AuditReport) -> str:
    """The number of --fail-over, where there is one."""
    if report.leak is None:
        return ""
    return f"<br><small>leak, as --fail-over counts it: {report.leak:.2f}</small>"


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric in (F1, ROUGE, COSINE) else f"{value:.0%}"


def _charts(report: AuditReport) -> Iterator[str]:
    """Two charts: each kind of what hurts, and the words of every attack beside the floors."""
    if report.strongest is None:
        return
    yield '<div class="two">'
    kinds = [(kind, best_figure(report, kind)) for kind in KINDS]
    hurt = [
        _bar(f"{kind} ({figure.n})", kind, figure, guess(report, kind))
        for kind, figure in kinds
        if figure is not None
    ]
    if hurt:
        yield '<div class="card"><h3>Details that hurt: share recovered</h3><div class="bars">'
        yield from hurt
        marks = any(guess(report, kind) for kind in KINDS)
        yield "</div><small>In brackets how many there were."
        yield f"{' The mark: the most that guessing reaches.' if marks else ''}</small></div>"
    yield '<div class="card"><h3>Words: token F1</h3><div class="bars">'
    rows = [(name, attack["figures"] or {}, "") for name, attack in report.attacks.items()]
    rows += [(name, table, "floor") for name, table in report.floors.items()]
    for name, table, kind in rows:
        figure = table.get(F1)
        if figure is not None:
            yield _bar(name, F1, figure, None, kind)
    yield "</div><small>Grey: floors, which know nothing of the vector.</small></div></div>"


def _bar(name: str, metric: str, figure: Figure, floor: float | None, kind: str = "") -> str:
    """Name, bar with the mark of a floor, and the figure with its interval: three cells."""
    ends = " to ".join(_number(metric, end) for end in (figure.low, figure.high))
    mark = "" if not floor else f'<i style="left:{100 * min(1.0, floor):.1f}%"></i>'
    return (
        f'<span>{_text(name)}</span><div class="{kind}"><div style="width:'
        f'{100 * min(1.0, figure.mean):.1f}%"></div>{mark}</div>'
        f"<span>{_number(metric, figure.mean)} <small>[{_text(ends)}]</small></span>"
    )


def _example(report: AuditReport) -> Iterator[str]:
    """The record that came back most nearly, where it is seen at once."""
    if report.records:
        record = max(report.records, key=lambda r: r.f1)
        yield f'<h2>For example</h2><div class="card">{_record(record)}</div>'


def _finding(finding: Finding) -> str:
    references = "; ".join(f"{name}: {', '.join(ids)}" for name, ids in finding.references.items())
    state = " open" if finding.severity in ("critical", "high") else ""
    first = finding.remedy.partition(". ")[0].rstrip(".") + "."
    return (
        f'<details class="finding" style="--of:{_COLOURS[finding.severity]}"{state}>'
        f"<summary>{_badge(finding.severity)} <strong>{_text(finding.title)}</strong>"
        f'<span class="soft">{_text(first)}</span></summary>'
        f"<p>{_text(finding.evidence)}</p>"
        f"<p><strong>What to do.</strong> {_text(finding.remedy)}</p>"
        f"<p><small>To see it again: <code>{_text(finding.reproduce)}</code></small></p>"
        f"<p><small>{_text(finding.id)} · {_text(references)}</small></p></details>"
    )


def _next_step(report: AuditReport) -> Iterator[str]:
    command = defend_command(report)
    if command is not None:
        yield f"<p>{_text(PROTECTION)} <code>{_text(command)}</code></p>"


def _records(report: AuditReport) -> Iterator[str]:
    if not report.records:
        return
    manner = (
        "shown as they are"
        if report.settings["show_pii"]
        else "masked where they hurt: the first letter is left"
    )
    yield f"<h2>The {len(report.records)} records of which most came back</h2>"
    yield (
        f'<p class="soft">Texts are {manner}. Green: a word that the original has. Patterns find '
        "what hurts, and miss some of it: keep this page where the documents may be kept.</p>"
    )
    yield "<details><summary>Show them</summary>"
    yield from map(_record, report.records)
    yield "</details>"


def _record(record: ShownRecord) -> str:
    counts = ", ".join(f"{kind} {got} of {of}" for kind, (got, of) in record.hurt.items())
    group = "" if record.group is None else f" · {record.group}"
    about = f"{record.id}{group} · {record.length} tokens · F1 {record.f1:.2f}"
    about += f" · {counts}" if counts else ""
    words = " ".join(f"<b>{_text(w)}</b>" if right else _text(w) for w, right in record.words)
    return (
        f'<article><small>{_text(about)}</small><div class="two">'
        f"<p><small>original</small><br>{_text(record.original)}</p>"
        f"<p><small>recovered by {_text(record.attack)}</small><br>{words}</p></div></article>"
    )


def _details(report: AuditReport) -> Iterator[str]:
    yield "<h2>Figures</h2>"
    note = length_note(report)
    yield f'<p class="soft">{_text(HOW_TO_READ)} {_text(note or "")}</p>'
    for line in report.notes + report.store.notes + report.identity.notes:
        yield f"<p>Note: {_text(line)}</p>"
    if report.strongest is None:
        yield "<p>No evidence of recovery: only what the inverter says of itself.</p>"
        columns: Row = ("", "access", "records", "confidence", "cosine")
        yield from _table(columns, unscored_rows(report))
    else:
        for title, names in METRIC_TABLES.items():
            yield from _fold(title, ("", *names), figure_rows(report, names))
        access = ((name, attack["access"]) for name, attack in report.attacks.items())
        yield from _fold("What each attacker has", ("", "access"), access)
    columns = ("", "", "records", F1, ANY)
    if report.by_length:
        yield from _fold("By length in tokens", columns, breakdown(report.by_length))
    if report.by_group:
        group = f"By {report.settings['group_by']}"
        yield from _fold(group, columns, breakdown(report.by_group))
    near = f"Near-duplicates: {report.neighbours.duplicates} pairs in the sample"
    pairs = [(a, b, f"{c:.3f}") for a, b, c in report.neighbours.examples]
    if pairs:
        yield from _fold(near, ("", "", "cosine"), pairs)
    yield from _fold("The store", ("", ""), facts(report))


def _fold(title: str, columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    yield f"<details><summary>{_text(title)}</summary>"
    yield from _table(columns, rows)
    yield "</details>"


def _table(columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    yield '<div class="wide"><table>'
    if any(columns):
        yield f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in columns)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>"
    yield "</table></div>"
