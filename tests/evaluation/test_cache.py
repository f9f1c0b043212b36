import json

import pytest

from unembed.errors import DataError
from unembed.evaluation.cache import RowCache
from unembed.evaluation.metrics import Recovery

SETTINGS = {"seed": 0}
TEXTS = ["one", "two", "thrée"]
RECOVERIES = [
    Recovery("ein", [1], [0.1 + 0.2], 3, 0, 1.5, 0.9),
    Recovery("", [], [], 3, 0, 1.5, None),
    Recovery("drei", [3, 4]),
]


@pytest.fixture
def written(tmp_path):
    with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache:
        assert cache.read(TEXTS) == []
        cache.append(TEXTS[:2], RECOVERIES[:2])
        cache.append(TEXTS[2:], RECOVERIES[2:])
    return cache.path


def test_row_cache_what_was_kept_comes_back_in_parts(written, tmp_path):
    with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache:
        assert cache.path == written
        assert cache.read(TEXTS[:2]) == RECOVERIES[:2]
        assert cache.read([TEXTS[2], "four"]) == RECOVERIES[2:]
        cache.append(["four"], RECOVERIES[:1])
        assert cache.read(["five"]) == [], "what was appended now is not read again"
    with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache:
        assert cache.read([*TEXTS, "four"]) == [*RECOVERIES, RECOVERIES[0]]


def test_row_cache_the_file_says_what_it_was_made_with(written):
    first = json.loads(written.read_text(encoding="utf-8").splitlines()[0])
    assert first == {"row": "greedy:steps=8/x", "settings": SETTINGS}


def test_row_cache_other_settings_are_another_file(written, tmp_path):
    with RowCache(tmp_path, "greedy:steps=8/x", {"seed": 1}) as cache:
        assert cache.path != written
        assert cache.read(TEXTS) == []


def test_row_cache_a_line_cut_at_any_byte_is_made_again(written, tmp_path):
    content = written.read_bytes()
    lines = content.count(b"\n")
    start = content.rindex(b"\n", 0, -1) + 1
    for end in (*range(start, len(content), 7), len(content) - 1):
        written.write_bytes(content[:end])
        with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache:
            assert cache.read(TEXTS) == RECOVERIES[: lines - 2]
            cache.append(TEXTS[2:], RECOVERIES[2:])
        assert written.read_bytes() == content


def test_row_cache_recoveries_of_other_texts_are_refused(written, tmp_path):
    with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache, pytest.raises(DataError):
        cache.read(["another"])
    written.write_bytes(written.read_bytes().replace(b'"passes"', b'"posses"'))
    damaged = pytest.raises(DataError, match="Delete the file")
    with RowCache(tmp_path, "greedy:steps=8/x", SETTINGS) as cache, damaged:
        cache.read(TEXTS)


def test_row_cache_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="a folder at"):
        RowCache(tmp_path / "taken", "greedy", SETTINGS)


def test_row_cache_without_a_folder_nothing_is_kept():
    with RowCache(None, "greedy", SETTINGS) as cache:
        cache.append(TEXTS, RECOVERIES)
        assert cache.read(TEXTS) == []
