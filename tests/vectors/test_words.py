"""The word probe: which words are in a text, learned from vectors that are sums of words."""

import dataclasses
import json

import numpy as np
import pytest

from unembed.encoders.base import EncoderIdentity
from unembed.errors import CheckpointError, ConfigError, DataError, EmbeddingError
from unembed.vectors.words import WEIGHTS, WORDS, WordProbe, fit_words, words_of

DIMENSION = 24
IDENTITY = EncoderIdentity("sums", None, DIMENSION, "0" * 64, "")


def sums_of_words(count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts of words with falling base rates, and vectors that are sums of the words' own."""
    rng = np.random.default_rng(seed)
    words = ["the", "river", "Paris", *[f"w{chr(97 + i)}" for i in range(20)]]
    rates = np.array([0.9, 0.4, 0.3, *np.linspace(0.25, 0.05, 20)])
    own = np.random.default_rng(99).standard_normal((len(words), DIMENSION))
    there = rng.random((count, len(words))) < rates
    there[:, 0] |= ~there.any(axis=1)
    vectors = there @ own + 1.5 * rng.standard_normal((count, DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = ["so " + " ".join(np.array(words)[row]) + "." for row in there]
    return texts, vectors.astype(np.float32)


@pytest.fixture(scope="module")
def probe() -> WordProbe:
    return fit_words(IDENTITY, *sums_of_words(3000))


def test_fit_words_knows_rare_words_by_their_own_embeddings():
    texts, vectors = sums_of_words(250)
    own = np.random.default_rng(99).standard_normal((23, DIMENSION)).astype(np.float32)
    order = ["the", "river", "paris", *[f"w{chr(97 + i)}" for i in range(20)]]

    def encode(words):
        rows = np.array([own[order.index(word)] if word in order else 0 * own[0] for word in words])
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    new_texts, new_vectors = sums_of_words(1000, seed=5)
    losses = []
    for method in (None, encode):
        fitted = fit_words(IDENTITY, texts, vectors, encode=method)
        p, there = fitted.probabilities(new_vectors).clip(1e-6, 1 - 1e-6), truth(fitted, new_texts)
        losses.append(-np.log(np.where(there, p, 1 - p)).mean())
    assert losses[1] < losses[0]


def truth(probe: WordProbe, texts: list[str]) -> np.ndarray:
    return np.array([[word in words_of(text) for word in probe.words] for text in texts])


def test_words_of_folds_case_and_drops_the_possessive_s():
    text = "The nurse’s well-known RIVER, rivers' and 7 Émile's: I'm e-"
    assert words_of(text) == {"the", "nurse", "well-known", "river", "rivers", "and", "émile",
                              "i'm", "e"}  # fmt: skip


def test_fit_words_finds_the_words_of_new_texts(probe):
    texts, vectors = sums_of_words(400, seed=1)
    there, p = truth(probe, texts), probe.probabilities(vectors)
    for word in ("river", "paris", "wa"):
        place = probe.words.index(word)
        own, others = p[there[:, place], place].mean(), p[~there[:, place], place].mean()
        assert own > 2 * others, word


def test_probabilities_are_calibrated(probe):
    texts, vectors = sums_of_words(2000, seed=2)
    there, p = truth(probe, texts), probe.probabilities(vectors)
    bins = np.minimum((10 * p).astype(int), 9)
    gaps = [abs((p - there)[bins == b].sum()) for b in range(10)]
    assert sum(gaps) / p.size < 0.02
    assert np.allclose(probe.base_rates, there.mean(axis=0), atol=0.05)


def test_most_probable_leaves_common_words_out_and_knows_names(probe):
    vectors = sums_of_words(50, seed=3)[1]
    rows = probe.most_probable(vectors, 5)
    assert all(word.base_rate < 0.1 for row in rows for word in row)
    assert all(len(row) == 5 for row in rows)
    assert all(row == sorted(row, key=lambda word: -word.probability) for row in rows)
    with_common = probe.most_probable(vectors, 100, common=True)[0]
    assert {word.word for word in with_common} == {*probe.words} - {"paris"} | {"Paris"}
    (names,) = probe.most_probable(vectors[0], 9, common=True, names=True)
    assert [(word.word, word.is_name) for word in names] == [("Paris", True)]
    with pytest.raises(ConfigError, match="top as a whole number of at least 1; found 0"):
        probe.most_probable(vectors, 0)
    with pytest.raises(EmbeddingError, match="24 dimensions"):
        probe.probabilities(np.ones(3))


def test_a_saved_probe_says_the_same(probe, tmp_path):
    probe.save(str(tmp_path / "probe"))
    again = WordProbe.from_pretrained(tmp_path / "probe")
    vectors = sums_of_words(100, seed=4)[1]
    assert np.abs(again.probabilities(vectors) - probe.probabilities(vectors)).max() < 0.05
    ours, theirs = (one.statistics.to_dict() for one in (probe, again))
    assert ours == theirs
    for name in ("encoder", "words", "names", "trained"):
        assert getattr(again, name) == getattr(probe, name), name
    assert (tmp_path / "probe" / WEIGHTS).stat().st_size < 2 * probe.weight.size + 4000
    assert "24 dimensions" in repr(again) and f"{len(probe.words)} words" in repr(again)


def damaged_words(change):
    def damage(folder):
        data = json.loads((folder / WORDS).read_text())
        change(data)
        (folder / WORDS).write_text(json.dumps(data))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / WORDS).unlink(),
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / WORDS).write_text("{"),
        lambda folder: (folder / WORDS).write_text("[" * 100_000),
        lambda folder: (folder / WEIGHTS).write_bytes(b"\0" * 100),
        damaged_words(lambda data: data["words"].pop()),
        damaged_words(lambda data: data.update(format=99)),
        damaged_words(lambda data: data["names"].update({"900": "X"})),
        damaged_words(lambda data: data["encoder"].update(dimension=7)),
        damaged_words(lambda data: data.update(statistics=3)),
        damaged_words(lambda data: data["statistics"].update(int8="AA==")),
        damaged_words(lambda data: data["statistics"].update(shape=[1, len(data["words"])])),
    ],
)
def test_a_damaged_probe_is_refused(probe, tmp_path, damage):
    probe.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match="a word probe"):
        WordProbe.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_refused(probe, tmp_path):
    broken = dataclasses.replace(probe, bias=np.full_like(probe.bias, np.nan))
    broken.save(tmp_path)
    with pytest.raises(CheckpointError, match="finite: False"):
        WordProbe.from_pretrained(tmp_path)


