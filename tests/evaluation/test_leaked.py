"""Leaked pairs: what is read and what is counted, the map they give, and the curve."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed import evaluate
from unembed.data.pairs import Pairs
from unembed.encoders.alignment import RIDGE
from unembed.encoders.fingerprint import PROBES
from unembed.encoders.vectors import typical_rows
from unembed.errors import DataError, EmbeddingError, EncoderError, UnembedError
from unembed.evaluation.leaked import (
    CONSTANT,
    NOISE,
    OWN,
    LeakedPairs,
    align_curve,
    align_pairs,
)
from unembed.evaluation.metrics import word_f1
from unembed.evaluation.report.plots import curve_table, write_curve

UNSEEN = 40  # dimensions of the encoder nobody trained for


def unseen(encoder, texts, noise=0.01, seed=0):
    """Vectors of another encoder: the fake one's, turned, moved, with noise, of another length."""
    turn = np.random.default_rng(1).standard_normal((encoder.identity.dimension, UNSEEN))
    rows = encoder.encode(texts) @ turn / np.sqrt(UNSEEN) + 0.2
    rows = rows + noise * np.random.default_rng(seed).standard_normal(rows.shape)
    return 3.0 * rows.astype(np.float64)


def write(path, texts, vectors, **columns):
    """A file of pairs by its suffix."""
    rows = [list(map(float, v)) if v is not None else None for v in vectors]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "embedding": rows, **columns}), path)
    else:
        lines = [json.dumps({"text": t, "embedding": v}) for t, v in zip(texts, rows, strict=True)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(pieces):
    return [piece.text for piece in pieces]


@pytest.fixture
def halves(texts, encoder, tmp_path):
    """Two files of pairs of the unseen encoder, without a text in common."""
    leaked, held_out = texts[::2], texts[1::2]
    write(tmp_path / "leaked.parquet", leaked, unseen(encoder, leaked))
    write(tmp_path / "held-out.jsonl", held_out, unseen(encoder, held_out, seed=9))
    return LeakedPairs(tmp_path / "leaked.parquet"), LeakedPairs(tmp_path / "held-out.jsonl")


# Reading


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_leaked_pairs_blocks_hand_out_every_usable_pair(texts, encoder, tmp_path, suffix):
    vectors = unseen(encoder, texts)
    pairs = LeakedPairs(write(tmp_path / f"pairs{suffix}", texts, vectors))
    (block,) = list(pairs.blocks())
    assert block[0] == texts
    np.testing.assert_allclose(block[1], vectors)
    assert pairs.row_count == len(texts) and not pairs.left_out


def test_leaked_pairs_blocks_count_and_name_what_they_leave_out(encoder, tmp_path):
    good = ["the cat runs", "the dog eats", "a bird sings", "the court"]
    a, b, c, d = unseen(encoder, good)
    rows = [
        (good[0], a, None),
        ("", b, "empty text"),
        ("  \n", b, "empty text"),
        (None, b, "no text"),
        (good[1], None, "no vector"),
        (good[1], a * np.nan, "NaN or infinity"),
        (good[1], a * 0, "only zeros"),
        (good[1], a[:-1], f"{UNSEEN - 1} dimensions instead of {UNSEEN}"),
        (good[1], b, None),
        (good[0], a, "duplicate row"),
        (good[0], c, "text of a row before, other vector"),
        (good[2], c, "text that is held out"),
        (good[3], d, None),
    ]
    path = write(tmp_path / "pairs.parquet", [r[0] for r in rows], [r[1] for r in rows])
    pairs = LeakedPairs(path, apart_from=frozenset([good[2]]))
    for _ in range(2):  # what a first reading counted is not counted again
        used = [text for block, _ in pairs.blocks() for text in block]
        assert used == [good[0], good[1], good[3]]
        reasons = [reason for *_, reason in rows if reason]
        assert pairs.left_out == {reason: reasons.count(reason) for reason in reasons}
        assert pairs.row_count == len(rows) == len(used) + pairs.left_out.total()
    assert "2 × empty text" in pairs.describe_left_out()


def test_leaked_pairs_blocks_of_lines_that_are_damaged(encoder, tmp_path):
    good = ["the cat runs", "the dog eats"]
    path = write(tmp_path / "pairs.jsonl", good, unseen(encoder, good))
    odd = [
        "no json",
        '{"text": "the moon"}',
        '{"text": 7, "embedding": ' + str([1.0] * UNSEEN) + "}",
    ]
    path.write_text(path.read_text() + "\n" + "\n".join(odd), encoding="utf-8")
    pairs = LeakedPairs(path)
    assert [text for block, _ in pairs.blocks() for text in block] == good
    assert pairs.left_out.total() == 3 and pairs.left_out["text that is no string"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"column": "body"},
            r"a column 'body'.*Pass --text-column with the one that holds the text",
        ),
        ({"key": "vec"}, r"a column 'vec'"),
    ],
)
def test_leaked_pairs_blocks_say_which_column_is_missing(
    options, message, texts, encoder, tmp_path
):
    path = write(tmp_path / "pairs.parquet", texts[:3], unseen(encoder, texts[:3]))
    with pytest.raises(EmbeddingError, match=message):
        list(LeakedPairs(path, **options).blocks())


