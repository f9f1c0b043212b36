import pytest

from unembed.data.collect.filters import FILTERS, Limits, first_failure
from unembed.errors import DataError

LIMITS = Limits(min_chars=10, max_chars=2000)


@pytest.mark.parametrize(
    "text",
    [
        "A plain English sentence.",
        "这是一个没有空格的中文句子。它足够长。",
        "هذه جملة عربية تُكتب من اليمين إلى اليسار.",
        "זהו משפט בעברית שנכתב מימין לשמאל.",
        "यह हिन्दी का एक वाक्य है जिसमें मात्राएँ हैं।",
        "นี่คือประโยคภาษาไทยที่ไม่มีช่องว่าง",
        "On 3 May 1997, 41 people came 😀!",
        "Line one of it.\nLine two of it.",
    ],
)
def test_text_of_any_script_passes(text):
    assert first_failure(text, LIMITS) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "empty"),
        ("a\0 text with a NUL byte inside", "nul_bytes"),
        ("a text with half a \ud83d surrogate pair", "invalid_utf8"),
        ("short", "too_short"),
        ("many words " * 200, "too_long"),
        ("😀😃😄😁😆😅😂🤣🥲😊", "few_letters"),
        ("\u200b" * 20, "few_letters"),
        ("👩\u200d👩\u200d👧🇩🇪❤\ufe0f👍🏽🎉🎉🎉🎉", "few_letters"),
        ("12.50 | 13.20 | 99.10 | x", "few_letters"),
        ("spam " * 300, "repetitive"),
    ],
)
def test_first_failure_a_text_is_left_out_for_a_named_reason(text, name):
    assert first_failure(text, LIMITS) == name
    assert name in FILTERS


def test_the_limits_can_be_moved():
    assert first_failure("12345 67890", Limits(min_letters=0.0)) is None
    assert first_failure("spam " * 300, Limits(min_compressed=0.0)) is None


def test_limits_that_let_nothing_through_are_refused():
    with pytest.raises(DataError, match="--chars"):
        Limits(min_chars=10, max_chars=9)
