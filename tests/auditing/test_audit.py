import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.auditing.attacks import WORDS
from unembed.auditing.audit import audit
from unembed.auditing.conclude import CONSTANT, NEAREST, SHUFFLED
from unembed.auditing.report import write_report
from unembed.errors import ConfigError, DataError, StoreError, UnembedError
from unembed.evaluation.cache import UNFINISHED, unfinished_folder
from unembed.vectors.stores.address import open_store
from unembed.vectors.words import fit_words

from .conftest import write


def test_audit_recovers_from_a_store_and_beats_the_floors(report):
    assert report.identity.verdict == "same"
    assert report.identity.cosine == pytest.approx(1.0, abs=1e-4)
    assert report.read["rows"] == report.read["with_text"] == 50
    best = report.attacks["inverter"]
    assert best["access"].startswith("the vectors, and knowledge")
    leak, floor = best["figures"]["token F1"], report.floors[SHUFFLED]["token F1"]
    assert leak.low > floor.high
    assert leak.low > report.floors[CONSTANT]["token F1"].high
    assert report.floors[SHUFFLED]["cosine"] is None
    assert set(report.by_group) == {"north", "south"}
    assert sum(g["inverter"]["token F1"].n for g in report.by_group.values()) == 50
    assert report.leak == pytest.approx(
        leak.mean - max(f["token F1"].high for f in report.floors.values()), abs=1e-5
    )
    assert report.findings[0].id in ("embedding-inversion", "duplicates-across-groups")
    assert len(report.records) == 20
    assert report.records[0].f1 == max(record.f1 for record in report.records)


def test_audit_gives_one_report_for_one_seed(store, inverter, tmp_path):
    paths = []
    for name in ("one", "two"):
        report = audit(store, to=inverter, sample=20, seed=5, folder=tmp_path / name)
        paths.append(write_report(report, tmp_path / name))
    for one, two in zip(*paths, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    other = audit(store, to=inverter, sample=20, seed=6)
    assert [r.id for r in other.records] != [r.id for r in report.records]


def test_audit_goes_on_after_a_kill_to_the_same_report(store, inverter, tmp_path):
    whole = audit(store, to=inverter, sample=60).to_dict()

    class KilledError(Exception):
        pass

    calls = []

    class Counted:
        """The inverter, killed in its second batch."""

        def __init__(self, limit):
            self.limit = limit

        def __getattr__(self, name):
            return getattr(inverter, name)

        def invert(self, vectors, **options):
            if len(calls) == self.limit:
                raise KilledError
            calls.append(len(np.atleast_2d(vectors)))
            return inverter.invert(vectors, **options)

    from unembed.auditing import attacks

    size, attacks._BATCH = attacks._BATCH, 20
    try:
        with pytest.raises(KilledError):
            audit(store, to=Counted(1), sample=60, folder=tmp_path)
        assert (tmp_path / UNFINISHED).stat().st_mode & 0o077 == 0
        assert list((tmp_path / UNFINISHED).rglob("*.jsonl"))
        calls.clear()
        again = audit(store, to=Counted(-1), sample=60, folder=tmp_path).to_dict()
    finally:
        attacks._BATCH = size
    assert calls == [20, 20, 1], "the first batch was not decoded again"
    assert again == whole
    assert list(tmp_path.iterdir()) == [], "recovered texts stay in the folder"


def test_audit_refuses_a_folder_that_another_audit_writes_to(store, inverter, tmp_path):
    with (
        unfinished_folder(tmp_path),
        pytest.raises(DataError, match=r"another process writing to it"),
    ):
        audit(store, to=inverter, sample=20, folder=tmp_path)


def test_audit_without_texts_claims_no_recovery(bare_report):
    assert bare_report.leak is None
    assert bare_report.strongest is None
    assert bare_report.records == []
    assert bare_report.attacks["inverter"]["figures"] is None
    assert bare_report.attacks["inverter"]["mean_cosine"] > 0
    assert bare_report.identity.verdict == "unknown"
    assert "inversion-not-measured" in [finding.id for finding in bare_report.findings]


def test_audit_of_foreign_vectors_finds_nothing(texts, encoder, inverter, tmp_path):
    noise = np.random.default_rng(0).standard_normal((len(texts), encoder.identity.dimension))
    path = write(tmp_path / "noise.parquet", texts, encoder, noise)
    report = audit(path, to=inverter)
    assert report.identity.verdict == "different"
    assert report.leak < 0.1
    finding = next(f for f in report.findings if f.id == "embedding-inversion")
    assert finding.severity in ("none", "low")


def test_audit_refuses_vectors_that_fit_no_attack(tmp_path, inverter):
    np.save(tmp_path / "v.npy", np.ones((10, 7), dtype=np.float32))
    with pytest.raises(StoreError, match=r"32 dimensions.*found 7 dimensions"):
        audit(tmp_path / "v.npy", to=inverter)


class Rotation:
    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, vectors):
        mapped = vectors @ self.matrix
        return (mapped / np.linalg.norm(mapped, axis=1, keepdims=True)).astype(np.float32)

    def describe(self):
        return "a rotation"


