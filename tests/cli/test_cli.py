"""The commands, run in process with the fake encoder; a few as real processes."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unembed
from tests.fakes import word_probe
from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import make_fingerprint
from unembed.inverter import Inverter


def save(path, array):
    np.save(path, np.asarray(array, dtype=np.float32))
    return path


@pytest.mark.parametrize(
    "command",
    ["prepare", "preflight", "inspect", "train", "plot", "export", "invert", "evaluate", "serve"],
)
def test_every_command_explains_itself(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: " in out
    assert command in out


def test_help_lists_every_command(run):
    _, out, _ = run("--help")
    listed = {line.split()[1] for line in out.splitlines() if line.startswith("│ ")}
    assert {
        "prepare",
        "preflight",
        "inspect",
        "train",
        "export",
        "invert",
        "evaluate",
        "serve",
    } <= listed


def test_a_process_answers_with_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "unembed", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"unembed {unembed.__version__}\n",
        "",
    )


def test_a_process_fails_with_one_line_and_code_2(tmp_path):
    arguments = ["prepare", "--source", tmp_path / "x.txt", "--out", tmp_path / "o", "-c", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "unembed", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected a configuration file or one of ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["frobnicate"], ["invert", "--frob"], ["prepare"]])
def test_a_misspelt_command_has_code_2_and_no_traceback(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


# invert


def test_invert_a_text(run, inverter_folder, with_fake_encoder, inverter, encoder):
    text = "dog dog dog"
    code, out, _ = run("invert", "--text", text, "--checkpoint", inverter_folder, "--json")
    assert code == 0
    trip = json.loads(out)
    expected = inverter.invert(encoder.encode([text]))[0]
    assert trip["original"] == text
    assert trip["inversion"]["text"] == expected.text
    assert trip["cosine"] == pytest.approx(
        float(encoder.encode([expected.text])[0] @ encoder.encode([text])[0]), abs=1e-5
    )
    assert with_fake_encoder[0]["trust_remote_code"] is False
    assert with_fake_encoder[0]["prompt"] == ""


def test_invert_prints_a_table_for_readers(run, inverter_folder, with_fake_encoder):
    code, out, _ = run(
        "invert", "--text", "dog [bold]dog", "--checkpoint", inverter_folder, "--steps", 2
    )
    assert code == 0
    assert "dog [bold]dog" in out, "brackets in a text are text"
    assert "2 denoiser passes, 0 encoder calls" in out


def test_invert_can_be_watched(run, inverter_folder, with_fake_encoder):
    code, out, _ = run(
        "invert", "--text", "dog dog", "--checkpoint", inverter_folder, "--steps", 2, "--watch"
    )
    assert code == 0
    assert "recovered" in out


@pytest.mark.parametrize("rows", [None, 3])
def test_invert_a_file_needs_no_encoder(run, inverter_folder, inverter, encoder, tmp_path, rows):
    vectors = encoder.encode(["dog dog", "cat cat", "the river"])
    path = save(tmp_path / "v.npy", vectors[0] if rows is None else vectors)
    expected = [item.text for item in inverter.invert(vectors[: rows or 1])]
    code, out, _ = run("invert", "--embedding", path, "--checkpoint", inverter_folder)
    assert code == 0
    assert out.splitlines() == expected
    code, out, _ = run("invert", "--embedding", path, "--checkpoint", inverter_folder, "--json")
    assert [item["text"] for item in json.loads(out)] == expected


def test_invert_writes_files(run, inverter_folder, inverter, encoder, tmp_path):
    vectors = encoder.encode(["dog dog", "cat cat", "the river"])
    np.savez(tmp_path / "v.npz", a=vectors, b=vectors[:1] * np.nan)
    arguments = ("invert", "--embedding", tmp_path / "v.npz", "--checkpoint", inverter_folder)
    code, out, _ = run(*arguments, "--key", "a", "--out", tmp_path / "texts.jsonl")
    assert (code, out) == (0, f"3 texts in {tmp_path / 'texts.jsonl'}\n")
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [item.text for item in inverter.invert(vectors)]
    assert [json.loads(line)["text"] for line in lines] == expected
    vectors[1] = np.nan
    np.savez(tmp_path / "v.npz", a=vectors, b=vectors[1:2])
    code, out, err = run(*arguments, "--key", "a", "--skip-bad")
    assert (code, len(out.splitlines())) == (0, 2)
    assert err.endswith("note: vectors left out: 1 × NaN or infinity (row 1)\n")
    code, out, err = run(*arguments, "--key", "b", "--skip-bad")
    assert (code, out) == (2, "")
    assert "1 left out: 1 × NaN or infinity (row 0)" in err


@pytest.mark.parametrize(
    "option", [("--out", "x.jsonl"), ("--key", "a"), ("--column", "a"), ("--skip-bad",)]
)
def test_invert_refuses_options_of_files_for_a_text(refused, option):
    message = refused("invert", "--text", "a", *option)
    assert f"{option[0]} with --embedding only" in message


def test_invert_refuses_a_picture_of_vectors(refused):
    message = refused("invert", "--embedding", "v.npy", "--svg", "x.svg")
    assert "--svg with --text only" in message


def test_invert_takes_a_text_or_a_file(refused, inverter_folder, tmp_path):
    path = save(tmp_path / "v.npy", np.ones(32))
    both = refused("invert", "--text", "a", "--embedding", path, "--checkpoint", inverter_folder)
    assert "either --text or --embedding; found both" in both
    assert "found neither" in refused("invert", "--checkpoint", inverter_folder)


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.ones(31), "embeddings of 32 dimensions, [32] or [N, 32]; found shape [31]"),
        (np.ones((2, 384)), "found shape [2, 384]"),
        (np.ones((2, 2, 32)), "found shape [2, 2, 32]"),
        (np.full(32, np.nan), "NaN or infinity in vector 0"),
        (np.stack([np.ones(32), np.full(32, np.inf)]), "NaN or infinity in vector 1"),
        (np.stack([np.ones(32), np.zeros(32)]), "only zeros in vector 1"),
    ],
)
def test_invert_refuses_bad_vectors(refused, inverter_folder, tmp_path, vectors, said):
    path = save(tmp_path / "v.npy", vectors)
    message = refused("invert", "--embedding", path, "--checkpoint", inverter_folder)
    assert said in message


def test_invert_refuses_a_file_that_is_no_array(refused, inverter_folder, tmp_path):
    path = tmp_path / "v.npy"
    path.write_text("0.1, 0.2", encoding="utf-8")
    message = refused("invert", "--embedding", path, "--checkpoint", inverter_folder)
    assert f"a NumPy array at {path}" in message
    missing = tmp_path / "none.npy"
    assert str(missing) in refused("invert", "--embedding", missing, "-c", "minilm")


@pytest.mark.parametrize(("text", "reason"), [("", "empty one after --text"), ("  ", "visible")])
def test_invert_refuses_an_empty_text(refused, inverter_folder, with_fake_encoder, text, reason):
    message = refused("invert", "--text", text, "--checkpoint", inverter_folder)
    assert reason in message


def test_invert_refuses_an_unknown_strategy(refused, inverter_folder, tmp_path):
    path = save(tmp_path / "v.npy", np.ones(32))
    message = refused(
        "invert", "--embedding", path, "--checkpoint", inverter_folder, "--strategy", "magic"
    )
    assert "a strategy among greedy" in message
    assert "found 'magic'" in message


def test_the_encoder_may_be_elsewhere(run, inverter_folder, text_file, with_fake_encoder):
    given = ("--checkpoint", inverter_folder, "--steps", 2)
    assert run("invert", "--text", "the cat sleeps", *given)[0] == 0
    assert run("invert", "--text", "the cat sleeps", "--encoder", "moved", *given)[0] == 2
    arguments = ("evaluate", "--texts", text_file, "--limit", 4, *given)
    assert "found moved" in run(*arguments, "--encoder", "moved")[2]
    assert [asked["name"] for asked in with_fake_encoder] == ["fake", "moved", "moved"]
    assert with_fake_encoder[1]["prompt"] == FakeEncoder().identity.prompt


def test_invert_passes_options_and_guidance_on(run, inverter_folder, tmp_path):
    path = save(tmp_path / "v.npy", np.ones(32))
    code, out, _ = run(
        *("invert", "--embedding", path, "--checkpoint", inverter_folder, "--json"),
        *("--strategy", "euler", "--option", "temperature=0.5", "--option", "top_p=0.9"),
        *("--guidance", "0", "1.5", "--seed", 3, "--steps", 4),
    )
    (found,) = Inverter.from_pretrained(inverter_folder).invert(
        np.ones(32),
        strategy="euler",
        options={"temperature": 0.5, "top_p": 0.9},
        guidance=(0.0, 1.5),
        seed=3,
        steps=4,
    )
    assert code == 0
    assert found.token_ids == [t for item in json.loads(out) for t in item["token_ids"]]


def test_invert_writes_texts_of_a_given_length(run, refused, inverter_folder, inverter, tmp_path):
    path = save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((3, 32)))
    command = ("invert", "--embedding", path, "--checkpoint", inverter_folder, "--json", "--length")
    code, out, _ = run(*command, 2)
    assert code == 0
    assert [len(item["token_ids"]) for item in json.loads(out)] == [2] * 3
    error = refused(*command, inverter.length)
    assert f"a length of 1 to {inverter.length - 1} tokens" in error and "Correct --length" in error


@pytest.mark.parametrize("given", [(), ("--repetition", "0"), ("--repetition", "9")])
def test_invert_hands_over_what_repetition_costs(run, inverter_folder, tmp_path, given):
    path = save(tmp_path / "v.npy", np.ones(32))
    _, out, _ = run(
        *("invert", "--embedding", path, "--checkpoint", inverter_folder), "--json", *given
    )
    options = {"repetition": float(given[1])} if given else {}
    (found,) = Inverter.from_pretrained(inverter_folder).invert(np.ones(32), **options)
    assert found.token_ids == json.loads(out)[0]["token_ids"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("temperature", "an option of the form name=value"),
        ("=1", "an option of the form name=value"),
        ("heat=1", "an option of the strategy euler"),
        ("temperature=hot", "temperature of type float"),
        ("temperature=-1", "temperature of at least 0"),
    ],
)
def test_invert_refuses_bad_options(refused, inverter_folder, tmp_path, option, message):
    path = save(tmp_path / "v.npy", np.ones(32))
    call = ("invert", "--embedding", path, "--checkpoint", inverter_folder)
    assert message in refused(*call, "--strategy", "euler", "--option", option)


def test_invert_refuses_a_checkpoint_that_is_not_there(refused):
    message = refused("invert", "--text", "a", "--checkpoint", "nobody/nothing")
    assert "a folder or a Hub repository" in message
    assert "nobody/nothing" in message
    assert "error: expected an inverter" in refused("invert", "--text", "a", "--checkpoint", ".")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [None, 0, 0.5])
def test_invert_refuses_a_damaged_checkpoint(refused, inverter_folder, name, keep):
    path = inverter_folder / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: int(len(content) * keep)])
    message = refused("invert", "--text", "a", "--checkpoint", inverter_folder)
    assert str(inverter_folder) in message


def test_invert_refuses_a_checkpoint_of_an_encoder_it_cannot_get(refused, inverter_folder):
    message = refused("invert", "--text", "the cat", "--checkpoint", inverter_folder)
    assert "the encoder fake in a local folder or on the Hugging Face Hub" in message


def test_invert_refuses_a_checkpoint_of_another_encoder(refused, inverter_folder, monkeypatch):
    other = FakeEncoder(dimension=16)
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name, **settings: other)
    message = refused("invert", "--text", "the cat", "--checkpoint", inverter_folder)
    assert "vectors of the encoder fake (32 dimensions" in message
    assert "found fake (16 dimensions" in message


def test_a_device_that_is_not_there_is_refused(refused, inverter_folder):
    message = refused(
        "invert", "--text", "a", "--checkpoint", inverter_folder, "--device", "toaster"
    )
    assert "'toaster'" in message


def test_the_format_of_the_denoiser_can_be_named(run, refused, inverter_folder, encoder, tmp_path):
    np.save(tmp_path / "v.npy", encoder.encode(["dog dog", "cat cat"]))
    given = ("invert", "--embedding", tmp_path / "v.npy", "--checkpoint", inverter_folder)
    sure = {}
    for dtype in ("float32", "bfloat16"):
        code, out, _ = run(*given, "--json", "--device", "cpu", "--dtype", dtype)
        assert code == 0
        sure[dtype] = [item["confidences"] for item in json.loads(out)]
    assert sure["float32"] != sure["bfloat16"]
    assert "'float8'" in refused(*given, "--dtype", "float8")


# prepare, train, export, evaluate


@pytest.mark.slow
def test_from_texts_to_an_inverter_and_its_evaluation(
    run, text_file, config_file, with_fake_encoder, tmp_path
):
    pairs, training, folder = (tmp_path / name for name in ("pairs", "run", "inverter"))
    code, out, _ = run("prepare", "--source", text_file, "--out", pairs, "-c", config_file)
    assert code == 0
    assert out.endswith(f"pairs in 6 shards in {pairs}\n")

    code, out, _ = run(
        *("train", "--data", pairs, "--out", training, "-c", config_file),
        *("--set", "training.steps=4", "--set", "denoiser.token_table=encoder", "--device", "cpu"),
    )
    assert code == 0
    assert out.startswith("step 4, best validation loss ")

    code, out, _ = run("export", training, folder, "--onnx", folder / "denoiser.onnx")
    assert (code, out) == (0, f"inverter in {folder}\n")
    inverter = Inverter.from_pretrained(folder)
    assert inverter._onnx is not None
    assert inverter.encoder == FakeEncoder().identity
    assert inverter.fingerprint.to_dict() == make_fingerprint(FakeEncoder()).to_dict()

    report = tmp_path / "report.json"
    code, out, _ = run(
        *("evaluate", "--texts", text_file, "--checkpoint", folder, "--limit", 5, "--steps", 2),
        *("--train-pairs", pairs, "--out", report, "--json"),
    )
    assert code == 0
    assert json.loads(out) == json.loads(report.read_text(encoding="utf-8"))
    assert set(json.loads(out)["rows"]) == {
        "inverter",
        "shuffled embedding",
        "no embedding",
        "nearest training text",
        "random tokens",
    }

    code, out, _ = run(
        *("evaluate", "--texts", text_file, "--checkpoint", folder, "--limit", 5),
        *("--strategies", "greedy:steps=2,greedy:steps=3", "--out", tmp_path / "report"),
    )
    assert code == 0
    assert "greedy:steps=3" in out
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.json", "report.md", "report.html", "plots", "decoded"}


def test_preflight_shows_what_it_checked(run, config_file, with_fake_encoder, pairs_folder):
    code, out, _ = run("preflight", "-c", config_file)
    assert code == 0
    words = " ".join(out.split())
    assert "dimension passed 32" in words
    assert make_fingerprint(FakeEncoder()).sha256[:20] in words
    code, out, _ = run("preflight", "-c", config_file, "--data", pairs_folder, "--json")
    report = json.loads(out)
    assert (code, report["passed"]) == (0, True)
    assert "fingerprint" in [check["name"] for check in report["checks"]]


class Long(FakeEncoder):
    def encode(self, texts, progress=None):
        return 2 * super().encode(texts, progress)


def test_a_failed_preflight_has_code_1(run, config_file, monkeypatch):
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name, **settings: Long())
    code, out, _ = run("preflight", "-c", config_file)
    assert code == 1
    assert "unit length failed" in " ".join(out.split())


def test_inspect_shows_what_is_there(run, pairs_folder, tmp_path):
    code, out, _ = run("inspect", pairs_folder)
    assert code == 0
    assert "pairs" in out and "the " in out
    assert "writing systems Latin" in " ".join(out.split())
    code, out, _ = run("inspect", pairs_folder, "--json", "--examples", 2)
    assert (code, len(json.loads(out)["examples"])) == (0, 2)


def test_inspect_names_the_first_dozen_languages(run, pairs_folder, monkeypatch):
    found = {f"l{n:02d}": 30 - n for n in range(20)}
    monkeypatch.setattr("unembed.data.inspect.detected_languages", lambda texts: (found, "made up"))
    code, out, _ = run("inspect", pairs_folder)
    said = " ".join(out.split())
    assert code == 0
    assert "languages l00 30, l01 29, " in said
    assert "l11 19, 8 others 116 (made up)" in said


def test_inspect_refuses_a_folder_without_pairs(refused, tmp_path):
    assert "no manifest.json" in refused("inspect", tmp_path)


def test_evaluate_prints_a_table(run, text_file, inverter_folder, with_fake_encoder):
    code, out, _ = run(
        *("evaluate", "--texts", text_file, "--checkpoint", inverter_folder),
        *("--limit", 4, "--steps", 2),
    )
    assert code == 0
    assert "4 texts, greedy, 2 passes" in " ".join(out.split())
    assert "note: nearest training text: not measured" in out


def test_prepare_refuses_a_corpus_without_the_column(refused, tmp_path, with_fake_encoder):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"body": "the cat sleeps."}\n', encoding="utf-8")
    message = refused("prepare", "--source", source, "--out", tmp_path / "pairs")
    assert "a column 'text'" in message
    assert "'body'" in message
    assert with_fake_encoder == [], "the encoder is not loaded for nothing"


def test_prepare_refuses_a_source_without_texts_before_it_loads(
    refused, tmp_path, with_fake_encoder
):
    source = tmp_path / "texts.txt"
    source.touch()
    assert "found an empty file" in refused("prepare", "--source", source, "--out", "pairs")
    assert with_fake_encoder == []


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_prepare_refuses_a_source_it_cannot_read(refused, tmp_path, with_fake_encoder, content):
    source = tmp_path / "texts.parquet"
    if content is not None:
        source.write_bytes(content)
    message = refused("prepare", "--source", source, "--out", tmp_path / "pairs")
    assert str(source) in message


def test_prepare_refuses_several_sources_or_none(refused, text_file, tmp_path, with_fake_encoder):
    assert "one --source" in refused("prepare", "--out", tmp_path / "pairs")
    twice = ("--source", text_file, "--source", text_file)
    assert "one --source; found 2" in refused("prepare", *twice, "--out", tmp_path / "pairs")


def test_the_folders_are_in_data_if_none_are_named(run, passages, config_file, with_fake_encoder):
    Path("texts.txt").write_text("".join(f"{text}\n" for text in passages), encoding="utf-8")
    given = ("--source", "texts.txt", "--langs", "en", "--n-samples", 20)
    assert run("prepare", "--stage", 1, *given)[0] == 0
    code, out, _ = run("prepare", "--stage", 2, "-c", config_file, "--encode-batch", 512)
    assert code == 0
    assert out.endswith(f"in {Path('data', config_file.stem)}\n")
    assert with_fake_encoder[-1]["batch_size"] == 512
    manifest = json.loads(Path("data", config_file.stem, "manifest.json").read_text("utf-8"))
    assert sum(shard["passages"] for shard in manifest["shards"]) == 20
    code, _, err = run("inspect", Path("data", "raw"))
    assert code == 2
    assert "prepare --stage 2 --source" in err


@pytest.mark.parametrize(("dtype", "code"), [("float32", 0), ("bfloat16", 0), ("int3", 2)])
def test_the_format_of_the_encoder_can_be_named(
    run, text_file, config_file, with_fake_encoder, dtype, code
):
    given = ("--source", text_file, "-c", config_file, "--dtype", dtype, "--device", "cpu")
    assert run("prepare", *given, "--out", "pairs")[0] == code
    if code == 0:
        assert str(with_fake_encoder[-1]["compute"].dtype) == f"torch.{dtype}"


# prepare --stage 1


STAGE_1 = ("prepare", "--stage", 1)


def test_texts_are_collected_and_then_prepared(
    run, passages, config_file, with_fake_encoder, tmp_path
):
    source, raw, pairs = tmp_path / "texts.jsonl", tmp_path / "raw", tmp_path / "pairs"
    rows = [{"text": text, "lang": "en" if n % 2 else "de"} for n, text in enumerate(passages)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, _ = run(
        *(*STAGE_1, "--source", source, "--langs", "de,en", "--n-samples", 50, "--out", raw),
        *("--seed", 3, "--chars", 10, 500),
    )
    assert code == 0
    assert out.splitlines()[:2] == [f"42 texts in 1 shard in {raw}", "languages: de 21, en 21"]
    assert out.splitlines()[3] == "note: de: the sources end before 25 texts"
    settings = json.loads((raw / "manifest.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["seed"], settings["limits"]["max_chars"]) == (3, 500)
    code, out, _ = run(
        *("prepare", "--stage", 2, "--source", raw, "--out", pairs, "-c", config_file)
    )
    assert code == 0
    assert out.endswith(f"pairs in 6 shards in {pairs}\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--langs", "en"), "--n-samples"),
        (("--n-samples", 5), "--langs"),
        (("--langs", "en,en", "--n-samples", 5), "different languages"),
        (("--langs", "en", "--n-samples", 5, "--limit", 7), "--limit with --stage 2"),
        (("--langs", "en", "--n-samples", 5, "--encode-batch", 7), "--encode-batch with --stage 2"),
        (("--langs", "en", "--n-samples", 5, "--chars", 9, 8), "--chars"),
        (("--langs", "en", "--n-samples", 5, "--source", "none.txt"), "nothing at none.txt"),
        (("--langs", "en", "--n-samples", 5, "--column", "body"), "'text'"),
        (("--langs", "en,de", "--n-samples", 5), "--lang-column"),
    ],
)
def test_collecting_refuses_what_makes_no_sense(refused, tmp_path, options, said):
    source = tmp_path / "texts.jsonl"
    source.write_text('{"text": "the cat sleeps in the house."}\n', encoding="utf-8")
    given = () if "--source" in options else ("--source", source)
    assert said in refused(*STAGE_1, *given, *options, "--out", tmp_path / "raw")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--langs", "en"), ("--n-samples", 5), ("--seed", 0), ("--near-duplicates", 0.8)],
)
def test_options_of_stage_1_are_refused_in_stage_2(refused, text_file, tmp_path, option, value):
    message = refused("prepare", "--source", text_file, option, value, "--out", tmp_path / "o")
    assert f"{option} with --stage 1" in message


def test_prepare_refuses_what_the_other_stage_alone_uses(refused, text_file, tmp_path):
    """Also where the value is the default's: whoever gives an option expects it to do something."""
    out = ("--out", tmp_path / "o")
    for given in (("--chars", 10, 100_000), ("--lang-column", "lang")):
        message = refused("prepare", "--source", text_file, *given, *out)
        assert f"{given[0]} with --stage 1 only; found it with --stage 2" in message
    for given in (
        ("--set", "data.length=16"),
        ("--config", "minilm"),
        ("--device", "cpu"),
        ("--dtype", "auto"),
        ("--no-verify",),
        ("--verify",),
        ("--trust-remote-code",),
        ("--ray", "local"),
    ):
        options = ("--langs", "en", "--n-samples", 5, "--source", text_file)
        message = refused(*STAGE_1, *options, *given, *out)
        assert f"{given[0]} with --stage 2 only; found it with --stage 1" in message
    assert not (tmp_path / "o").exists()


