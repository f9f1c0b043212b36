import gzip
import json
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.collect.conftest import texts_of
from unembed.data.collect.sources import (
    FileSource,
    HubSource,
    MissingLanguageError,
    parse_source,
)
from unembed.errors import ConfigError, DataError


def read(source, lang="en", alone=True):
    skipped = Counter()
    texts = list(source.texts(lang, alone, lambda reason: skipped.update([reason])))
    return texts, dict(skipped)


def refusal(source, lang="en", alone=True, error=DataError):
    with pytest.raises(error) as caught:
        read(source, lang, alone)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("spec", "expected", "weight"),
    [
        ("c4", HubSource("allenai/c4", "{lang}"), 1.0),
        ("c4:0.7", HubSource("allenai/c4", "{lang}"), 0.7),
        ("hf:user/set", HubSource("user/set"), 1.0),
        ("hf:user/set@v2:a.{lang}:body:3", HubSource("user/set@v2", "a.{lang}", "body"), 3.0),
        ("hf:user/set::body", HubSource("user/set", None, "body"), 1.0),
        ("texts/{lang}.jsonl.gz:.5", FileSource("texts/{lang}.jsonl.gz"), 0.5),
        ("texts", FileSource("texts"), 1.0),
    ],
)
def test_a_spec_names_a_source_and_its_weight(spec, expected, weight):
    found = parse_source(spec)
    assert (found.source, found.weight) == (expected, weight)


@pytest.mark.parametrize("spec", ["c4:0", "hf:", "hf:a:b:c:d", "texts:0.0"])
def test_parse_source_a_spec_that_says_nothing_is_refused(spec):
    with pytest.raises(DataError, match="source"):
        parse_source(spec)


def test_file_source_rows_are_chosen_by_language(jsonl_file):
    assert read(FileSource(str(jsonl_file)), "ar", False) == (texts_of("ar", 60), {})


@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_rows_are_chosen_by_language(tmp_path, dictionary):
    texts, langs = pa.array(["a", None, "b", "c"]), pa.array(["de", "en", "en", None])
    if dictionary:
        texts, langs = texts.dictionary_encode(), langs.dictionary_encode()
    pq.write_table(pa.table({"lang": langs, "text": texts}), tmp_path / "t.parquet")
    assert read(FileSource(str(tmp_path / "t.parquet")), "en", False) == (["b"], {"no_text": 1})


def test_file_source_a_path_may_name_the_language(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "b.txt").write_text("three\n", encoding="utf-8")
    (tmp_path / "en" / "a.jsonl").write_text('{"text": "one", "lang": "?"}\n', encoding="utf-8")
    (tmp_path / "de-1.txt.gz").write_bytes(gzip.compress(b"zwei\n"))
    assert read(FileSource(str(tmp_path / "{lang}")), "en", False) == (["one", "three"], {})
    assert read(FileSource(str(tmp_path / "{lang}-*.txt.gz")), "de", False) == (["zwei"], {})
    assert "'fr'" in refusal(FileSource(str(tmp_path / "{lang}")), "fr", False)
    assert "'fr'" in refusal(
        FileSource(str(tmp_path / "{lang}-*.txt.gz")), "fr", False, MissingLanguageError
    )