@pytest.fixture
def rotated(texts, encoder, tmp_path):
    """The store under a secret rotation: another space of the same size."""
    square = np.random.default_rng(3).standard_normal((32, 32))
    matrix = np.linalg.qr(square)[0]
    vectors = encoder.encode(texts) @ matrix
    return write(tmp_path / "rotated.parquet", texts, encoder, vectors), matrix


def test_audit_through_a_map_that_is_given(rotated, inverter, report):
    path, matrix = rotated
    plain = report.attacks["inverter"]["figures"]["token F1"].mean
    turned = audit(path, to=inverter, align=Rotation(matrix.T), sample=50)
    assert turned.identity.verdict == "different"
    assert turned.strongest == "inverter through a map"
    mapped = turned.attacks["inverter through a map"]["figures"]["token F1"].mean
    assert mapped == pytest.approx(plain, abs=0.02)
    assert turned.attacks["inverter"]["figures"]["token F1"].mean < mapped - 0.2


def test_audit_makes_a_map_from_rows_that_are_not_scored(rotated, inverter):
    fitted = []

    def fit(x, y):
        fitted.append((x, y))
        return Rotation(np.linalg.lstsq(x, y, rcond=None)[0])

    report = audit(rotated[0], to=inverter, align_from_store=25, fit_align=fit)
    ((x, y),) = fitted
    assert x.shape == y.shape == (25, 32)
    attack = report.attacks["inverter through pairs of the store"]
    assert attack["records"] == attack["figures"]["token F1"].n == 35
    assert "25 of the store's texts" in attack["access"]


def test_audit_makes_a_map_as_the_command_align_does(rotated, inverter):
    report = audit(rotated[0], to=inverter, align_from_store=30)
    mapped = report.attacks["inverter through pairs of the store"]
    assert mapped["records"] == 30
    assert "30 pairs" in mapped["settings"]["align"]
    better = mapped["figures"]["token F1"].low
    assert better > report.floors[SHUFFLED]["token F1"].high
    assert report.strongest == "inverter through pairs of the store"


def test_audit_looks_up_in_a_corpus(store, texts, inverter, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in texts[:20]))
    report = audit(store, to=inverter, corpus=tmp_path / "corpus.txt")
    attack = report.attacks["lookup in the corpus"]
    assert attack["figures"]["exact match"].mean > 0.33
    assert report.neighbours.members == 20
    assert "membership" in [finding.id for finding in report.findings]


def test_audit_takes_the_nearest_other_text_of_a_corpus_for_a_floor(
    store, texts, inverter, report, tmp_path
):
    alone = report
    swapped = [" ".join([*text.rstrip(".").split()[::-1], "."]) for text in texts]
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in [*texts, *swapped]))
    report = audit(store, to=inverter, corpus=tmp_path / "corpus.txt", sample=50)
    floor, found = report.floors[NEAREST], report.attacks["lookup in the corpus"]["figures"]
    assert found["exact match"].mean > 0.9
    assert floor["exact match"].mean < 0.1, "the record's own text was taken for the floor"
    assert floor["token F1"].mean > 0.9, "the same words in another order are in the corpus"
    # The inverter does not beat this floor; the lookup is not measured against itself
    assert report.strongest == "lookup in the corpus"
    assert report.floors[SHUFFLED]["token F1"].high < 0.5
    finding = next(f for f in report.findings if f.id == "embedding-inversion")
    assert "highest floor 0." in finding.evidence
    assert NEAREST not in alone.floors
    assert alone.leak < report.leak


