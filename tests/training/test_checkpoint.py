"""Saving, starting and resuming: a run that goes on sees the pairs it began with, or refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unembed.config import validate_config
from unembed.data.pairs import MANIFEST, TOKENIZER, Pairs
from unembed.denoiser import Denoiser
from unembed.errors import CheckpointError, TrainingError
from unembed.inverter import Inverter
from unembed.training import checkpoint, loop
from unembed.training.checkpoint import BEST, LATEST, PREVIOUS, locked, read_state, start_from
from unembed.training.distributed import Processes
from unembed.training.export import inverter_from_run
from unembed.training.metrics_log import METRICS

from .helpers import CPU, make_config, records, same_tensors, stop_after


def change(folder, edit):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest["shards"])
    path.write_text(json.dumps(manifest))


def cut(config, data, run, after):
    assert loop.train(config, data, run, CPU, should_stop=stop_after(after)).step == after


@pytest.fixture
def growing(pairs, tmp_path):
    """Pairs of which `prepare` has written a part so far, and how to write the rest."""
    folder = tmp_path / "growing"
    shutil.copytree(pairs, folder)
    whole = (folder / MANIFEST).read_text()
    change(folder, lambda shards: shards.__delitem__(slice(10, None)))
    return folder, lambda: (folder / MANIFEST).write_text(whole)


def test_pairs_that_came_since_do_not_change_a_run(growing, tmp_path):
    folder, grow = growing
    config = make_config()
    loop.train(config, folder, tmp_path / "whole", CPU)
    cut(config, folder, tmp_path / "cut", 5)
    few = len(Pairs.open(folder))
    grow()
    assert len(Pairs.open(folder)) > few == len(Pairs.open(folder, 10))
    progress = loop.train(config, folder, tmp_path / "cut", CPU, resume=True)
    assert progress.step == 12 and progress.pairs == few - 16
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)
    assert read_state(tmp_path / "cut" / LATEST).facts["shards"] == 10


@pytest.mark.parametrize("fewer", [False, True])
def test_train_other_pairs_are_refused(growing, tmp_path, fewer):
    folder, _ = growing
    cut(make_config(), folder, tmp_path / "run", 5)
    before = (tmp_path / "run" / LATEST).read_bytes()
    if fewer:
        change(folder, lambda shards: shards.pop())
    else:
        change(folder, lambda shards: shards[3].update(sha256={"tokens": "0", "embeddings": "1"}))
    with pytest.raises(CheckpointError, match="pairs_digest"):
        loop.train(make_config(), folder, tmp_path / "run", CPU, resume=True)
    assert (tmp_path / "run" / LATEST).read_bytes() == before


def test_train_another_process_of_masking_is_refused(pairs, tmp_path):
    config = make_config()
    cut(config, pairs, tmp_path, 5)
    linear = config.diffusion.model_copy(update={"schedule": "linear"})
    other = config.model_copy(update={"diffusion": linear})
    with pytest.raises(CheckpointError, match=r"diffusion\.schedule log-linear"):
        loop.train(other, pairs, tmp_path, CPU, resume=True)


def test_train_a_folder_in_use_is_refused_before_a_batch_size_is_tried(
    pairs, tmp_path, monkeypatch
):
    cut(make_config(), pairs, tmp_path, 5)
    tried = []
    monkeypatch.setattr(loop, "find_batch_size", lambda *given: tried.append(1) or 8)
    with pytest.raises(CheckpointError, match="Pass --resume"):
        loop.train(make_config(batch_size="auto"), pairs, tmp_path, CPU)
    assert not tried


def test_processes_that_see_different_states_are_refused(pairs, tmp_path, monkeypatch):
    cut(make_config(), pairs, tmp_path, 5)
    monkeypatch.setattr(Processes, "min", lambda self, value: min(value, 0))  # another is at 0
    with pytest.raises(CheckpointError, match="steps 0 to 5"):
        loop.train(make_config(), pairs, tmp_path, CPU, resume=True)


def test_train_a_table_thawed_on_the_way_resumes_exactly_too(pairs, tmp_path):
    thawed = make_config(table_lr=0.5)
    for run in (tmp_path / "whole", tmp_path / "cut"):
        loop.train(make_config(table_lr=0.0, steps=4), pairs, run, CPU)
    stops = iter([False] * 3 + [True])
    first = loop.train(
        thawed, pairs, tmp_path / "cut", CPU, resume=True, should_stop=lambda: next(stops)
    )
    assert first.step == 8
    for run in (tmp_path / "whole", tmp_path / "cut"):
        assert loop.train(thawed, pairs, run, CPU, resume=True).step == 12
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)


# Refusals, full disks, other starts


def test_save_state_on_a_full_disk_keeps_the_old_state(pairs, tmp_path, monkeypatch):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    before = (tmp_path / LATEST).read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(TrainingError, match="No space left"):
        loop.train(make_config(steps=8), pairs, tmp_path, CPU, resume=True)
    assert (tmp_path / LATEST).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_train_a_run_is_not_overwritten_nor_mixed_with_another(pairs, tmp_path):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    with pytest.raises(CheckpointError, match="--resume"):
        loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    wider = make_config(steps=8).model_dump()
    wider["denoiser"]["hidden"] = 64
    with pytest.raises(CheckpointError, match="sizes"):
        loop.train(validate_config(wider, "test"), pairs, tmp_path, CPU, resume=True)


def test_start_or_resume_goes_on_when_its_encoder_has_another_name(pairs, tmp_path):
    moved = tmp_path / "pairs"
    shutil.copytree(pairs, moved)
    manifest = (moved / "manifest.json").read_text().replace('"name": "fake"', '"name": "moved"')
    (moved / "manifest.json").write_text(manifest)
    assert loop.Pairs.open(moved).encoder.name == "moved"
    loop.train(make_config(steps=3), pairs, tmp_path / "run", CPU)
    loop.train(make_config(steps=4), moved, tmp_path / "run", CPU, resume=True)
    saved = read_state(tmp_path / "run" / LATEST)
    progress, facts = saved.progress, saved.facts
    assert (progress.step, facts["encoder"]["name"]) == (4, "moved")
    other = manifest.replace('"weights_digest": "', '"weights_digest": "0')
    (moved / "manifest.json").write_text(other)
    with pytest.raises(CheckpointError, match="a run with encoder"):
        loop.train(make_config(steps=5), moved, tmp_path / "run", CPU, resume=True)


def test_train_a_run_is_not_mixed_into_its_pairs(pairs):
    before = sorted(path.name for path in pairs.iterdir())
    with pytest.raises(CheckpointError, match=r"an empty run folder .*prepared pairs"):
        loop.train(make_config(steps=4), pairs, pairs, CPU)
    assert sorted(path.name for path in pairs.iterdir()) == before


def test_train_pairs_of_another_length_than_the_configuration_are_refused(pairs, tmp_path):
    config = make_config()
    longer = config.data.length + 1
    data = config.data.model_copy(update={"length": longer})
    with pytest.raises(TrainingError, match=f"--set data.length={config.data.length}"):
        loop.train(config.model_copy(update={"data": data}), pairs, tmp_path, CPU)


@pytest.mark.parametrize("changed", ["seed", "validation_pairs", "batch_size"])
def test_train_a_run_is_not_resumed_with_other_samples(pairs, tmp_path, changed):
    config = make_config(steps=4)
    loop.train(config, pairs, tmp_path, CPU)
    before = (tmp_path / LATEST).read_bytes()
    value = getattr(config.training, changed)
    with pytest.raises(CheckpointError, match=rf"training\.{changed}.*{value}"):
        loop.train(make_config(steps=8, **{changed: value + 1}), pairs, tmp_path, CPU, resume=True)
    assert (tmp_path / LATEST).read_bytes() == before
    same = {"accumulate": config.training.batch_size, "batch_size": 1}
    assert loop.train(make_config(steps=5, **same), pairs, tmp_path, CPU, resume=True).step == 5


def test_start_from_takes_an_inverter_of_the_same_widths_only(pairs, tmp_path):
    loop.train(make_config(), pairs, tmp_path / "first", CPU)
    inverter_from_run(tmp_path / "first").save_pretrained(tmp_path / "inverter")
    start = str(tmp_path / "inverter")
    config = make_config(start_from=start, steps=3, lr=1e-6, log_every=1)
    loop.train(config, pairs, tmp_path / "second", CPU)
    fresh = make_config(steps=3, lr=1e-6, log_every=1)
    loop.train(fresh, pairs, tmp_path / "fresh", CPU)
    assert records(tmp_path / "second")[0]["loss"] < records(tmp_path / "fresh")[0]["loss"]
    recorded = read_state(tmp_path / "second" / LATEST).facts["config"]
    assert recorded["training"]["start_from"] == "inverter"
    assert recorded["encoder"] == config.encoder.model_dump()
    assert str(tmp_path) not in json.dumps(recorded), "no absolute paths"

    wide = config.model_copy(
        update={"denoiser": config.denoiser.model_copy(update={"feed_forward": 48})}
    )
    with pytest.raises(CheckpointError, match=r"training\.start_from .* to have sizes"):
        loop.train(wide, pairs, tmp_path / "third", CPU)
    assert not (tmp_path / "third" / LATEST).exists()


def test_start_from_makes_a_longer_and_deeper_run_start_as_the_inverter(pairs, tmp_path):
    loop.train(make_config(), pairs, tmp_path / "first", CPU)
    inverter_from_run(tmp_path / "first").save_pretrained(tmp_path / "inverter")
    inverter = Inverter.from_pretrained(tmp_path / "inverter")
    torch.manual_seed(1)
    grown = Denoiser(replace(inverter.denoiser.sizes, length=20, layers=4))
    start_from(str(tmp_path / "inverter"), grown, Pairs.open(pairs))

    tokens = torch.randint(0, 20, (3, 12))
    embedding, t = torch.randn(3, grown.sizes.embedding_dim), torch.rand(3)
    with torch.no_grad():
        torch.testing.assert_close(
            grown(tokens, embedding, t), inverter.denoiser(tokens, embedding, t)
        )
    assert torch.equal(grown.positions[12:], grown.positions[11].expand(8, -1))
    told = Denoiser(replace(inverter.denoiser.sizes, feedback=True))
    start_from(str(tmp_path / "inverter"), told, Pairs.open(pairs))
    with torch.no_grad():
        both = torch.cat([embedding, torch.randn(embedding.shape)], dim=1)
        torch.testing.assert_close(told(tokens, both, t), inverter.denoiser(tokens, embedding, t))
    guided = Denoiser(replace(inverter.denoiser.sizes, guidance=0.4))
    inverter.denoiser = guided
    inverter.save_pretrained(tmp_path / "guided")
    again = Denoiser(replace(guided.sizes, guidance=0.0))
    start_from(str(tmp_path / "guided"), again, Pairs.open(pairs))
    assert torch.equal(again.blocks[0].qkv.weight.half(), guided.blocks[0].qkv.weight.half())
    with pytest.raises(CheckpointError, match="length and layers may be larger"):
        start_from(
            str(tmp_path / "inverter"),
            Denoiser(replace(inverter.denoiser.sizes, length=8)),
            Pairs.open(pairs),
        )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_train_a_disk_that_really_refuses_keeps_the_old_state(pairs, tmp_path):
    """No file may grow beyond a few kilobytes, which the state does."""
    loop.train(make_config(steps=4, decoded_pairs=0), pairs, tmp_path, CPU)
    before = (tmp_path / LATEST).read_bytes()
    script = f"""
