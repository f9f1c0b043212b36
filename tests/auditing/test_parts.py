"""The parts of an audit one by one: what hurts, whose vectors, neighbours, severity."""

import re

import numpy as np
import pytest

from unembed.auditing import neighbours
from unembed.auditing.findings import INVERSION_IDS, Strongest, inversion_severity, open_to_all
from unembed.auditing.identify import identify
from unembed.auditing.neighbours import find_neighbours
from unembed.auditing.scoring import ANY, EXACT, F1, Record, Scorer, figures
from unembed.auditing.sensitive import (
    Masker,
    PatternsAndPresidio,
    find_sensitive,
    make_finder,
    mask,
)
from unembed.encoders.pipeline import variant
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.metrics import Recovery, count_recovered, speller
from unembed.vectors.stores.store import StoreFacts

TEXT = (
    "Please call Maria Gonzalez at +1 415 555 0134 or write to maria.g@example.com before "
    "12 March 2026. The invoice INV-2026-0042 over $1,250.50 went to IBAN DE89 3704 0044 0532 "
    "0130 00; see https://example.com/x?y=1. Her card is 4111 1111 1111 1111, room 7."
)


def test_find_sensitive_finds_each_kind_once():
    assert find_sensitive(TEXT) == {
        "names": {"Maria", "Gonzalez"},
        "e-mail addresses": {"maria.g@example.com"},
        "phone numbers": {"+1 415 555 0134"},
        "URLs": {"https://example.com/x?y=1"},
        "identifiers": {"INV-2026-0042", "DE89 3704 0044 0532 0130 00", "4111 1111 1111 1111"},
        "amounts": {"$1,250.50"},
        "dates": {"12 March 2026"},
        "numbers": {"7"},
    }


@pytest.mark.parametrize(
    ("text", "kind", "span"),
    [
        ("due on 2026-03-12.", "dates", "2026-03-12"),
        ("due on 12.03.2026.", "dates", "12.03.2026"),
        ("due on March 3rd, 2026.", "dates", "March 3rd, 2026"),
        ("cost 1.200,00 € in all", "amounts", "1.200,00 €"),
        ("paid 30 dollars", "amounts", "30 dollars"),
        ("her SSN 078-05-1120", "identifiers", "078-05-1120"),
        ("from 192.168.0.1 today", "identifiers", "192.168.0.1"),
        ("ring (030) 1234-5678 now", "phone numbers", "(030) 1234-5678"),
    ],
)
def test_find_sensitive_knows_many_spellings(text, kind, span):
    assert find_sensitive(text)[kind] == {span}


@pytest.mark.parametrize("text", ["", "nothing here hurts", "It Is In The Of And", "the year"])
def test_find_sensitive_leaves_plain_words_alone(text):
    assert find_sensitive(text) == {}


def test_make_finder_says_what_it_uses():
    finder, named = make_finder(use_presidio=False)
    assert finder is find_sensitive
    assert named == "own patterns"


class Hit:
    def __init__(self, entity_type, start, end):
        self.entity_type, self.start, self.end = entity_type, start, end


class Analyzer:
    """Answers as Presidio does: kinds and places, some of them inside what patterns have."""

    def analyze(self, text, language, score_threshold):
        assert (language, score_threshold) == ("en", 0.4)
        places = {"PERSON": "maria weber", "DATE_TIME": "1111", "MEDICAL_LICENSE": "B12"}
        return [Hit(kind, text.index(s), text.index(s) + len(s)) for kind, s in places.items()]


def test_patterns_and_presidio_together_count_nothing_twice():
    text = "then maria weber, licence B12, paid by card 4111 1111 1111 1111"
    assert PatternsAndPresidio(Analyzer())(text) == {
        "names": {"maria", "weber"},
        "identifiers": {"4111 1111 1111 1111", "B12"},
    }


def test_count_recovered_compares_as_the_tokenizer_spells(minilm):
    spell = speller(minilm.tokenizer)
    spans = find_sensitive(TEXT)
    back = "call maria gonzales at maria. g @ example. com, $ 1, 250. 50 on march"
    counts = count_recovered(spans, back, spell)
    assert counts["names"] == (1, 2)
    assert counts["e-mail addresses"] == (1, 1)
    assert counts["amounts"] == (1, 1)
    assert counts["dates"] == (0, 1)
    assert counts["identifiers"] == (0, 3)


