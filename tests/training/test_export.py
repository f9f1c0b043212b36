import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from unembed.checkpoints import Storage
from unembed.config import Config
from unembed.data.pairs import Pairs
from unembed.device import choose_compute
from unembed.encoders.base import FakeEncoder
from unembed.errors import CheckpointError, ConfigError, DataError
from unembed.evaluation.evaluate import evaluate
from unembed.inverter import Inverter
from unembed.training import loop
from unembed.training.checkpoint import BEST, read_state
from unembed.training.export import (
    GUIDANCE,
    export_run,
    figures_table,
    fit_guidance,
    inverter_from_run,
)

CPU = choose_compute("cpu", "float32")


@pytest.fixture(scope="module")
def run(_prepared, tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    settings = tiny_config.model_dump()
    settings["training"]["tensorboard"] = False
    loop.train(Config.model_validate(settings), _prepared, folder, CPU)
    return folder


def test_export_run_fits_guidance_on_pairs(_prepared, tiny_config, tmp_path):
    """What it takes for the states without the embedding is nearer to them than the others are."""
    settings = tiny_config.model_dump()
    settings["training"] |= {"tensorboard": False, "condition_dropout": 0.5, "lr": 0.01}
    settings["training"] |= {"steps": 60, "eval_every": 60, "save_every": 60}
    loop.train(Config.model_validate(settings), _prepared, tmp_path / "run", CPU)
    pairs = Pairs.open(_prepared)
    export_run(tmp_path / "run", tmp_path / "out", pairs=pairs)
    inverter = Inverter.from_pretrained(tmp_path / "out")
    plain = inverter_from_run(tmp_path / "run").denoiser.eval()
    assert inverter.denoiser.sizes.guidance == GUIDANCE
    ids, vectors = (torch.from_numpy(x) for x in pairs.rows(np.arange(8)))
    tokens = ids.long()
    tokens[:, ::2] = inverter.spec.mask_id
    e, t = torch.nn.functional.normalize(vectors.float(), dim=1), torch.full((8,), 0.5)
    with torch.no_grad():
        given, missing = (plain.hidden_states(tokens, x, t) for x in (e, torch.zeros_like(e)))
        guided = inverter.denoiser.output_states(tokens, e, t)
    expected = given + GUIDANCE * (given - missing)
    assert (guided - expected).square().mean() < 0.5 * (given - expected).square().mean()
    inverter.save_pretrained(tmp_path / "again")
    assert Inverter.from_pretrained(tmp_path / "again").denoiser.sizes.guidance == GUIDANCE
    with pytest.raises(ConfigError, match="for the first time"):
        fit_guidance(inverter, pairs)


def test_export_run_refuses_to_fit_guidance_without_condition_dropout(run, _prepared, tmp_path):
    with pytest.raises(ConfigError, match="condition_dropout above 0"):
        export_run(run, tmp_path / "out", pairs=Pairs.open(_prepared))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def report(run, passages):
    """Figures of the run's inverter, as `unembed evaluate --out` writes them."""
    figures = evaluate(inverter_from_run(run), FakeEncoder(), passages, limit=4, steps=2)
    return figures.to_dict()


def test_export_run_the_folder_has_the_averaged_weights_tokenizer_card_and_curves(run, tmp_path):
    out = tmp_path / "out"
    notes = export_run(run, out)
    assert all("decoded" in note for note in notes)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "README.md", "curves.png")
    }
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    tensors = read_state(run / BEST).tensors
    stored = load_file(out / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(tensor, tensors[f"ema.{name}"].half())
    assert Inverter.from_pretrained(out).trained["device"] == CPU.describe()


def test_export_run_the_card_says_what_the_run_was(run, tmp_path):
    export_run(run, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    saved = read_state(run / BEST)
    progress, facts = saved.progress, saved.facts
    assert ModelCard(text).data.to_dict()["library_name"] == "unembed"
    assert "# Inverter for fake, texts of up to 11 tokens" in text
    assert ModelCard(text).data.to_dict()["license"] == "other", "whose words the table starts from"
    assert "`fake`, whose licence is not known here" in text
    assert f"{progress.step:,} steps of 8 pairs" in text and f"{progress.pairs:,} pairs" in text
    assert f"on {CPU.describe()}" in text and f"{progress.best_loss:.4f}" in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert yaml.safe_load(settings) == facts["config"], "the run can be made again from it"
    parameters = sum(p.numel() for p in inverter_from_run(run).denoiser.parameters())
    numbers = re.findall(r"([\d.]+) M (?:parameters|of it)", text)
    assert sum(map(float, numbers)) == pytest.approx(parameters / 1e6, abs=0.1)
    for words in ("Not measured", "## Intended use", "authorised", "(curves.png)", "## Use"):
        assert words in text


def test_export_run_the_card_s_python_runs(run, tmp_path, monkeypatch, capsys):
    export_run(run, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr("unembed.encoders.sentence.load_encoder", lambda *args: FakeEncoder())
    exec(code.replace("path/of/this/folder", str(tmp_path)), {})
    assert capsys.readouterr().out.endswith("\n")


def test_figures_of_an_evaluation_stand_in_the_card(run, report, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(report))
    export_run(run, tmp_path / "out", evaluation=tmp_path / "eval.json")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    accuracy = report["rows"]["inverter"]["token accuracy"]
    assert f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in text
    assert "| shuffled embedding |" in text and "Not measured" not in text
    assert "texts 4" in text and "nearest training text: not measured" in text


def test_a_figure_that_could_not_be_computed_is_not_a_zero():
    table = figures_table({"rows": {"inverter": {"cosine": None}}})
    assert table.splitlines()[-1] == "| **unembed, vector only** | not measured |"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"settings": {}}', "KeyError: 'encoder'"),
        (None, "FileNotFoundError"),
    ],
)
def test_export_run_what_is_no_evaluation_is_refused_and_nothing_written(
    run, tmp_path, content, message
):
    path = tmp_path / "eval.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"figures that `unembed evaluate --out` wrote.*{message}"):
        export_run(run, tmp_path / "out", evaluation=path)
    assert not (tmp_path / "out").exists()


