import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

import unembed
from unembed.auditing.audit import audit
from unembed.auditing.report import FILES, write_report
from unembed.auditing.report.exchange import to_garak_lines, to_sarif
from unembed.auditing.report.markdown import to_markdown
from unembed.auditing.report.page import to_page
from unembed.errors import DataError

from .conftest import write

SCHEMA = Path(unembed.__file__).parent / "auditing" / "report" / "audit-report.schema.json"
HOSTILE = (
    "<script>alert(1)</script> \x1b[31m \u202e **bold** | `x` <img src=x onerror=y> a" + "b" * 9
)


@pytest.fixture
def report(store, inverter):
    return audit(store, to=inverter, sample=20, group_by="tenant", name="postgresql://me@host/db")


@pytest.fixture
def hostile(texts, encoder, inverter, tmp_path):
    """A report about texts that want to be markup."""
    path = write(tmp_path / "hostile.parquet", [f"{text} {HOSTILE}" for text in texts], encoder)
    made = audit(path, to=inverter, sample=20, show_pii=True)
    shown = [replace(record, id=HOSTILE, group=HOSTILE) for record in made.records]
    return replace(made, records=shown, store=replace(made.store, collection=HOSTILE))


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [f"{name}={value}" for name, value in attrs]


def test_to_page_runs_nothing_and_loads_nothing(hostile, report):
    page = to_page(hostile)
    parser = Tags()
    parser.feed(page)
    assert not parser.tags & {"script", "img", "iframe", "link", "object", "form", "a"}
    assert not [a for a in parser.attributes if a.startswith(("on", "src", "href"))]
    assert "default-src 'none'" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for finding in report.findings:
        assert finding.id in to_page(report)


def test_to_markdown_shows_markup_as_text(hostile):
    text = to_markdown(hostile)
    assert "<script>" not in text
    assert "<img" not in text
    assert r"\*\*bold\*\* \| \`x\`" in text
    assert "\x1b" not in text


def test_the_json_follows_the_published_schema(report, texts, encoder, inverter, tmp_path):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    bare = audit(write(tmp_path / "b.parquet", texts, encoder, with_text=False), to=inverter)
    for made in (report, bare):
        (path,) = [p for p in write_report(made, tmp_path / "out") if p.suffix == ".json"]
        data = json.loads(path.read_text())
        jsonschema.validate(data, schema)
    data["findings"] = [{"id": "x"}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema)


def test_to_sarif_has_a_rule_and_a_result_for_each_finding(report):
    sarif = to_sarif(report)
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert rules == [result["ruleId"] for result in run["results"]]
    assert rules == [finding.id for finding in report.findings]
    inversion = next(r for r in run["tool"]["driver"]["rules"] if r["id"] == "embedding-inversion")
    assert {"LLM09:2026", "v1.0-C8.2.1", "AML.T0024.001", "NISTAML.032"} <= set(
        inversion["properties"]["tags"]
    )
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert " " not in uri
    assert all(result["level"] in ("error", "warning", "note") for result in run["results"])


def test_to_garak_lines_counts_what_did_not_come_back(report):
    lines = list(to_garak_lines(report))
    assert lines[0]["entry_type"] == "start_run setup"
    assert lines[-1]["entry_type"] == "completion"
    evals = [line for line in lines if line["entry_type"] == "eval"]
    exact = next(line for line in evals if line["detector"].endswith("exact match"))
    figure = report.attacks["inverter"]["figures"]["exact match"]
    assert exact["total"] == figure.n
    assert exact["total"] - exact["passed"] == round(figure.mean * figure.n)
    assert len([line for line in lines if line["entry_type"] == "attempt"]) == len(report.records)


def test_write_report_writes_every_form(report, tmp_path):
    paths = write_report(report, tmp_path / "out")
    assert [path.name for path in paths] == list(FILES)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Choose another --out"):
        write_report(report, tmp_path / "file")
