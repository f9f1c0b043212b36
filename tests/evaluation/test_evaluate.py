import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from unembed.data.pairs import Pairs
from unembed.decoding import Decoding
from unembed.denoiser import Denoiser
from unembed.encoders.base import FakeEncoder
from unembed.errors import ConfigError, DataError, EncoderError
from unembed.evaluation.evaluate import evaluate, groups_of
from unembed.evaluation.metrics import ESSENTIAL, METRICS, token_set_f1
from unembed.evaluation.samples import Passage, Sample, cutting

GREEDY = {
    "decoding": "greedy:steps=3",
    "strategy": "greedy",
    "steps": 3,
    "encoder_calls": 0,
    "options": {"order": "confidence", "lengths": 1},
    "guidance": None,
    "repetition": 2.0,
    "length": None,
    "limit": None,
    "threat_model": "vector only",
}
BASELINES = ["shuffled embedding", "no embedding", "nearest training text", "random tokens"]


def test_evaluate_a_perfect_inverter_scores_one_and_the_shuffled_control_does_not(
    lookup, encoder, passages, pieces
):
    report = evaluate(lookup, encoder, passages, limit=None)
    perfect = report.rows["inverter"]
    assert {name: perfect[name].mean for name in ESSENTIAL} == pytest.approx(
        dict.fromkeys(ESSENTIAL, 1.0), abs=1e-6
    )
    shuffled = report.rows["shuffled embedding"]
    assert shuffled["exact match"].mean == 0.0
    for name in ESSENTIAL:
        assert shuffled[name].high < 0.9
        assert shuffled[name].n == perfect[name].n == len(pieces)


def test_evaluate_the_shuffled_control_is_the_recovery_of_derangement(
    lookup, encoder, passages, pieces
):
    report = evaluate(lookup, encoder, passages, limit=None)
    ids = [piece.token_ids for piece in pieces]
    half = len(ids) // 2
    others = ids[-half:] + ids[:-half]
    by_hand = [token_set_f1(a, b) for a, b in zip(ids, others, strict=True)]
    figure = report.rows["shuffled embedding"]["token-set F1"]
    assert figure.mean == pytest.approx(np.mean(by_hand))


def test_evaluate_an_empty_recovery_has_no_cosine(lookup_of, encoder, passages, pieces):
    half = [piece.text for piece in pieces[::2]]
    inverter = lookup_of(half)
    report = evaluate(inverter, encoder, passages, limit=None)
    row = report.rows["inverter"]
    assert row["cosine"].n == len(half)
    assert row["cosine"].mean == pytest.approx(1.0, abs=1e-6), "an empty text is not a zero"
    assert row["exact match"].n == len(pieces)
    assert row["exact match"].mean == pytest.approx(len(half) / len(pieces))
    assert [example.cosine is None for example in report.examples[:4]] == [
        False,
        True,
        False,
        True,
    ]
    assert report.examples[1].recovered == ""


def test_evaluate_an_inverter_that_recovers_nothing_has_no_cosine_at_all(
    lookup_of, encoder, passages
):
    report = evaluate(lookup_of([]), encoder, passages)
    assert report.rows["inverter"]["token-set precision"] is None
    assert report.rows["inverter"]["cosine"] is None
    assert report.rows["inverter"]["token accuracy"].mean == 0.0
    assert json.loads(json.dumps(report.to_dict()))["rows"]["inverter"]["cosine"] is None


def test_the_nearest_training_text_is_a_row_of_its_own(lookup, encoder, passages, pairs_folder):
    report = evaluate(lookup, encoder, passages, train_pairs=Pairs.open(pairs_folder))
    row = report.rows["nearest training text"]
    assert row["exact match"].mean == 1.0, "the pairs hold these very texts"
    assert row["cosine"].mean == pytest.approx(1.0, abs=1e-3)
    assert report.notes == []


def test_evaluate_every_table_has_every_control(lookup, encoder, passages, pairs_folder):
    texts = [Passage(text, {"domain": ("a", "b")[i % 2]}) for i, text in enumerate(passages)]
    report = evaluate(lookup, encoder, texts, train_pairs=Pairs.open(pairs_folder))
    assert list(report.rows) == ["inverter", *BASELINES]
    assert list(report.breakdowns) == ["length", "domain"]
    for groups in report.breakdowns.values():
        for group in groups.values():
            assert list(group) == list(report.rows)
    for row in report.rows.values():
        assert list(row) == list(METRICS)
    assert report.rows["random tokens"]["passes"] is None, "it makes none, which is not 0"
    assert report.rows["nearest training text"]["calibration error"] is None
    blind = report.rows["no embedding"]
    assert blind["token-set recall"].high < report.rows["inverter"]["token-set recall"].low