def test_figures_of_another_encoder_are_refused(run, report, tmp_path):
    other = FakeEncoder(dimension=16).identity.to_dict()
    settings = {**report["settings"], "encoder": other}
    (tmp_path / "eval.json").write_text(json.dumps({**report, "settings": settings}))
    with pytest.raises(DataError, match=r"figures about fake \(32 .*found fake \(16 "):
        export_run(run, tmp_path / "out", evaluation=tmp_path / "eval.json")
    settings["encoder"] = {**report["settings"]["encoder"], "name": "moved"}
    (tmp_path / "eval.json").write_text(json.dumps({**report, "settings": settings}))
    export_run(run, tmp_path / "out", evaluation=tmp_path / "eval.json")


def test_export_run_a_card_of_one_s_own_is_taken_as_it_is(run, tmp_path):
    export_run(run, tmp_path, card="# Mine\n")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_export_run_int8_shards_from_the_run_load(run, tmp_path):
    export_run(run, tmp_path, storage=Storage("int8", "4KB"))
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded, exact = Inverter.from_pretrained(tmp_path), inverter_from_run(run)
    for (name, one), other in zip(
        exact.denoiser.named_parameters(), loaded.denoiser.parameters(), strict=True
    ):
        limit = max(one.abs().max().item() / 250, 1e-6)
        assert (one - other).abs().max().item() <= limit, name
    assert "stored as int8" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "manifest.json", "config.json"])
def test_export_run_files_of_others_are_not_written_over(run, tmp_path, name):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    with pytest.raises(DataError, match=rf"a new folder at .*such as {name}.*another OUT"):
        export_run(run, tmp_path)
    assert (tmp_path / name).read_text(encoding="utf-8") == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", name]
    with pytest.raises(DataError, match="found a file"):
        export_run(run, tmp_path / name)


def test_export_run_an_export_that_was_cut_short_is_made_again(run, tmp_path):
    for name in ("model.safetensors", "model.safetensors.tmp", "tokenizer.json"):
        (tmp_path / name).write_text("half", encoding="utf-8")
    export_run(run, tmp_path)
    assert Inverter.from_pretrained(tmp_path).encoder.name == "fake"


@pytest.mark.parametrize("missing", ["matplotlib", "log"])
def test_export_run_without_curves_a_note_says_why_and_the_rest_is_there(
    run, tmp_path, monkeypatch, missing
):
    export_run(run, tmp_path / "out")
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        monkeypatch.setattr("unembed.training.curves.METRICS", "none.jsonl")
    (note,) = export_run(run, tmp_path / "out")
    assert note.startswith("no curves in the card: expected ")
    assert not (tmp_path / "out" / "curves.png").exists()
    assert "curves" not in (tmp_path / "out" / "README.md").read_text()


def test_inverter_from_run_weights_that_are_not_finite_are_not_exported(run, tmp_path, monkeypatch):
    inverter = inverter_from_run(run)
    with torch.no_grad():
        inverter.denoiser.positions[0, 0] = float("nan")
    monkeypatch.setattr("unembed.training.export.inverter_from_run", lambda *args: inverter)
    with pytest.raises(CheckpointError, match="others in positions"):
        export_run(run, tmp_path / "out")
