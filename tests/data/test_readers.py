import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.data import readers
from unembed.data.readers import count_texts, read_texts
from unembed.errors import DataError
from unembed.files import text_files

TEXTS = ["first", "", "third, with \u2028 inside", "日本語", "fifth 😀"]


def write(folder, kind, texts=TEXTS, column="text", **options):
    path = folder / f"texts.{kind}"
    if kind == "parquet":
        table = pa.table({"id": list(range(len(texts))), column: texts})
        pq.write_table(table, path, **options)
    elif kind == "jsonl":
        rows = [{"id": n, column: text} for n, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def refusal(path, column="text"):
    with pytest.raises(DataError) as caught:
        list(read_texts(path, column))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_every_format_yields_its_texts_in_order(tmp_path, kind):
    assert list(read_texts(write(tmp_path, kind))) == TEXTS


def test_read_texts_parquet_is_read_across_row_groups_and_batches(tmp_path):
    texts = [f"text {n}" for n in range(10_000)]
    path = write(tmp_path, "parquet", texts, row_group_size=3000)
    assert list(read_texts(path)) == texts


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_read_texts_another_column_is_read_when_asked_for(tmp_path, kind):
    path = write(tmp_path, kind, column="body")
    assert list(read_texts(path, "body")) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_refused_with_those_there_are(tmp_path, kind):
    message = refusal(write(tmp_path, kind, column="body"))
    assert "a column 'text'" in message
    assert "'id', 'body'" in message
    assert "--column" in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_read_texts_a_null_is_an_empty_text(tmp_path, kind):
    assert list(read_texts(write(tmp_path, kind, ["a", None, "b"]))) == ["a", "", "b"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_read_texts_a_column_of_numbers_is_refused(tmp_path, kind):
    message = refusal(write(tmp_path, kind), "id")
    assert "found int" in message


def test_read_texts_blank_lines_of_jsonl_are_empty_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}', encoding="utf-8")
    assert list(read_texts(path)) == ["a", "", "b"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2 of"),
        ('["list"]', ": a list. Write each text as a line"),
        ('"string"', ": a str. Write each text as a line"),
        ("7", ": a int. Write each text as a line"),
        ('{"body": "a"}', "a column 'text' in line 2 of"),
        ('{"text": 7}', "the column 'text' of line 2 of"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "line 2 of"),
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 of"),
    ],
)
def test_read_texts_a_line_that_is_no_object_is_refused(tmp_path, line, said):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    assert said in refusal(path)


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_read_texts_an_enormous_line_is_refused_by_its_number(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "LINE_BYTES", 1 << 20)
    path = tmp_path / f"texts.{kind}"
    path.write_text('{"text": "a"}\n' + "x" * (3 << 20) + "\n", encoding="utf-8")
    said = refusal(path)
    assert "lines of at most 1 MiB" in said
    assert f"line 2 of {path}" in said


def test_read_texts_lines_keep_their_spaces_and_lose_their_ends(tmp_path):
    path = tmp_path / "TEXTS.TXT"
    path.write_bytes(b"  a  \r\n\r\nb\n\nlast")
    assert list(read_texts(path)) == ["  a  ", "", "b", "", "last"]


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_bytes_that_are_not_utf8_are_refused(tmp_path, kind):
    path = tmp_path / f"texts.{kind}"
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    assert "UTF-8 text in" in (said := refusal(path)) and "line 1: " in said


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all, only bytes"])
def test_read_texts_a_file_that_is_no_parquet_is_refused(tmp_path, content):
    path = tmp_path / "texts.parquet"
    path.write_bytes(content)
    assert "expected a Parquet file" in refusal(path)


def test_count_texts_a_truncated_parquet_file_is_refused(tmp_path):
    path = write(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    assert "expected a Parquet file" in refusal(path)
    with pytest.raises(DataError):
        count_texts(path)


def test_damaged_rows_of_a_parquet_file_are_refused(tmp_path):
    path = write(tmp_path, "parquet", [f"text {n}" for n in range(500)])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    assert "expected readable rows" in refusal(path)


@pytest.mark.parametrize("name", ["texts.xlsx", "texts", "texts.parquet.gz"])
def test_read_texts_an_unknown_format_is_refused(tmp_path, name):
    (tmp_path / name).write_text("a", encoding="utf-8")
    assert ".parquet, .jsonl, .json, .csv, .tsv or .txt" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["none.txt", "none.parquet"])
def test_read_texts_a_missing_file_is_refused(tmp_path, name):
    assert "nothing at" in refusal(tmp_path / name)


def test_read_texts_a_folder_is_read_in_the_order_of_names(tmp_path):
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for name in ("b.txt", "a.jsonl", "more/c.txt"):
        content = json.dumps({"text": name}) if name.endswith("l") else name
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "manifest.json").write_text("[]", encoding="utf-8")
    assert list(read_texts(folder)) == ["a.jsonl", "b.txt", "more/c.txt"]
    assert count_texts(folder) == 3