def test_leaked_pairs_blocks_refuse_a_file_without_a_usable_pair(encoder, tmp_path):
    path = write(tmp_path / "pairs.parquet", ["", " "], unseen(encoder, ["the cat"] * 2))
    with pytest.raises(EmbeddingError, match=r"2 rows, none usable \(2 × empty text\)"):
        list(LeakedPairs(path).blocks())


def test_leaked_pairs_blocks_refuse_arrays_which_have_no_texts(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((3, 4)))
    with pytest.raises(EmbeddingError, match="Use Parquet"):
        list(LeakedPairs(tmp_path / "v.npy").blocks())


def test_leaked_pairs_read_a_prepared_folder(pairs_folder):
    pairs, prepared = LeakedPairs(pairs_folder), Pairs.open(pairs_folder)
    blocks = list(pairs.blocks())
    assert pairs.row_count == len(prepared)
    assert sum(len(texts) for texts, _ in blocks) + pairs.left_out.total() == len(prepared)
    assert pairs.source["name"] == "fake"
    assert pairs.source["fingerprint"] == prepared.fingerprint.sha256


def test_leaked_pairs_blocks_embed_texts_alone(texts, encoder, tmp_path):
    lines = ["", *texts[:5], "  ", texts[0]]
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = []

    class Counting(type(encoder)):
        def encode(self, texts, progress=None):
            asked.extend(texts)
            return super().encode(texts, progress)

    pairs = LeakedPairs(tmp_path / "t.txt", encoder=Counting())
    ((known, vectors),) = pairs.blocks()
    assert known == asked == texts[:5]
    np.testing.assert_allclose(vectors, encoder.encode(texts[:5]), atol=1e-6)
    assert pairs.left_out == {"empty text": 2, "duplicate row": 1} and pairs.row_count == len(lines)
    assert pairs.source["name"] == "fake" and pairs.source["fingerprint"]
    asked.clear()
    assert [known for known, _ in pairs.blocks(3)] == [texts[:3]] == [asked]


def test_leaked_pairs_choose_texts_that_are_typical(texts, encoder, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(["", *texts]) + "\n", encoding="utf-8")
    pairs = LeakedPairs(tmp_path / "t.txt", encoder=encoder)
    pairs.choose(encoder, 7, seed=0)
    chosen = [text for block, _ in pairs.blocks() for text in block]
    expected = typical_rows(encoder.encode(texts), 7)
    assert chosen == [texts[row] for row in expected] and pairs.left_out == {"empty text": 1}
    everything = LeakedPairs(tmp_path / "t.txt", encoder=encoder)
    everything.choose(encoder, len(texts), seed=0)
    assert everything.only is None


