"""The report as one HTML page: two minutes for a manager, the rest to drill into."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html import escape

from unembed.auditing.findings import Finding
from unembed.auditing.report.tables import (
    HOW_TO_READ,
    METRIC_TABLES,
    Row,
    breakdown,
    facts,
    figure_rows,
    headline,
    length_note,
    unscored_rows,
)
from unembed.auditing.result import AuditReport, ShownRecord
from unembed.auditing.scoring import ANY, F1

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
:root { color-scheme: light dark; --line: #8884; --right: #2a9d5c55; --bar: #b3401d; }
body { font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { font-size: 1.15rem; }
.badge { color: #fff; border-radius: .3em; padding: .1em .5em; font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .25rem .7rem;
  align-items: center; }
.bars div { background: var(--line); height: .9rem; border-radius: .2rem; }
.bars div div { background: var(--bar); }
.bars .floor div { background: #7b8794; }
article, details { border-bottom: 1px solid var(--line); padding: .6rem 0; }
article p, details p { margin: .2rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; } small { opacity: .8; }
b { background: var(--right); font-weight: inherit; border-radius: .2em; }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def to_page(report: AuditReport) -> str:
    """The whole page; everything that comes from the store is escaped."""
    severity = report.severity
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Vector store audit: {_text(report.store.collection)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            "<h1>What this vector store gives away</h1>",
            f"<p>{_text(report.store.kind)} · {_text(report.store.collection)} · "
            f"{report.store.count:,} vectors · {_badge(severity, f'most severe: {severity}')}</p>",
            f'<p class="lead">{_text(headline(report))}</p>',
            *_bars(report),
            "<h2>Findings</h2>",
            *map(_finding, report.findings),
            *_records(report),
            *_details(report),
            "</body></html>\n",
        ]
    )


def _text(text: str) -> str:
    return escape(_CONTROL.sub("\ufffd", text))


def _badge(severity: str, text: str) -> str:
    return f'<span class="badge" style="background:{_COLOURS[severity]}">{_text(text)}</span>'


def _bars(report: AuditReport) -> Iterator[str]:
    """Two charts: what hurts, and words; the attacks above the floors."""
    if report.strongest is None:
        return
    for metric, title in ((ANY, "Details that hurt: share recovered"), (F1, "Words: token F1")):
        rows = [
            (n, a["figures"].get(metric), "") for n, a in report.attacks.items() if a["figures"]
        ]
        rows += [(n, f.get(metric), "floor") for n, f in report.floors.items()]
        if not any(figure for _, figure, _ in rows):
            continue
        yield f'<h2>{_text(title)}</h2><div class="bars">'
        for name, figure, kind in rows:
            if figure is not None:
                form = ".2f" if metric == F1 else ".0%"
                ends = " to ".join(format(end, form) for end in (figure.low, figure.high))
                yield (
                    f'<span>{_text(name)}</span><div class="{kind}"><div style="width:'
                    f'{100 * min(1.0, figure.mean):.1f}%"></div></div>'
                    f"<span>{figure.mean:{form}} [{ends}]</span>"
                )
        yield "</div>"


def _finding(finding: Finding) -> str:
    references = "; ".join(f"{name}: {', '.join(ids)}" for name, ids in finding.references.items())
    begun = " open" if finding.severity in ("critical", "high") else ""
    return (
        f"<details{begun}><summary>{_badge(finding.severity, finding.severity)} "
        f"<strong>{_text(finding.title)}</strong></summary>"
        f"<p>{_text(finding.evidence)}</p>"
        f"<p><strong>What to do.</strong> {_text(finding.remedy)}</p>"
        f"<p><small>To see it again: <code>{_text(finding.reproduce)}</code></small></p>"
        f"<p><small>{_text(finding.id)} · {_text(references)}</small></p></details>"
    )


def _records(report: AuditReport) -> Iterator[str]:
    if not report.records:
        return
    manner = (
        "shown as they are"
        if report.settings["show_pii"]
        else ("masked where they hurt: the first letter is left")
    )
    yield f"<h2>The {len(report.records)} records of which most came back</h2>"
    yield (
        f"<p>Texts are {manner}. Green: a word that the original has. Patterns find what hurts, "
        "and miss some of it: keep this page where the documents may be kept.</p>"
    )
    yield from map(_record, report.records)


def _record(record: ShownRecord) -> str:
    counts = ", ".join(f"{kind} {got} of {of}" for kind, (got, of) in record.hurt.items())
    group = "" if record.group is None else f" · {record.group}"
    about = f"{record.id}{group} · {record.length} tokens · F1 {record.f1:.2f} · {counts}"
    words = " ".join(f"<b>{_text(w)}</b>" if right else _text(w) for w, right in record.words)
    return (
        f"<article><p><small>{_text(about)}</small></p>"
        f"<p><small>original</small><br>{_text(record.original)}</p>"
        f"<p><small>recovered by {_text(record.attack)}</small><br>{words}</p></article>"
    )


def _details(report: AuditReport) -> Iterator[str]:
    yield "<h2>Figures</h2>"
    yield f"<p>{_text(HOW_TO_READ)}</p>"
    note = length_note(report)
    if note:
        yield f"<p>{_text(note)}</p>"
    for line in report.notes + report.store.notes + report.identity.notes:
        yield f"<p>Note: {_text(line)}</p>"
    if report.strongest is None:
        yield "<p>No evidence of recovery: only what the inverter says of itself.</p>"
        yield from _table(("", "access", "records", "confidence", "cosine"), unscored_rows(report))
    else:
        for title, names in METRIC_TABLES.items():
            yield f"<h3>{_text(title)}</h3>"
            yield from _table(("", *names), figure_rows(report, names))
        access = ((name, attack["access"]) for name, attack in report.attacks.items())
        yield "<h3>What each attacker has</h3>"
        yield from _table(("", "access"), access)
    columns = ("", "", "records", F1, ANY)
    for title, groups in (
        ("length in tokens", report.by_length),
        (str(report.settings["group_by"]), report.by_group),
    ):
        if groups:
            yield f"<details><summary>By {_text(title)}</summary>"
            yield from _table(columns, breakdown(groups))
            yield "</details>"
    places = report.neighbours
    yield "<details><summary>Neighbours</summary>"
    yield f"<p>{places.duplicates} pairs of near-duplicates in the sample.</p>"
    yield from _table(("", "", "cosine"), ((a, b, f"{c:.3f}") for a, b, c in places.examples))
    yield "</details><details><summary>The store</summary>"
    yield from _table(("", ""), facts(report))
    yield "</details>"


def _table(columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    yield '<div class="wide"><table>'
    if any(columns):
        yield f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in columns)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{_text(value)}</td>' for value in row)}</tr>"
    yield "</table></div>"
