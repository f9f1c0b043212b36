import pytest
from benchmarks.paste import as_section, insert

REPORT = """# What the embeddings gave away

- texts: 4 pieces, seed 0
- note: plots: not drawn

## Tokens

| | token accuracy |
|---|---|
| greedy | 0.5 |

![quality](plots/quality.svg)
![passes](plots/passes.svg)

## Examples

### Good

| original | recovered |
|---|---|
| # a | b |
"""
PAGE = "# Results\n\n<!-- report -->\nold\n<!-- end of report -->\n\nmore\n"


def test_a_report_becomes_a_section():
    section = as_section(REPORT)
    assert "plots" not in section and "What the embeddings" not in section
    assert [line for line in section.splitlines() if line.startswith("#")] == [
        "### Tokens",
        "### Examples",
        "#### Good",
    ]
    assert "| greedy | 0.5 |\n\n### Examples" in section


def test_it_takes_the_place_of_the_one_before_and_nothing_else():
    page = insert(PAGE, REPORT)
    assert page.startswith("# Results\n") and page.endswith("<!-- end of report -->\n\nmore\n")
    assert "old" not in page and "| greedy | 0.5 |" in page
    assert insert(page, REPORT) == page


@pytest.mark.parametrize("page", ["# Results\n", PAGE + PAGE])
def test_a_page_without_one_place_is_refused(page):
    with pytest.raises(ValueError, match="one place"):
        insert(page, REPORT)


def test_the_page_of_the_report_has_a_place(pytestconfig):
    path = pytestconfig.rootpath / "docs" / "reports" / "every-strategy.md"
    page = path.read_text(encoding="utf-8")
    assert "| greedy | 0.5 |" in insert(page, REPORT)