def test_one_language_needs_no_column(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    assert read(FileSource(str(path)), "en", True) == (["a"], {})
    assert "--lang-column" in refusal(FileSource(str(path)), "en", False)
    plain = tmp_path / "t.txt"
    plain.write_text("a\n", encoding="utf-8")
    assert read(FileSource(str(plain)), "en", True) == (["a"], {})
    assert "one language" in refusal(FileSource(str(plain)), "en", False)


def test_file_source_a_language_that_a_file_lacks_is_named(jsonl_file):
    message = refusal(FileSource(str(jsonl_file)), "xx", False, MissingLanguageError)
    assert "'xx'" in message
    assert str(jsonl_file) in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_column_is_refused(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text('{"body": "a"}\n', encoding="utf-8")
    else:
        pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
        assert "found int64" in refusal(FileSource(str(path), "n"))
    message = refusal(FileSource(str(path)))
    assert "a column 'text'" in message
    assert "'body'" in message


def test_file_source_lines_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("unembed.data.collect.filters._LINE_BYTES", 1000)
    path = tmp_path / "t.jsonl.gz"
    rows = [
        b'{"text": "good"}',
        b"",
        b'{"text": null}',
        b'{"text": 7}',
        b'{"other": "a"}',
        b"[1]",
        b'{"text": "cut',
        b"[" * 900,
        b'{"text": "caf\xe9"}',
        b'{"text": "' + b"x" * 5000 + b'"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(gzip.compress(b"\n".join(rows)))
    assert read(FileSource(str(path))) == (
        ["good", "last"],
        {"no_text": 4, "not_json": 3, "invalid_utf8": 1, "too_long": 1},
    )


def test_parquet_text_that_is_not_utf8_is_counted(tmp_path):
    texts = pa.array([b"good", b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    assert read(FileSource(str(tmp_path / "t.parquet"))) == (["good"], {"invalid_utf8": 1})


def test_file_source_an_enormous_line_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr("unembed.data.collect.filters._LINE_BYTES", 1 << 16)
    import tracemalloc

    path = tmp_path / "t.txt"
    path.write_bytes(b"x" * (32 << 20) + b"\nthe end\n")
    tracemalloc.start()
    found = read(FileSource(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == (["the end"], {"too_long": 1})
    assert peak < 8 << 20


def test_file_source_broken_gzip_is_an_error(tmp_path):
    path = tmp_path / "t.txt.gz"
    whole = gzip.compress("".join(f"text {n * n}\n" for n in range(9999)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    assert "whole .gz data" in refusal(FileSource(str(path)))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_file_source_what_is_only_called_compressed_is_an_error(tmp_path, suffix):
    path = tmp_path / f"t.jsonl{suffix}"
    path.write_bytes(b'{"text": "plain after all"}\n')
    assert f"whole {suffix} data" in refusal(FileSource(str(path)))


def test_file_source_a_wrong_checksum_of_gzip_is_an_error(tmp_path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"a text\n")[:-8] + bytes(8))
    assert "CRC check failed" in refusal(FileSource(str(path)))


def test_file_source_a_file_of_which_no_line_can_be_read_says_why(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("{\n" + '{"text": 3}\n' * 2, encoding="utf-8")
    with pytest.raises(MissingLanguageError, match=r"none \(passed over: {'not_json': 1, 'no_te"):
        list(FileSource(str(path)).texts("en", True, lambda reason: None))


def test_file_source_a_utf16_file_yields_nothing_and_every_line_is_counted(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("one\ntwo\nthree".encode("utf-16"))
    texts, counted = read(FileSource(str(path)))
    assert counted == {"invalid_utf8": 1}, "the byte order mark"
    assert all("\0" in text for text in texts) and len(texts) == 2


def test_file_source_a_description_tells_other_files_apart(tmp_path, jsonl_file):
    source = FileSource(str(jsonl_file))
    before = source.describe(["en"])
    assert (before["files"], before["bytes"]) == (1, jsonl_file.stat().st_size)
    assert str(tmp_path) not in json.dumps(before), "no absolute paths"
    jsonl_file.write_text("{}\n", encoding="utf-8")
    assert source.describe(["en"]) != before
    with pytest.raises(DataError, match="nothing at"):
        FileSource(str(tmp_path / "none.txt")).describe(["en"])


# The Hub: the real streaming code on a local folder laid out as the repository of C4 is


def test_hub_source_the_hub_is_streamed_by_configuration(hub_folder):
    pytest.importorskip("datasets")
    for lang in ("en", "de", "zh"):
        source = HubSource(str(hub_folder), "{lang}")
        whole = texts_of(lang, 60)
        assert read(source, lang, False) == (whole[0::2] + whole[1::2], {})


def test_reading_the_hub_does_not_load_torch(hub_folder):
    """`datasets` would, and 220 MB of memory with it."""
    code = f"""
import datasets, sys
from unembed.data.collect.sources import HubSource
texts = list(HubSource({str(hub_folder)!r}, "{{lang}}").texts("de", False, lambda reason: None))
assert len(texts) == 60 and "torch" not in sys.modules
assert datasets.config.TORCH_AVAILABLE, "as before for everybody else"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hub_source_the_hub_is_read_no_further_than_asked(hub_folder, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    calls = []
    real = datasets.load_dataset

    def watched(*arguments, **options):
        calls.append((arguments, options))
        return real(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    texts = HubSource(str(hub_folder), "{lang}").texts("de", False, lambda reason: None)
    assert next(texts) == texts_of("de", 1)[0]
    texts.close()
    assert calls == [
        ((str(hub_folder), "de"), {"split": "train", "revision": None, "streaming": True})
    ]


def test_hub_source_a_language_the_hub_lacks_is_named(hub_folder):
    pytest.importorskip("datasets")
    message = refusal(HubSource(str(hub_folder), "{lang}"), "xx", False, MissingLanguageError)
    assert "'xx'" in message
    assert "'de'" in message, "says which there are"


def test_hub_source_a_column_the_hub_lacks_is_named(hub_folder):
    pytest.importorskip("datasets")
    message = refusal(HubSource(str(hub_folder), "{lang}", "body"), "de", False)
    assert "a column 'body'" in message
    assert "'text', 'url'" in message


def test_hub_source_a_broken_file_of_the_hub_is_an_error(hub_folder, tmp_path):
    pytest.importorskip("datasets")
    import shutil

    folder = shutil.copytree(hub_folder, tmp_path / "c4")
    path = folder / "multilingual" / "c4-de.tfrecord-00000-of-00002.json.gz"
    path.write_bytes(path.read_bytes()[:-50])
    assert "readable rows in the data set" in refusal(HubSource(str(folder), "{lang}"), "de")


def test_hub_source_without_a_network_the_hub_says_so(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal(HubSource("allenai/c4", "{lang}"))
    assert "allenai/c4 (en)" in message
    assert "Check the network" in message


def test_hub_source_without_datasets_the_hub_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"datasets is not installed. Run `pip .*\[hub\]"):
        next(HubSource("allenai/c4", "{lang}").texts("en", True, lambda reason: None))


def test_hub_source_a_revision_is_asked_for(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or [{"text": "a"}]
    )
    source = HubSource("user/set@v2")
    assert read(source) == (["a"], {})
    assert asked == [(("user/set", None), {"split": "train", "revision": "v2", "streaming": True})]
    assert (source.name, source.describe(["en"])["revision"]) == ("user/set", "v2")


def test_rows_of_the_hub_are_chosen_by_language(tmp_path):
    pytest.importorskip("datasets")
    table = pa.table({"body": ["a", "b", None, "c"], "lang": ["en", "de", "en", "en"]})
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    source = parse_source(f"hf:{tmp_path / 'set'}::body").source
    assert read(source, "en", False) == (["a", "c"], {"no_text": 1})
    assert "none" in refusal(source, "fr", False, MissingLanguageError)
    other = HubSource(str(tmp_path / "set"), None, "body", "language")
    assert "--lang-column" in refusal(other, "en", False)
    assert read(other, "en", True)[0] == ["a", "b", "c"]
