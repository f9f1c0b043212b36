"""Put the tables and examples of a report into a page of the docs, as they are.

    unembed evaluate --texts dev.parquet --strategies all --out report/
    python -m benchmarks.paste report/report.md docs/reports/every-strategy.md

What stands between ``<!-- report -->`` and ``<!-- end of report -->`` is replaced. Headings go one
level down; the plots stay in the report.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_PLACE = re.compile(r"(<!-- report -->\n).*?(<!-- end of report -->)", re.DOTALL)


def as_section(report: str) -> str:
    """A report (Markdown) as part of a page: no title, no plots, headings a level down."""
    lines = [
        f"#{line}" if line.startswith("#") else line
        for line in report.splitlines()
        if not line.startswith(("# ", "![", "- note: plots"))
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def insert(page: str, report: str) -> str:
    """The page with the report in its place.

    Raises:
        ValueError: The page has no such place, or several.
    """
    section = as_section(report)
    changed, count = _PLACE.subn(lambda place: f"{place[1]}\n{section}\n{place[2]}", page)
    if count != 1:
        raise ValueError(f"expected one place for a report in the page, found {count}")
    return changed


def main() -> None:
    """Replace it in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    page = insert(
        options.page.read_text(encoding="utf-8"), options.report.read_text(encoding="utf-8")
    )
    options.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
