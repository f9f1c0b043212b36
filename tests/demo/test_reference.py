from html.parser import HTMLParser

import pytest


class Outline(HTMLParser):
    """Checks that tags are closed, and keeps the text, headings and addresses."""

    OPEN_ENDED = frozenset({"meta", "link", "td", "th", "tr"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.linked, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.linked += [value for name, value in attributes if name in ("href", "src")]
        if tag not in self.OPEN_ENDED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.OPEN_ENDED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def outline(client):
    answer = client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    read = Outline()
    read.feed(answer.text)
    assert read.open == []
    read.text = " ".join(" ".join(read.text).split())
    return read


def test_every_operation_and_field_is_told(outline, client):
    document = client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in outline.text
    body = document["paths"]["/decode"]["post"]["requestBody"]["content"]["application/json"]
    for name in body["schema"]["properties"]:
        assert f" {name} " in outline.text
    assert "list of number or null" in outline.text
    assert "application/problem+json" in outline.text and "text/event-stream" in outline.text


def test_it_loads_nothing_from_elsewhere_and_runs_nothing(outline, client):
    assert "script" not in outline.tags and "style" not in outline.tags
    assert not [address for address in outline.linked if "//" in address]
    for address in outline.linked:
        assert client.get(f"/{address.removeprefix('./')}").status_code == 200
