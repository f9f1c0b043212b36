"""Maps for vectors of another encoder, offered by the demo as further models."""

import numpy as np
import pytest

from tests.evaluation.test_leaked import UNSEEN, unseen, write
from unembed.demo.limits import Limits
from unembed.demo.models import load_demo
from unembed.encoders.alignment import Alignment
from unembed.encoders.base import FakeEncoder
from unembed.errors import CheckpointError, ConfigError
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.inverter import Inverter


@pytest.fixture
def folder(inverter, encoder, passages, tmp_path):
    """A map from 40 pairs."""
    path = write(tmp_path / "leaked.jsonl", passages[:40], unseen(encoder, passages[:40]))
    align_pairs(inverter, encoder, LeakedPairs(path), name="unseen").save(tmp_path / "my-map")
    return tmp_path / "my-map"


@pytest.fixture
def mapped(serve, folder):
    return serve(alignments=[str(folder)])


def test_models_tell_which_map_is_on(mapped, inverter):
    plain, aligned = mapped.get("/models").json()["models"]
    assert "map" not in plain
    assert aligned["name"] == f"{plain['name']} + my-map"
    assert (aligned["encoder"], aligned["dimension"]) == ("unseen", UNSEEN)
    assert aligned["map"]["into"] == inverter.encoder.name
    assert aligned["map"]["pairs"] == 40
    assert aligned["map"]["cosine"] > aligned["map"]["floor"]
    assert aligned["strategies"] == plain["strategies"]


def test_decode_and_invert_read_vectors_through_a_map(mapped, decode, served, folder, encoder):
    vectors = unseen(encoder, ["the cat runs at the house.", "the dog hides."])
    model = mapped.get("/models").json()["models"][1]["name"]
    expected = [item.text for item in served.invert(Alignment.load(folder)(vectors))]
    body = {"embeddings": vectors.tolist(), "model": model}
    answer = mapped.post("/invert", json=body).json()
    assert [result["text"] for result in answer["results"]] == expected
    assert answer["model"] == model
    events = decode(mapped, embedding=vectors[0].tolist(), model=model)
    assert events[-1][0] == "done" and events[-1][1]["text"] == expected[0]


def test_a_text_needs_no_map(mapped, decode):
    model = mapped.get("/models").json()["models"][1]["name"]
    plain, aligned = (
        decode(mapped, text="the cat runs at the house.", **body)[-1][1]["text"]
        for body in ({}, {"model": model})
    )
    assert plain == aligned


def test_a_vector_of_the_wrong_size_is_refused_by_a_map(mapped):
    model = mapped.get("/models").json()["models"][1]["name"]
    for size, status in ((UNSEEN, 200), (32, 422)):
        body = {"embeddings": [[0.5] * size], "model": model}
        assert mapped.post("/invert", json=body).status_code == status


def test_queue_lists_the_workers_of_a_model_once(mapped):
    names = [each["model"] for each in mapped.get("/queue").json()]
    assert names == [names[0]] * 3


def test_load_demo_refuses_a_map_for_another_inverter(inverter_folder, folder, tmp_path):
    alignment = Alignment.load(folder)
    other = FakeEncoder(16).identity
    wrong = {**vars(alignment), "target": other}
    wrong["matrix"] = np.zeros((UNSEEN, 16), np.float32)
    wrong["target_mean"] = np.ones(16, np.float32)
    Alignment(**{k: v for k, v in wrong.items() if k != "digest"}).save(tmp_path / "wrong")

    def load(*maps):
        return load_demo(
            [str(inverter_folder)],
            Limits(rate=None),
            Inverter.from_pretrained,
            lambda inverter: FakeEncoder(),
            alignments=[str(path) for path in maps],
        )

    with pytest.raises(CheckpointError, match="into the space of"):
        load(tmp_path / "wrong")
    with pytest.raises(ConfigError, match="whose names differ"):
        load(folder, folder)
