import random
from collections import Counter

import pytest

from tests.data.collect.conftest import texts_of
from unembed.data.collect.filters import Duplicates, Limits
from unembed.data.collect.mix import (
    Sample,
    Tally,
    draw_samples,
    open_streams,
    quotas,
    shuffle,
    source_names,
)
from unembed.data.collect.sources import FileSource, MissingLanguageError, Weighted
from unembed.errors import DataError


class ListSource:
    """Texts from memory; a `None` is a row that cannot be read."""

    def __init__(self, name, **texts):
        self.name, self.by_lang = name, texts

    def describe(self, langs):
        return {"name": self.name}

    def texts(self, lang, alone, skip):
        if lang not in self.by_lang:
            raise MissingLanguageError(lang, "none", "Correct")
        for text in self.by_lang[lang]:
            if text is None:
                skip("not_json")
            else:
                yield text


def drawn(sources, wanted, seed=0, tally=None):
    tally = tally or Tally()
    streams = open_streams(sources, list(wanted), tally)
    limits, seen = Limits(), Duplicates(1000)
    return list(draw_samples(streams, wanted, limits, seen, random.Random(seed), tally)), tally


def many(name, count):
    return [f"{name} has a text with number {n}" for n in range(count)]


@pytest.mark.parametrize(
    ("langs", "samples", "expected"),
    [
        ("ab", 10, {"a": 5, "b": 5}),
        ("abc", 8, {"a": 3, "b": 3, "c": 2}),
        ("ab", 1, {"a": 1, "b": 0}),
    ],
)
def test_quotas_languages_share_equally(langs, samples, expected):
    assert quotas(langs, samples) == expected


def test_draw_samples_languages_are_balanced_at_every_point():
    source = ListSource("s", en=many("en", 900), de=many("de", 900))
    samples, _ = drawn([Weighted(source)], {"en": 300, "de": 300})
    assert Counter(sample.lang for sample in samples) == {"en": 300, "de": 300}
    assert 70 <= sum(sample.lang == "en" for sample in samples[:200]) <= 130


def test_draw_samples_sources_are_mixed_by_weight_among_what_is_kept():
    noisy = [text for pair in zip(many("a", 900), ["x"] * 900, strict=True) for text in pair]
    sources = [
        Weighted(ListSource("a", en=noisy), 3.0),
        Weighted(ListSource("b", en=many("b", 900))),
    ]
    samples, tally = drawn(sources, {"en": 800})
    assert 560 <= sum(sample.source == "a" for sample in samples) <= 640
    assert tally.total("too_short") == tally.events["en", "a", "too_short"] > 500


def test_draw_samples_the_same_seed_draws_the_same():
    def sources():
        return [Weighted(ListSource(n, en=many(n, 50), de=many(n + "d", 50))) for n in "ab"]

    wanted = {"en": 40, "de": 40}
    assert drawn(sources(), wanted)[0] == drawn(sources(), wanted)[0]
    assert drawn(sources(), wanted)[0] != drawn(sources(), wanted, seed=1)[0]


def test_what_one_source_lacks_the_other_gives():
    sources = [
        Weighted(ListSource("a", en=many("a", 3))),
        Weighted(ListSource("b", en=many("b", 9), de=many("c", 9))),
    ]
    samples, tally = drawn(sources, {"en": 12, "de": 5})
    assert Counter((s.lang, s.source) for s in samples) == {
        ("en", "a"): 3,
        ("en", "b"): 9,
        ("de", "b"): 5,
    }
    assert tally.missing == [("de", "a")]


def test_draw_samples_a_language_that_all_sources_lack_is_an_error():
    sources = [Weighted(ListSource(name, en=["a"])) for name in "ab"]
    with pytest.raises(DataError, match="fr"):
        drawn(sources, {"en": 1, "fr": 1})


def test_draw_samples_everything_read_is_kept_or_counted():
    texts = [None, "  a good text to keep \n", "a  GOOD text to keep", "x", " ", None, "😀" * 20]
    samples, tally = drawn([Weighted(ListSource("s", en=texts))], {"en": 9})
    assert samples == [Sample("a good text to keep", "en", "s")]
    assert tally.sums(0) == {
        "en": {
            "duplicate": 1,
            "empty": 1,
            "few_letters": 1,
            "kept": 1,
            "not_json": 2,
            "read": 7,
            "too_short": 1,
        }
    }
    assert tally.sums(1) == {"s": tally.sums(0)["en"]}


def test_source_names_sources_of_one_name_are_numbered():
    names = source_names([Weighted(FileSource(path)) for path in ("a/t.txt", "b/t.txt", "c.txt")])
    assert names == ["t.txt", "t.txt#2", "c.txt"]


@pytest.mark.parametrize(("rows", "chars"), [(0, 10**6), (7, 10**6), (10**6, 200), (10**6, 10**6)])
def test_shuffle_shuffling_loses_nothing_and_holds_little(rows, chars):
    samples = [Sample(text, "en", "s") for text in texts_of("en", 60)]
    read = held = 0

    def counted():
        nonlocal read
        for sample in samples:
            read += 1
            yield sample

    found = []
    for sample in shuffle(counted(), random.Random(0), rows, chars):
        found.append(sample)
        held = max(held, read - len(found))
    assert sorted(found) == sorted(samples)
    assert (found == samples) is (rows == 0)
    assert held <= rows