def test_masker_hides_spans_in_both_texts():
    masker = Masker(find_sensitive(TEXT))
    for text in (masker.text(TEXT), masker.text("maria gonzalez, 4155550134 room 8")):
        assert "aria" not in text.casefold()
        assert "onzalez" not in text
        assert re.search(r"\d", text) is None
    assert "Please call" in masker.text(TEXT)
    assert mask("Maria") == "M••••"


def test_masker_hides_first_names_at_the_beginning_of_a_sentence():
    spans = find_sensitive("Rosa Lindqvist called. The Lindqvist account is closed.")
    assert spans["names"] == {"Lindqvist"}
    masker = Masker(spans, names=["Kenji"])
    shown = masker.text("Rosa Lindqvist called. The Lindqvist account. Kenji wrote of a kenji.")
    assert shown == "R••• L•••••••• called. The L•••••••• account. K•••• wrote of a kenji."


def test_mask_leaves_the_first_letter():
    assert mask("2026-03") == "••••-••"


def test_scorer_takes_the_best_window_of_a_long_text(encoder):
    tokenizer = encoder.tokenizer
    ids = tokenizer.encode(["cat dog bird fish house river city road tree sun moon star"])[0]
    record = Record(0, "0", "x", ids, {})
    back = Recovery("", ids[8:12])
    assert Scorer(tokenizer, 4).measure(record, back)[F1] == 1.0
    assert Scorer(tokenizer, 4).measure(record, back)[EXACT] == 0.0
    assert Scorer(tokenizer, 50).measure(record, back)[F1] == pytest.approx(0.5)


def test_figures_counts_spans_and_gives_intervals():
    values = [{F1: k % 2, EXACT: 0.0, "names": (k % 2, 2)} for k in range(100)]
    table = figures(values, seed=0)
    assert table[F1].mean == 0.5
    assert table[F1].low < 0.5 < table[F1].high
    assert table["names"].mean == 0.25
    assert table["names"].n == table[ANY].n == 200
    assert table["dates"] is None
    assert figures(values, seed=0) == table
    assert figures([], seed=0) == {}


# Identity


def test_identify_names_the_encoder_and_its_prompt(encoder, inverter, texts):
    plain = identify(encoder.encode(texts), texts, inverter, encoder)
    assert (plain.verdict, plain.unit, plain.differs) == ("same", True, None)
    prompted = identify(
        3 * encoder.encode(["query: " + t for t in texts]), texts, inverter, encoder
    )
    assert prompted.verdict == "different"
    assert prompted.differs.startswith("prompt '")
    assert prompted.unit is False
    assert prompted.norms[1] == pytest.approx(3.0, abs=1e-3)


def test_identify_names_a_cut_of_texts_and_of_dimensions(encoder, inverter):
    words = "cat dog bird fish house river city road tree sun moon star rain snow".split()
    long = [
        " ".join(words[(row + k) % 7 + 7 * (k >= 32)] for k in range(60)) for row in range(20)
    ]  # other words behind the 32nd
    short = [" ".join(words[row : row + 3]) for row in range(10)]
    cut = [" ".join(text.split()[:32]) for text in long]
    texts = short * 3 + long
    result = identify(encoder.encode(short * 3 + cut), texts, inverter, encoder)
    assert result.verdict == "same"
    assert result.differs.startswith("for 16 of 32 texts: texts read up to 32 tokens (cosine 1.0")
    assert identify(encoder.encode(texts), texts, inverter, encoder).differs is None
    shorter = identify(encoder.encode(texts)[:, :20], texts, inverter, encoder)
    assert shorter.verdict == "different"
    assert shorter.differs == "the first 20 of 32 dimensions (cosine 1.000)"


def test_identify_says_what_it_tried_in_vain(encoder, inverter, texts):
    noise = np.random.default_rng(0).standard_normal((len(texts), 32)).astype(np.float32)
    result = identify(noise, texts, inverter, encoder)
    assert (result.verdict, result.differs) == ("different", None)
    assert "tried: 6 prompts, tokens, lower" in result.notes[0]


