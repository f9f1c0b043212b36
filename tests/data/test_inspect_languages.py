import json
import sys

import pytest

from unembed.data.inspect import detected_languages, named_languages
from unembed.errors import DataError


def manifest(source, passages):
    made_from = {"name": source.name, "bytes": source.stat().st_size, "column": "text"}
    return {"source": made_from, "shards": [{"passages": passages}, {"passages": 1}]}


def test_named_languages_passages_that_were_read_are_counted_by_their_language(tmp_path):
    source = tmp_path / "t.jsonl"
    langs = ["de", "fr", "fr", None, "el"]
    source.write_text("\n".join(json.dumps({"text": "a", "lang": lang}) for lang in langs))
    found, what = named_languages(source, manifest(source, 3))
    assert list(found.items()) == [("fr", 2), ("de", 1), ("(none)", 1)]
    assert what == "passages, by the column 'lang' of t.jsonl"


def test_named_languages_plain_text_names_no_languages(tmp_path):
    source = tmp_path / "some.txt"
    source.write_text("a text", encoding="utf-8")
    manifest = {"source": {"name": "some.txt", "bytes": 6}, "shards": []}
    with pytest.raises(DataError, match="plain text, which has none"):
        named_languages(source, manifest)


def test_detected_languages_languages_are_detected_and_the_sample_is_named():
    pytest.importorskip("py3langid")
    texts = ["the cat sleeps by the river", "мы идём домой по мосту", "the dog runs to the house"]
    found, what = detected_languages(texts)
    assert list(found.items()) == [("en", 2), ("ru", 1)]
    assert what == "detected, sample of 3 pairs"


def test_detected_languages_without_the_detector_nothing_is_guessed(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    assert detected_languages(["the cat"]) is None