import resource
from pathlib import Path
from tests.training.helpers import make_config, CPU
from unembed.errors import TrainingError
from unembed.training import loop
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2}, resource.RLIM_INFINITY))
config = make_config(steps=8, eval_every=100, decoded_pairs=0)
try:
    loop.train(config, Path({str(pairs)!r}), Path({str(tmp_path)!r}), CPU, resume=True)
except TrainingError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "room to save" in done.stdout and "--resume" in done.stdout
    assert (tmp_path / LATEST).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("refused", [BEST, loop.METRICS])
def test_train_a_disk_full_at_any_file_keeps_the_old_state(pairs, tmp_path, monkeypatch, refused):
    loop.train(make_config(steps=4), pairs, tmp_path, CPU)
    before = {name: (tmp_path / name).read_bytes() for name in (LATEST, BEST)}
    original = checkpoint.write_tensors

    def full(tensors, path, metadata):
        if refused in Path(path).name:
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    def no_room(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    if refused == loop.METRICS:
        monkeypatch.setattr(loop.MetricsLog, "write", no_room)
    with pytest.raises(TrainingError, match=rf"room to save .*{refused}.*No space left"):
        loop.train(make_config(steps=8, lr=0.05), pairs, tmp_path, CPU, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in (LATEST, BEST)} == before


# A damaged state, and what is left of a run


def spoil_tensors(path):
    """Change four bytes in the middle, which are numbers and no header."""
    state = bytearray(path.read_bytes())
    state[len(state) // 2 : len(state) // 2 + 4] = b"\x7f\x7f\x7f\x7f"
    path.write_bytes(state)


def damages():
    return {
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "empty": lambda path: path.write_bytes(b""),
        "header": lambda path: path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:]),
        "tensors": spoil_tensors,
        "missing": Path.unlink,
    }


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory):
    """A run of 12 steps that nothing happened to."""
    run = tmp_path_factory.mktemp("whole")
    loop.train(make_config(), pairs, run, CPU)
    return run