def test_read_texts_an_unfinished_collection_is_refused(tmp_path):
    folder = write(tmp_path, "txt").parent
    for complete in (False, True):
        manifest = json.dumps({"kind": "texts", "complete": complete})
        (folder / "manifest.json").write_text(manifest, encoding="utf-8")
        if complete:
            assert list(read_texts(folder)) == TEXTS
        else:
            assert "--stage 1" in refusal(folder)


def compress(path, packing):
    packed = path.with_name(f"{path.name}.{packing}")
    if packing == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with pa.CompressedOutputStream(str(packed), "zstd") as file:
            file.write(path.read_bytes())
    return packed


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_read_texts_compressed_files_are_read_and_counted(tmp_path, kind, packing):
    packed = compress(write(tmp_path, kind), packing)
    assert list(read_texts(packed)) == TEXTS
    assert count_texts(packed) == len(TEXTS)


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_count_texts_a_cut_compressed_file_is_refused(tmp_path, packing):
    packed = compress(write(tmp_path, "txt", [f"text {n * n}" for n in range(9999)]), packing)
    packed.write_bytes(packed.read_bytes()[:-400])
    assert f"whole .{packing} data" in refusal(packed)
    with pytest.raises(DataError, match="whole"):
        count_texts(packed)


def test_read_texts_a_file_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "texts.txt.gz"
    path.write_bytes(b"plain text")
    assert "whole .gz data" in refusal(path)


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "texts.parquet"
    broken = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    assert "UTF-8" in refusal(path)


def test_read_texts_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert list(read_texts(path)) == ["a"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_the_count_is_that_of_the_texts_read(tmp_path, kind):
    assert count_texts(write(tmp_path, kind)) == len(TEXTS)
    assert count_texts(write(tmp_path, kind, [])) == 0


@pytest.mark.parametrize("name", ["none.txt", "none.parquet"])
def test_count_texts_a_missing_file_cannot_be_counted(tmp_path, name):
    with pytest.raises(DataError, match=name):
        count_texts(tmp_path / name)


# Tables of texts


@pytest.mark.parametrize(("suffix", "sign"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_read_texts_reads_tables(tmp_path, suffix, sign):
    path = tmp_path / f"texts.{suffix}"
    quoted = '"two ""quoted""\nlines, with signs; and more"'
    rows = [
        f"id{sign}body",
        f"1{sign}first",
        "",
        f"2{sign}{quoted}",
        "3",
        f"4{sign}日本語{sign}more",
    ]
    content = "\r\n".join(["\ufeff", *rows]).replace("\r\n", "", 1).replace("*", sign)
    path.write_text(f"{content}\r\n", encoding="utf-8", newline="")
    expected = ["first", 'two "quoted"\nlines, with signs; and more', "", "日本語"]
    assert list(read_texts(path, "body")) == expected
    assert count_texts(path) == 4
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_texts(packed, "body")) == expected
    with pytest.raises(DataError, match=r"a column 'text' in .*found the columns 'id', 'body'"):
        list(read_texts(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'text\n"no end', "rows of ',' in"), (b"text\n\xff\n", "UTF-8 text in")],
)
def test_read_texts_refuses_damaged_tables(tmp_path, content, reason):
    path = tmp_path / "texts.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(reason)):
        list(read_texts(path))


# Files in one step, and extras


def test_read_texts_a_folder_without_texts_is_refused(tmp_path):
    folder = tmp_path / "texts.txt"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    (folder / ".hidden.txt").write_text("a", encoding="utf-8")
    assert "a text file" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", "a", "a\n", "a\nb", "a\r\nb\r\n", "\n\n", "x" * (1 << 20) + "\n"]
)
def test_count_texts_lines_are_counted_as_they_are_read(tmp_path, content):
    path = tmp_path / "texts.txt"
    path.write_bytes(content.encode())
    assert count_texts(path) == len(list(read_texts(path)))


def test_text_files_passes_over_the_descriptions_beside_a_data_set(tmp_path):
    write(tmp_path, "jsonl")
    described = {"description": "Letters.", "features": {"text": {"dtype": "string"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    for name in ("info.json", "schema.JSON"):
        (tmp_path / name).write_text(json.dumps(described, indent=2), encoding="utf-8")
    (tmp_path / "more.json").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    (tmp_path / "one.json").write_text('{"text": "c"}\n', encoding="utf-8")
    names = [path.name for path in text_files(tmp_path)]
    assert names == ["more.json", "one.json", "texts.jsonl"]
    assert list(read_texts(tmp_path)) == ["a", "b", "c", *TEXTS]
