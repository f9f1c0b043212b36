from types import SimpleNamespace

import pytest
import torch

from unembed import device as memory
from unembed.data.pairs import Pairs
from unembed.device import free_bytes
from unembed.errors import TrainingError
from unembed.training import auto_batch_size as module
from unembed.training import loop
from unembed.training.auto_batch_size import MAX_BATCH, find_batch_size
from unembed.training.checkpoint import LATEST, read_state
from unembed.training.distributed import Processes

from .helpers import CPU, make_config


def choose(pairs, **settings):
    config = make_config(batch_size="auto", **settings)
    return find_batch_size(config, Pairs.open(pairs), Processes(CPU), loop.make_denoiser)


def test_with_memory_to_spare_there_are_as_many_pairs_as_make_sense(pairs):
    available = len(Pairs.open(pairs)) - 16
    found = choose(pairs)
    assert found <= available < 2 * found and found <= MAX_BATCH


def test_find_batch_size_on_a_cpu_half_of_the_free_memory_bounds_it(pairs, monkeypatch):
    weights = 4 * sum(
        p.nbytes for p in loop.make_denoiser(make_config(), Pairs.open(pairs)).parameters()
    )
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * (weights + 4_000_000))
    small = choose(pairs)
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * (weights + 8_000_000))
    assert choose(pairs) == 2 * small
    # Counted by hand, roughly: for each pair 2 layers x 12 positions x some 20 vectors of 32
    assert 4_000_000 / (8 * 2 * 12 * 30 * 32) < small < 4_000_000 / (2 * 2 * 12 * 10 * 32)


def test_find_batch_size_no_room_at_all_is_said(pairs, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with pytest.raises(TrainingError, match="1000 bytes free"):
        choose(pairs)


def test_find_batch_size_a_run_keeps_the_size_it_found_when_it_resumes(
    pairs, tmp_path, monkeypatch
):
    config = make_config(batch_size="auto", steps=3, decoded_pairs=0)
    loop.train(config, pairs, tmp_path, CPU)
    found = read_state(tmp_path / LATEST).facts["config"]["training"]["batch_size"]
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    more = make_config(batch_size="auto", steps=4, decoded_pairs=0)
    loop.train(more, pairs, tmp_path, CPU, resume=True)
    assert read_state(tmp_path / LATEST).facts["config"]["training"]["batch_size"] == found >= 8


@pytest.mark.parametrize(("limit", "free"), [("5000", 3000), ("max", None), ("100", 0)])
def test_free_bytes_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch, limit, free):
    """Files that were read count as used there, and are given up when memory is asked for."""
    files = {"max": limit, "current": "3500", "stat": "anon 2000\ninactive_file 1500\nslab 1"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    machine = SimpleNamespace(available=1_000_000)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == (1_000_000 if free is None else free)
