import pytest

from unembed.evaluation.metrics import find_spans, span_recalls


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("Pay 1,250.75 on 3 May 2021 for Q10", "numbers", {"1,250.75", "3", "2021"}),
        ("at 10:30, 5 of 7.", "numbers", {"10:30", "5", "7"}),
        ("no digits", "numbers", set()),
        (
            "write to bob.smith+x@mail.example.org.",
            "e-mail addresses",
            {"bob.smith+x@mail.example.org"},
        ),
        ("an @ sign", "e-mail addresses", set()),
        ("see https://a.org/b?c=1, or www.d.net.", "URLs", {"https://a.org/b?c=1", "www.d.net"}),
        ("The man met Anna in New York", "names", {"Anna", "New", "York"}),
        ("He left. She and I'm told I know Zoë O’Brien!", "names", {"Zoë", "O’Brien"}),
        ('He said: "Stop it"', "names", set()),
        ("all lower case", "names", set()),
        ("\u201cHello\u201d was NATO's word", "names", {"NATO's"}),
    ],
)
def test_find_spans_spans_by_hand(text, kind, found):
    assert find_spans(text)[kind] == found


def test_find_spans_what_stands_inside_an_address_is_not_counted_twice():
    found = find_spans("at www.a.org/1984/Smith and Bob2@b.com")
    assert found["numbers"] == set()
    assert found["names"] == set()


def test_span_recalls_recall_is_that_of_the_distinct_spans(minilm):
    found = span_recalls("the years 1984, 1985 and 1984", "in 1984", minilm.tokenizer)
    assert found == {"numbers": 0.5}


@pytest.mark.parametrize(
    ("recovered", "recall"),
    [
        ("mail bob @ x. org now", 1.0),
        ("mail BOB@X.ORG now", 1.0),
        ("mail bob @ x. organ now", 0.0),
        ("mail rob@x.org", 0.0),
        ("", 0.0),
    ],
)
def test_span_recalls_spaces_and_case_do_not_count_but_words_end(minilm, recovered, recall):
    found = span_recalls("please mail bob@x.org", recovered, minilm.tokenizer)
    assert found == {"e-mail addresses": recall}


def test_span_recalls_a_number_inside_another_is_not_that_number(minilm):
    assert span_recalls("it was 7 then", "it was 1977", minilm.tokenizer) == {"numbers": 0.0}


def test_span_recalls_accents_are_compared_as_the_tokenizer_spells_them(minilm):
    assert span_recalls("we saw José", "we saw jose", minilm.tokenizer) == {"names": 1.0}
