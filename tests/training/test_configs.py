"""Every shipped configuration trains: its vocabulary as shipped, synthetic pairs, small sizes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unembed.config import load_config, shipped_configs
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.pipeline import find
from unembed.tokenizer import TextTokenizer, word_tokenizer
from unembed.training import checkpoint as resuming
from unembed.training import loop
from unembed.training.checkpoint import LATEST, read_state

from .helpers import CPU, records

# Tokens of each encoder, with what the denoiser adds where a model lacks it
VOCABULARIES = {
    "all-MiniLM-L6-v2": 30_522,
    "Qwen3-Embedding-0.6B": 151_671,
    "jina-embeddings-v3": 250_002,
    "EmbeddingGemma-300m": 262_144,
}
# Layers, length and vocabulary stay; a CPU has no time for the widths
SHRUNK = (
    "denoiser.hidden=12",
    "denoiser.feed_forward=48",
    "training.steps=3",
    "training.batch_size=4",
    "training.warmup_steps=1",
    "training.log_every=1",
    "training.validation_pairs=4",
    "training.decoded_pairs=1",
    "training.compile=false",
)


def synthetic_pairs(config):
    size, dimension = VOCABULARIES[config.encoder.name], find(config.encoder.name).dimension
    definition = word_tokenizer(["word"]).definition
    tokenizer = TextTokenizer(definition, size, size - 1, size - 2, size - 3)
    generator = np.random.default_rng(0)
    contents = [generator.integers(0, size - 3, generator.integers(5, 15)) for _ in range(20)]
    vectors = generator.standard_normal((20, dimension)).astype(np.float16)
    identity = EncoderIdentity(config.encoder.name, None, dimension, "0" * 64, "")
    manifest = {
        "encoder": identity.to_dict(),
        "pieces": {"length": config.data.length},
        "shards": [],
    }
    tokens = tokenizer.pack(contents, config.data.length)
    return Pairs([tokens], [vectors], np.array([0, 20]), manifest, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_configs())
def test_it_trains_three_steps(name, tmp_path, monkeypatch):
    config = load_config(name, SHRUNK)
    prepared = synthetic_pairs(config)
    monkeypatch.setattr(resuming, "Pairs", SimpleNamespace(open=lambda *given: prepared))
    assert loop.train(config, tmp_path, tmp_path / "run", CPU).step == 3
    losses = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert len(losses) == 3 and np.isfinite(losses).all()
    sizes = read_state(tmp_path / "run" / LATEST).facts["sizes"]
    assert sizes["vocab_size"] == VOCABULARIES[config.encoder.name]
    assert sizes["layers"] == load_config(name).denoiser.layers


@pytest.mark.parametrize("name", shipped_configs())
def test_its_sizes_as_shipped_make_a_network(name):
    config = load_config(name)
    wanted = config.denoiser.model_dump(exclude={"token_table"})
    size, dimension = VOCABULARIES[config.encoder.name], find(config.encoder.name).dimension
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserSizes(size, dimension, config.data.length, **wanted))
        tokens = torch.zeros(2, config.data.length, dtype=torch.long)
        logits = denoiser(tokens, torch.zeros(2, dimension), torch.ones(2))
    assert logits.shape == (2, config.data.length, size)
