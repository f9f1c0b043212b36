import json
import re
import sys
from html.parser import HTMLParser

import pytest

from unembed.data.pairs import Pairs
from unembed.errors import ConfigError, DataError
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.evaluate import evaluate
from unembed.evaluation.metrics import METRICS
from unembed.evaluation.report import (
    cell,
    escape_markdown,
    tables,
    to_markdown,
    to_page,
    write_report,
)
from unembed.evaluation.samples import Passage

EVIL = "<script>alert(1)</script> | the *cat* $x$ &amp; <b>dog</b>"


@pytest.fixture(scope="module")
def evaluation(inverter, encoder, passages, tmp_path_factory):
    texts = [Passage(text, {"domain": f"<d{i % 2}> $"}) for i, text in enumerate(passages)]
    return evaluate(inverter, encoder, texts, strategy=["greedy:steps=2", "greedy"], limit=40)


@pytest.fixture(scope="module")
def evil(evaluation):
    """The same report, had the first text been an attack on the reader."""
    from dataclasses import replace

    first = [replace(evaluation.examples[0], original=EVIL, tokens=[(EVIL, "right")])]
    return replace(evaluation, examples=first, notes=[EVIL])


class Reader(HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.mark.slow
def test_write_report_a_report_is_a_folder(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "report")
    files = {p.relative_to(tmp_path / "report").as_posix() for p in tmp_path.rglob("*.*")}
    plots = {"quality", "by-length", "by-domain", "calibration", "passes"}
    assert files == {
        *("report.md", "report.json", "report.html"),
        *(f"plots/{name}.{end}" for name in plots for end in ("png", "svg")),
    }
    found = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert set(found["rows"]["greedy"]) == set(METRICS)
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert all(f"(plots/{name}.svg)" in text for name in plots)
    (png,) = (tmp_path / "report" / "plots").glob("quality.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    write_report(evaluation, tmp_path / "report")


def test_a_report_begins_with_its_verdict(evaluation, tmp_path):
    verdict = evaluation.verdict
    assert to_markdown(evaluation, []).splitlines()[2] == f"**{escape_markdown(verdict)}**"
    reader = read(to_page(evaluation, {}))
    assert reader.tags.index("strong") < reader.tags.index("ul")
    assert verdict in "".join(reader.text)
    write_report(evaluation, tmp_path)
    assert next(iter(json.loads((tmp_path / "report.json").read_text("utf-8")))) == "verdict"


def test_tables_have_every_metric_and_row(evaluation):
    found = list(tables(evaluation))
    assert [table.title for table in found][-2:] == ["By tokens", "By domain"]
    assert sorted(n for table in found[:-2] for n in table.columns[1:]) == sorted(METRICS)
    for table in found[:-2]:
        assert [row[0] for row in table.rows] == list(evaluation.rows)
    assert all(len(row) == len(table.columns) for table in found for row in table.rows)


def test_a_missing_figure_is_called_missing():
    assert cell(None) == "missing"
    assert cell(Figure(0.5, 0.25, 0.75, 9)) == "0.500 [0.250, 0.750] (9)"
    assert cell(Figure(123.4, 99.0, 150.0, 9)) == "123.4 [99.0, 150.0] (9)"


@pytest.mark.slow
def test_write_report_the_page_needs_nothing_else(evaluation, tmp_path):
    write_report(evaluation, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = read(page)
    assert {"svg", "table", "article"} <= set(reader.tags)
    assert not {"link", "img", "iframe", "image", "object"} & set(reader.tags)
    assert all(address.startswith("#") for address in reader.addresses)
    assert "@import" not in page and re.findall(r"url\((?!#)", page) == []
    assert "default-src 'none'" in page
    texts = "".join(reader.text)
    for example in evaluation.examples:
        assert example.original in texts
        assert example.recovered in texts


def test_right_tokens_are_marked_in_the_page(evaluation):
    page = to_page(evaluation, {})
    example = next(e for e in evaluation.examples if ("right" in dict(map(reversed, e.tokens))))
    piece = next(piece for piece, mark in example.tokens if mark == "right")
    assert f"<b>{piece}</b>" in page


def test_to_page_a_script_in_a_text_stays_text(evil):
    page = to_page(evil, {})
    reader = read(page)
    assert reader.tags.count("script") == 1, "our own"
    assert "alert(1)</script>" not in page
    # a parser stops reading data as text inside <script> only, so all of EVIL is text
    assert EVIL in "".join(reader.text)
    assert "<d0> $" in "".join(reader.text)


def test_a_script_stays_text_in_markdown_and_a_table_a_table(evil):
    text = to_markdown(evil, [])
    assert "<script>" not in text
    line = next(line for line in text.splitlines() if "alert" in line and line.startswith("| "))
    assert line.replace("\\|", "").count("|") == 5
    assert escape_markdown("a|b <i> *c*\nd") == r"a\|b &lt;i&gt; \*c\* d"


def test_markdown_shows_the_tables_and_the_examples(evaluation):
    text = to_markdown(evaluation, [])
    for heading in ("## Tokens", "## By tokens", "### Good", "### Middling", "### Bad"):
        assert f"\n{heading}\n" in text
    assert f" {cell(evaluation.rows['greedy']['cosine'])} |" in text
    assert r"&lt;d0&gt; \$ |" in text
    assert to_markdown(evaluation, []) == text


def test_write_report_without_matplotlib_the_plots_are_missing_and_said_to_be(
    evaluation, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(evaluation, tmp_path)
    assert list((tmp_path / "plots").iterdir()) == []
    for name in ("report.md", "report.html", "report.json"):
        assert "matplotlib is not installed" in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.slow
def test_write_report_calls_have_a_plot_where_there_are_some(
    lookup, encoder, passages, pairs_folder, tmp_path
):
    report = evaluate(
        *(lookup, encoder, passages),
        strategy=["greedy", "guided-search:encoder_calls=5"],
        limit=6,
        train_pairs=Pairs.open(pairs_folder),
    )
    write_report(report, tmp_path)
    assert (tmp_path / "plots" / "encoder-calls.svg").exists()


def test_write_report_a_place_that_cannot_be_written_is_refused(evaluation, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="a folder at"):
        write_report(evaluation, tmp_path / "taken")


def test_write_report_refuses_what_is_no_evaluation(tmp_path):
    with pytest.raises(ConfigError, match="an evaluation; found NoneType"):
        write_report(None, tmp_path)