def test_align_pairs_embeds_only_the_chosen_texts(inverter, encoder, texts, tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    asked = []

    class Counting(type(encoder)):
        def encode(self, texts, progress=None):
            asked.append(len(texts))
            return super().encode(texts, progress)

    leaked = LeakedPairs(tmp_path / "t.txt", encoder=Counting())
    alignment = align_pairs(inverter, encoder, leaked, limit=9)
    assert alignment.pairs == 9 and asked == [9, len(PROBES)]


# The map


def test_align_pairs_reads_another_encoders_vectors(inverter, encoder, halves, texts):
    leaked, held_out = halves
    alignment = align_pairs(inverter, encoder, leaked, name="unseen")
    assert (alignment.method, alignment.name, alignment.pairs) == (RIDGE, "unseen", len(texts[::2]))
    assert alignment.inverter is not None and alignment.norms[0] > 1
    (block,) = held_out.blocks()
    own = encoder.encode(block[0])
    assert (alignment(block[1]) * own).sum(axis=1).mean() > 0.95
    aligned = [item.text for item in inverter.aligned(alignment).invert(block[1])]
    assert aligned == [item.text for item in inverter.invert(alignment(block[1]))]
    plain = [item.text for item in inverter.invert(own)]
    alike = np.mean([word_f1(a, b) for a, b in zip(aligned, plain, strict=True)])
    assert alike > 0.2 + np.mean([word_f1(a, b) for a, b in zip(aligned[1:], plain, strict=False)])


def test_align_pairs_takes_as_many_as_it_is_told(inverter, encoder, halves):
    assert align_pairs(inverter, encoder, halves[0], limit=2).pairs == 2


def test_align_pairs_records_what_was_left_out(inverter, encoder, texts, tmp_path):
    path = write(tmp_path / "p.parquet", ["", *texts[:9]], unseen(encoder, texts[:10]))
    assert align_pairs(inverter, encoder, LeakedPairs(path)).left_out == {"empty text": 1}


def test_align_pairs_refuses_another_encoder(inverter, halves):
    from unembed.encoders.base import FakeEncoder

    with pytest.raises(EncoderError):
        align_pairs(inverter, FakeEncoder(16), halves[0])


def test_align_pairs_of_rows_that_do_not_belong_together_is_doubted(
    inverter, encoder, texts, tmp_path
):
    path = write(tmp_path / "p.parquet", texts, unseen(encoder, texts[40:] + texts[:40]))
    assert "predicts nothing" in align_pairs(inverter, encoder, LeakedPairs(path)).doubt()


# Evaluating with vectors of the unseen encoder


def test_evaluate_inverts_the_vectors_that_come_with_the_texts(inverter, encoder, halves):
    leaked, held_out = halves
    alignment = align_pairs(inverter, encoder, leaked)
    ((texts, vectors),) = held_out.blocks()
    report = evaluate(inverter.aligned(alignment), encoder, texts, vectors=vectors, limit=20)
    assert report.settings["alignment"] == alignment.describe()
    assert any("mapped" in note for note in report.notes)
    rows = report.rows
    assert rows["inverter"]["token-set F1"].mean > rows["shuffled embedding"]["token-set F1"].mean
    assert {example.original for example in report.examples} <= set(texts)  # not cut into pieces
    without = evaluate(inverter.aligned(alignment), None, texts, vectors=vectors, limit=20)
    f1 = without.rows["inverter"]["token-set F1"]
    assert f1 == rows["inverter"]["token-set F1"]


def test_evaluate_of_an_aligned_inverter_wants_vectors(inverter, encoder, halves, passages):
    aligned = inverter.aligned(align_pairs(inverter, encoder, halves[0]))
    with pytest.raises(DataError, match="stored vectors of"):
        evaluate(aligned, encoder, passages, limit=4)


# The curve


@pytest.fixture(scope="module")
def curve(inverter, encoder, pieces, tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("curve"), [piece.text for piece in pieces]
    write(folder / "leaked.jsonl", texts[::2], unseen(encoder, texts[::2]))
    write(folder / "held.jsonl", texts[1::2], unseen(encoder, texts[1::2]))
    pools = [LeakedPairs(folder / name) for name in ("leaked.jsonl", "held.jsonl")]
    return align_curve(inverter, encoder, *pools, [1, 4, 40, 10_000], limit=25)


def test_align_curve_rises_from_its_floors_to_its_ceiling(curve):
    by_pairs = {point.pairs: point for point in curve.points}
    f1 = {n: point.figures["word F1"] for n, point in by_pairs.items()}
    assert f1[1].mean == pytest.approx(curve.floors[CONSTANT]["word F1"].mean, abs=0.15)
    assert f1[1].mean < f1[40].mean
    assert f1[40].mean == pytest.approx(curve.floors[OWN]["word F1"].mean, abs=0.1)
    assert f1[40].mean > by_pairs[40].shuffled["word F1"].mean
    assert f1[40].mean > curve.floors[NOISE]["word F1"].mean
    assert all(figure.low <= figure.mean <= figure.high for figure in f1.values())
    assert by_pairs[1].predicted is None and by_pairs[1].doubt is not None
    assert by_pairs[40].reached == pytest.approx(by_pairs[40].predicted, abs=0.05)


def test_align_curve_says_that_pairs_are_fewer_than_asked_for(curve):
    there = max(point.pairs for point in curve.points)
    assert 40 < there < 10_000
    assert any(f"10,000 pairs: not measured, there are {there:,}" in note for note in curve.notes)


def test_align_curve_keeps_held_out_texts_out_of_the_pairs(inverter, encoder, texts, tmp_path):
    same = write(tmp_path / "same.jsonl", texts[:30], unseen(encoder, texts[:30]))
    curve = align_curve(inverter, encoder, LeakedPairs(same), LeakedPairs(same), [2, 30], limit=10)
    assert [point.pairs for point in curve.points] == [2, 20]
    assert any("10 × text that is held out" in note for note in curve.notes)


def test_align_curve_is_the_same_twice_and_nested(inverter, encoder, halves):
    from unembed.encoders.alignment import PairSums, fit_alignment

    seen = []

    def fit(x, y):
        seen.append(x)
        sums = PairSums()
        sums.add(x, y)
        return fit_alignment(sums, inverter.encoder)

    first = align_curve(inverter, encoder, *halves, [3, 9], limit=8, fit=fit)
    assert first == align_curve(inverter, encoder, *halves, [9, 3], limit=8)
    np.testing.assert_array_equal(seen[0], seen[1][:3])


def test_align_curve_refuses_vectors_of_two_encoders(inverter, encoder, halves, tmp_path):
    short = write(
        tmp_path / "s.jsonl", ["the cat", "a dog"], unseen(encoder, ["the cat"] * 2)[:, :9]
    )
    with pytest.raises(EmbeddingError, match="40 dimensions"):
        align_curve(inverter, encoder, halves[0], LeakedPairs(short), [2])


def test_write_curve_writes_figures_a_table_and_a_picture(curve, tmp_path):
    write_curve(curve, tmp_path / "out")
    names = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")
    )
    assert names == ["curve.json", "curve.md", "plots/curve.png", "plots/curve.svg"]
    data = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [p["pairs"] for p in data["points"]] == [p.pairs for p in curve.points]
    table = (tmp_path / "out" / "curve.md").read_text()
    assert table.count("\n| ") == len(curve_table(curve)) and "not measured" in table
    assert "leaked pairs" in (tmp_path / "out" / "plots" / "curve.svg").read_text()
    write_curve(curve, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == data


def test_write_curve_without_matplotlib_says_so(curve, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_curve(curve, tmp_path / "out")
    assert "matplotlib is not installed" in (tmp_path / "out" / "curve.md").read_text()


def test_align_pairs_refuses_what_is_of_another_kind(inverter, encoder, texts, tmp_path):
    file = write(tmp_path / "pairs.parquet", texts, unseen(encoder, texts))
    leaked = LeakedPairs(str(file))  # a path as text is one
    assert align_pairs(inverter, encoder, leaked).pairs == len(texts)
    for settings, message in (
        ({"leaked": str(file)}, "leaked pairs; found"),
        ({"leaked": LeakedPairs(None)}, "a path; found NoneType"),
        ({"inverter": None}, "an inverter; found NoneType"),
        ({"limit": 0}, "limit as a whole number of at least 1"),
        ({"seed": -1}, "seed as a whole number"),
        ({"name": 3}, "name as text"),
    ):
        values = {"inverter": inverter, "encoder": encoder, "leaked": leaked, **settings}
        with pytest.raises(UnembedError, match=message):
            align_pairs(**values)
    for mine, held in ((str(file), leaked), (leaked, texts)):
        with pytest.raises(UnembedError, match="leaked pairs; found"):
            align_curve(inverter, encoder, mine, held, limit=5)
    with pytest.raises(UnembedError, match="an inverter; found NoneType"):
        align_curve(None, encoder, leaked, leaked)


def test_align_pairs_gives_a_map_that_can_be_compared_and_hashed(
    inverter, encoder, texts, tmp_path
):
    leaked = LeakedPairs(write(tmp_path / "pairs.parquet", texts, unseen(encoder, texts)))
    one, two = (align_pairs(inverter, encoder, leaked) for _ in range(2))
    assert one == one
    assert one != two
    assert len({one, two}) == 2
    assert one.digest == two.digest
