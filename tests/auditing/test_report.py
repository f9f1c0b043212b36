import html
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

import unembed
from unembed.auditing.report import FILES, write_report
from unembed.auditing.report.exchange import to_garak_lines, to_sarif
from unembed.auditing.report.markdown import to_markdown
from unembed.auditing.report.page import to_page
from unembed.auditing.report.tables import defend_command, guess
from unembed.errors import DataError

SCHEMA = Path(unembed.__file__).parent / "auditing" / "report" / "audit-report.schema.json"
HOSTILE = (
    "<script>alert(1)</script> \x1b[31m \u202e **bold** | `x` <img src=x onerror=y> a" + "b" * 9
)


@pytest.fixture
def hostile(report):
    """A report about texts that want to be markup."""
    text = {"original": HOSTILE, "words": [(word, True) for word in HOSTILE.split(" ")]}
    shown = [replace(r, id=HOSTILE, group=HOSTILE, **text) for r in report.records]
    finding = replace(report.findings[0], evidence=HOSTILE)
    return replace(
        report,
        records=shown,
        store=replace(report.store, collection=HOSTILE, not_read=[HOSTILE]),
        by_group={HOSTILE: report.by_group["north"]},
        findings=[finding],
        notes=[HOSTILE],
    )


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


def test_to_page_says_what_a_manager_and_an_engineer_ask(report, bare_report):
    page = to_page(report)
    for finding in report.findings:
        assert finding.id in page
        assert finding.title in page
    best, guessed = report.attacks["inverter"]["figures"]["token F1"], guess(report, "token F1")
    assert f"<strong>{best.mean:.2f}</strong>" in page
    assert f"guessing: at most {guessed:.2f}" in page
    assert f"counts it: {report.leak:.2f}" in page
    assert "<strong>not measured</strong>" in to_page(bare_report)
    assert guessed == max(floor["token F1"].high for floor in report.floors.values())
    for record in report.records:
        assert record.original in page
    assert "was not measured" in to_page(bare_report)
    assert "no evidence of recovery" in to_page(bare_report).casefold()


def test_defend_command_reads_the_same_vectors(report, bare_report):
    words = "unembed audit 'a b?c' --sample 9 --column v --text-column 'my text' --show-pii"
    settings = {**report.settings, "command": words}
    report = replace(report, settings=settings)
    command = "unembed defend 'a b?c' --column v --text-column 'my text'"
    assert defend_command(report) == command
    assert f"<code>{html.escape(command)}</code>" in to_page(report)
    assert f"    {command}\n" in to_markdown(report)
    assert "unembed defend" not in to_page(bare_report) + to_markdown(bare_report)


def test_to_markdown_shows_markup_as_text(hostile):
    text = to_markdown(hostile)
    assert "<script>" not in text
    assert "<img" not in text
    assert r"\*\*bold\*\* \| \`x\`" in text
    assert "\x1b" not in text


def test_the_json_follows_the_published_schema(report, bare_report, tmp_path):
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for made in (report, bare_report):
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
