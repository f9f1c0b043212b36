"""Where pieces begin and end, with the tokenizers of all kinds of encoders."""

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tests.tokenizers import KINDS, WORDS
from unembed.config import DataSection
from unembed.data.inspect import inspect_pairs
from unembed.data.pairs import MANIFEST, Pairs
from unembed.data.pieces import CUTTER, cut_pieces, is_outdated
from unembed.data.prepare import choose_tokens, count_tokens, prepare_pairs
from unembed.encoders.base import FakeEncoder
from unembed.errors import DataError
from unembed.tokenizer import TextTokenizer

PROSE = (
    "The nurse reads a letter. Thus the file is closed. Both of them went home.  It was a good day."
)
SENTENCES = re.split(r"(?<=\.)\s+", PROSE)
NO_SPACES = ("word_piece", "trimmed_offsets")


@cache
def tokenizer_of(kind):
    return KINDS[kind]()


@cache
def trimmed(kind):
    """With a vocabulary of single letters and the commonest tokens, so that words are spelled."""
    whole = tokenizer_of(kind)
    counts = count_tokens([PROSE, " ".join(WORDS)] * 3, whole, DataSection(min_tokens=1))
    return whole.trim(choose_tokens(whole, counts, 5))


def cut(passage, tokenizer, dropped=None, **changes):
    chosen = DataSection.model_validate({"length": 48, "min_tokens": 1, "pack": 0.0, **changes})
    pieces = cut_pieces([passage], tokenizer, chosen, dropped=dropped, round_trip=False)
    return [piece.text for piece in pieces]


@pytest.mark.parametrize("kind", KINDS)
def test_carries_spaces_tells_the_kinds_apart(kind):
    assert tokenizer_of(kind).carries_spaces == (kind not in NO_SPACES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segmenter", ["regex", "sentencex"])
@pytest.mark.parametrize("make", [tokenizer_of, trimmed])
def test_cut_pieces_ends_a_piece_where_its_sentence_ends(kind, segmenter, make):
    assert cut(PROSE, make(kind), segmenter=segmenter) == SENTENCES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lines", ["A title\nThe file\n\n  It was", "A title \n The file\n \nIt was"]
)
def test_cut_pieces_ends_a_piece_at_the_line_end(kind, lines):
    assert cut(lines, tokenizer_of(kind)) == ["A title", "The file", "It was"]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_pieces_cuts_a_long_sentence_before_a_word(kind):
    sentence = " ".join(WORDS[:28])
    pieces = cut(sentence, tokenizer_of(kind), length=24)
    assert len(pieces) > 1
    assert " ".join(pieces) == sentence


def test_cut_pieces_keeps_a_number_whole_whose_digits_are_words():
    sentence = " ".join(["the day 2023"] * 10)
    for length in range(9, 15):
        pieces = cut(sentence, tokenizer_of("single_digits"), length=length)
        assert {word for piece in pieces for word in piece.split()} == {"the", "day", "2023"}


@pytest.mark.parametrize("kind", ["byte_level", "single_digits", "one_word"])
def test_cut_pieces_fills_a_piece_where_a_script_has_no_spaces(kind):
    tokenizer = tokenizer_of(kind)
    passage = "the " + "東京です" * 12
    pieces = cut(passage, tokenizer, length=16)
    assert "".join(pieces) == passage.replace(" ", "", 1) or "".join(pieces) == passage
    assert min(len(tokenizer.encode([piece])[0]) for piece in pieces[:-1]) > 8


def test_cut_pieces_ends_a_sentence_inside_a_token():
    """One token is "。です", across the end."""
    names = ["東", "京", "。", "で", "す", "です", "。です"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [("で", "す"), ("。", "です")]))
    joined = TextTokenizer.from_backend(backend, None, None, None)
    assert "。です" in backend.encode("東京。です").tokens
    assert cut("東京。です。です。", joined) == ["東京。", "です。", "です。"]


