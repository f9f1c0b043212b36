import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.errors import DataError
from unembed.evaluation.samples import Passage, PassageFile, Samples

ROWS = [
    {"text": "the cat sleeps.", "domain": "pets", "lang": "en"},
    {"text": "a dog runs.", "domain": None, "lang": "en"},
    {"text": "", "domain": "none", "lang": ""},
]
EXPECTED = [
    Passage("the cat sleeps.", {"domain": "pets", "lang": "en"}),
    Passage("a dog runs.", {"lang": "en"}),
    Passage("", {"domain": "none"}),
]


def test_labels_of_parquet(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    domains = table["domain"].dictionary_encode()
    pq.write_table(table.set_column(1, "domain", domains), tmp_path / "a.parquet")
    file = PassageFile(tmp_path / "a.parquet")
    assert list(file) == list(file) == EXPECTED


def test_labels_of_json_lines(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert list(PassageFile(tmp_path / "a.jsonl")) == EXPECTED


def test_a_file_without_labels(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    pq.write_table(pa.table({"body": ["three"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"body": "four", "extra": 1}\n', encoding="utf-8")
    assert list(PassageFile(tmp_path / "a.txt")) == [Passage(t, {}) for t in ("one", "", "two")]
    assert list(PassageFile(tmp_path / "b.parquet", "body")) == [Passage("three", {})]
    assert list(PassageFile(tmp_path / "c.jsonl", "body")) == [Passage("four", {})]


def test_passage_file_a_wrong_line_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"tex', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        list(PassageFile(tmp_path / "a.jsonl"))


@pytest.fixture
def samples(encoder, tiny_config, passages):
    return lambda texts=passages, **kw: Samples(texts, encoder.tokenizer, tiny_config.data, **kw)


def test_all_pieces_in_order(samples, pieces):
    found = samples()
    assert len(found) == len(pieces)
    assert [s.text for s in found] == [piece.text for piece in pieces]
    assert [s.token_ids for s in found] == [piece.token_ids for piece in pieces]


def test_samples_a_generator_is_read_once_and_kept(samples, passages):
    assert list(samples(text for text in passages)) == list(samples())


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
@pytest.mark.parametrize("limit", [2, 3, 7, 8, 9, None])
def test_chunks_hold_everything_and_never_one_alone(samples, size, limit):
    found = samples(limit=limit)
    chunks = list(found.chunks(size))
    assert [sample for _, chunk in chunks for sample in chunk] == list(found)
    at = 0
    for first, chunk in chunks:
        assert first == at
        assert 2 <= len(chunk) <= size + 1
        at += len(chunk)


def test_samples_the_digest_is_that_of_the_texts(samples, passages):
    assert samples().digest == samples().digest
    assert samples().digest != samples(passages[1:]).digest
    labelled = [Passage(text, {"lang": "en"}) for text in passages]
    assert samples(labelled).digest != samples().digest


def test_samples_reading_is_reported(samples, passages, monkeypatch):
    monkeypatch.setattr("unembed.evaluation.samples._REPORT_EVERY", 20)
    seen = []
    samples(report=seen.append)
    assert seen == [20, 40, len(passages)]
