"""An audit as a folder: a page that needs nothing else, Markdown, JSON, SARIF, JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from unembed.auditing.report.exchange import to_garak_lines, to_sarif
from unembed.auditing.report.markdown import to_markdown
from unembed.auditing.report.page import to_page
from unembed.auditing.result import AuditReport
from unembed.errors import DataError
from unembed.files import as_path, atomic, make_folder

FILES = ("report.html", "report.md", "report.json", "report.sarif", "report.garak.jsonl")


def write_report(report: AuditReport, folder: str | Path) -> list[Path]:
    """Write every form of a report; the same audit writes the same bytes.

    Raises:
        DataError: The folder cannot be written.
    """
    if not isinstance(report, AuditReport):
        raise DataError("the report of an audit", f"{report!r:.80}", "Make it with unembed.audit")
    folder = as_path(folder)
    make_folder(folder)
    contents = (
        to_page(report),
        to_markdown(report),
        json.dumps(report.to_dict(), indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        json.dumps(to_sarif(report), indent=2, ensure_ascii=False) + "\n",
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in to_garak_lines(report)),
    )
    paths = [folder / name for name in FILES]
    try:
        for path, text in zip(paths, contents, strict=True):
            with atomic(path) as file:
                file.write_text(text, encoding="utf-8", errors="backslashreplace")
                file.chmod(0o600)  # texts that came back: for whoever ran the audit
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error
    return paths