@pytest.mark.slow
def test_identify_names_another_pooling_and_prompt_of_a_real_encoder(inverter, minilm):
    texts = [f"The river of the {k}th city is long and its fish are old." for k in range(4)]
    model = variant(minilm.differentiable, "cls", None)
    vectors = model.encode([f"query: {text}" for text in texts])
    result = identify(vectors, texts, inverter, minilm)
    assert result.verdict == "different"
    assert result.differs.startswith("prompt 'query: ', pooling cls (cosine 1.0")


def test_identify_by_dimension(encoder, inverter):
    other = identify(np.ones((3, 1536), dtype=np.float32), None, inverter, encoder)
    assert other.verdict == "different"
    assert "text-embedding-3-small" in other.candidates


# Neighbours


def test_find_neighbours_sees_duplicates_across_groups_and_outliers(monkeypatch):
    generator = np.random.default_rng(0)
    near = generator.standard_normal(16)
    vectors = near + 0.3 * generator.standard_normal((40, 16))
    vectors[1] = vectors[0]
    vectors[3] = vectors[5]
    vectors[20] = -near
    ids = [str(row) for row in range(40)]
    groups = ["a"] * 3 + ["b"] * 37
    result = find_neighbours(ids, vectors.astype(np.float32), groups, None)
    pairs = {pair[:2] for pair in result.examples}
    assert {("0", "1"), ("3", "5")} <= pairs
    groups[1] = "b"
    again = find_neighbours(ids, vectors.astype(np.float32), groups, None)
    assert again.across == result.across + 1
    assert again.examples[0][:2] == ("0", "1")
    assert "20" in result.outliers
    assert result.members is None
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    assert find_neighbours(ids, vectors.astype(np.float32), groups, None) == again
    assert find_neighbours(["x"], vectors[:1].astype(np.float32), None, None).duplicates == 0


# Severity


def strongest(f1=0.0, hurt=0.0, exact=0.0, easy=True):
    table = {
        F1: Figure(f1, f1, f1, 50),
        EXACT: Figure(exact, exact, exact, 50),
        "names": Figure(hurt, hurt, hurt, 50),
        ANY: None,
    }
    return Strongest("inverter", "the vectors", table, {F1: 0.2, "names": 0.05}, easy)


@pytest.mark.parametrize(
    ("attack", "exposed", "severity"),
    [
        (strongest(f1=0.2), False, "none"),
        (strongest(f1=0.2), True, "none"),
        (strongest(f1=0.25), False, "low"),
        (strongest(f1=0.31), False, "medium"),
        (strongest(f1=0.31), True, "high"),
        (strongest(f1=0.31, easy=False), False, "low"),
        (strongest(hurt=0.16), False, "high"),
        (strongest(exact=0.05), False, "high"),
        (strongest(hurt=0.31), False, "critical"),
        (strongest(hurt=0.31), True, "critical"),
        (strongest(hurt=0.31, easy=False), False, "high"),
    ],
)
def test_inversion_severity_follows_its_rule(attack, exposed, severity):
    assert inversion_severity(attack, exposed)[0] == severity


def test_open_to_all_goes_by_what_was_observed():
    assert open_to_all(StoreFacts("redis", "x", authentication="none was needed"))
    assert open_to_all(StoreFacts("pgvector", "x", authentication="… every login (PUBLIC)"))
    assert not open_to_all(StoreFacts("file", "x", authentication="none: a folder"))


def test_the_identifiers_are_those_of_the_catalogues():
    ids = [i for group in INVERSION_IDS.values() for i in group]
    assert ids == list(dict.fromkeys(ids))
    for name in (
        "LLM09:2026",
        "LLM08:2025",
        "LLM02:2026",
        "v1.0-C8.2.1",
        "v1.0-C5.2.7",
        "v1.0-C11.1.3",
        "v1.0-C11.2.2",
        "AML.T0085.000",
        "AML.T0024.001",
        "NISTAML.032",
    ):
        assert name in ids