def test_groups_add_up_to_the_whole(lookup_of, encoder, passages, pieces):
    texts = [Passage(text, {"lang": "ab"[i % 2]}) for i, text in enumerate(passages)]
    inverter = lookup_of([piece.text for piece in pieces[::3]])
    report = evaluate(inverter, encoder, texts, limit=None)
    whole = report.rows["inverter"]["token-set F1"]
    for groups in report.breakdowns.values():
        figures = [group["inverter"]["token-set F1"] for group in groups.values()]
        assert sum(figure.n for figure in figures) == whole.n == len(pieces)
        total = sum(figure.n * figure.mean for figure in figures)
        assert total / whole.n == pytest.approx(whole.mean)
    assert list(report.breakdowns["lang"]) == ["a", "b"]


OTHER_ROWS = {*BASELINES} - {"nearest training text"}


@pytest.mark.parametrize(
    ("tokens", "group"),
    [(1, "1-3"), (4, "4-8"), (8, "4-8"), (9, "9-16"), (17, "17-24"), (32, "25-32"), (33, "33-")],
)
def test_groups_of_length(tokens, group):
    assert list(groups_of(Sample("", [1] * tokens, {}))) == [("length", group)]


def test_evaluate_many_domains_share_a_last_group(lookup, encoder, passages, monkeypatch):
    monkeypatch.setattr("unembed.evaluation.evaluate._MOST_GROUPS", 3)
    texts = [Passage(text, {"domain": f"d{i:02}"}) for i, text in enumerate(passages)]
    report = evaluate(lookup, encoder, texts, limit=None)
    groups = list(report.breakdowns["domain"])
    assert len(groups) == 4
    assert groups[-1] == "others"


def test_evaluate_a_costly_strategy_may_be_tried_on_fewer_texts(
    lookup, encoder, passages, tmp_path
):
    specs = ["best-of:samples=1:encoder_calls=1:limit=6", "greedy", "greedy:limit=6"]
    texts = [Passage(text, {"domain": f"d{i % 3}"}) for i, text in enumerate(passages)]
    report = evaluate(lookup, encoder, texts, limit=30, strategy=specs, folder=tmp_path)
    decoded = [count for count, options in lookup.calls if options["decoding"].name == "best-of"]
    assert sum(decoded) == 6
    counts = {name: row["token accuracy"].n for name, row in report.rows.items()}
    assert counts == {specs[0]: 6, "greedy": 30, specs[2]: 6, **dict.fromkeys(OTHER_ROWS, 30)}
    shown = {name: {e.index for e in report.examples if e.row == name} for name in specs}
    assert shown[specs[0]] == shown[specs[2]] and len(shown[specs[0]]) == 6
    assert shown["greedy"] == set(range(30))
    for row in (specs[0], "greedy"):
        of_groups = [group[row]["cosine"] for group in report.breakdowns["domain"].values()]
        assert sum(figure.n for figure in of_groups if figure is not None) == counts[row]
    again = evaluate(lookup, encoder, texts, limit=30, strategy=specs, folder=tmp_path)
    assert again == report, "what is on the disk is not decoded again"


def test_without_training_pairs_the_report_says_what_is_missing(lookup, encoder, passages):
    report = evaluate(lookup, encoder, passages)
    assert set(report.rows) == {"inverter", *BASELINES} - {"nearest training text"}
    assert report.rows["inverter"]["informative recall"] is None
    rarity, nearest = report.notes
    assert rarity.startswith("informative recall: not measured, the training corpus is not known")
    assert nearest == "nearest training text: not measured, no training pairs were given"


def test_several_strategies_are_rows_of_their_own(inverter, encoder, passages):
    specs = ["greedy:steps=2", Decoding(steps=5)]
    report = evaluate(inverter, encoder, passages, limit=20, strategy=specs)
    assert list(report.rows)[:2] == ["greedy:steps=2", "greedy:steps=5"]
    assert [report.rows[name]["passes"].mean for name in list(report.rows)[:2]] == [2.0, 5.0]
    assert report.settings["attacks"]["greedy:steps=5"]["threat_model"] == "vector only"
    assert len(report.examples) == 40
    one = evaluate(inverter, encoder, passages, limit=20, steps=5)
    for metric in ESSENTIAL:
        assert one.rows["inverter"][metric] == report.rows["greedy:steps=5"][metric]