def test_audit_may_call_the_encoder(store, inverter):
    report = audit(store, to=inverter, sample=12, encoder_calls=20)
    attack = report.attacks["inverter and encoder"]
    assert "up to 20 calls" in attack["access"]
    assert attack["mean_cosine"] >= report.attacks["inverter"]["mean_cosine"] - 1e-3


def test_audit_scores_long_texts_by_windows_and_says_so(encoder, inverter, texts, tmp_path):
    long = [" ".join(texts[row : row + 8]) for row in range(20)]
    report = audit(write(tmp_path / "long.parquet", long, encoder), to=inverter)
    assert report.read["longer_than_the_inverter_writes"] == 20
    assert report.attacks["inverter"]["figures"]["exact match"].mean == 0
    text = (write_report(report, tmp_path / "r")[1]).read_text()
    assert "20 of 20 texts are longer than the 11 tokens" in text


def test_audit_names_the_words_of_long_texts(encoder, inverter, texts, tmp_path):
    draw = random.Random(0)
    chunks = [" ".join(draw.sample(texts, 4)) for _ in range(240)]
    probe = tmp_path / "probe"
    fit_words(encoder.identity, chunks, encoder.encode(chunks)).save(probe)
    mixed = write(tmp_path / "mixed.parquet", [*chunks[:20], *texts[:20]], encoder)
    report = audit(mixed, to=inverter, probe=probe)
    attack = report.attacks[WORDS]
    assert attack["records"] == 20, "the short ones are the inverter's"
    assert (
        attack["figures"]["token F1"].low > report.floors[f"{SHUFFLED} ({WORDS})"]["token F1"].high
    )
    assert (
        WORDS not in audit(write(tmp_path / "short.parquet", texts, encoder), to=inverter).attacks
    )
    with pytest.raises(ConfigError, match="Correct --probe"):
        audit(mixed, to=inverter, probe="minilm")


def test_audit_refuses_a_field_that_no_row_has(texts, encoder, inverter, tmp_path):
    path = write(tmp_path / "v.parquet", texts, encoder)
    table = pq.read_table(path)
    empty = table.set_column(table.column_names.index("tenant"), "tenant", pa.nulls(len(texts)))
    pq.write_table(empty, path)
    with pytest.raises(StoreError, match=r"none in the rows read.*--group-by"):
        audit(path, to=inverter, encoder=encoder, group_by="tenant")


@pytest.mark.parametrize("bad", [{"sample": 0}, {"decoding": "nothing"}])
def test_audit_refuses_wrong_settings(store, inverter, bad):
    with pytest.raises(ConfigError):
        audit(store, to=inverter, **bad)


def test_audit_refuses_a_corpus_that_is_not_there(store, inverter, tmp_path):
    with pytest.raises(DataError, match="nothing at"):
        audit(store, to=inverter, corpus=tmp_path / "gone.txt")


def test_audit_runs_without_the_encoder(store, inverter, monkeypatch):
    from unembed.auditing import audit as module
    from unembed.errors import EncoderError

    def fail(name, **options):
        raise EncoderError("an encoder", "none", "Install it")

    monkeypatch.setattr(module, "load_encoder", fail)
    report = audit(store, to=inverter)
    assert report.attacks["inverter"]["mean_cosine"] is None
    assert "could not be loaded" in report.notes[0]
    assert report.attacks["inverter"]["figures"]["token F1"].mean > 0.3