def test_prepare_help_cuts_no_option_at_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("prepare", "--help")
    assert code == 0
    assert "…" not in out.replace("en,zh,…", "")
    assert "--trust-remote-code" in out
    assert "hf:NAME[:CONFIG][:COLUMN]" in out


@pytest.mark.parametrize("command", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.speed=3", "unknown key 'training.speed'"),
        ("training.lr=fast", "training.lr"),
        ("data.length=1", "data.length"),
        ("data.pack=[", "data.pack=["),
        ("lr=1", "section.key=value"),
    ],
)
def test_settings_are_checked_first(refused, text_file, tmp_path, command, override, said):
    read = {"prepare": "--source", "train": "--data"}[command]
    message = refused(command, read, text_file, "--out", tmp_path / "out", "--set", override)
    assert said in message


def test_an_unknown_key_in_a_file_is_refused(refused, text_file, config_file, tmp_path):
    config_file.write_text("training:\n  momentum: 0.9\n", encoding="utf-8")
    message = refused("prepare", "--source", text_file, "--out", tmp_path / "o", "-c", config_file)
    assert "unknown key 'training.momentum'" in message
    assert "weight_decay" in message


def test_prepare_refuses_a_folder_of_something_else(
    run, text_file, config_file, pairs_folder, with_fake_encoder
):
    before = {path.name: path.read_bytes() for path in pairs_folder.iterdir()}
    code, out, err = run(
        *("prepare", "--source", text_file, "--out", pairs_folder, "-c", config_file),
        *("--set", "data.length=16"),
    )
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: expected {pairs_folder} to hold pairs with")
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in pairs_folder.iterdir()} == before


