"""Words that a vector gives away: `POST /words`, its limits and its place in the queue."""

import threading

import numpy as np
import pytest

from tests.fakes import word_probe
from unembed.encoders.alignment import Alignment
from unembed.encoders.base import FakeEncoder
from unembed.errors import ConfigError
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.vectors.words import WordProbe

from ..evaluation.test_leaked import unseen, write
from .test_app import refused
from .tiny import tiny_demo

TEXT = "the old river sends the bank a letter and the doctor a code " * 3  # beyond 12 positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("probe")
    word_probe(FakeEncoder()).save(path)
    return str(path)


@pytest.fixture
def client(serve, folder):
    return serve(probes=[folder])


def test_words_of_a_text_are_those_of_the_probe(client, folder, encoder):
    answer = client.post("/words", json={"text": TEXT, "top": 5}).json()
    assert (answer["model"], answer["encoder"]) == ("inverter", "fake")
    (expected,) = WordProbe.from_pretrained(folder).most_probable(encoder.encode([TEXT]), 5)
    assert [word["word"] for word in answer["words"]] == [word.word for word in expected]
    for told, word in zip(answer["words"], expected, strict=True):
        assert told["probability"] == pytest.approx(word.probability, abs=1e-4)
        assert told["base_rate"] == pytest.approx(word.base_rate, abs=1e-6)
        assert told["is_name"] is word.is_name is (word.word == "River")
        assert told["occurs"] is (word.word in ("River", "bank", "doctor"))


def test_words_of_a_vector_do_not_say_what_occurs(client, encoder):
    vector = encoder.encode([TEXT])[0]
    text, again = (
        client.post("/words", json=body).json()["words"]
        for body in ({"text": TEXT}, {"embedding": (3 * vector).tolist()})
    )
    assert {word["occurs"] for word in again} == {None}
    assert [word["word"] for word in again] == [word["word"] for word in text]


def test_words_can_be_names_alone_or_common_ones_too(client):
    names = client.post("/words", json={"text": TEXT, "names": True}).json()["words"]
    assert [word["word"] for word in names] == ["River"]
    every = client.post("/words", json={"text": TEXT, "common": True}).json()["words"]
    assert len(every) == 8 and "the" in [word["word"] for word in every]


def test_models_tells_how_many_words_are_known(client, serve):
    (model,) = client.get("/models").json()["models"]
    assert model["words"] == 8
    (plain,) = serve().get("/models").json()["models"]
    assert "words" not in plain


def test_words_without_a_probe_are_a_problem(serve):
    problem = refused(serve().post("/words", json={"text": TEXT}), 422)
    assert "a model with a word probe (none here has one)" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "expected either text or embedding"),
        ({"text": "a", "embedding": [1.0]}, "expected either text or embedding"),
        ({"text": " "}, "visible character"),
        ({"text": "x" * 2001}, "at most 2000 characters"),
        ({"embedding": [1.0] * 31}, "embeddings of 32 dimensions"),
        ({"embedding": [0.0] * 32}, "only zeros"),
        ({"embedding": ["1"] * 32}, "embedding"),
        ({"text": "a", "top": 0}, "top"),
        ({"text": "a", "top": 201}, "top"),
        ({"text": "a", "names": 1}, "names"),
        ({"text": "a", "steps": 4}, "steps"),
        ({"text": "a", "model": "none"}, "a model among inverter"),
    ],
)
def test_a_request_for_words_that_cannot_be_served_is_a_problem(client, body, said):
    assert said in refused(client.post("/words", json=body), 422)["detail"]


def test_words_wait_in_the_queue_of_their_model(serve, folder, encoder):
    started, proceed = threading.Event(), threading.Event()

    class Held(FakeEncoder):
        def encode(self, texts, progress=None):
            started.set()
            assert proceed.wait(60)
            return super().encode(texts, progress)

    client = serve(probes=[folder], encoder=Held(), queue=1)
    vector = {"embedding": encoder.encode([TEXT])[0].tolist()}
    answers = {}

    def ask(name, body):
        answers[name] = client.post("/words", json=body)

    first = threading.Thread(target=ask, args=("first", {"text": TEXT}))
    first.start()
    assert started.wait(60)
    second = threading.Thread(target=ask, args=("second", vector))
    second.start()
    quick = client.demo.models["inverter"].workers["quick"]
    while quick.counts != (1, 1):
        assert second.is_alive()
    try:
        problem = refused(client.post("/words", json=vector), 503)
        assert problem["retry_after"] >= 1
    finally:
        proceed.set()
        first.join(60)
        second.join(60)
    assert {answer.status_code for answer in answers.values()} == {200}


def test_words_count_for_the_rate(serve, folder):
    client = serve(probes=[folder], rate="2/hour")
    assert [client.post("/words", json={"text": "a"}).status_code for _ in range(3)] == [
        200, 200, 429
    ]  # fmt: skip


def test_words_of_a_mapped_vector_are_those_behind_the_map(
    serve, folder, inverter, encoder, passages, tmp_path
):
    pairs = write(tmp_path / "leaked.jsonl", passages[:40], unseen(encoder, passages[:40]))
    align_pairs(inverter, encoder, LeakedPairs(pairs), name="unseen").save(tmp_path / "my-map")
    client = serve(probes=[folder], alignments=[str(tmp_path / "my-map")])
    vectors = unseen(encoder, [TEXT])
    body = {"embedding": vectors[0].tolist(), "model": "inverter + my-map", "top": 3}
    answer = client.post("/words", json=body).json()
    mapped = Alignment.load(tmp_path / "my-map")(vectors)
    (expected,) = WordProbe.from_pretrained(folder).most_probable(mapped, 3)
    assert [word["word"] for word in answer["words"]] == [word.word for word in expected]


def test_load_demo_refuses_a_probe_of_another_encoder(inverter_folder, tmp_path):
    word_probe(FakeEncoder(16)).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="a word probe for fake"):
        tiny_demo([inverter_folder], probes=[str(tmp_path / "other")])
    demo = tiny_demo([inverter_folder], probes=["minilm"])  # ships, is of no use here
    assert demo.find(None).probe is None
    demo.close()


def test_probabilities_of_the_fake_probe_prefer_the_words_of_the_text(encoder):
    probe = word_probe(encoder)
    p = probe.probabilities(encoder.encode(["river bank", "cat dog"]))
    index = [probe.words.index(word) for word in ("river", "bank", "cat", "dog")]
    assert np.all(p[0, index[:2]] > p[1, index[:2]]) and np.all(p[1, index[2:]] > p[0, index[2:]])