@pytest.fixture(scope="module")
def _eight(pairs, tmp_path_factory):
    run = tmp_path_factory.mktemp("eight")
    cut(make_config(), pairs, run, 8)
    return run


@pytest.fixture
def eight(_eight, tmp_path):
    """A run stopped at step 8, saved there and at step 4; a test may damage its own copy."""
    return shutil.copytree(_eight, tmp_path / "run")


@pytest.mark.parametrize("damage", damages())
def test_saved_state_falls_back_on_the_one_before(pairs, whole, eight, damage, caplog):
    assert [read_state(eight / n).progress.step for n in (LATEST, PREVIOUS)] == [8, 4]
    damages()[damage](eight / LATEST)
    assert loop.train(make_config(), pairs, eight, CPU, resume=True).step == 12
    assert "going on from step 4" in caplog.text
    assert same_tensors(whole / LATEST, eight / LATEST)
    assert (eight / BEST).read_bytes() != b"" and read_state(eight / PREVIOUS).progress.step == 8
    assert (eight / (LATEST + ".damaged")).exists() == (damage != "missing")


def test_saved_state_is_refused_where_both_are_damaged(pairs, eight):
    for name in (LATEST, PREVIOUS):
        spoil_tensors(eight / name)
    before = {path.name: path.read_bytes() for path in eight.iterdir()}
    with pytest.raises(CheckpointError, match=r"whole training state .*do not match its digest"):
        loop.train(make_config(), pairs, eight, CPU, resume=True)
    assert {path.name: path.read_bytes() for path in eight.iterdir()} == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", [BEST, METRICS])
