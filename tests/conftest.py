"""What the tests share: a fake encoder, texts, prepared pairs, a tiny inverter, and no network."""

import os
import random
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from unembed.config import Config
from unembed.data.prepare import prepare_pairs
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import choose_compute
from unembed.encoders.base import FakeEncoder
from unembed.encoders.sentence import load_encoder
from unembed.inverter import Inverter

from . import architectures

_NAMES = "cat dog bird fish house river city road tree sun moon star rain snow bank court".split()
_VERBS = "runs walks eats sleeps reads writes opens closes sends finds leaks hides pays".split()
_QUALITIES = "red blue green small large old new good bad".split()


def pytest_configure():
    """One thread, here and in subprocesses, and no example of a property measured in seconds.

    The networks of the tests are so small that threads cost more than they bring, and on busy
    cores, where they wait for each other inside every product, a hundred times more.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _offline(request, monkeypatch):
    """Only tests marked `network` reach beyond this machine."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def refuse(self, address):
        inside = self.family == getattr(socket, "AF_UNIX", None)
        if not inside and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a unit test wants to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def encoder():
    return FakeEncoder()


@pytest.fixture(scope="session")
def minilm():
    """The real all-MiniLM-L6-v2, from the package that carries it."""
    return load_encoder("all-MiniLM-L6-v2", compute=choose_compute("cpu", "float32"))


@pytest.fixture(scope="session", params=list(architectures.TOKENIZERS))
def architecture(request, tmp_path_factory):
    """A tiny encoder of a real one's architecture, saved as a sentence-transformers folder."""
    return architectures.build(
        request.param, tmp_path_factory.mktemp(request.param, numbered=False)
    )


@pytest.fixture(scope="session")
def multilingual():
    """A passage in each of some languages."""
    return architectures.TEXTS


@pytest.fixture(scope="session")
def tiny_config():
    return Config.model_validate(
        {
            "encoder": {"name": "fake"},
            "data": {"length": 12, "min_tokens": 3, "passages_per_shard": 8},
            "denoiser": {
                "hidden": 32,
                "layers": 1,
                "heads": 2,
                "feed_forward": 32,
                "token_table": "random",
            },
            "training": {
                "steps": 6,
                "batch_size": 8,
                "warmup_steps": 2,
                "eval_every": 3,
                "save_every": 2,
                "log_every": 2,
                "validation_pairs": 8,
            },
        }
    )


def _sentence(draw):
    """4 to 10 tokens, so that with L = 12 some sentences share a piece and some do not."""
    parts = ["the", *draw.sample(_QUALITIES, draw.randint(0, 3))]
    parts += [draw.choice(_NAMES), draw.choice(_VERBS)]
    if draw.random() < 0.5:
        parts += ["at", "the", draw.choice(_NAMES)]
    return " ".join(parts) + "."


@pytest.fixture(scope="session")
def passages():
    """42 passages of 2 to 5 short sentences in the fake encoder's words."""
    draw = random.Random(0)
    return [" ".join(_sentence(draw) for _ in range(draw.randint(2, 5))) for _ in range(42)]


@pytest.fixture(scope="session")
def text_file(passages, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "passages.txt"
    path.write_text("".join(line + "\n" for line in passages), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _prepared(text_file, tiny_config, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "pairs"
    prepare_pairs(text_file, folder, tiny_config, encoder)
    return folder


@pytest.fixture
def pairs_folder(_prepared, tmp_path):
    """Prepared pairs in 6 shards; a test may damage its own copy."""
    return Path(shutil.copytree(_prepared, tmp_path / "pairs"))


@pytest.fixture(scope="session")
def inverter(encoder, tiny_config):
    """Knows the fake encoder's words from the start: its logits are their cosines to the vector."""
    sizes = DenoiserSizes(
        vocab_size=encoder.tokenizer.size,
        embedding_dim=encoder.identity.dimension,
        length=tiny_config.data.length,
        **tiny_config.denoiser.model_dump(exclude={"token_table"}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(sizes)
    words = encoder.word_embeddings()
    words = words / np.linalg.norm(words, axis=1, keepdims=True)
    with torch.no_grad():
        denoiser.token_table.weight.copy_(torch.from_numpy(words))
        denoiser.embedding_shift.weight.copy_(4.0 * torch.eye(sizes.hidden))
    return Inverter(
        denoiser,
        encoder.tokenizer,
        encoder.identity,
        {"schedule": "log-linear", "rate": 5.0},
        trained={"config": tiny_config.model_dump()},
    )


@pytest.fixture(scope="session")
def _saved(inverter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "inverter"
    inverter.save_pretrained(folder)
    return folder


@pytest.fixture
def inverter_folder(_saved, tmp_path):
    """The tiny inverter on disk; a test may damage its own copy."""
    return Path(shutil.copytree(_saved, tmp_path / "inverter"))