def test_fit_words_refuses_what_is_no_identity():
    with pytest.raises(DataError, match="the identity of an encoder; found 'minilm'"):
        fit_words("minilm", *sums_of_words(300))


def test_fit_words_refuses_what_is_no_text():
    with pytest.raises(DataError, match="texts; found NoneType, int"):
        fit_words(IDENTITY, [None, 3] * 150, sums_of_words(300)[1])


def test_fit_words_needs_enough_texts():
    texts, vectors = sums_of_words(100)
    with pytest.raises(DataError, match="at least 200 texts with a vector each; found 100"):
        fit_words(IDENTITY, texts, vectors)
    texts, vectors = [f"w{'abcdefghij'[i % 10]}{i}x" for i in range(300)], sums_of_words(300)[1]
    with pytest.raises(DataError, match="words that 8 texts have"):
        fit_words(IDENTITY, texts, vectors)


@pytest.mark.parametrize("name", [None, 3, b"x"])
def test_from_pretrained_refuses_what_is_no_name(name):
    with pytest.raises(CheckpointError, match="a word probe"):
        WordProbe.from_pretrained(name)


@pytest.mark.parametrize("top", [0, 1.5, "a", True, None])
def test_most_probable_refuses_a_top_that_is_no_number(probe, top):
    with pytest.raises(ConfigError, match="top as a whole number of at least 1"):
        probe.most_probable(np.ones(DIMENSION), top)


def test_fit_words_measures_what_the_vectors_have_in_common(probe):
    vectors = sums_of_words(400, seed=5)[1]
    assert probe.statistics.doubt(vectors, "sums") is None
    assert WordProbe.from_pretrained().statistics.directions.shape == (64, 384)


@pytest.mark.parametrize("switch", ["common", "names"])
def test_most_probable_refuses_switches_that_are_none(switch):
    probe = WordProbe.from_pretrained("minilm")
    with pytest.raises(ConfigError, match=f"{switch} as True or False; found 'no'"):
        probe.most_probable(np.ones(384), **{switch: "no"})


def test_word_probes_compare_by_identity_not_by_their_numbers():
    one, two = (WordProbe.from_pretrained("minilm") for _ in range(2))
    assert one == one
    assert one != two