def test_train_a_run_without_a_state_is_not_begun_anew_over_what_is_left(
    pairs, eight, left, resume
):
    for name in {LATEST, PREVIOUS, BEST, METRICS} - {left}:
        (eight / name).unlink()
    before = (eight / left).read_bytes()
    with pytest.raises(CheckpointError, match=f"{left} of a run, and no state to go on from"):
        loop.train(make_config(), pairs, eight, CPU, resume=resume)
    assert (eight / left).read_bytes() == before


def test_read_state_a_best_state_never_is_without_a_latest_one(pairs, whole, tmp_path):
    """Killed between the first validation and the first regular save."""
    config = make_config(save_every=100)

    def killed():
        if (tmp_path / BEST).exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, pairs, tmp_path, CPU, should_stop=killed)
    assert read_state(tmp_path / LATEST).progress.step == 4
    loop.train(config, pairs, tmp_path, CPU, resume=True)
    assert same_tensors(whole / LATEST, tmp_path / LATEST)


def test_read_state_takes_files_of_older_versions_without_a_digest(pairs, eight, whole):
    with safe_open(eight / LATEST, framework="pt") as file:
        metadata = file.metadata()
    del metadata["digest"]
    save_file(load_file(eight / LATEST), eight / LATEST, metadata)
    loop.train(make_config(), pairs, eight, CPU, resume=True)
    assert same_tensors(whole / LATEST, eight / LATEST)


def test_train_a_lost_tokenizer_is_put_back(pairs, eight):
    tokenizer = (eight / TOKENIZER).read_bytes()
    (eight / TOKENIZER).unlink()
    loop.train(make_config(), pairs, eight, CPU, resume=True)
    assert (eight / TOKENIZER).read_bytes() == tokenizer


def test_locked_keeps_a_second_training_out_of_a_folder(pairs, eight):
    before = {path.name: path.read_bytes() for path in eight.iterdir()}
    refusal = pytest.raises(CheckpointError, match="to be free; found another training")
    with locked(eight, Processes(CPU)), refusal:
        loop.train(make_config(), pairs, eight, CPU, resume=True)
    assert {path.name: path.read_bytes() for path in eight.iterdir()} == before
    with pytest.raises(CheckpointError, match="--resume"):  # a refusal frees the folder again
        loop.train(make_config(), pairs, eight, CPU)
    assert loop.train(make_config(), pairs, eight, CPU, resume=True).step == 12


def test_train_a_wsd_run_made_longer_before_its_decay_equals_one_planned_longer(pairs, tmp_path):
    schedule = {"schedule": "wsd", "decay_steps": 4}
    loop.train(make_config(**schedule), pairs, tmp_path / "whole", CPU)
    cut(make_config(steps=8, **schedule), pairs, tmp_path / "cut", 4)
    loop.train(make_config(**schedule), pairs, tmp_path / "cut", CPU, resume=True)
    assert same_tensors(tmp_path / "whole" / LATEST, tmp_path / "cut" / LATEST)
