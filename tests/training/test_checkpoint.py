"""Saving, starting and resuming: a run that goes on sees the pairs it began with, or refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from unembed.data.manifest import MANIFEST
from unembed.data.pairs import Pairs
from unembed.errors import CheckpointError
from unembed.training import loop
from unembed.training.checkpoint import LATEST, read_state
from unembed.training.distributed import Processes

from .helpers import CPU, make_config


def change(folder, edit):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest["shards"])
    path.write_text(json.dumps(manifest))


def cut(config, data, run, after):
    stops = iter([False] * (after - 1) + [True])
    assert loop.train(config, data, run, CPU, should_stop=lambda: next(stops)).step == after


def same_tensors(one, other):
    first, second = (load_file(run / LATEST) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


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
    assert same_tensors(tmp_path / "whole", tmp_path / "cut")
    assert read_state(tmp_path / "cut" / LATEST).facts["shards"] == 10


@pytest.mark.parametrize("fewer", [False, True])
def test_other_pairs_are_refused(growing, tmp_path, fewer):
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


def test_another_process_of_masking_is_refused(pairs, tmp_path):
    config = make_config()
    cut(config, pairs, tmp_path, 5)
    linear = config.diffusion.model_copy(update={"schedule": "linear"})
    other = config.model_copy(update={"diffusion": linear})
    with pytest.raises(CheckpointError, match=r"diffusion\.schedule log-linear"):
        loop.train(other, pairs, tmp_path, CPU, resume=True)


def test_a_folder_in_use_is_refused_before_a_batch_size_is_tried(pairs, tmp_path, monkeypatch):
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


def test_a_table_thawed_on_the_way_resumes_exactly_too(pairs, tmp_path):
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
    assert same_tensors(tmp_path / "whole", tmp_path / "cut")
