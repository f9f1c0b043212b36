"""The code path of the real encoders, on tiny random models of their architectures."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from unembed.config import Config
from unembed.data.pairs import Pairs, read_manifest
from unembed.data.prepare import prepare_pairs
from unembed.device import choose_compute
from unembed.encoders.fingerprint import preflight
from unembed.encoders.sentence import load_encoder
from unembed.errors import DataError
from unembed.inverter import Inverter
from unembed.training.export import inverter_from_run
from unembed.training.loop import train
from unembed.vectors.invert import invert_text

CPU = choose_compute("cpu", "float32")


@pytest.fixture(scope="module")
def model(architecture):
    return load_encoder(str(architecture), compute=CPU)


@pytest.fixture
def source(multilingual, tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in multilingual * 2]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def config(**data):
    return Config.model_validate(
        {
            "data": {"length": 24, "min_tokens": 2, "passages_per_shard": 9, **data},
            "denoiser": {"hidden": 32, "layers": 1, "heads": 2, "feed_forward": 32},
            "training": {
                "steps": 3,
                "batch_size": 4,
                "warmup_steps": 1,
                "eval_every": 3,
                "save_every": 3,
                "validation_pairs": 4,
            },
        }
    )


def name_of(folder):
    return folder.parent.name


def test_a_preflight_passes(model):
    report = preflight(model)
    assert report.passed, [check for check in report.checks if check.passed is False]


def test_vectors_are_those_of_the_official_pipeline(architecture, model, multilingual):
    official = SentenceTransformer(str(architecture), device="cpu", local_files_only=True)
    expected = official.encode_document(multilingual, batch_size=3)
    vectors = model.encode(multilingual)
    assert np.abs(vectors - expected).max() < 1e-4
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-4
    assert (vectors @ vectors.T - np.eye(len(vectors))).max() < 0.999, "texts are told apart"


def test_the_document_prompt_is_used_and_matters(architecture, model, multilingual):
    expected = {"gemma3": "title: none | text: "}.get(name_of(architecture), "")
    assert model.identity.prompt == expected
    other = load_encoder(str(architecture), prompt="some other prompt: ", compute=CPU)
    cosines = (model.encode(multilingual) * other.encode(multilingual)).sum(axis=1)
    assert cosines.min() < 0.99


def test_special_ids_are_distinct_and_inside_the_vocabulary(architecture, model):
    tokenizer = model.tokenizer
    ids = (tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_id)
    assert len(set(ids)) == 3
    assert max(ids) < tokenizer.size
    if name_of(architecture) == "qwen3":  # no mask token, and padding is the end token
        assert tokenizer.size == tokenizer.backend.get_vocab_size() + 2
    else:
        assert tokenizer.size == tokenizer.backend.get_vocab_size()


def test_every_writing_comes_back_from_its_tokens(model, multilingual):
    ids = model.tokenizer.encode(multilingual)
    assert all(model.tokenizer.decodes_back(multilingual, ids))


def test_the_token_table_covers_the_vocabulary(model):
    words = model.word_embeddings()
    assert words.shape[1] == 32
    assert len(words) >= model.tokenizer.backend.get_vocab_size()


@pytest.mark.slow
@pytest.mark.parametrize("min_count", [None, 2])
def test_from_texts_to_an_inverter(model, source, tmp_path, min_count):
    """Prepare, train three steps, export, save, load, invert."""
    chosen = config(vocabulary={"min_count": min_count})
    manifest = prepare_pairs(source, tmp_path / "pairs", chosen, model)
    pairs = Pairs.open(tmp_path / "pairs")
    tokens, vectors = pairs.rows(np.arange(len(pairs)))
    texts = pairs.tokenizer.decode(tokens)
    again = model.encode(texts)
    same = (again * vectors).sum(axis=1)
    assert same.min() > 0.98, "the vector and the tokens speak of the same string"
    if min_count is not None:
        assert pairs.tokenizer.size < model.tokenizer.size
        assert manifest["vocabulary"]["after"] == pairs.tokenizer.size

    train(chosen, tmp_path / "pairs", tmp_path / "run", CPU, words=model.word_embeddings())
    inverter_from_run(tmp_path / "run").save_pretrained(tmp_path / "inverter")
    inverter = Inverter.from_pretrained(tmp_path / "inverter")
    assert inverter.denoiser.sizes.vocab_size == pairs.tokenizer.size
    assert inverter.fingerprint is not None
    trip = invert_text(inverter, model, texts[0], steps=2, length=4)  # one token takes one
    assert trip.inversion.passes == 2
    assert inverter.tokenizer.encode([texts[0]])[0] == [
        int(tokens[0, i]) for i in pairs.tokenizer.content_positions(tokens[0].tolist())
    ]


def test_the_table_starts_from_the_words_that_were_kept(model, source, tmp_path, monkeypatch):
    chosen = config(vocabulary={"min_count": 2})
    prepare_pairs(source, tmp_path / "pairs", chosen, model)
    tokenizer = Pairs.open(tmp_path / "pairs").tokenizer
    given = []
    monkeypatch.setattr(
        "unembed.denoiser.Denoiser.start_from_words", lambda self, words: given.append(words)
    )
    words = model.word_embeddings()
    train(chosen, tmp_path / "pairs", tmp_path / "run", CPU, words=words)
    inside = [token for token in tokenizer.source_ids if token < len(words)]
    assert torch.equal(given[0], torch.from_numpy(words[inside]))


def test_pieces_the_model_would_cut_off_are_refused(model, source, tmp_path):
    assert 24 <= model.most_tokens < 48
    with pytest.raises(DataError, match=f"at most {model.most_tokens} tokens"):
        prepare_pairs(source, tmp_path / "pairs", config(length=model.most_tokens + 2), model)
    assert not (tmp_path / "pairs").exists()
    prepare_pairs(source, tmp_path / "pairs", config(length=model.most_tokens + 1), model)


def test_a_special_token_in_a_text_does_not_end_it(model, tmp_path):
    """Such a piece is left out and counted: its tokens would be those of a shorter text."""
    names = [model.tokenizer.backend.id_to_token(i) for i in model.tokenizer.special_ids]
    source = tmp_path / "texts.txt"
    lines = [f"The court {name} heard her on Friday" for name in names if name]
    source.write_text("\n".join([*lines, "The court heard her."]), encoding="utf-8")
    prepare_pairs(source, tmp_path / "pairs", config(), model)
    shard = read_manifest(tmp_path / "pairs")["shards"][0]
    assert shard["dropped"] == {"not_round_trip": len(lines)}
    tokens, _ = Pairs.open(tmp_path / "pairs").rows(np.arange(shard["pairs"]))
    texts = model.tokenizer.decode(tokens)
    assert texts[-1] == "The court heard her."
    assert not any(name in text for name in names if name for text in texts)


@pytest.mark.slow
def test_hostile_texts_become_true_pairs_or_are_counted(model, tmp_path):
    texts = [
        "\x00\x00 NUL bytes \x00 inside a text \x01 and controls \x7f",
        "😀" * 50,
        "   \u3000\t ",
        "\u200b\u200f\ufeff",
        "x" * 50_000,
        "字" * 5_000,
        "שלום עולם, מה שלומך היום?",
        "\ufffd\ufffe broken \ud7ff letters",
        "Ａ ﬁ ½ ① Ⅷ ㎏ full width and compatibility forms",
        "a\u0301\u0301\u0301\u0301 stacked marks",
        "line\u2028separators\u2029and\x0bothers",
        "",
    ]
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    manifest = prepare_pairs(source, tmp_path / "pairs", config(), model)
    pairs = Pairs.open(tmp_path / "pairs")
    assert sum(shard["pairs"] for shard in manifest["shards"]) == len(pairs) > 2
    tokens, vectors = pairs.rows(np.arange(len(pairs)))
    decoded = pairs.tokenizer.decode(tokens)
    assert (model.encode(decoded) * vectors).sum(axis=1).min() > 0.98