def test_prepare_refuses_a_file_where_the_folder_should_be(
    run, text_file, config_file, tmp_path, with_fake_encoder
):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    code, _, err = run(
        "prepare", "--source", text_file, "--out", tmp_path / "taken", "-c", config_file
    )
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


def test_a_run_killed_before_its_first_save_starts_anew_from_the_words(
    run, pairs_folder, config_file, tmp_path, with_fake_encoder
):
    given = ("--data", pairs_folder, "-c", config_file, "--device", "cpu")
    given += ("--set", "training.steps=3", "--set", "denoiser.token_table=encoder")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("train", *given, "--out", whole)[0] == 0
    killed.mkdir()
    shutil.copy(whole / "tokenizer.json", killed)  # what is there before the first save
    assert run("train", *given, "--out", killed, "--resume")[0] == 0
    one, other = (load_file(folder / "latest.safetensors") for folder in (whole, killed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_train_refuses_a_folder_without_pairs(refused, tmp_path):
    message = refused("train", "--data", tmp_path / "none", "--out", tmp_path / "run")
    assert "Run `unembed prepare` first" in message


class Turned(FakeEncoder):
    """The weights are the same, what is made of them is not: another pooling, another library."""

    def encode(self, texts, progress=None):
        return np.roll(super().encode(texts, progress), 1, axis=1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (FakeEncoder(dimension=16), "pairs of the encoder fake"),
        (Turned(), "pairs of an encoder with the fingerprint"),
    ],
)
def test_train_refuses_pairs_of_another_encoder(
    refused, pairs_folder, config_file, tmp_path, monkeypatch, other, said
):
    monkeypatch.setitem(unembed.__dict__, "load_encoder", lambda name, **settings: other)
    message = refused(
        *("train", "--data", pairs_folder, "--out", tmp_path / "run", "-c", config_file),
        *("--set", "denoiser.token_table=encoder"),
    )
    assert said in message


def test_words_are_refused_for_pairs_of_another_tokenizer(
    refused, pairs_folder, config_file, tmp_path, with_fake_encoder
):
    manifest = json.loads((pairs_folder / "manifest.json").read_text())
    manifest["pieces"]["vocabulary"]["tokenizer"] = "other"
    (pairs_folder / "manifest.json").write_text(json.dumps(manifest))
    message = refused(
        *("train", "--data", pairs_folder, "--out", tmp_path / "run", "-c", config_file),
        *("--set", "denoiser.token_table=encoder"),
    )
    assert "pairs of the tokenizer other" in message and "token_table=random" in message


def test_export_refuses_what_is_no_run(refused, tmp_path):
    out = tmp_path / "inverter"
    assert "a run of `unembed train` at" in refused("export", tmp_path, out)
    assert "found 'newest'" in refused("export", tmp_path, out, "--which", "newest")
    assert "none.md" in refused("export", tmp_path, out, "--card", tmp_path / "none.md")
    (tmp_path / "latin.md").write_bytes("é".encode("latin-1"))
    message = refused("export", tmp_path, out, "--card", tmp_path / "latin.md")
    assert "Markdown in UTF-8 at" in message and "--card" in message
    assert "found 'int4'" in refused("export", tmp_path, out, "--weights", "int4")
    assert "found '5 pieces'" in refused("export", tmp_path, out, "--shard-size", "5 pieces")


def test_plot_refuses_what_is_no_run_axis_or_picture(refused, tmp_path):
    (tmp_path / "run").mkdir()
    arguments = ("plot", tmp_path / "run", "--out")
    assert "a run of `unembed train` at" in refused(*arguments, tmp_path / "x.png")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "found an empty file" in refused(*arguments, tmp_path / "x.png")
    assert ".png or .svg" in refused(*arguments, tmp_path / "x.gif")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    assert "found 'years'" in refused(*arguments, tmp_path / "x.png", "--x", "years")


def test_evaluate_refuses_to_write_where_there_is_no_folder(refused, text_file, inverter_folder):
    message = refused(
        *("evaluate", "--texts", text_file, "--checkpoint", inverter_folder),
        *("--out", "none/report.json"),
    )
    assert "a folder for none/report.json" in message.replace("\\", "/")


def test_evaluate_refuses_to_write_among_the_texts(refused, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sleeps by the river.\n", encoding="utf-8")
    message = refused("evaluate", "--texts", tmp_path / "texts", "--out", tmp_path / "texts")
    assert "an --out outside of" in message


def test_evaluate_refuses_to_write_over_the_texts(refused, tmp_path):
    texts = tmp_path / "texts.json"
    texts.write_text('{"text": "the cat sleeps by the river."}\n', encoding="utf-8")
    assert "an --out outside of" in refused("evaluate", "--texts", texts, "--out", texts)
    assert texts.read_text().startswith('{"text"')


def test_evaluate_refuses_texts_without_a_piece(run, inverter_folder, with_fake_encoder, tmp_path):
    (tmp_path / "short.txt").write_text("no.\n", encoding="utf-8")
    code, _, err = run(
        "evaluate", "--texts", tmp_path / "short.txt", "--checkpoint", inverter_folder
    )
    assert code == 2
    assert "at least 2 pieces" in err.splitlines()[-1]


# serve


@pytest.fixture
def served(run, with_fake_encoder, monkeypatch):
    """Run `serve` up to where it listens; returns its output and what would be served."""
    seen = {}

    def listen(app, bound, *, ready, stopping, proxies):
        ready()
        seen["stopping"] = stopping
        seen.update(app=app, demo=app.state.demo, proxies=proxies)
        bound.close()

    monkeypatch.setattr("unembed.demo.server.run", listen)
    monkeypatch.setattr("unembed.demo.server.write_log", lambda: None)

    def command(*arguments):
        code, out, err = run("serve", "--port", 0, *arguments)
        assert code == 0
        assert err == "" or "--open" in arguments
        for model in seen["demo"].models.values():
            model.close()
        return out, seen

    return command


def test_serve_is_on_loopback_with_limits_unless_told_otherwise(served, inverter_folder):
    out, seen = served("--checkpoint", inverter_folder)
    assert out.startswith("open http://127.0.0.1:")
    assert out.endswith(" (models: inverter; Ctrl+C stops)\n")
    (guard,) = seen["app"].user_middleware
    assert guard.kwargs["hosts"] == ["localhost", "127.0.0.1", "[::1]", "127.0.0.1"]
    limits = seen["demo"].limits
    assert (limits.rate, limits.queue, limits.seconds) == ("120/minute", 64, 60.0)
    assert seen["demo"].log_texts is False and seen["proxies"] == []


def test_serve_says_that_it_finishes_what_runs(served, inverter_folder, capfd):
    _, seen = served("--checkpoint", inverter_folder)
    seen["stopping"]()
    assert "finishing what runs, at most 60 s" in capfd.readouterr().out


def test_serve_passes_its_options_on(served, inverter_folder, inverter, tmp_path):
    inverter.save_pretrained(tmp_path / "other")
    _, seen = served(
        *("--checkpoint", inverter_folder, "--checkpoint", tmp_path / "other"),
        *("--host", "0.0.0.0", "--allow-host", "demo.example", "--log-texts"),
        *("--allow-origin", "https://friend.example", "--trust-proxy", "192.0.2.1"),
        *("--rate", "none", "--max-queue", 3, "--max-seconds", 5, "--max-encoder-calls", 9),
    )
    assert list(seen["demo"].models) == ["inverter", "other"]
    cors, guard = seen["app"].user_middleware
    assert cors.kwargs["allow_origins"] == ["https://friend.example"]
    assert guard.kwargs["hosts"] == ["localhost", "127.0.0.1", "[::1]", "demo.example"]
    limits = seen["demo"].limits
    assert (limits.rate, limits.queue, limits.seconds, limits.encoder_calls) == (None, 3, 5.0, 9)
    assert seen["demo"].log_texts is True and seen["proxies"] == ["192.0.2.1"]


def test_serve_finds_words_with_the_probe_of_its_encoder(served, inverter_folder, tmp_path):
    word_probe(FakeEncoder()).save(tmp_path)
    _, seen = served("--checkpoint", inverter_folder)  # the probe that ships is for another encoder
    assert seen["demo"].find(None).probe is None
    _, seen = served("--checkpoint", inverter_folder, "--probe", tmp_path)
    assert seen["demo"].find(None).probe.encoder == FakeEncoder().identity


@pytest.mark.parametrize(
    ("screen", "opened"), [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "w"}, True)]
)
def test_serve_opens_the_page_where_there_is_a_screen(
    served, inverter_folder, monkeypatch, screen, opened
):
    pages = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in screen.items():
        monkeypatch.setenv(name, value)
    out, _ = served("--checkpoint", inverter_folder, "--open")
    assert pages == ([out.split()[1]] if opened else [])


