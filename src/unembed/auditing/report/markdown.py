"""The report as Markdown, for a ticket or a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from unembed.auditing.report.tables import (
    HOW_TO_READ,
    METRIC_TABLES,
    PROTECTION,
    Row,
    breakdown,
    defend_command,
    facts,
    figure_rows,
    headline,
    length_note,
    unscored_rows,
)
from unembed.auditing.result import AuditReport
from unembed.auditing.scoring import ANY, F1
from unembed.evaluation.report import escape_markdown


def to_markdown(report: AuditReport) -> str:
    """The report's text."""
    lines = [
        f"# Vector store audit: {_text(report.store.collection)}",
        "",
        f"Most severe: **{report.severity}**. {_text(headline(report))}"
        + ("" if report.leak is None else f" Leak, as --fail-over counts it: {report.leak:.3f}."),
        "",
        "## Findings",
        "",
    ]
    for finding in report.findings:
        references = "; ".join(f"{n}: {', '.join(ids)}" for n, ids in finding.references.items())
        lines += [
            f"### {finding.severity}: {_text(finding.title)}",
            "",
            _text(finding.evidence),
            "",
            f"What to do: {_text(finding.remedy)}",
            "",
            f"`{finding.id}` · {_text(references)}",
            "",
        ]
    command = defend_command(report)
    if command is not None:
        lines += [PROTECTION, "", f"    {_printable(command)}", ""]
    lines += ["## Figures", "", HOW_TO_READ, ""]
    note = length_note(report)
    lines += [_text(note), ""] if note else []
    notes = report.notes + report.store.notes + report.identity.notes
    lines += [f"- note: {_text(line)}" for line in notes]
    lines += [""] if notes else []
    if report.strongest is None:
        columns: Row = ("", "access", "records", "confidence", "cosine")
        lines += [*_table(columns, unscored_rows(report)), ""]
    else:
        for title, names in METRIC_TABLES.items():
            rows = figure_rows(report, names)
            lines += [f"### {title}", "", *_table(("", *names), rows), ""]
    for title, groups in (
        ("length in tokens", report.by_length),
        (str(report.settings["group_by"]), report.by_group),
    ):
        if groups:
            columns = ("", "", "records", F1, ANY)
            lines += [f"### By {_text(title)}", "", *_table(columns, breakdown(groups)), ""]
    lines += ["## Records of which most came back", ""] if report.records else []
    for record in report.records:
        words = " ".join(f"**{_text(w)}**" if right else _text(w) for w, right in record.words)
        lines += [
            f"- {_text(record.id)}, F1 {record.f1:.2f}: {_text(record.original)}",
            f"  - {words}",
        ]
    lines += ["", "## The store", "", *_table(("", ""), facts(report))]
    return "\n".join(lines).rstrip() + "\n"


def _table(columns: Row, rows: Iterable[Row]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(map(_text, row))} |"


def _text(text: str) -> str:
    """Text on one line that Markdown shows as it is, without control characters."""
    return escape_markdown(_printable(text))


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