def test_to_dict_is_plain_data(report):
    data = report.to_dict()
    assert json.loads(json.dumps(data))["schema"] == 1
    assert replace(report, findings=[]).severity == "none"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sample": "4"}, "sample as a whole number of at least 1; found '4'"),
        ({"sample": True}, "sample as a whole number"),
        ({"seed": 1.5}, "seed as a whole number"),
        ({"align_from_store": -1}, "align_from_store as a whole number of at least 0"),
        ({"encoder_calls": None}, "encoder_calls as a whole number"),
        ({"to": None}, "an inverter; found NoneType"),
        ({"encoder": 3}, "an encoder, or its name; found int 3"),
        ({"decoding": 3}, "a Decoding, or the text of one"),
        ({"align": 3}, "a map, or the folder of one; found 3"),
        ({"align": Rotation}, "a map, or the folder of one"),
        ({"align_from_store": 2, "fit_align": 3}, "fit_align as a function"),
        ({"corpus": ["a text"]}, "corpus as a path"),
        ({"corpus": ""}, "corpus as a path; found ''"),
        ({"corpus_column": 3}, "corpus_column as text"),
        ({"probe": "nope"}, "a word probe: .*found nope"),
        ({"group_by": 3}, "group_by as text"),
        ({"text_column": 3}, "text_column as text"),
        ({"show_pii": "no"}, "show_pii as True or False; found 'no'"),
        ({"folder": 3}, "folder as a path"),
        ({"progress": 3}, "progress as a function"),
        ({"name": 3}, "name as text"),
        ({"command": 3}, "command as text"),
    ],
)
def test_audit_refuses_settings_of_another_kind(store, inverter, setting, message):
    with pytest.raises(UnembedError, match=message):
        audit(store, **{"to": inverter, "sample": 4, **setting})


@pytest.mark.parametrize("store", [None, 3, [1.0], np.ones((2, 3)), "", " ", b"x"])
def test_audit_refuses_what_is_no_store(store, inverter):
    with pytest.raises(UnembedError, match=r"expected (an open store|a store)"):
        audit(store, to=inverter)


def test_audit_takes_numbers_of_numpy_and_paths_as_text(store, inverter, tmp_path):
    plain = audit(store, to=inverter, sample=10, seed=3)
    numbers = {"sample": np.int64(10), "seed": np.int32(3)}
    other = audit(str(store), to=inverter, folder=str(tmp_path), **numbers)
    assert json.dumps(other.to_dict()["records"]) == json.dumps(plain.to_dict()["records"])
    assert json.dumps(other.settings), "a number of NumPy's is in the settings"
    audit(store, to=inverter, sample=4, seed=1 << 70)  # a seed of any size


def test_audit_of_an_open_store_needs_the_field_to_group_by(store, inverter):
    with open_store(store) as opened, pytest.raises(ConfigError, match="opened with the field 'te"):
        audit(opened, to=inverter, sample=4, group_by="tenant")
    with open_store(store) as opened, pytest.raises(ConfigError, match="text_column with an add"):
        audit(opened, to=inverter, sample=4, text_column="text")
    with open_store(store, keep="tenant") as opened:
        report = audit(opened, to=inverter, sample=20, group_by="tenant")
    assert set(report.by_group) == {"north", "south"}


def test_audit_notes_a_column_of_texts_that_holds_none(store, inverter, report):
    bare = audit(store, to=inverter, sample=4, text_column="embedding")
    assert bare.leak is None
    assert any("'embedding' was taken for that of the texts" in note for note in bare.notes)
    assert not any("was taken for" in note for note in report.notes)


def test_write_report_refuses_what_is_no_report(report, tmp_path):
    with pytest.raises(DataError, match="the report of an audit; found None"):
        write_report(None, tmp_path)
    assert all(path.is_file() for path in write_report(report, str(tmp_path / "as-text")))


@pytest.mark.parametrize("align", [None, 3, np.eye(32)])
def test_audit_refuses_what_fit_align_gives_and_is_no_map(store, inverter, align):
    with pytest.raises(ConfigError, match="fit_align to give a map"):
        audit(store, to=inverter, align_from_store=8, fit_align=lambda x, y: align)
