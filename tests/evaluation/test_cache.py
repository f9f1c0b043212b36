import json

import pytest

from unembed.errors import DataError
from unembed.evaluation.cache import Journal
from unembed.evaluation.metrics import Recovery

SETTINGS = {"seed": 0}
TEXTS = ["one", "two", "thrée"]
FOUND = [
    Recovery("ein", [1], [0.1 + 0.2], 3, 0, 1.5, 0.9),
    Recovery("", [], [], 3, 0, 1.5, None),
    Recovery("drei", [3, 4]),
]


@pytest.fixture
def written(tmp_path):
    with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal:
        assert journal.read(TEXTS) == []
        journal.append(TEXTS[:2], FOUND[:2])
        journal.append(TEXTS[2:], FOUND[2:])
    return journal.path


def test_what_was_kept_comes_back_in_parts(written, tmp_path):
    with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal:
        assert journal.path == written
        assert journal.read(TEXTS[:2]) == FOUND[:2]
        assert journal.read([TEXTS[2], "four"]) == FOUND[2:]
        journal.append(["four"], FOUND[:1])
        assert journal.read(["five"]) == [], "what was appended now is not read again"
    with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal:
        assert journal.read([*TEXTS, "four"]) == [*FOUND, FOUND[0]]


def test_the_file_says_what_it_was_made_with(written):
    first = json.loads(written.read_text(encoding="utf-8").splitlines()[0])
    assert first == {"row": "greedy:steps=8/x", "settings": SETTINGS}


def test_other_settings_are_another_file(written, tmp_path):
    with Journal(tmp_path, "greedy:steps=8/x", {"seed": 1}) as journal:
        assert journal.path != written
        assert journal.read(TEXTS) == []


def test_a_line_cut_at_any_byte_is_made_again(written, tmp_path):
    content = written.read_bytes()
    lines = content.count(b"\n")
    start = content.rindex(b"\n", 0, -1) + 1
    for end in (*range(start, len(content), 7), len(content) - 1):
        written.write_bytes(content[:end])
        with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal:
            assert journal.read(TEXTS) == FOUND[: lines - 2]
            journal.append(TEXTS[2:], FOUND[2:])
        assert written.read_bytes() == content


def test_recoveries_of_other_texts_are_refused(written, tmp_path):
    with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal, pytest.raises(DataError):
        journal.read(["another"])
    written.write_bytes(written.read_bytes().replace(b'"passes"', b'"posses"'))
    damaged = pytest.raises(DataError, match="Delete the file")
    with Journal(tmp_path, "greedy:steps=8/x", SETTINGS) as journal, damaged:
        journal.read(TEXTS)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="a folder at"):
        Journal(tmp_path / "taken", "greedy", SETTINGS)


def test_without_a_folder_nothing_is_kept():
    with Journal(None, "greedy", SETTINGS) as journal:
        journal.append(TEXTS, FOUND)
        assert journal.read(TEXTS) == []
