import json
import sys

import numpy as np
import pytest

from unembed.data.inspect import inspect_pairs, plot_inspection, writing_systems
from unembed.data.pairs import MANIFEST, Pairs, read_manifest
from unembed.data.prepare import prepare_pairs
from unembed.encoders.fingerprint import make_fingerprint
from unembed.errors import ConfigError, DataError


def test_the_figures_are_those_of_the_pairs(pairs_folder, encoder, tiny_config):
    pairs = Pairs.open(pairs_folder)
    report = inspect_pairs(pairs_folder)
    assert (report.pairs, report.shards, report.complete) == (len(pairs), 6, True)
    assert report.bytes == sum(path.stat().st_size for path in pairs_folder.glob("*.npy"))
    assert report.encoder == encoder.identity.to_dict()
    assert report.fingerprint == make_fingerprint(encoder).sha256
    assert report.vocabulary == {"size": encoder.tokenizer.size}
    tokens, _ = pairs.rows(np.arange(len(pairs)))
    lengths = [len(pairs.tokenizer.content_positions(row)) for row in tokens.tolist()]
    assert report.lengths == np.bincount(lengths, minlength=tiny_config.data.length).tolist()
    assert report.distinct_tokens == len(np.unique(tokens))
    quantiles = report.quantiles()
    assert quantiles[50] == np.sort(lengths)[(len(lengths) - 1) // 2]
    assert quantiles[5] <= quantiles[50] <= quantiles[95]
    json.dumps(report.to_dict())


def test_examples_are_texts_of_the_pairs_drawn_with_the_seed(pairs_folder):
    pairs = Pairs.open(pairs_folder)
    texts = pairs.tokenizer.decode(pairs.rows(np.arange(len(pairs)))[0])
    report = inspect_pairs(pairs_folder, examples=4)
    assert len(report.examples) == 4
    assert set(report.examples) <= set(texts)
    assert inspect_pairs(pairs_folder, examples=4).examples == report.examples
    assert inspect_pairs(pairs_folder, examples=4, seed=1).examples != report.examples
    assert inspect_pairs(pairs_folder, examples=0).examples == []


def test_inspect_pairs_what_was_left_out_and_trimmed_is_shown(tmp_path, tiny_config, encoder):
    source = tmp_path / "texts.txt"
    source.write_text("the cat sleeps. a.\nzyx runs at the river.\n" * 9, encoding="utf-8")
    config = tiny_config.model_validate(
        {**tiny_config.model_dump(), "data": {**tiny_config.data.model_dump(), "pack": 0.0}}
    )
    prepare_pairs(source, tmp_path / "out", config, encoder)
    report = inspect_pairs(tmp_path / "out")
    assert report.dropped == {"not_round_trip": 9, "too_short": 9}


def test_inspect_pairs_an_older_folder(pairs_folder):
    manifest = read_manifest(pairs_folder)
    del manifest["fingerprint"]
    for shard in manifest["shards"]:
        del shard["dropped"]
    (pairs_folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    report = inspect_pairs(pairs_folder)
    assert report.fingerprint is None
    assert report.dropped == {}


def test_inspect_pairs_languages_are_those_of_the_passages_read(tmp_path, tiny_config, encoder):
    source = tmp_path / "texts.jsonl"
    rows = [("en", "the cat sleeps by the river.")] * 5 + [("de", "the dog runs to a house.")] * 40
    lines = [json.dumps({"text": text, "lang": lang, "none": None}) for lang, text in rows]
    source.write_text("\n".join(lines), encoding="utf-8")
    prepare_pairs(source, tmp_path / "out", tiny_config, encoder, limit=1)
    passages = sum(shard["passages"] for shard in read_manifest(tmp_path / "out")["shards"])
    assert 5 < passages < 45, "the case: not all of the source was read"
    report = inspect_pairs(tmp_path / "out", source=source)
    assert report.languages == {"de": passages - 5, "en": 5}
    assert report.languages_are == "passages, by the column 'lang' of texts.jsonl"
    report = inspect_pairs(tmp_path / "out", source=source, lang_column="none")
    assert report.languages == {"(none)": passages}
    with pytest.raises(DataError, match="a column 'language'"):
        inspect_pairs(tmp_path / "out", source=source, lang_column="language")
    source.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match="the source of the pairs"):
        inspect_pairs(tmp_path / "out", source=source)


def test_inspect_pairs_without_a_source_languages_are_detected(pairs_folder):
    pytest.importorskip("py3langid")
    report = inspect_pairs(pairs_folder)
    assert sum(report.languages.values()) == min(report.pairs, 2000)


def test_inspect_pairs_without_the_detector_languages_are_not_known(pairs_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    report = inspect_pairs(pairs_folder)
    assert (report.languages, report.languages_are) == (None, "not known")
    assert report.writing


def test_writing_systems_are_told_apart():
    assert writing_systems(["abc é 1 !", "東京", "мир", "سلام"]) == {
        "Latin": 4,
        "Cjk": 2,
        "Cyrillic": 3,
        "Arabic": 4,
    }


def test_plot_inspection_a_picture(pairs_folder, tmp_path):
    pytest.importorskip("matplotlib")
    plot_inspection(inspect_pairs(pairs_folder), tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="a place to write"):
        plot_inspection(inspect_pairs(pairs_folder), tmp_path / "none" / "lengths.png")


def test_plot_inspection_without_matplotlib_the_message_says_what_to_install(
    pairs_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[plots\]"):
        plot_inspection(inspect_pairs(pairs_folder), tmp_path / "lengths.png")
