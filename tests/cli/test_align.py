"""`unembed align` and the options that use its maps, in process with the fake encoder."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.test_leaked import UNSEEN, unseen, write
from unembed.encoders.alignment import Alignment
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.inverter import Inverter

pytestmark = pytest.mark.usefixtures("with_fake_encoder")


@pytest.fixture
def sentences(passages):
    """Distinct sentences of the fake encoder's words."""
    return sorted({s.strip() + "." for p in passages for s in p.split(".") if s.strip()})


@pytest.fixture
def leaked(sentences, encoder, tmp_path):
    return write(tmp_path / "leaked.parquet", sentences[::2], unseen(encoder, sentences[::2]))


@pytest.fixture
def folder(leaked, inverter, encoder, tmp_path):
    """A map from all leaked pairs."""
    align_pairs(inverter, encoder, LeakedPairs(leaked), name="unseen").save(tmp_path / "map")
    return tmp_path / "map"


@pytest.fixture
def vectors(sentences, encoder, tmp_path):
    """A file of held-out vectors of the unseen encoder."""
    np.save(tmp_path / "vectors.npy", unseen(encoder, sentences[1:13:2]))
    return tmp_path / "vectors.npy"


def test_align_writes_a_map_that_invert_reads(run, leaked, vectors, inverter_folder):
    code, out, err = run("align", leaked, "--to", inverter_folder, "--out", "my-encoder")
    assert code == 0, err
    assert "note" not in err
    assert "my-encoder → fake" in out and "leave-one-out cosine" in out
    alignment = Alignment.load("my-encoder")
    assert alignment.doubt() is None
    options = ("--checkpoint", inverter_folder, "--embedding", vectors, "--json", "--check")
    code, out, err = run("invert", "--align", "my-encoder", *options)
    assert code == 0 and "note" not in err
    inverter = Inverter.from_pretrained(inverter_folder, align="my-encoder")
    expected = inverter.invert(np.load(vectors))
    assert [row["text"] for row in json.loads(out)] == [item.text for item in expected]
    assert all(row["cosine"] is not None for row in json.loads(out) if row["text"].strip())


def test_align_counts_the_rows_it_leaves_out(run, sentences, encoder, inverter_folder, tmp_path):
    texts = ["", *sentences[:20], sentences[0]]
    rows = unseen(encoder, ["the cat", *sentences[:20], sentences[0]])
    rows[-1] = rows[1]
    path = write(tmp_path / "p.jsonl", texts, rows)
    code, out, err = run("align", path, "--to", inverter_folder, "--out", "m", "--json")
    assert code == 0
    data = json.loads(out)
    assert (data["read"], data["pairs"]) == (22, 20)
    assert data["left_out"] == {"empty text": 1, "duplicate row": 1}
    assert "of 22 rows left out: 1 × empty text, 1 × duplicate row" in err


def test_align_warns_of_a_map_that_predicts_nothing(
    run, sentences, encoder, inverter_folder, tmp_path
):
    others = np.random.default_rng(0).permutation(sentences).tolist()
    path = write(tmp_path / "p.jsonl", sentences, unseen(encoder, others))
    code, _, err = run("align", path, "--to", inverter_folder, "--out", "m")
    assert code == 0
    assert "predicts nothing: leave-one-out cosine" in err
    np.save(tmp_path / "v.npy", unseen(encoder, sentences[:2]))
    code, _, err = run(
        "invert", "--align", "m", "--checkpoint", inverter_folder, "--embedding", tmp_path / "v.npy"
    )
    assert code == 0 and "predicts nothing" in err


def test_align_texts_are_embedded_for_the_pairs(run, sentences, inverter_folder):
    Path("t.txt").write_text("\n".join(["", *sentences[:20], sentences[0]]), encoding="utf-8")
    options = ("--from", "fake", "--to", inverter_folder, "--out", "m", "--json")
    code, out, err = run("align", "--texts", "t.txt", *options)
    assert code == 0, err
    data = json.loads(out)
    assert (data["read"], data["pairs"]) == (22, 20)
    assert data["left_out"] == {"empty text": 1, "duplicate row": 1}
    assert Alignment.load("m").name == "fake" and data["leave_one_out_cosine"]["ridge"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "PAIRS, or --texts with --from"),
        (("--texts", "t.txt"), "--texts with --from only"),
        (("--from", "fake"), "--texts FILE with --from"),
        (("p.jsonl", "--texts", "t.txt", "--from", "fake"), "PAIRS, which have their vectors"),
        (("--texts", "t.txt", "--from", "fake", "--text-column", "b"), "--text-column"),
        (("--texts", "none.txt", "--from", "fake"), "none.txt"),
        (("--texts", "t.txt", "--from", "other"), "the encoder fake"),
    ],
)
def test_align_refuses(refused, arguments, message):
    Path("t.txt").write_text("the cat runs\n", encoding="utf-8")
    assert message in refused("align", *arguments, "--out", "m")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--align", "nowhere"), "an alignment, a folder with alignment.json"),
        (("--text", "the cat"), "--align with --embedding only"),
    ],
)
def test_invert_align_refuses(refused, arguments, message, vectors, inverter_folder, folder):
    if "--text" in arguments:
        arguments = (*arguments, "--align", folder)
    else:
        arguments = (*arguments, "--embedding", vectors)
    assert message in refused("invert", "--checkpoint", inverter_folder, *arguments)


