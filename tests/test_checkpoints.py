import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from unembed import checkpoints as weights
from unembed.checkpoints import (
    CARD,
    CONFIG,
    CURVES,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    Storage,
    load_checkpoint,
    load_weights,
    pack,
    save_weights,
    unpack,
)
from unembed.errors import CheckpointError, ConfigError, UnembedError


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A table with a row of zeros, rows of very different size, a bias, and what has 3 axes."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(40, 16, generator=draw)
    table[3] = 0.0
    table[4] *= 1000.0
    table[5] *= 1e-6
    return {
        "table.weight": table,
        "linear.weight": torch.randn(8, 16, generator=draw),
        "linear.bias": torch.randn(8, generator=draw),
        "positions": torch.randn(4, 16, generator=draw),
        "cube.weight": torch.randn(2, 3, 4, generator=draw),
    }


def test_write_tensors_who_may_read_a_new_file_may_read_the_weights(tmp_path):
    (tmp_path / "other").touch()
    weights.write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1.0, 1.0]
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_unpack_int8_is_off_by_at_most_half_a_step_of_its_row(state):
    back = unpack(pack(state, "int8"))
    assert back.keys() == state.keys()
    for name in ("table.weight", "linear.weight"):
        step = state[name].abs().amax(dim=1, keepdim=True) / 127
        assert (back[name] - state[name]).abs().le(step * 0.5001).all(), name
        assert torch.equal(back[name].abs().amax(dim=1), 127 * (step[:, 0])), "the largest stays"
    assert torch.equal(back["table.weight"][3], torch.zeros(16))
    assert all(tensor.dtype == torch.float32 for tensor in back.values())


def test_pack_int8_stores_matrices_only_with_a_scale_a_row(state):
    packed = pack(state, "int8")
    assert packed["table.weight"].dtype == torch.int8
    assert packed["table.weight_scale"].shape == (40,)
    assert packed["table.weight"].min() >= -127, "symmetric"
    for name in ("linear.bias", "positions", "cube.weight"):
        assert packed[name].dtype == torch.float16 and name + "_scale" not in packed


def test_unpack_a_second_rounding_changes_nothing(state):
    for number_format in weights.FORMATS:
        once = unpack(pack(state, number_format))
        twice = unpack(pack(once, number_format))
        assert all(torch.equal(once[name], twice[name]) for name in once), number_format


@pytest.mark.parametrize("number_format", ["float16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_save_weights_weights_that_do_not_fit_are_refused_before_anything_is_written(
    state, tmp_path, number_format, bad
):
    state["linear.bias"][2] = bad
    with pytest.raises(CheckpointError, match=r"others in linear\.bias"):
        save_weights(state, tmp_path, Storage(number_format))
    assert list(tmp_path.iterdir()) == []


def test_unpack_bfloat16_holds_what_float16_cannot(state):
    state["linear.bias"][2] = 1e30
    assert unpack(pack(state, "bfloat16"))["linear.bias"][2].item() == pytest.approx(1e30, rel=0.01)


def test_save_weights_shards_are_named_indexed_and_within_the_size(state, tmp_path):
    save_weights(state, tmp_path, Storage("float16", "300B"))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in state.values())
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in shards]
    assert sizes[0] == state["table.weight"].numel() * 2, "larger than a shard: one of its own"
    assert all(size <= 300 for size in sizes[1:])
    loaded = load_weights(tmp_path)
    assert all(torch.equal(loaded[name], state[name].half().float()) for name in state)


@pytest.mark.parametrize("number_format", list(weights.FORMATS))
def test_save_weights_one_file_and_shards_hold_the_same(state, tmp_path, number_format):
    loaded = []
    for size in ("4GB", "100B"):
        folder = tmp_path / size
        folder.mkdir()
        save_weights(state, folder, Storage(number_format, size))
        assert (folder / WEIGHTS).exists() == (size == "4GB")
        assert weights.stored_as(folder).number_format == number_format
        loaded.append(load_weights(folder))
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in state)


def test_save_weights_saving_again_leaves_no_older_files(state, tmp_path):
    for size in ("300B", "4GB", "100B", "300B"):
        save_weights(state, tmp_path, Storage("float16", size))
        found = {path.name for path in tmp_path.iterdir()}
        if size == "4GB":
            assert found == {WEIGHTS}
        else:
            names = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
            assert found == names | {INDEX}


