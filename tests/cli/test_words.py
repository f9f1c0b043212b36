"""`unembed words`, in process with the fake encoder."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unembed.encoders.base import FakeEncoder
from unembed.vectors.words import WordProbe

NOUNS = "river bank nurse judge letter key door window coat lamp".split()
STORY = "On Monday we met {} near the {} and then the {} was given back to the old {} who kept it"


@pytest.fixture(scope="module")
def stories() -> list[str]:
    rng = np.random.default_rng(0)
    people = ["Anna", "Bruno"]
    return [
        STORY.format(people[i % 2], *rng.choice(NOUNS, 3, replace=False)) + " for so long a time."
        for i in range(260)
    ]


@pytest.fixture(scope="module")
def probe_folder(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    vectors = FakeEncoder().encode(stories)
    table = pa.table({"text": stories, "vector": [row.tolist() for row in vectors]})
    pq.write_table(table, folder / "pairs.parquet")
    np.save(folder / "vectors.npy", vectors[:3])
    return folder


def test_words_learns_from_texts_and_tells_the_words_of_one(
    run,
    stories,
    tmp_path,
    with_fake_encoder,
):
    path, out = tmp_path / "texts.txt", tmp_path / "probe"
    path.write_text("\n".join(stories), encoding="utf-8")
    code, said, _ = run("words", "--fit", path, "--out", out, "--encoder", "fake")
    assert code == 0 and "names, from 260 texts" in said
    assert WordProbe.from_pretrained(out).encoder == FakeEncoder().identity
    code, said, _ = run("words", "--text", stories[0], "--probe", out, "--common", "--top", 3)
    assert code == 0 and "vector 0" in said
    assert len([line for line in said.splitlines() if "0." in line or "1." in line]) == 3


def test_words_learns_from_stored_vectors_without_an_encoder(run, probe_folder, tmp_path):
    out = tmp_path / "probe"
    command = ("words", "--fit", probe_folder / "pairs.parquet", "--column", "vector")
    code, said, _ = run(*command, "--encoder", "some-api", "--out", out)
    assert code == 0, said
    probe = WordProbe.from_pretrained(out)
    assert (probe.encoder.name, probe.encoder.dimension) == ("some-api", 32)
    found = ("words", "--embedding", probe_folder / "vectors.npy", "--probe", out, "--json")
    code, said, _ = run(*found, "--names", "--common")
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert {word["word"] for word in lines[0]["words"]} >= {"Anna", "Bruno"}
    assert all(0 <= word["probability"] <= 1 for line in lines for word in line["words"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of --text, --embedding and --fit; found none"),
        (("--text", "x", "--fit", "y.txt"), "found --text and --fit"),
        (("--fit", "y.txt"), "--out FOLDER with --fit; found none"),
        (("--text", "x", "--probe", "nowhere"), "a word probe"),
        (("--fit", "y.parquet", "--out", "z"), "y.parquet"),
        (("--text", "x", "--out", "z"), "--out with --fit only; found --text"),
        (("--text", "x", "--skip-bad"), "--skip-bad with --embedding or --fit only"),
        (("--embedding", "v.npy", "--limit", "300"), "--limit with --fit only"),
        (("--embedding", "v.json", "--key", "a", "--column", "b"), "--column without --key only"),
        (("--fit", "y.txt", "--out", "z", "--top", "3"), "--top without --fit only; found --fit"),
    ],
)
def test_words_refuses_what_it_cannot_do(refused, with_fake_encoder, arguments, message):
    assert message in refused("words", *arguments, "--encoder", "fake")


def test_words_refuses_a_column_that_is_not_there(refused, probe_folder, tmp_path):
    command = ("words", "--fit", probe_folder / "pairs.parquet", "--out", tmp_path / "o")
    assert "embedding" in refused(*command, "--column", "embedding")


def test_words_skips_bad_vectors_and_counts_them(run, probe_folder, stories, tmp_path):
    vectors = FakeEncoder().encode(stories[:4])
    vectors[1] = 0
    np.save(tmp_path / "v.npy", vectors)
    probe = ("--probe", fitted(run, probe_folder, tmp_path))
    code, out, err = run("words", "--embedding", tmp_path / "v.npy", *probe, "--json")
    assert code == 2 and "pass --skip-bad" in err
    code, out, err = run("words", "--embedding", tmp_path / "v.npy", *probe, "--json", "--skip-bad")
    assert code == 0 and [json.loads(line)["row"] for line in out.splitlines()] == [0, 2, 3]
    assert "note: vectors left out: 1 × only zeros (row 1)" in err


def test_words_notes_vectors_of_another_encoder_once(run, probe_folder, stories, tmp_path):
    probe = ("--probe", fitted(run, probe_folder, tmp_path))
    own = FakeEncoder().encode(stories)
    for vectors, notes in ((own, 0), (np.random.default_rng(0).normal(size=(2000, 32)), 1)):
        np.save(tmp_path / "v.npy", vectors)
        code, _, err = run("words", "--embedding", tmp_path / "v.npy", *probe, "--json")
        assert code == 0 and err.count("vectors do not look like fake's") == notes, err


def fitted(run, probe_folder, tmp_path):
    command = ("words", "--fit", probe_folder / "pairs.parquet", "--key", "vector")
    code, _, err = run(*command, "--encoder", "fake", "--out", tmp_path / "probe")
    assert code == 0, err
    return tmp_path / "probe"