def test_invert_align_refuses_another_dimension(refused, inverter_folder, folder, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, UNSEEN + 1)))
    arguments = ("--checkpoint", inverter_folder, "--align", folder)
    line = refused("invert", *arguments, "--embedding", tmp_path / "v.npy")
    assert f"{UNSEEN + 1}" in line and f"{UNSEEN}" in line


def test_invert_align_refuses_a_map_for_another_inverter(refused, folder, vectors):
    line = refused("invert", "--align", folder, "--embedding", vectors)  # minilm is the default
    assert "into the space of all-MiniLM-L6-v2" in line and "fake" in line


def test_invert_align_notes_vectors_of_a_third_encoder(
    run, sentences, encoder, inverter, inverter_folder, tmp_path
):
    many = [f"{one} {other}" for one in sentences[:20] for other in sentences[:20]]
    path = write(tmp_path / "many.parquet", many, unseen(encoder, many))
    alignment = align_pairs(inverter, encoder, LeakedPairs(path), name="unseen")
    assert alignment.statistics is not None
    alignment.save(tmp_path / "map")
    np.save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((40, UNSEEN)))
    options = ("--checkpoint", inverter_folder, "--embedding", tmp_path / "v.npy")
    _, _, err = run("invert", "--align", tmp_path / "map", *options)
    assert "do not look like unseen's" in err


def test_evaluate_align_measures_vectors_beside_their_texts(
    run, sentences, encoder, folder, inverter_folder, tmp_path
):
    held_out = write(tmp_path / "h.jsonl", sentences[1::2], unseen(encoder, sentences[1::2]))
    options = ("--checkpoint", inverter_folder, "--limit", 10, "--json")
    code, out, err = run("evaluate", "--embedding", held_out, "--align", folder, *options)
    assert code == 0, err
    report = json.loads(out)
    assert report["settings"]["alignment"].startswith("unseen → fake: ridge")
    assert report["rows"]["inverter"]["cosine"]["n"] == 10


def test_evaluate_align_curve_prints_and_writes_the_curve(
    run, sentences, encoder, leaked, inverter_folder, tmp_path
):
    held_out = write(tmp_path / "h.jsonl", sentences[1::2], unseen(encoder, sentences[1::2]))
    options = ("--checkpoint", inverter_folder, "--leaked", leaked, "--limit", 8, "--out", "curve")
    code, out, err = run(
        "evaluate", "--embedding", held_out, "--align-curve", "1,10,9999", *options
    )
    assert code == 0, err
    assert "8 held-out texts" in out
    for words in ("constant output", "random vector", "9,999 pairs: not measured"):
        assert words in Path("curve/curve.md").read_text(encoding="utf-8")
    data = json.loads(Path("curve/curve.json").read_text())
    assert [point["pairs"] for point in data["points"]][:2] == [1, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--align-curve", "1,ten"), "numbers of pairs as 1,10,100"),
        (("--align-curve", "1,0"), "numbers of pairs as 1,10,100"),
        (("--align-curve", "1,10"), "--leaked, the pairs that leaked"),
        (("--leaked", "x.parquet"), "with --align-curve only"),
        (("--align-curve", "1", "--leaked", "x.jsonl", "--strategies", "all"), "--strategies"),
    ],
)
def test_evaluate_align_curve_refuses(refused, arguments, message, leaked):
    assert message in refused("evaluate", "--embedding", leaked, *arguments)


def test_align_refuses_a_file_in_the_place_of_the_map_at_once(
    refused, leaked, inverter_folder, with_fake_encoder, tmp_path
):
    (tmp_path / "file").write_text("")
    said = refused("align", leaked, "--to", inverter_folder, "--out", tmp_path / "file")
    assert "a folder at" in said and with_fake_encoder == []
