"""The whole comparison on the fake encoder: rows, attackers, resuming, a user's own defence."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unembed
from unembed.defences import comparison as front
from unembed.defences.attackers import parse_attackers
from unembed.defences.comparison import defend
from unembed.defences.defence import Defence, parse_defence, unit
from unembed.defences.leak import F1
from unembed.defences.records import Queries, Records
from unembed.defences.report import picture, to_markdown, to_page, write_report
from unembed.defences.result import DefenceReport
from unembed.defences.utility import NDCG, OVERLAP, RECALL
from unembed.errors import ConfigError, DataError, UnembedError
from unembed.evaluation.cache import UNFINISHED

SMALL = {"held_out": 40, "pairs": (10, 80), "seed": 0}


@pytest.fixture(scope="module")
def report(records, inverter, encoder):
    """A few defences against all attackers but A2."""
    return defend(
        records,
        defences="rotation,gaussian:cosine=0.96,int8,binary:rerank=20,pii",
        to=inverter,
        encoder=encoder,
        **SMALL,
    )


def row(report, name):
    return next(r for r in report.rows if r.defence == name)


def test_defend_has_a_row_a_defence_and_a_figure_an_attacker(report):
    names = [r.defence for r in report.rows]
    assert names == ["none", "rotation", "gaussian", "int8", "binary:rerank=20", "pii"]
    assert list(report.attackers) == ["U", "A1", "R10", "R80", "L", "L+R80"]
    assert set(row(report, "rotation").leak) == set(report.attackers)
    assert set(row(report, "none").leak) == {"U", "L"}  # others have nothing to undo
    for each in report.rows:
        best = max(each.leak, key=lambda name: each.leak[name][F1].mean)
        assert each.strongest == best
        assert all(f.n == 40 for f in (table[F1] for table in each.leak.values()))


def test_defend_finds_a_rotation_at_the_floor_and_broken_by_pairs(report):
    plain, rotation = row(report, "none"), row(report, "rotation")
    assert plain.f1("U").low > report.floor
    assert rotation.f1("U").low <= report.floor
    assert rotation.f1("R80").mean == pytest.approx(plain.f1("U").mean, abs=0.02)
    assert rotation.utility[OVERLAP].mean == 1.0
    assert rotation.loss.mean == 0.0
    assert rotation.secret and not plain.secret


def test_defend_finds_nothing_changed_by_int8(report):
    int8, plain = row(report, "int8"), row(report, "none")
    assert int8.f1("U").mean == pytest.approx(plain.f1("U").mean, abs=0.02)
    assert int8.cosine > 0.999
    assert int8.gain.low <= 0
    assert (plain.bytes_each, int8.bytes_each, row(report, "binary:rerank=20").bytes_each) == (
        128,
        32,
        4,
    )


def test_defend_says_who_is_named_by_a_corpus_that_has_the_text(report):
    assert row(report, "none").identification.mean == 1.0
    assert row(report, "rotation").identifier == "R80"


def test_defend_is_the_same_for_the_same_seed(report, records, inverter, encoder):
    again = defend(records, defences="rotation", to=inverter, encoder=encoder, **SMALL)
    one, other = row(report, "rotation"), row(again, "rotation")
    assert replace(one, milliseconds=0.0) == replace(other, milliseconds=0.0)


@dataclass
class Halved(Defence):
    """Keeps every other number."""

    offset: int = 0

    def apply(self, vectors, random):
        return vectors[:, self.offset :: 2]


def test_defend_takes_defences_as_objects(records, inverter):
    report = defend(records, defences=[Halved(offset=1)], to=inverter, **SMALL)
    plain, halved = report.rows
    assert (plain.defence, halved.defence) == ("none", "Halved:offset=1")
    assert halved.cosine is None and halved.bytes_each == 64


def test_the_documented_defence_appears_in_the_table(records, inverter, tmp_path):
    page = Path(__file__).parents[2].joinpath("docs", "defences.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class " in c]
    assert len(code.splitlines()) <= 30
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    report = defend(records, defences=f"{tmp_path}/mine.py:SignFlip", to=inverter, **SMALL)
    flipped = row(report, "SignFlip")
    assert flipped.secret and flipped.about.startswith("Secret signs")
    assert flipped.utility[OVERLAP].mean == 1.0
    assert "| SignFlip |" in to_markdown(report)


def test_defend_takes_a_users_own_defence_from_a_file(records, inverter, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import unembed\n\n\nclass Negative(unembed.Defence):\n"
        '    """Vectors turned round."""\n\n'
        "    def apply(self, vectors, random):\n        return -vectors\n"
    )
    path = f"{tmp_path}/mine.py:Negative"
    report = defend(records, defences=path, to=inverter, **SMALL)
    assert [r.defence for r in report.rows] == ["none", "Negative"]
    assert row(report, "Negative").about == "Vectors turned round."
    assert row(report, "Negative").f1("A1").mean > row(report, "Negative").f1("U").mean


def test_defend_finds_a_users_fault_before_anything_is_decoded(records, inverter, tmp_path):
    class Narrow(Defence):
        def apply(self, vectors, random):
            return vectors[:, :9]

        def query(self, vectors):
            return vectors

    message = r"Narrow to give 160 finite queries of 9 numbers; found shape \[160, 32\]"
    with pytest.raises(ConfigError, match=message):
        defend(records, defences=[Narrow()], to=inverter, folder=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda v: v[:5], "Broken to give 160 finite vectors; found shape [5, 32]"),
        (lambda v: v * np.nan, "finite vectors"),
        (lambda v: v.nothing, "Broken to be applied; found AttributeError"),
    ],
)
def test_defend_says_what_is_wrong_with_a_users_defence(records, inverter, fault, message):
    class Broken(Defence):
        def apply(self, vectors, random):
            return fault(vectors)

    with pytest.raises(ConfigError, match=re.escape(message)):
        defend(records, defences=[Broken()], to=inverter, **SMALL)


class _KilledError(Exception):
    pass


@pytest.mark.slow
def test_defend_goes_on_where_it_was_killed(records, inverter, encoder, tmp_path, monkeypatch):
    arguments = {"defences": "rotation,binary", "to": inverter, "encoder": encoder, **SMALL}
    whole = defend(records, **arguments)
    decoded = 0
    invert = type(inverter).invert

    def counted(self, vectors, **options):
        nonlocal decoded
        decoded += len(vectors)
        return invert(self, vectors, **options)

    monkeypatch.setattr(type(inverter), "invert", counted)

    def killing(stage, done, total):
        if decoded > 150:
            raise _KilledError

    with pytest.raises(_KilledError):
        defend(records, folder=tmp_path, progress=killing, **arguments)
    assert (tmp_path / UNFINISHED).stat().st_mode & 0o777 == 0o700
    before, decoded = decoded, 0
    again = defend(records, folder=tmp_path, **arguments)
    assert before >= 160
    assert decoded < 9 * 40 - 120  # what was finished is read
    assert not (tmp_path / UNFINISHED).exists()
    for one, other in zip(whole.rows, again.rows, strict=True):
        assert replace(one, milliseconds=0.0) == replace(other, milliseconds=0.0)


def test_defend_decodes_equal_estimates_once(records, inverter, monkeypatch):
    decoded = []
    invert = type(inverter).invert
    monkeypatch.setattr(
        type(inverter), "invert", lambda s, v, **o: decoded.append(len(v)) or invert(s, v, **o)
    )
    defend(records, defences="binary,binary:rerank=50", attackers="U", to=inverter, **SMALL)
    assert sorted(decoded) == [1, 40, 40]  # the floor's one text, undefended, the codes


def test_defend_with_labels_decides_by_ndcg(records, inverter):
    pytest.importorskip("ir_measures")
    rows = list(range(0, 60))
    noise = 0.5 * np.random.default_rng(0).standard_normal((60, 32)) / np.sqrt(32)
    labels = [frozenset([records.ids[i]]) for i in rows]
    queries = Queries(unit(records.vectors[rows] + noise), labels)
    report = defend(
        records, queries=queries, defences="binary", attackers="U", to=inverter, **SMALL
    )
    assert report.metric == NDCG
    plain, binary = report.rows
    assert binary.utility[NDCG].mean < plain.utility[NDCG].mean <= 1.0
    assert plain.utility[NDCG].mean <= plain.utility[RECALL].mean
    ratio = binary.utility[NDCG].mean / plain.utility[NDCG].mean
    assert binary.loss.mean == pytest.approx(1.0 - ratio)
    assert binary.loss.low < binary.loss.mean < binary.loss.high


@pytest.mark.slow
def test_defend_retrains_on_defended_vectors(records, inverter, tmp_path):
    report = defend(
        records,
        defences="rotation",
        attackers="U,A2",
        minutes=0.02,
        to=inverter,
        folder=tmp_path,
        **SMALL,
    )
    assert "A2" in row(report, "rotation").leak
    assert "A2" not in row(report, "none").leak
    assert "0.02 minutes of processor time" in report.attackers["A2"]


# What is refused


def test_defend_refuses_what_it_cannot_measure(records, inverter):
    few = Records(records.ids[:5], records.texts[:5], records.vectors[:5])
    with pytest.raises(DataError, match="at least 8 records"):
        defend(few, to=inverter)
    cut = Records(records.ids, records.texts, records.vectors[:, :7])
    with pytest.raises(DataError, match="vectors of 32 dimensions"):
        defend(cut, to=inverter)
    with pytest.raises(ConfigError, match="budget as a number from 0 to 1; found 2"):
        defend(records, budget=2, to=inverter)
    with pytest.raises(ConfigError, match="the encoder, to embed texts again for pii"):
        defend(records, defences="pii", attackers="U", to=inverter, **SMALL)
    nobody = Queries(records.vectors[:2], [frozenset(["x"]), frozenset(["y"])])
    with pytest.raises(DataError, match="queries whose `relevant` names ids of records"):
        defend(records, queries=nobody, to=inverter, **SMALL)
    with pytest.raises(ConfigError, match=r"minutes as a number .*found nan"):
        defend(records, minutes=float("nan"), to=inverter, **SMALL)


def test_defend_notes_what_cannot_run_of_all(records, inverter, monkeypatch):
    short = [parse_defence("none"), parse_defence("pii")]
    monkeypatch.setattr(front, "as_defences", lambda text: short)
    report = defend(records, defences="all", attackers="U", to=inverter, **SMALL)
    assert [r.defence for r in report.rows] == ["none"]
    assert any(note.startswith("pii: not measured, expected the encoder") for note in report.notes)


def test_parse_attackers_knows_all_and_a2():
    assert parse_attackers("all,A2") == ["U", "A1", "R", "L", "A2"]
    with pytest.raises(ConfigError, match="attackers of U, A1, A2, R, L or all; found 'Z'"):
        parse_attackers("Z")


# The report


def test_recommendation_names_the_conditions(report):
    first, second = report.recommendation()
    assert first.startswith("Within 2% of top-10 overlap")
    assert "rotation" in second and "lookup with 80 leaked pairs" in second


def test_recommendation_says_that_no_pairs_were_tried(records, inverter):
    report = defend(records, defences="rotation", attackers="U", to=inverter, **SMALL)
    assert "nobody was asked who knows texts with" in report.recommendation()[1]
    assert not any("pairs" in note for note in report.notes)


def test_recommendation_where_nothing_is_within_the_budget(report):
    tight = replace(report, rows=[report.rows[0]])
    assert isinstance(tight, DefenceReport)
    assert (
        tight.recommendation()[0] == "No defence of those tried stays within 2% of top-10 overlap."
    )


def test_to_page_needs_no_script_and_escapes_names(report):
    odd = replace(report, rows=[report.rows[0], replace(report.rows[1], defence="<script>x")])
    page = to_page(odd)
    assert "<script" not in page and "&lt;script&gt;x" in page
    assert page.count('class="point"') == 2
    assert "default-src 'none'" in page


def test_picture_shares_a_label_among_points_that_coincide(report):
    rows = [replace(report.rows[1], defence=f"<{i}>" * 40) for i in range(9)]
    text = "".join(picture(replace(report, rows=[report.rows[0], *rows])))
    assert text.count('class="point"') == 10
    assert text.count("&lt;4&gt;") == 40 and "&lt;5&gt;" not in text and "and 4 more</text>" in text


def test_to_markdown_has_every_row_and_what_is_not_protected(report):
    text = to_markdown(report)
    for each in report.rows:
        assert f"| {each.defence}" in text.replace("\\", "")
    assert "What none of this protects against" in text


def test_write_report_writes_no_secret(report, tmp_path):
    paths = write_report(report, tmp_path / "out")
    assert [p.name for p in paths] == ["report.html", "report.md", "report.json"]
    assert "matrix" not in (tmp_path / "out" / "report.json").read_text()


def test_the_front_door_has_defend():
    assert unembed.defend is defend and unembed.Defence is Defence


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"defences": None}, "defences, or their names; found NoneType"),
        ({"defences": [parse_defence("int8"), parse_defence("int8")]}, "int8 twice"),
        ({"defences": [Defence]}, "a defence, or its name; found .*Make one of it"),
        ({"defences": [3]}, "a defence, or its name; found 3"),
        ({"attackers": None}, "attackers of U, A1, A2, R, L or all; found None"),
        ({"pairs": 3}, "pairs as some whole numbers; found 3"),
        ({"pairs": []}, "pairs as some whole numbers; found none"),
        ({"pairs": "10"}, "pairs as some whole numbers"),
        ({"pairs": [8, 1.5]}, r"pairs\[1\] as a whole number"),
        ({"pairs": [True]}, r"pairs\[0\] as a whole number"),
        ({"budget": "a"}, "budget as a number from 0 to 1; found 'a'"),
        ({"budget": True}, "budget as a number from 0 to 1"),
        ({"overlap": None}, "overlap as a number from 0 to 1"),
        ({"minutes": float("nan")}, "minutes as a number"),
        ({"held_out": 2.0}, "held_out as a whole number"),
        ({"corpus": 3}, "corpus as a path"),
        ({"corpus_column": 3}, "corpus_column as text"),
        ({"to": 3}, "an inverter; found int 3"),
        ({"encoder": 3}, "an encoder, or its name"),
        ({"decoding": 3}, "a Decoding, or the text of one"),
        ({"decoding": "best-of:encoder_calls=2"}, "no encoder"),
        ({"seed": -1}, "seed as a whole number"),
        ({"folder": 3}, "folder as a path"),
        ({"progress": 3}, "progress as a function"),
        ({"queries": ["a question"]}, "queries; found list"),
        ({"queries": Queries(np.ones((2, 9)))}, "dimensions"),
        ({"queries": Queries(np.ones((0, 32)))}, "queries; found none"),
        ({"queries": Queries(np.ones((2, 32)), [{"r1"}])}, "one relevant for each query"),
        ({"queries": Queries(np.ones((2, 32)), 3)}, "relevant in a list; found int 3"),
        ({"queries": Queries(np.ones((2, 32)), None, [0, 160])}, "own: rows of 160 records"),
    ],
)
def test_defend_refuses_settings_of_another_kind(records, inverter, setting, message):
    with pytest.raises(UnembedError, match=message):
        defend(records, **{"defences": "int8", "to": inverter, **setting})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "records with a text and a vector each; found NoneType"),
        (lambda r: r.vectors, "records with a text and a vector each; found ndarray"),
        (lambda r: replace(r, texts=r.texts[:-1]), "160 ids, 159 texts and 160 vectors"),
        (lambda r: replace(r, texts=[None, *r.texts[1:]]), "no text at 0"),
        (lambda r: replace(r, texts=None), "texts of records in a list; found NoneType"),
        (lambda r: replace(r, ids=3), "ids of records in a list; found int 3"),
        (lambda r: replace(r, texts=[*r.texts[:-1], r.texts[0]]), "text of a row before at 159"),
        (lambda r: replace(r, vectors=r.vectors * np.nan), "NaN or infinity in vector 0"),
        (lambda r: replace(r, vectors=r.vectors[0]), r"found shape \[32\]"),
    ],
)
def test_defend_refuses_records_that_are_none(records, inverter, change, message):
    with pytest.raises(UnembedError, match=message):
        defend(change(records), defences="int8", to=inverter)


def test_defend_takes_vectors_of_any_kind_and_names_in_a_list(records, inverter, tmp_path):
    plain = defend(records, defences="int8", attackers="U", to=inverter, **SMALL)
    others = [
        replace(records, vectors=3 * torch.from_numpy(records.vectors).double()),
        replace(
            records, vectors=records.vectors.astype(">f8").tolist(), texts=tuple(records.texts)
        ),
    ]
    for other in others:
        report = defend(
            other,
            defences=["int8"],
            attackers=["U"],
            to=inverter,
            folder=str(tmp_path),
            progress=None,
            **{**SMALL, "pairs": np.array([80, 10]), "held_out": np.int64(40)},
        )
        assert report.settings == plain.settings
        for one, two in zip(report.rows, plain.rows, strict=True):
            assert one.f1().mean == pytest.approx(two.f1().mean, abs=0.02)


class InPlace(Defence):
    """Changes what it is given."""

    def apply(self, vectors, random):
        """Halve the vectors where they stand."""
        vectors *= 0.5
        return vectors


class Rewriter(Defence):
    """Gives other texts than it should."""

    def __init__(self, texts):
        self.texts = texts

    def rewrite(self, texts):
        """Whatever it was told to."""
        return self.texts

    def apply(self, vectors, random):
        """The same vectors."""
        return vectors


class Nothing(Defence):
    """Leaves no number."""

    def apply(self, vectors, random):
        """Rows without numbers."""
        return vectors[:, :0]


class Loud(InPlace):
    """Noise of no number."""

    def apply(self, vectors, random):
        """The same vectors."""
        return vectors

    def sigma(self, dimension):
        """No number."""
        return "much"


@pytest.mark.parametrize(
    ("defence", "message"),
    [
        (InPlace(), "InPlace to be applied; found ValueError: .*read-only"),
        (Rewriter([3]), "Rewriter to give a text for each of 1"),
        (Rewriter([]), "Rewriter to give a text for each of 1"),
        (Rewriter("a text"), "Rewriter to give a text for each of 1"),
        (Nothing(), r"Nothing to give .* finite vectors; found shape \[160, 0\]"),
        (Loud(), "sigma as a number of at least 0; found 'much'"),
    ],
)
def test_defend_lets_no_defence_spoil_the_rows_of_others(
    records, inverter, encoder, defence, message
):
    before = records.vectors.copy()
    with pytest.raises(ConfigError, match=message):
        defend(records, defences=[defence], to=inverter, encoder=encoder, **SMALL)
    assert (records.vectors == before).all()


def test_defend_report_is_written_for_a_report_only(tmp_path):
    with pytest.raises(DataError, match="the report of defend; found None"):
        write_report(None, tmp_path)
