"""What every command does with its options: none is ignored in silence, wrong ones fail at once."""

import json
import logging
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

import unembed
from unembed.cli.options import OUTPUT, STRATEGY_OPTIONS, interruptible
from unembed.decoding.settings import STRATEGIES, strategy_fields
from unembed.errors import EncoderError

COMMANDS = "prepare preflight inspect train plot export invert evaluate serve".split()


@pytest.fixture
def files(tmp_path, encoder, passages):
    """Vectors, texts and a table of both, where the command runs."""
    folder = tmp_path / "here"
    texts = passages[:12]
    np.save(folder / "v.npy", encoder.encode(texts))
    rows = [{"id": i, "text": text, "vector": encoder.encode([text])[0].tolist()}
            for i, text in enumerate(texts)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "t.txt").write_text("\n".join(texts) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("invert --embedding v.npy --out o.jsonl --json", "--json without --out only"),
        ("invert --text a --encoder-calls 5", "encoder calls (--encoder-calls) with best-of"),
        ("invert --text a --strategy greedy:encoder_calls=5", "with greedy, which makes none"),
        ("invert --text a --config minilm --checkpoint minilm", "--config without --checkpoint"),
        ("invert --text a --config my.yaml", "--config with the name of weights that ship"),
        ("invert --embedding v.npy --key a", "no key (--key, --column) for v.npy"),
        ("invert --embedding t.parquet --key vector --column vector", "--column without --key"),
        ("invert --text a --watch --json", "--watch without --json only"),
        ("invert --text a --svg a.png", "--svg that ends in .svg; found a.png"),
        ("invert --text a --svg nodir/a.svg", "a place to write nodir/a.svg; found no folder"),
        ("invert --embedding v.npy --out o.csv", "an --out that ends in .jsonl or .parquet"),
        ("invert --embedding v.npy --out nodir/o.jsonl", "found no folder nodir"),
        ("invert --embedding none.npy", "found nothing there"),
        ("invert --text a --batch-size 3", "--batch-size with --embedding only"),
        ("evaluate", "--texts, or --embedding; found neither"),
        ("evaluate --texts t.jsonl --strategy euler --strategies greedy", "--strategy without"),
        ("evaluate --texts t.jsonl --strategy greedy:steps=4 --steps 2", "that does not say"),
        ("evaluate --texts t.jsonl --strategies greedy:encoder_calls=4", "which makes none"),
        ("evaluate --texts t.txt --column body", "--column for texts in columns only"),
        ("evaluate --texts t.jsonl --text-column body", "--text-column with --embedding only"),
        ("evaluate --texts t.jsonl --skip-bad", "--skip-bad with --embedding only"),
        ("evaluate --texts t.jsonl --ranges=-1,1", "--ranges with --embedding only"),
        ("evaluate --texts t.jsonl --out figures.csv", "the name of a .csv file"),
        ("evaluate --embedding t.jsonl --out t.jsonl", "an --out outside of t.jsonl"),
        ("evaluate --embedding none.parquet", "found nothing there"),
        ("evaluate --embedding v.npy", "--texts with v.npy, which holds vectors alone"),
        ("invert --text a --strategy best-of", "for the strategy best-of; found 0 encoder calls"),
        ("evaluate --embedding v.npy --texts t.txt --text-column a", "texts in columns only"),
        ("prepare --source t.txt --column body --out d", "--column for texts in columns only"),
        ("prepare --stage 1 --source t.txt --out d", "found no --langs and no --n-samples"),
        ("prepare --stage 1 --source t.txt --langs en --out d", "found no --n-samples"),
        ("inspect d --lang-column l", "--lang-column with --source only"),
        ("inspect d --png nodir/a.png", "a place to write nodir/a.png"),
        ("inspect d --png a.svg", "--png that ends in .png; found a.svg"),
        ("plot r --out nodir/a.png", "a place to write nodir/a.png"),
        ("export r o --card c.md --evaluation e.json", "--evaluation without --card only"),
    ],
)
def test_an_option_without_effect_or_place_is_refused_before_any_work(
    refused, files, monkeypatch, command, said
):
    def load(*given, **options):
        raise AssertionError("something was loaded first")

    monkeypatch.setattr(unembed.Inverter, "from_pretrained", load)
    monkeypatch.setitem(unembed.__dict__, "load_encoder", load)
    assert said in refused(*command.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", 3), "note: --seed has no effect: greedy draws nothing"),
        (("--encoder", "x"), "note: --encoder has no effect: no text is embedded"),
        (("--trust-remote-code",), "note: --trust-remote-code has no effect"),
    ],
)
def test_note_idle_tells_of_options_that_may_stand_in_any_command(
    run, files, inverter_folder, options, said
):
    code, out, err = run(
        "invert", "--embedding", "v.npy", "--checkpoint", inverter_folder, *options
    )
    assert (code, len(out.splitlines())) == (0, 12)
    assert said in err


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_answers_to_h_and_cuts_nothing_at_80_columns(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(*command, "-h")
    assert (code, run(*command, "--help")[1]) == (0, out)
    meant = ("en,zh,…", "8,…", "minute, …", "in docs…")
    cut = [line for line in out.splitlines() if "…" in line and not any(m in line for m in meant)]
    assert cut == []


@pytest.mark.parametrize("command", ["invert", "evaluate"])
def test_help_lists_strategies_with_their_options_and_defaults(run, command):
    registry = {
        name: " ".join(f"{item.name}={item.default}" for item in strategy_fields(name))
        for name in STRATEGIES
    }
    assert registry == STRATEGY_OPTIONS
    out = " ".join(run(command, "--help")[1].split())
    assert all(f"{name}: {options}" in out for name, options in registry.items())


def test_quiet_leaves_standard_error_to_notes(run, files, inverter_folder, with_fake_encoder):
    arguments = ("evaluate", "--texts", "t.jsonl", "--checkpoint", inverter_folder, "--limit", 8)
    assert "8 texts, each decoded up to 3 times: a" in run(*arguments)[2]
    code, out, err = run(*arguments, "-q")
    assert (code, err) == (0, "")
    assert "of the words come back" in out.splitlines()[0]
    code, _, err = run(
        *("invert", "--embedding", "v.npy", "--checkpoint", inverter_folder, "--out", "o.jsonl"),
        *("--quiet", "--seed", 1),
    )
    assert (code, err) == (0, "note: --seed has no effect: greedy draws nothing\n")
    run("invert", "--text", " ")
    assert not OUTPUT.quiet, "of one command only"


def test_verbose_shows_where_an_error_came_from(run):
    code, _, err = run("invert", "--text", " ", "--verbose")
    assert code == 2
    assert err.splitlines()[0] == "Traceback (most recent call last):"
    assert err.splitlines()[-1].startswith("error: expected a text")


def test_invert_notes_a_text_longer_than_the_inverter_writes(
    run, inverter_folder, inverter, with_fake_encoder
):
    text = "the cat sleeps in the house . " * 20
    code, _, err = run("invert", "--text", text, "--checkpoint", inverter_folder)
    assert code == 0
    most = inverter.length - 1
    assert f"note: the text has 140 tokens, and this inverter writes at most {most}" in err
    assert "note" not in run("invert", "--text", "the cat", "--checkpoint", inverter_folder)[2]


def test_invert_names_the_encoder_whose_vectors_it_wants(run, files, inverter_folder):
    np.save(files / "w.npy", np.ones((2, 48), dtype=np.float32))
    rows = json.dumps({"embedding": [1.0] * 48}) + "\n"
    (files / "w.jsonl").write_text(rows, encoding="utf-8")
    for name in ("w.npy", "w.jsonl"):
        _, _, err = run("invert", "--embedding", name, "--checkpoint", inverter_folder)
        assert "Use vectors of fake" in err


def test_evaluate_measures_stored_vectors_of_a_table(
    run, files, inverter_folder, with_fake_encoder, monkeypatch
):
    arguments = ("evaluate", "--embedding", "t.parquet", "--checkpoint", inverter_folder)
    columns = ("--column", "vector", "--text-column", "text")
    code, out, err = run(*arguments, *columns, "--out", "report", "-q")
    assert (code, err) == (0, "")
    report = json.loads((files / "report" / "report.json").read_text("utf-8"))
    assert report["settings"]["texts"] == 12
    assert report["settings"]["vectors"] == "stored"
    assert report["rows"]["inverter"]["cosine"]["n"] > 0
    verdict = report["verdict"]
    assert " ".join(out.split()).startswith(verdict)
    assert (files / "report" / "report.md").read_text("utf-8").splitlines()[2] == f"**{verdict}**"
    page = (files / "report" / "report.html").read_text("utf-8")
    assert page.index("of the words come back") < page.index("<ul>")

    def nothing(name, **settings):
        raise EncoderError("the encoder fake", "nothing", "Install it")

    monkeypatch.setitem(unembed.__dict__, "load_encoder", nothing)
    code, out, err = run(*arguments, *columns, "--json")
    assert code == 0
    assert "the encoder is not at hand, so no cosine is measured" in err
    assert json.loads(out)["rows"]["inverter"]["cosine"] is None
    code, _, err = run(*arguments, *columns, "--encoder", "elsewhere")
    assert code == 2, "an encoder that was asked for must be there"
    code, _, err = run("evaluate", "--texts", "t.jsonl", "--checkpoint", inverter_folder)
    assert code == 2, "texts without vectors cannot do without it"


def test_evaluate_lists_all_columns_when_that_of_the_texts_is_another(
    run, files, inverter_folder, with_fake_encoder
):
    arguments = ("evaluate", "--embedding", "t.parquet", "--text-column", "body")
    code, _, err = run(*arguments, "--checkpoint", inverter_folder)
    assert code == 2
    assert "a column 'body' in t.parquet; found the columns 'id', 'text', 'vector'" in err
    assert "--text-column" in err


def test_evaluate_tells_what_it_left_out_of_a_table(run, files, inverter_folder, with_fake_encoder):
    vectors = np.load(files / "v.npy")
    vectors[4] = 0
    np.save(files / "v.npy", vectors)
    arguments = ("evaluate", "--embedding", "v.npy", "--texts", "t.txt")
    code, _, err = run(*arguments, "--checkpoint", inverter_folder)
    assert code == 2 and "only zeros in vector 4" in err
    code, out, _ = run(*arguments, "--checkpoint", inverter_folder, "--skip-bad", "--json")
    assert code == 0
    assert "vectors left out: 1 × only zeros (row 4)" in json.loads(out)["notes"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interruptible_ends_with_a_line_and_the_signals_code(capsys, name):
    number = getattr(signal, name)
    inherited = signal.getsignal(number)  # under nohup SIGHUP is ignored
    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    signal.signal(number, default)
    try:
        with pytest.raises(typer.Exit) as ended, interruptible("the same command goes on"):
            os.kill(os.getpid(), number)
            time.sleep(60)
        assert signal.getsignal(number) == default
    finally:
        signal.signal(number, inherited)
    assert ended.value.exit_code == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


@pytest.mark.parametrize(
    ("command", "way_on"),
    [
        ("evaluate --texts t.jsonl --out report", "stopped; the same command goes on\n"),
        ("evaluate --texts t.jsonl", "stopped; with --out FOLDER it could have gone on\n"),
        ("invert --embedding v.npy --out o.jsonl", "stopped; the same command goes on from there"),
    ],
)
def test_a_stopped_command_says_how_it_goes_on(
    run, files, inverter_folder, with_fake_encoder, monkeypatch, command, way_on
):
    def stop(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(unembed.Inverter, "invert", stop)
    code, _, err = run(*command.split(), "--checkpoint", inverter_folder, "-q")
    assert code == 130
    assert way_on in err


def test_prepare_that_is_stopped_says_how_it_goes_on(
    run, files, config_file, with_fake_encoder, monkeypatch
):
    def stop(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("unembed.data.prepare.prepare_pairs", stop)
    code, _, err = run("prepare", "--source", "t.jsonl", "-c", config_file, "--out", "d")
    assert (code, err) == (130, "stopped; the same command goes on after the last finished shard\n")


def test_verbose_lets_libraries_speak_that_are_silent_otherwise(run):
    for name in ("matplotlib.font_manager", "torch.onnx._internal", "torchvision"):
        run("plot", "nothing", "--out", "a.png", "-v")
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)
        run("plot", "nothing", "--out", "a.png")
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