def test_serve_fails_with_one_line(
    refused, served, inverter_folder, inverter, tmp_path, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"a free port {port} at 127.0.0.1; found" in refused("serve", "--port", port)
    assert "192.0.2.1" in refused("serve", "--host", "192.0.2.1", "--port", 0)
    assert "an inverter: a shipped one" in refused("serve", "--port", 0, "--checkpoint", "nothing")
    assert "a rate such as 120/minute" in refused("serve", "--port", 0, "--rate", "fast")
    inverter.save_pretrained(tmp_path / "there" / "inverter")
    both = ("--checkpoint", inverter_folder, "--checkpoint", tmp_path / "there" / "inverter")
    assert "checkpoints whose names differ" in refused("serve", "--port", 0, *both)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: find(name, *rest) if name != "uvicorn" else None,
    )
    message = refused("serve")
    assert "the packages of the extra demo for the demo; found that uvicorn" in message
    assert "[demo]'" in message


def test_evaluate_frontier_prints_and_writes_the_curve(
    run, text_file, inverter_folder, with_fake_encoder, tmp_path
):
    code, out, _ = run(
        *("evaluate", "--texts", text_file, "--checkpoint", inverter_folder, "--frontier"),
        *("--limit", 2, "--steps", 2, "--out", tmp_path / "curve"),
        *("--strategies", "guided-search:encoder_calls=7:rounds=1"),
    )
    assert code == 0
    assert "calls are those allowed at most" in " ".join(out.split())
    assert (tmp_path / "curve" / "frontier.md").read_text(encoding="utf-8").count("| 7 |") >= 2


def test_evaluate_refuses_a_corpus_that_no_strategy_looks_at(refused, text_file, tmp_path):
    message = refused("evaluate", "--texts", text_file, "--corpus", tmp_path)
    assert "--corpus with guided-search" in message
