import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from tests.data.collect.conftest import texts_of
from unembed.data.collect.collect import MANIFEST, CollectSettings, collect_texts
from unembed.data.collect.filters import Limits
from unembed.data.collect.sources import FileSource, Weighted, parse_source
from unembed.data.readers import count_texts, read_texts
from unembed.errors import DataError

SETTINGS = CollectSettings(("en", "de", "zh"), 90, shard_rows=25, buffer_rows=20)


def contents(folder):
    """Every file of a folder but the lock, name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rows(folder):
    shards = sorted(folder.glob("*.parquet"))
    return [row for path in shards for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def sources(jsonl_file):
    return [Weighted(FileSource(str(jsonl_file)))]


@pytest.fixture
def collected(sources, tmp_path):
    folder = tmp_path / "raw"
    collect_texts(sources, folder, SETTINGS)
    return folder


class Stop(BaseException):
    """Like a kill at one moment."""


def stop_after(calls):
    def progress(state):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Stop

    return progress


def test_collect_texts_shards_hold_texts_with_their_language_and_source(collected):
    found = rows(collected)
    assert len(found) == 90
    for lang in SETTINGS.langs:
        texts = {row["text"] for row in found if row["lang"] == lang}
        assert len(texts) == 30
        assert texts <= set(texts_of(lang, 60))
    assert {row["source"] for row in found} == {"mixed.jsonl"}
    assert [row["lang"] for row in found] != sorted(row["lang"] for row in found)
    shards = sorted(collected.glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in shards] == [25, 25, 25, 15]
    assert pq.read_metadata(shards[0]).row_group(0).column(0).compression == "ZSTD"


def test_collect_texts_the_manifest_accounts_for_everything(collected, tmp_path):
    manifest = json.loads((collected / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["complete"] is True
    assert manifest["settings"]["seed"] == 0
    assert [shard["rows"] for shard in manifest["shards"]] == [25, 25, 25, 15]
    counts = manifest["counts"]
    assert counts["kept"] == 90
    assert counts["read"] == counts["kept"] + sum(counts["left_out"].values())
    assert {lang: found["kept"] for lang, found in counts["langs"].items()} == dict.fromkeys(
        SETTINGS.langs, 30
    )
    assert str(tmp_path) not in json.dumps(manifest), "no absolute paths"


def test_collect_texts_stage_2_reads_the_folder(collected):
    assert list(read_texts(collected)) == [row["text"] for row in rows(collected)]
    assert count_texts(collected) == 90


def test_collect_texts_the_seed_decides(sources, collected, tmp_path):
    collect_texts(sources, tmp_path / "again", SETTINGS)
    assert contents(tmp_path / "again") == contents(collected)
    other = CollectSettings(("en", "de", "zh"), 90, seed=5, shard_rows=25, buffer_rows=20)
    collect_texts(sources, tmp_path / "other", other)
    assert rows(tmp_path / "other") != rows(collected)


def test_collect_texts_sources_of_every_kind_are_mixed(hub_folder, jsonl_file, tmp_path):
    pytest.importorskip("datasets")
    specs = [f"hf:{hub_folder}:{{lang}}:0.7", f"{jsonl_file}:0.3"]
    settings = CollectSettings(("en", "zh"), 60, shard_rows=25)
    manifest = collect_texts([parse_source(spec) for spec in specs], tmp_path / "raw", settings)
    kept = {name: events["kept"] for name, events in manifest["counts"]["sources"].items()}
    assert kept["c4"] > kept["mixed.jsonl"] > 5
    assert kept["c4"] + kept["mixed.jsonl"] == 60
    assert len({row["text"] for row in rows(tmp_path / "raw")}) == 60


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_collect_texts_a_stopped_collection_ends_with_the_same_files(
    sources, collected, tmp_path, monkeypatch, shards
):
    monkeypatch.setattr("unembed.data.collect.collect._REPORT_EVERY", 1)
    out = tmp_path / "stopped"
    with pytest.raises(Stop):
        collect_texts(sources, out, SETTINGS, stop_after(25 * shards + 10))
    assert len(list(out.glob("*.parquet"))) == shards
    assert not list(out.glob("*.tmp"))
    if shards:
        with pytest.raises(DataError, match="stage 1"):
            list(read_texts(out))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    collect_texts(sources, out, SETTINGS)
    assert contents(out) == contents(collected)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "none is written twice"


def test_collect_texts_a_connection_that_breaks_is_an_error_and_the_next_start_goes_on(
    tmp_path, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    rows_given = [{"text": text} for text in texts_of("en", 60)]

    def broken(*arguments, **options):
        yield from rows_given[:40]
        raise ConnectionError("the line went dead")

    settings = CollectSettings(("en",), 60, shard_rows=10, buffer_rows=5)
    sources, out = [parse_source("hf:user/set")], tmp_path / "raw"
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match="went dead"):
        collect_texts(sources, out, settings)
    assert len(list(out.glob("*.parquet"))) == 3
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: iter(rows_given))
    for folder in (out, tmp_path / "whole"):
        collect_texts(sources, folder, settings)
    assert contents(out) == contents(tmp_path / "whole")


def test_collect_texts_a_damaged_or_missing_shard_is_made_again(sources, collected):
    whole = contents(collected)
    (collected / "texts-00001.parquet").write_bytes(b"damaged")
    (collected / "texts-00003.parquet").unlink()
    collect_texts(sources, collected, SETTINGS)
    assert contents(collected) == whole


def test_a_source_that_has_changed_is_refused(sources, collected, jsonl_file):
    lines = jsonl_file.read_text(encoding="utf-8").splitlines(keepends=True)
    before = contents(collected)
    jsonl_file.write_text("".join(reversed(lines)), encoding="utf-8")  # of the same size
    with pytest.raises(DataError, match="has changed"):
        collect_texts(sources, collected, SETTINGS)
    jsonl_file.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match="another --out"):
        collect_texts(sources, collected, SETTINGS)
    assert contents(collected) == before


def test_collect_texts_other_settings_are_refused(sources, collected):
    with pytest.raises(DataError, match="another --out"):
        collect_texts(sources, collected, CollectSettings(("en",), 90))


def test_collect_texts_texts_are_not_written_over_nor_among_their_sources(sources, collected):
    before = contents(collected)
    shard = next(collected.glob("*.parquet"))
    inside, over = "an --out outside of ", "an --out folder without sources"
    cases = (collected, collected, inside), (collected, collected / "b", inside)
    for source, out, refusal in (*cases, (shard, collected, over)):
        (collected / MANIFEST).unlink(missing_ok=True)
        with pytest.raises(DataError, match=refusal):
            collect_texts([Weighted(FileSource(str(source)))], out, SETTINGS)
    del before[MANIFEST]
    assert contents(collected) == before


def test_parse_source_a_source_without_a_name_is_refused():
    with pytest.raises(DataError, match=r"a --source; found ' '"):
        parse_source(" ")


def test_collect_texts_one_writer_a_folder(sources, collected):
    with FileLock(collected / ".lock"), pytest.raises(DataError, match="another process"):
        collect_texts(sources, collected, SETTINGS)


def test_collect_texts_texts_that_all_fail_are_an_error(sources, tmp_path):
    with pytest.raises(DataError, match="too_short"):
        collect_texts(
            sources, tmp_path / "raw", CollectSettings(("en",), 9, limits=Limits(min_chars=5000))
        )


@pytest.mark.parametrize("langs", [(), ("en", "en"), ("en", "")])
def test_collect_settings_languages_that_are_none_are_refused(langs):
    with pytest.raises(DataError, match="--langs"):
        CollectSettings(langs, 10)


@pytest.mark.parametrize("near", [0.0, 0.99, float("nan")])
def test_collect_settings_a_similarity_that_minhash_cannot_tell_is_refused(near):
    with pytest.raises(DataError, match=r"similarity of 0\.1 to 0\.95"):
        CollectSettings(("en",), 10, near_duplicates=near)


PROCESS = """
import sys
from unembed.cli import main as cli
from unembed.data.collect import collect
import dataclasses
init = collect.CollectSettings
collect.CollectSettings = lambda *a, **o: init(*a, shard_rows=50, buffer_rows=20, **o)
if sys.argv[1] == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
sys.argv = ["unembed", "prepare", "--stage", "1", *sys.argv[2:]]
cli.main()
"""


def command(how, *arguments):
    return [sys.executable, "-c", PROCESS, how, *map(str, arguments)]


@pytest.fixture
def large_file(tmp_path):
    path = tmp_path / "large.jsonl"
    draw = random.Random(0)
    lines = []
    for lang in ("en", "de"):
        texts = texts_of(lang, 60)
        for n in range(3000):
            text = f"{draw.choice(texts)} {draw.choice(texts)} {n}"
            lines.append(json.dumps({"lang": lang, "text": text}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_collecting_from_files_loads_no_torch(jsonl_file, tmp_path):
    options = ("--source", jsonl_file, "--langs", "en", "--n-samples", 9, "--out", tmp_path / "raw")
    python, flag, code, *rest = command("", *options)
    code = code.replace("cli.main()", "try:\n    cli.main()\nexcept SystemExit:\n    pass\n")
    code += "print('torch' in sys.modules)"
    done = subprocess.run([python, flag, code, *rest], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[0].startswith("9 texts in 1 shard ")
    assert done.stdout.splitlines()[-1] == "False"


def test_collect_texts_a_full_disk_is_one_line_and_loses_nothing(large_file, tmp_path):
    out = tmp_path / "raw"
    options = ("--source", large_file, "--langs", "en,de", "--n-samples", 400, "--out", out)
    done = subprocess.run(command("full", *options), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: expected room to write in {out}")
    assert "Traceback" not in done.stderr
    assert not list(out.glob("texts-*.tmp"))
    settings = CollectSettings(("en", "de"), 400, shard_rows=50, buffer_rows=20)
    for folder in (out, tmp_path / "whole"):
        collect_texts([Weighted(FileSource(str(large_file)))], folder, settings)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_files(large_file, tmp_path):
    def options(out):
        samples = ("--langs", "en,de", "--n-samples", 5000, "--out", out)
        return ("--source", large_file, *samples)

    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command("", *options(whole)), check=True, capture_output=True)
    draw = random.Random(1)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(
            command("", *options(out)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seen = len(list(out.glob("*.parquet"))) if out.exists() else 0
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if out.exists() and len(list(out.glob("*.parquet"))) >= min(seen + 5, 90):
                break
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    subprocess.run(command("", *options(out)), check=True, capture_output=True)
    assert killed >= 5
    assert contents(out) == contents(whole)