def test_evaluate_hands_the_encoder_only_to_an_attack_that_may_call_it(lookup, encoder, passages):
    calling = Decoding.of("guided-search", encoder_calls=7, beam=2)
    report = evaluate(lookup, encoder, passages, limit=10, strategy=[calling, "greedy"])
    calls = [options for _, options in lookup.calls]
    allowed = [options for options in calls if options["decoding"] == calling]
    assert len(allowed) == 1, "the baselines are decoded by greedy"
    assert allowed[0]["encoder"] is encoder
    assert report.settings["controls_decoded_by"]["strategy"] == "greedy"
    assert report.settings["threat_model"] == "vector + encoder"
    rest = [options for options in calls if options["decoding"] == Decoding()]
    assert rest and all(options["encoder"] is None for options in rest)


def test_evaluate_without_the_libraries_their_metrics_are_missing(
    lookup, encoder, passages, monkeypatch
):
    for name in ("sacrebleu.metrics.bleu", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    report = evaluate(lookup, encoder, passages, limit=10)
    row = report.rows["inverter"]
    missing = [name for name in METRICS if row[name] is None]
    assert {"BLEU (sentence)", "BLEU (corpus)", "ROUGE-L"} <= set(missing)
    assert "exact match" not in missing
    assert "BLEU: not measured, sacrebleu is not installed" in report.notes[0]
    assert "ROUGE-L: not measured, rouge-score is not installed" in report.notes[1]


def test_evaluate_a_perfect_inverter_has_a_perfect_bleu(lookup, encoder, passages):
    row = evaluate(lookup, encoder, passages).rows["inverter"]
    assert row["BLEU (corpus)"].mean == pytest.approx(100.0)
    assert row["ROUGE-L"].mean == 1.0
    assert row["calibration error"].mean == pytest.approx(0.0)
    assert row["length error"].mean == row["length bias"].mean == 0.0
    assert row["milliseconds"].mean > 0.0


def test_evaluate_the_report_says_how_it_was_made(lookup, encoder, passages):
    report = evaluate(lookup, encoder, passages, limit=10, steps=3, seed=5)
    assert report.settings == {
        "texts": 10,
        "encoder": encoder.identity.to_dict(),
        "strategy": "greedy",
        "passes": 1,
        "seed": 5,
        "threat_model": "vector only",
        "encoder_calls": 0,
        "attacks": {"inverter": GREEDY},
        "controls_decoded_by": GREEDY,
        "bootstrap_resamples": 1000,
        "vectors": "embedded here",
    }
    assert len(report.examples) == 10
    assert all(options["decoding"] == Decoding(steps=3) for _, options in lookup.calls)


def test_evaluate_the_sample_is_that_of_the_seed(lookup, encoder, passages, pieces):
    def originals(seed):
        report = evaluate(lookup, encoder, passages, limit=10, seed=seed)
        return [example.original for example in report.examples]

    assert originals(0) == originals(0)
    assert originals(0) != originals(1)
    every = [piece.text for piece in pieces]
    assert len(set(originals(0)) & set(every)) == 10
    assert originals(0) == sorted(originals(0), key=every.index)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_evaluate_a_generous_limit_takes_every_piece(lookup, encoder, passages, pieces, limit):
    report = evaluate(lookup, encoder, passages, limit=limit)
    assert [example.original for example in report.examples] == [piece.text for piece in pieces]


def test_evaluate_texts_are_cut_as_in_training(lookup, encoder, tiny_config):
    lookup.trained["config"]["data"]["pack"] = 0.0
    lookup.trained["config"]["data"]["min_tokens"] = 4
    report = evaluate(lookup, encoder, ["the cat sleeps. a dog runs. is it."])
    assert [example.original for example in report.examples] == ["the cat sleeps.", "a dog runs."]


@pytest.mark.parametrize("texts", [[], ["", "no."], ["the cat sleeps."]])
def test_evaluate_fewer_than_two_pieces_are_refused(lookup, encoder, texts):
    with pytest.raises(DataError, match="at least 2 pieces of 3 tokens or more"):
        evaluate(lookup, encoder, texts)


def test_evaluate_another_encoder_is_refused(lookup, passages):
    with pytest.raises(EncoderError, match="vectors of the encoder fake"):
        evaluate(lookup, FakeEncoder(dimension=16), passages)
    assert lookup.calls == []


def test_training_pairs_of_another_encoder_are_refused(lookup, encoder, passages, pairs_folder):
    manifest = pairs_folder / "manifest.json"
    text = manifest.read_text(encoding="utf-8").replace(encoder.identity.weights_digest, "0" * 64)
    manifest.write_text(text, encoding="utf-8")
    with pytest.raises(EncoderError, match="training pairs of the encoder fake"):
        evaluate(lookup, encoder, passages, train_pairs=Pairs.open(pairs_folder))


def test_evaluate_progress_reaches_the_total_of_every_stage(
    lookup, encoder, passages, pieces, pairs_folder
):
    last = {}

    def note(stage, done, total):
        last[stage] = (done, total)

    pairs = Pairs.open(pairs_folder)
    evaluate(lookup, encoder, passages, train_pairs=pairs, limit=None, progress=note)
    assert last == {
        "cutting the texts": (len(passages), 0),
        **dict.fromkeys(["inverter", *BASELINES], (len(pieces), len(pieces))),
        "searching the training texts": (len(pairs), len(pairs)),
    }


def test_evaluate_a_real_inverter_beats_its_shuffled_control(inverter, encoder, passages):
    report = evaluate(inverter, encoder, passages, limit=60, steps=4)
    found, chance = report.rows["inverter"], report.rows["shuffled embedding"]
    assert found["token-set F1"].mean > chance["token-set F1"].high
    assert found["cosine"].low > chance["cosine"].high
    again = evaluate(inverter, encoder, passages, limit=60, steps=4)
    assert again.examples == report.examples
    for name, row in again.rows.items():
        same = {k: v for k, v in row.items() if k != "milliseconds"}
        assert same == {k: v for k, v in report.rows[name].items() if k != "milliseconds"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": ["the cat runs.", None]}, DataError, "a text; found None at position 1"),
        ({"texts": [3.5, "the cat runs."]}, DataError, "a text; found 3.5 at position 0"),
        ({"strategy": 3}, ConfigError, "a Decoding, or the text of one; found int"),
        ({"strategy": ["greedy", None, 3]}, ConfigError, "a Decoding, or the text of one"),
        ({"inverter": 3}, ConfigError, "an inverter; found int 3"),
        ({"texts": 3}, DataError, "a list of texts; found int 3"),
        ({"texts": None}, DataError, "a list of texts; found NoneType"),
        ({"folder": 3}, ConfigError, "folder as a path; found 3"),
        ({"progress": 3}, ConfigError, "progress as a function; found 3"),
        ({"train_pairs": "pairs"}, ConfigError, "train_pairs as pairs; found 'pairs'"),
        ({"limit": "a"}, ConfigError, "limit as a whole number of at least 1; found 'a'"),
        ({"limit": 0}, ConfigError, "limit as a whole number of at least 1; found 0"),
        ({"seed": 1.5}, ConfigError, "seed as a whole number of at least 0; found 1.5"),
        ({"corpus": "x"}, ConfigError, "corpus as pairs; found 'x'.*Pairs.open"),
    ],
)
def test_evaluate_refuses_what_is_of_another_kind(lookup, encoder, arguments, error, message):
    given = {"inverter": lookup, "encoder": encoder, "texts": ["the cat runs.", "a dog eats."]}
    with pytest.raises(error, match=message):
        evaluate(**(given | arguments))


