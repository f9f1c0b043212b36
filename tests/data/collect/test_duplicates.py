import random

import pytest

from unembed.data.collect.filters import Duplicates, HashSet, text_hash


def test_a_set_remembers_what_was_added_and_nothing_else():
    draw = random.Random(0)
    values = [draw.getrandbits(64) for _ in range(20_000)]
    found = HashSet(10_000)
    for value in values[:10_000]:
        found.add(value)
        found.add(value)
    assert all(value in found for value in values[:10_000])
    assert not any(value in found for value in values[10_000:])
    assert found.forgotten == 0


def test_hash_set_hashes_that_meet_in_a_slot_are_told_apart():
    found = HashSet(10)
    low = 77
    for high in range(0, 50, 2):
        found.add(high << 32 | low)
    assert [high << 32 | low in found for high in range(2, 50)] == [True, False] * 24


@pytest.mark.parametrize("capacity", [1, 819, 820, 1638, 1639, 5000])
def test_hash_set_a_set_has_room_for_what_was_expected(capacity):
    found = HashSet(capacity)
    draw = random.Random(capacity)
    for _ in range(capacity):
        found.add(draw.getrandbits(64))
    assert found.forgotten == 0


def test_hash_set_five_million_texts_are_remembered_in_a_few_megabytes():
    assert HashSet(5_000_000).nbytes == 4 * 6_250_000
    assert HashSet(10**12).nbytes == 512 << 20  # pages that are never touched cost nothing


def test_five_million_near_duplicates_fit_into_a_quarter_of_a_gigabyte():
    pytest.importorskip("datasketch")
    seen = Duplicates(5_000_000, near=0.8)
    assert seen.nbytes == 25_000_000 + 9 * 25_000_000, "9 bands, 5 bytes each for a load of 80%"
    for similarity in (0.1, 0.5, 0.7, 0.95):
        most = Duplicates(5_000_000, near=similarity).nbytes
        assert most <= 25_000_000 + (256 << 20), "however many bands"


def test_hash_set_a_full_set_forgets_and_says_so():
    found = HashSet(1_000_000, most=1 << 10)
    for value in range(1, 2000):
        found.add(value << 40 | value)
    assert found.forgotten == 1999 - int(0.8 * 1024)
    assert (5 << 40 | 5) in found
    assert (1999 << 40 | 1999) not in found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The river.", "  the\n\nRIVER. "),
        ("ﬁne caf\u00e9", "fine cafe\u0301"),
        ("\uff11\uff12 \uff46", "12 f"),
        ("Straße", "STRASSE"),
    ],
)
def test_text_hash_texts_that_read_the_same_are_one(one, other):
    assert text_hash(one) == text_hash(other)


def test_text_hash_other_texts_are_others():
    assert text_hash("the river") != text_hash("the rivers")
    seen = Duplicates(10)
    assert [seen.reason(text) for text in ("a b", "A  b", "a c")] == [None, "duplicate", None]


def test_near_duplicates_are_found_when_asked_for():
    pytest.importorskip("datasketch")
    draw = random.Random(1)
    words = [f"word{n}" for n in range(500)]
    text = " ".join(draw.sample(words, 200))
    close = text.replace(text.split()[100], "other")
    far = " ".join(draw.sample(words, 200))
    near = Duplicates(10, near=0.8)
    assert [near.reason(t) for t in (text, close, far, text)] == [
        *(None, "near_duplicate", None, "duplicate")
    ]
    exact = Duplicates(10)
    assert [exact.reason(t) for t in (text, close)] == [None, None]


def test_reason_short_texts_have_a_sketch_too():
    pytest.importorskip("datasketch")
    near = Duplicates(10, near=0.8)
    assert [near.reason(text) for text in ("a", "ab", "河", "a!")] == [None] * 4
