"""The commands with an encoder behind an API, a small server on this machine."""

import json
import sys

import numpy as np
import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from unembed.cli import main as cli
from unembed.data.pairs import Pairs
from unembed.encoders.fingerprint import PROBES, make_fingerprint
from unembed.inverter import Inverter

from ..encoders.serving import serving

SECRET = "sk-unembed-0123456789abcdef"


@pytest.fixture
def server(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("UNEMBED_API_KEY", SECRET)
    monkeypatch.setenv("UNEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    with serving(encoder) as server:
        yield server


@pytest.fixture
def run(server, monkeypatch, capfd):
    """Run a command against the server: returns exit code, standard output, standard error."""

    def command(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["unembed", *map(str, arguments), "--api-base", server.base]
        )
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert SECRET not in out + err
        return code, out, err

    return command


@pytest.fixture
def config(tiny_config, encoder, tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=encoder.tokenizer.backend, unk_token="[UNK]")
    words.save_pretrained(tmp_path / "words")
    settings = tiny_config.model_dump()
    settings["encoder"] = {"name": "openai:fake"}
    settings["data"]["vocabulary"] = {"tokenizer": str(tmp_path / "words")}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(inverter, encoder, tmp_path):
    """The tiny inverter, of the fake encoder, with its vectors of the probe texts."""
    known = Inverter(
        inverter.denoiser,
        inverter.tokenizer,
        inverter.encoder,
        inverter.diffusion,
        inverter.trained,
        fingerprint=make_fingerprint(encoder),
    )
    known.save_pretrained(tmp_path / "inverter")
    return tmp_path / "inverter"


@pytest.mark.slow
def test_prepare_goes_on_and_pays_for_nothing_twice(
    run, server, config, text_file, encoder, tmp_path
):
    out = tmp_path / "pairs"
    wanted = ("prepare", "--config", config, "--source", text_file, "--out", out, "--price", "2")
    server.answers = [None] * 3 + [500] * 100
    code, _, err = run(*wanted)
    *_, usage, error = err.splitlines()
    assert (code, error.startswith("error: expected vectors from http://127.0.0.1")) == (2, True)
    assert usage.startswith("openai:fake: 4 calls, ") and "at 2 a million tokens" in usage
    server.answers, before = [], len(server.texts)
    code, printed, err = run(*wanted)
    assert code == 0 and "pairs in 6 shards" in printed
    assert len(server.texts[before:]) == len(set(server.texts[before:])), "each text once"
    pairs = Pairs.open(out)
    assert pairs.encoder.name == "openai:fake"
    tokens, embeddings = pairs.rows(np.arange(len(pairs)))
    expected = encoder.encode(pairs.tokenizer.decode(tokens))
    assert np.abs(embeddings - expected).max() < 1e-3
    manifest = (out / "manifest.json").read_text(encoding="utf-8")
    assert server.base not in manifest and SECRET not in manifest
    code, printed, _ = run("preflight", "--config", config, "--data", out, "--json")
    checks = {check["name"]: check for check in json.loads(printed)["checks"]}
    assert (code, checks["fingerprint"]["passed"]) == (0, True)
    assert checks["noise"]["found"].startswith("one text 10 times: 1 different answer, ")


def test_prepare_needs_a_tokenizer(run, config, text_file, tmp_path):
    wanted = ("prepare", "--config", config, "--set", "data.vocabulary.tokenizer=null")
    code, _, err = run(*wanted, "--source", text_file, "--out", tmp_path / "pairs")
    assert code == 2 and "--set data.vocabulary.tokenizer=FOLDER" in err


@pytest.mark.slow
def test_evaluate_and_invert_take_an_api(run, server, checkpoint, text_file):
    given = ("--checkpoint", checkpoint, "--encoder", "openai:fake")
    code, printed, err = run("evaluate", "--texts", text_file, "--limit", 5, "--steps", 2, *given)
    assert code == 0 and "greedy" in printed
    assert "openai:fake: " in err
    wanted = ("--text", "the red cat runs.", "--strategy", "best-of:samples=3:steps=2")
    code, printed, _ = run("invert", *wanted, "--encoder-calls", 5, "--json", *given)
    assert code == 0 and json.loads(printed)["inversion"]["encoder_calls"] > 0
    code, _, err = run("invert", *wanted, "--encoder-calls", 5, "--max-calls", 1, *given)
    assert code == 0 and "openai:fake: 0 calls" in err, "all is in the cache"
    code, _, err = run("invert", "--text", "a dog", "--max-calls", 1, *given)
    assert code == 2 and "expected at most 1 calls of fake; found another one" in err


@pytest.mark.slow
def test_align_embeds_texts_and_pays_for_nothing_twice(run, server, checkpoint, passages, tmp_path):
    texts = sorted({s.strip() for p in passages for s in p.split(".") if s.strip()})[:60]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    given = ("--to", checkpoint, "--encoder", "openai:fake", "--out", tmp_path / "map")
    wanted = ("align", "--texts", tmp_path / "texts.txt", "--from", "openai:other", *given)
    server.answers = [None] * 3 + [500] * 100  # the probe texts of both, the texts of one
    code, out, err = run(*wanted)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: expected vectors from http://127.0.0.1")
    assert not (tmp_path / "map").exists()
    server.answers, before = [], len(server.requests)
    code, out, err = run(*wanted)
    assert code == 0 and "openai:other → fake: " in out
    asked = {
        model: {t for r in server.requests[before:] if r["model"] == model for t in r["input"]}
        for model in ("other", "fake")
    }
    assert asked["other"] <= set(PROBES) and set(texts) <= asked["fake"]
    files = [path.read_text(encoding="utf-8") for path in (tmp_path / "map").glob("*.json")]
    assert files and not any(SECRET in text or server.base in text for text in files)
    before = len(server.requests)
    code, _, err = run(*wanted, "--limit", 5)
    assert code == 0 and len(server.requests) == before, "all is in the cache"


@pytest.mark.parametrize("command", ["prepare", "preflight", "invert", "evaluate"])
@pytest.mark.slow
def test_a_page_in_place_of_vectors_is_one_line(
    run, server, config, checkpoint, text_file, tmp_path, command
):
    server.always = lambda handler, right: handler.send(b"<!doctype html><title>Log in</title>")
    of_config = ("--config", config)
    of_checkpoint = ("--checkpoint", checkpoint, "--encoder", "openai:fake")
    arguments = {
        "prepare": ("--source", text_file, "--out", tmp_path / "pairs", *of_config),
        "preflight": of_config,
        "invert": ("--text", "a cat", *of_checkpoint),
        "evaluate": ("--texts", text_file, *of_checkpoint),
    }
    code, out, err = run(command, *arguments[command])
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: expected JSON with embeddings in the answer of the API; found HTML. "
        "Check --api-base and encoder.name."
    ]