words = st.one_of(st.sampled_from(WORDS[:27]), st.from_regex(r"[a-zß]{1,9}", fullmatch=True))
sentences = st.lists(st.lists(words, min_size=1, max_size=30).map(" ".join), max_size=6)
spaces = st.sampled_from([" ", "  ", "\n", "\n\n", " \n ", "\t"])


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=sentences,
    gap=spaces,
    mark=st.sampled_from(".!…"),
    packed=st.booleans(),
    trim=st.booleans(),
    segmenter=st.sampled_from(["regex", "sentencex"]),
    length=st.integers(24, 64),
    windows=st.integers(1, 3),
)
@example(
    parts=["the nurse reads a letter", "thus the file is closed"],
    gap=" ",
    mark=".",
    packed=True,
    trim=False,
    segmenter="regex",
    length=32,
    windows=1,
)
@settings(max_examples=25, deadline=None)
def test_cut_pieces_cuts_at_sentence_ends_or_between_words(
    kind, parts, gap, mark, packed, trim, segmenter, length, windows
):
    tokenizer = (trimmed if trim else tokenizer_of)(kind)
    passage = gap.join(part.capitalize() + mark for part in parts)
    changes = {"pack": float(packed), "segmenter": segmenter, "length": length}
    dropped = Counter()
    pieces = cut(passage, tokenizer, dropped, windows=windows, **changes)
    counts = map(len, tokenizer.encode(passage.split()))
    if max(counts, default=0) > length // 2:
        return  # a word that takes most of a piece is cut inside
    known = set(passage.split())
    if not tokenizer.carries_spaces:  # signs are words to these
        known.update(re.findall(r"\w+|[^\w\s]", passage))
    for piece in pieces:
        words = piece.split() if tokenizer.carries_spaces else re.findall(r"\w+|[^\w\s]", piece)
        assert set(words) <= known, "no word is cut"
    if windows > 1 or dropped["too_long"]:
        return  # cut out of its passage, a piece may have more tokens than in it
    assert "".join("".join(pieces).split()) == "".join(passage.split()), "none is lost or doubled"
    if segmenter == "sentencex":
        return  # it joins what it takes for abbreviations
    for piece, following in pairwise(pieces):
        ended = piece.endswith(mark)
        inner = mark in piece.removesuffix(mark)
        assert ended or not inner, "a piece that holds a sentence end stops at one"
        assert packed or not inner, "unpacked, a piece holds one sentence"
        if not ended:
            assert len(tokenizer.encode([f"{piece} {following}"])[0]) > length // 2


@pytest.mark.parametrize("kind", KINDS)
@given(passage=st.text(alphabet="ab .!?。\n\t\r\"'é😀字で\u0301\u200b\u3000", max_size=120))
@settings(max_examples=25, deadline=None)
def test_cut_pieces_loses_nothing_visible_whatever_the_text(kind, passage):
    pieces = cut(passage, tokenizer_of(kind), length=64)
    if all(len(ids) < 64 for ids in tokenizer_of(kind).encode(pieces)) and "byte" in kind:
        assert "".join("".join(pieces).split()) == "".join(passage.split())


# Pairs of the older cutter


class SpacedEncoder(FakeEncoder):
    """The fake encoder, with a tokenizer whose tokens carry spaces."""

    def __init__(self):
        super().__init__()
        self._own, self.tokenizer = self.tokenizer, tokenizer_of("byte_level")

    def encode(self, texts, progress=None):
        self.tokenizer, spaced = self._own, self.tokenizer
        try:
            return super().encode(texts, progress)
        finally:
            self.tokenizer = spaced


def without_cutter(folder):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest.pop("cutter") == CUTTER
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_prepare_pairs_refuses_pairs_of_the_older_cutter(tmp_path, text_file, tiny_config):
    out, encoder = tmp_path / "out", SpacedEncoder()
    prepare_pairs(text_file, out, tiny_config, encoder, limit=5)
    assert Pairs.open(out).outdated is None
    assert inspect_pairs(out).outdated is None
    without_cutter(out)
    assert "made with an older cutter" in Pairs.open(out).outdated
    assert "made with an older cutter" in inspect_pairs(out).outdated
    with pytest.raises(DataError, match="made with an older cutter"):
        prepare_pairs(text_file, out, tiny_config, encoder)


def test_pairs_of_a_tokenizer_without_spaces_stay_valid(pairs_folder, text_file, tiny_config):
    without_cutter(pairs_folder)
    assert Pairs.open(pairs_folder).outdated is None
    assert prepare_pairs(text_file, pairs_folder, tiny_config, FakeEncoder())["complete"]


def test_is_outdated_asks_tokenizer_and_version():
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        assert not is_outdated({"cutter": CUTTER}, tokenizer)
        assert is_outdated({}, tokenizer) == tokenizer.carries_spaces