@pytest.mark.parametrize("strategy", [[], ["greedy", "greedy"]])
def test_evaluate_strategies_must_differ(lookup, encoder, passages, strategy):
    with pytest.raises(ConfigError, match="different strategies"):
        evaluate(lookup, encoder, passages, strategy=strategy)


@pytest.mark.parametrize("wrong", ["greeedy", "greedy:order=best", "euler:top_p=2"])
def test_evaluate_a_wrong_strategy_is_refused_before_any_is_tried(
    inverter, encoder, passages, wrong
):
    said = []
    with pytest.raises(ConfigError):
        evaluate(
            inverter,
            encoder,
            passages,
            strategy=["greedy", wrong],
            progress=lambda *stage: said.append(stage),
        )
    assert said == []


def test_cutting_is_that_of_training_or_of_a_prefix_or_as_long_as_asked(inverter):
    trained = inverter.trained["config"]["data"]
    assert cutting(inverter).model_dump() == trained
    assert cutting(inverter, 6).length == 7
    assert (cutting(inverter, 2).length, cutting(inverter, 2).min_tokens) == (3, 2)
    for wrong in (12, 0, 2.5, "3"):
        with pytest.raises(ConfigError, match=r"max_tokens as a .*Correct max_tokens"):
            cutting(inverter, wrong)
    other = copy.copy(inverter)
    other.denoiser = Denoiser(replace(inverter.denoiser.sizes, prefix=8))
    assert (cutting(other).length, cutting(other, 11).length) == (8, 12)


def test_evaluate_measures_pieces_of_at_most_so_many_tokens(lookup, encoder, passages):
    report = evaluate(lookup, encoder, passages, max_tokens=5, limit=None)
    assert set(report.breakdowns["length"]) <= {"1-3", "4-8"}
