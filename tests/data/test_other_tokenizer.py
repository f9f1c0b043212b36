"""Pairs whose tokens are not the encoder's own."""

import json
import shutil

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from unembed.config import Config
from unembed.data.pairs import MANIFEST, Pairs
from unembed.data.prepare import prepare_pairs
from unembed.device import choose_compute
from unembed.encoders.base import FakeEncoder
from unembed.errors import EncoderError
from unembed.tokenizer import load_tokenizer, word_tokenizer
from unembed.training.export import inverter_from_run
from unembed.training.loop import train
from unembed.vectors.invert import invert_text


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    """The words of the encoder under other ids."""
    vocabulary = encoder.tokenizer.backend.get_vocab()
    words = sorted(word for word in vocabulary if word != "[UNK]")
    path = tmp_path_factory.mktemp("tokenizers") / "other"
    backend = word_tokenizer(words).backend
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(path)
    return path


def config(tiny_config, name, **more):
    data = tiny_config.model_dump()
    data["data"]["vocabulary"] = {"tokenizer": str(name), **more}
    return Config.model_validate(data)


@pytest.mark.parametrize("more", [{}, {"min_count": 2}])
def test_prepare_pairs_from_texts_to_an_inverter(
    text_file, tiny_config, encoder, folder, tmp_path, more
):
    chosen = config(tiny_config, folder, **more)
    prepare_pairs(text_file, tmp_path / "pairs", chosen, encoder, limit=50)
    pairs = Pairs.open(tmp_path / "pairs")
    tokens, vectors = pairs.rows(np.arange(len(pairs)))
    assert pairs.tokenizer.definition == load_tokenizer(str(folder)).definition
    assert pairs.tokenizer.definition != encoder.tokenizer.definition
    assert (encoder.encode(pairs.tokenizer.decode(tokens)) * vectors).sum(axis=1).min() > 0.99
    compute = choose_compute("cpu", "float32")
    train(chosen, tmp_path / "pairs", tmp_path / "run", compute)
    inverter = inverter_from_run(tmp_path / "run")
    assert inverter.tokenizer.digest == pairs.tokenizer.digest
    assert invert_text(inverter, encoder, "the cat sleeps", steps=2).inversion.passes == 2
    for said in (inverter.trained, pairs.manifest):
        assert str(folder) not in json.dumps(said), "no absolute paths"


def test_prepare_pairs_a_moved_tokenizer_is_the_same_one(
    text_file, tiny_config, encoder, folder, tmp_path
):
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    found = []
    for name, last in (("whole", folder), ("cut", moved)):
        out = tmp_path / name
        prepare_pairs(text_file, out, config(tiny_config, folder), encoder, limit=20)
        prepare_pairs(text_file, out, config(tiny_config, last), encoder)
        found.append((out / MANIFEST).read_bytes())
    assert found[0] == found[1]


def test_prepare_pairs_pieces_that_the_encoder_would_cut_off_are_left_out(
    text_file, tiny_config, folder, tmp_path
):
    class Short(FakeEncoder):
        most_tokens = 6

    manifest = prepare_pairs(text_file, tmp_path, config(tiny_config, folder), Short())
    left_out = sum(shard["dropped"].get("beyond_encoder", 0) for shard in manifest["shards"])
    pairs = Pairs.open(tmp_path)
    texts = pairs.tokenizer.decode(pairs.rows(np.arange(len(pairs)))[0])
    assert left_out > 0
    assert max(map(len, FakeEncoder().tokenizer.encode(texts))) == 6


def test_prepare_pairs_what_is_no_tokenizer_is_refused(text_file, tiny_config, encoder, tmp_path):
    out = tmp_path / "pairs"
    with pytest.raises(EncoderError, match=r"Correct data\.vocabulary\.tokenizer"):
        prepare_pairs(text_file, out, config(tiny_config, tmp_path / "none"), encoder)
    assert not out.exists()
