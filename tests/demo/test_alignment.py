import pytest

from unembed.demo.events import align_words, split_words


@pytest.fixture(scope="module")
def align(minilm):
    return lambda original, recovered: align_words(original, recovered, minilm.tokenizer)


def test_align_words_case_accents_and_punctuation_make_no_difference(align):
    assert align("Café, on MONDAY!", "cafe on monday") == [
        ("right", "Café", "cafe"),
        ("right", "on", "on"),
        ("right", "MONDAY", "monday"),
    ]


def test_align_words_wrong_missing_and_extra_words(align):
    assert align("the patient was admitted on monday", "a patient was seen on") == [
        ("wrong", "the", "a"),
        ("right", "patient", "patient"),
        ("right", "was", "was"),
        ("wrong", "admitted", "seen"),
        ("right", "on", "on"),
        ("missing", "monday", None),
    ]
    assert align("the dog", "the the big dog") == [
        ("right", "the", "the"),
        ("extra", None, "the"),
        ("extra", None, "big"),
        ("right", "dog", "dog"),
    ]


@pytest.mark.parametrize(
    ("original", "recovered"), [("", "a dog"), ("a dog", ""), ("...", "!"), ("a b c", "c b a")]
)
def test_split_words_every_word_is_there_once(align, original, recovered):
    aligned = align(original, recovered)
    assert [a for _, a, _ in aligned if a is not None] == split_words(original)
    assert [b for _, _, b in aligned if b is not None] == split_words(recovered)


def test_split_words_words_of_other_scripts():
    assert split_words("don't pay 300,000") == ["don", "t", "pay", "300", "000"]
    assert split_words("我丢了钥匙。") == ["我", "丢", "了", "钥", "匙"]
    assert split_words("हिन्दी में") == ["हिन्दी", "में"]