def test_save_weights_a_full_disk_keeps_the_old_weights(state, tmp_path, monkeypatch):
    save_weights(state, tmp_path, Storage("float16", "300B"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(state, tmp_path, Storage("int8", "200B"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def lose(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def swap(folder):
    """A shard of another checkpoint under the right name."""
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())


def outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["positions"] = "../model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def break_index(folder):
    (folder / INDEX).write_text('{"weight_map": [')


def empty_index(folder):
    (folder / INDEX).write_text("[]")


@pytest.mark.parametrize("damage", [truncate, lose, swap, outside, break_index, empty_index])
def test_damaged_shards_are_one_line_that_names_the_file(state, tmp_path, damage):
    save_weights(state, tmp_path, Storage("int8", "300B"))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=r"whole weights in .*safetensors") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_pack_whole_numbers_without_scales_are_refused(state, tmp_path):
    packed = pack(state, "int8")
    del packed["table.weight_scale"]
    save_file(packed, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"table\.weight_scale"):
        load_weights(tmp_path)


@pytest.mark.parametrize("size", ["0GB", "-1GB", "big", "", "5", "GB", "1 PB", "0.0001B", "nanGB"])
def test_storage_a_shard_size_is_a_number_and_a_unit(size):
    with pytest.raises(ConfigError, match="--shard-size"):
        Storage(shard_size=size)


def test_storage_sizes_count_in_powers_of_ten():
    assert Storage(shard_size="1.5 MB").shard_bytes == 1_500_000
    assert Storage(shard_size="4gb").shard_bytes == 4_000_000_000


def test_storage_an_unknown_number_format_is_refused():
    with pytest.raises(ConfigError, match=r"float16, bfloat16, int8; found 'int4'"):
        Storage("int4")


# Hostile and damaged folders


def settings_of(folder, **values):
    """Replace values of config.json, a path of keys with __ between them."""
    config = json.loads((folder / CONFIG).read_text())
    for path, value in values.items():
        *sections, last = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    (folder / CONFIG).write_text(json.dumps(config))


def weights_of(folder, change):
    stored = load_file(folder / WEIGHTS)
    save_file({**stored, **change(stored)}, folder / WEIGHTS)


def definition_of(folder, **steps):
    definition = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(definition | steps))


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def grows(letters):
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * letters}
    return {"type": "Sequence", "decoders": [step] * 4}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


NESTED = b"[" * 100_000 + b"]" * 100_000
FIFO = [replaced(name, os.mkfifo) for name in (CONFIG, TOKENIZER, WEIGHTS) if hasattr(os, "mkfifo")]
ENDLESS = [
    replaced(name, lambda path: path.symlink_to("/dev/zero")) for name in (CONFIG, TOKENIZER, INDEX)
]
# A tokenizer of two tokens, whole in itself
_TWO = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
OTHER = {"version": "1.0", "added_tokens": [], "model": _TWO}
DAMAGES = {
    "another tokenizer": replaced(TOKENIZER, lambda path: path.write_text(json.dumps(OTHER))),
    **{f"a pipe {number}": damage for number, damage in enumerate(FIFO)},
    **{f"without an end {number}": damage for number, damage in enumerate(ENDLESS[:2])},
    "nested config": replaced(CONFIG, lambda path: path.write_bytes(NESTED)),
    "nested training": lambda folder: settings_of(folder, training={"a": nested(60)}),
    "nested index": replaced(INDEX, lambda path: path.write_bytes(NESTED)),
    "nested tokenizer": replaced(TOKENIZER, lambda path: path.write_bytes(NESTED)),
    "a list": replaced(CONFIG, lambda path: path.write_text("[]")),
    "large": replaced(CONFIG, lambda path: path.write_bytes(b" " * (16 << 20) + b"{}")),
    "a large size": lambda folder: settings_of(folder, denoiser_sizes__vocab_size=10**30),
    "another dimension": lambda folder: settings_of(folder, encoder_identity__dimension=10),
    "a dimension that is text": lambda folder: settings_of(folder, encoder_identity__dimension="x"),
    "a name that is a list": lambda folder: settings_of(folder, encoder_identity__name=["x"]),
    "another vocabulary": lambda folder: settings_of(folder, token_ids__size=10**6),
    "a mask that is no whole number": lambda folder: settings_of(folder, token_ids__mask_id=1.0),
    "a mask that is true": lambda folder: settings_of(folder, token_ids__mask_id=True),
    "a mask beyond": lambda folder: settings_of(folder, token_ids__mask_id=10**6),
    "one id for all": lambda folder: settings_of(folder, token_ids__mask_id=110),
    "billions of tokens": lambda folder: settings_of(folder, token_ids__kept="0-9999999999"),
    "few tokens": lambda folder: settings_of(folder, token_ids__kept="0-9"),
    "tokens beyond": lambda folder: settings_of(folder, token_ids__kept=f"0-110 {2**40}"),
    "a rate of nothing": lambda folder: settings_of(folder, diffusion_process__rate=0),
    "an unknown schedule": lambda folder: settings_of(folder, diffusion_process__schedule="x"),
    "a fingerprint that is text": lambda folder: settings_of(folder, encoder_fingerprint="x"),
    "whole numbers": lambda folder: weights_of(
        folder, lambda w: {n: t.long() for n, t in w.items()}
    ),
    "complex numbers": lambda folder: weights_of(
        folder, lambda w: {n: t.to(torch.complex64) for n, t in w.items()}
    ),
    "truth": lambda folder: weights_of(folder, lambda w: {n: t.bool() for n, t in w.items()}),
    "int8 without scales": lambda folder: weights_of(
        folder, lambda w: {n: t.to(torch.int8) for n, t in w.items()}
    ),
    "other scales": lambda folder: weights_of(
        folder,
        lambda w: (
            {n: t.to(torch.int8) for n, t in w.items()} | {f"{n}_scale": torch.ones(3) for n in w}
        ),
    ),
    "surplus tensors": lambda folder: weights_of(
        folder, lambda w: {f"x{n}": torch.ones(1) for n in range(20_001)}
    ),
    "a decoder that multiplies": lambda folder: definition_of(folder, decoder=grows(500)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_load_checkpoint_refuses_what_is_hostile_or_damaged(inverter_folder, damage):
    damage(inverter_folder)
    with pytest.raises(UnembedError) as caught:
        load_checkpoint(inverter_folder)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_load_checkpoint_says_what_to_do_with_a_run(tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Run `unembed export .* OUT` and use OUT"):
        load_checkpoint(tmp_path)


def test_load_weights_counts_tensors_before_it_reads_them(inverter_folder, monkeypatch):
    weights_of(inverter_folder, lambda w: {f"x{n}": torch.ones(1) for n in range(20_001)})
    monkeypatch.setattr(weights, "load_file", lambda path: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=r"20,\d\d\d tensors, more than 20,000"):
        weights.load_weights(inverter_folder)


def test_load_checkpoint_passes_over_what_it_does_not_need(inverter_folder):
    (inverter_folder / CARD).write_bytes(b"\xff\xfe no UTF-8")
    (inverter_folder / "model-00001-of-00002.safetensors").write_bytes(b"junk")
    (inverter_folder / CURVES).mkdir()
    checkpoint = load_checkpoint(inverter_folder)
    assert "no UTF-8" in checkpoint.card and checkpoint.curves is None


@pytest.mark.parametrize("place", [1, 2, 3, 4, None])
def test_save_checkpoint_on_a_full_disk_leaves_the_inverter_that_was_there(
    inverter, inverter_folder, monkeypatch, place
):
    before = {path.name: path.read_bytes() for path in inverter_folder.iterdir()}
    count, flush = [0], os.fsync

    def full(number):
        count[0] += 1
        if count[0] == place:
            raise OSError(28, "No space left on device")
        flush(number)

    monkeypatch.setattr("unembed.files.os.fsync", full)
    other = copy.copy(inverter)
    other.trained, other.card = {"other": True}, "Another card."
    if place is None:
        other.save_pretrained(inverter_folder)
        assert count[0] == 2 * len(before) == 8, "all files, before any takes its place, and again"
        return
    with pytest.raises(CheckpointError, match="No space left"):
        other.save_pretrained(inverter_folder)
    assert {path.name: path.read_bytes() for path in inverter_folder.iterdir()} == before
