"""A folder laid out as the Hub's C4 is, and files that hold what is wrong in the wild."""

import gzip
import json

import pytest

_WORDS = {
    "en": "the river carries quiet boats past a sleeping town".split(),
    "de": "der Fluss trägt stille Boote an einer schlafenden Stadt vorbei".split(),
    "zh": list("河流载着安静的小船经过沉睡的城镇"),
    "ar": "يحمل النهر قوارب هادئة أمام مدينة نائمة".split(),
}


def texts_of(lang, count):
    """Different texts of a language, each long enough for every filter."""
    words = _WORDS[lang]
    joint = "" if lang == "zh" else " "
    return [
        joint.join(words[(n * 7 + k * (n % 5 + 1)) % len(words)] for k in range(12)) + f" {n}."
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """Gzip JSON lines and a card that names them by language: what `load_dataset` finds there."""
    root = tmp_path_factory.mktemp("hub") / "c4"
    card = ["---", "configs:"]
    for lang in ("en", "de", "zh"):
        english = lang == "en"
        stem = "en/c4-train." if english else f"multilingual/c4-{lang}.tfrecord-"
        pattern = "en/c4-train.*.json.gz" if english else f"multilingual/c4-{lang}.*.json.gz"
        card += [f"- config_name: {lang}", "  data_files:"]
        card += ["  - split: train", f"    path: {pattern}"]
        texts = texts_of(lang, 60)
        for part in range(2):
            path = root / f"{stem}{part:05d}-of-00002.json.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"text": text, "url": "none"} for text in texts[part::2]]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            path.write_bytes(gzip.compress(lines.encode()))
    (root / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return root


@pytest.fixture
def jsonl_file(tmp_path):
    """60 texts each of four languages, one language after the other."""
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": text, "lang": lang} for lang in _WORDS for text in texts_of(lang, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
