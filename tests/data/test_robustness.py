"""Shards that are damaged, killed on the way, or cannot be written."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from unembed.config import Config
from unembed.data import prepare as encode
from unembed.data.pairs import MANIFEST, Pairs, read_manifest, shard_names
from unembed.data.prepare import prepare_pairs
from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import PROBES
from unembed.errors import DataError, EncoderError


def contents(folder):
    """Every file of a folder but the lock, name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


class Counting(FakeEncoder):
    """Counts the texts it is given, the probes aside."""

    texts = 0

    def encode(self, texts, progress=None):
        if tuple(texts) != PROBES:
            self.texts += len(texts)
        return super().encode(texts, progress)


# Damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", [0, 1], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink(), lambda p: p.write_bytes(b"")])
def test_prepare_pairs_a_damaged_shard_alone_is_made_again(
    pairs_folder, text_file, tiny_config, which, damage
):
    before = contents(pairs_folder)
    damage(pairs_folder / shard_names(3)[which])
    with pytest.raises(DataError, match="makes damaged shards anew"):
        Pairs.verify(pairs_folder)
    encoder = Counting()
    manifest = prepare_pairs(text_file, pairs_folder, tiny_config, encoder)
    assert encoder.texts == manifest["shards"][3]["pairs"]
    assert contents(pairs_folder) == before
    Pairs.verify(pairs_folder)


def test_prepare_pairs_all_shards_lost_are_made_again(pairs_folder, text_file, tiny_config):
    before = contents(pairs_folder)
    for name in before:
        if name.endswith(".npy"):
            (pairs_folder / name).unlink()
    prepare_pairs(text_file, pairs_folder, tiny_config, FakeEncoder())
    assert contents(pairs_folder) == before


def test_prepare_pairs_the_check_can_be_left_out(pairs_folder, text_file, tiny_config):
    flip(pairs_folder / shard_names(3)[0])
    damaged = contents(pairs_folder)
    prepare_pairs(text_file, pairs_folder, tiny_config, FakeEncoder(), verify=False)
    assert contents(pairs_folder) == damaged


def test_prepare_pairs_an_embedding_file_of_another_machine_may_differ_in_its_last_bits(
    pairs_folder, text_file, tiny_config
):
    """Tokens must come out the same; vectors of another processor may not, and are recorded."""

    class Rough(FakeEncoder):
        def encode(self, texts, progress=None):
            vectors = super().encode(texts, progress)
            return vectors + 1e-4 * np.sign(vectors)

    path = pairs_folder / shard_names(2)[1]
    old = np.load(path)
    path.unlink()
    prepare_pairs(text_file, pairs_folder, tiny_config, Rough())
    Pairs.verify(pairs_folder)
    assert 0 < np.abs(np.load(path).astype(np.float32) - old.astype(np.float32)).max() < 1e-3


def forget_digest(folder):
    manifest = read_manifest(folder)
    del manifest["source"]["digest"]
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def test_prepare_pairs_a_damaged_shard_of_a_changed_source_is_not_made_up(
    pairs_folder, text_file, tiny_config, tmp_path
):
    text = text_file.read_text(encoding="utf-8")
    source = tmp_path / text_file.name
    source.write_text(text.replace("cat", "dog"), encoding="utf-8")
    forget_digest(pairs_folder)  # an older manifest, whose digest does not notice it first
    flip(pairs_folder / shard_names(3)[0])
    damaged = contents(pairs_folder)
    with pytest.raises(DataError, match="the tokens of the damaged shard 3 again"):
        prepare_pairs(source, pairs_folder, tiny_config, FakeEncoder())
    assert contents(pairs_folder) == damaged


def test_prepare_pairs_of_the_first_version_are_repaired_as_they_were(
    tmp_path, tiny_config, monkeypatch
):
    """Then pieces with unknown tokens were kept."""
    source = tmp_path / "texts.txt"
    source.write_text("the cat zyx sleeps. a dog runs.\n" * 9, encoding="utf-8")
    out = tmp_path / "out"
    original = encode._open_manifest

    def unchecked(job):
        job, manifest = original(job)
        manifest.pop("round_trip", None)
        return encode.replace(job, round_trip=False), manifest

    monkeypatch.setattr(encode, "_open_manifest", unchecked)
    prepare_pairs(source, out, tiny_config, FakeEncoder())
    monkeypatch.setattr(encode, "_open_manifest", original)
    before = contents(out)
    flip(out / shard_names(0)[0])
    prepare_pairs(source, out, tiny_config, FakeEncoder())
    assert contents(out) == before


# Bad vectors


class Broken(FakeEncoder):
    """Returns a bad vector for one of its texts from some call on."""

    def __init__(self, value, calls):
        super().__init__()
        self.value, self.calls = value, calls

    def encode(self, texts, progress=None):
        vectors = super().encode(texts, progress)
        if tuple(texts) != PROBES:
            self.calls -= 1
            if self.calls < 0:
                vectors[1] = self.value
        return vectors


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3.0])
def test_prepare_pairs_a_bad_vector_never_reaches_a_shard(
    text_file, tiny_config, tmp_path, pairs_folder, value
):
    out = tmp_path / "out"
    with pytest.raises(EncoderError, match="unit length") as caught:
        prepare_pairs(text_file, out, tiny_config, Broken(value, calls=2))
    assert "from fake for 'the " in str(caught.value)
    assert len(read_manifest(out)["shards"]) == 2
    Pairs.verify(out)
    prepare_pairs(text_file, out, tiny_config, FakeEncoder())
    assert contents(out) == contents(pairs_folder)


# A full disk


@pytest.mark.parametrize("writes", range(0, 12, 3))
def test_prepare_pairs_a_full_disk_loses_nothing(
    text_file, tiny_config, tmp_path, pairs_folder, monkeypatch, writes
):
    out = tmp_path / "out"
    left = [writes]
    fsync = os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="room on the disk of") as caught:
            prepare_pairs(text_file, out, tiny_config, FakeEncoder())
    assert "run the same command again" in str(caught.value).lower()
    assert not list(out.glob("*.tmp")), "half a file would take the room that is missing"
    if writes:
        Pairs.verify(out)
    prepare_pairs(text_file, out, tiny_config, FakeEncoder())
    assert contents(out) == contents(pairs_folder)


def test_prepare_pairs_a_folder_that_cannot_be_written_is_another_error(
    tmp_path, tiny_config, text_file
):
    out = tmp_path / "out"
    (out / f"{shard_names(0)[0]}.tmp").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        prepare_pairs(text_file, out, tiny_config, FakeEncoder())


# SIGKILL

CHILD = """
import json, sys, time
from pathlib import Path
from unembed.config import Config
from unembed.data.prepare import prepare_pairs
from unembed.encoders.base import FakeEncoder

class Slow(FakeEncoder):  # long enough to be killed inside
    def encode(self, texts, progress=None):
        time.sleep(0.004)
        return super().encode(texts, progress)

def tell(done):  # and wait until it is let go on
    print(done.shards, flush=True)
    sys.stdin.readline()

source, out, config = sys.argv[1:]
config = Config.model_validate(json.loads(config))
prepare_pairs(Path(source), Path(out), config, Slow(), progress=tell)
"""


@pytest.mark.slow
def test_prepare_pairs_killed_at_random_moments_it_ends_with_the_same_bytes(
    passages, tiny_config, tmp_path
):
    source = tmp_path / "texts.txt"
    source.write_text("".join(line + "\n" for line in passages * 3), encoding="utf-8")
    data = tiny_config.model_dump()
    data["data"].update(passages_per_shard=1, vocabulary={"min_count": 3})
    config = Config.model_validate(data)
    prepare_pairs(source, tmp_path / "whole", config, FakeEncoder())
    out, draw, killed = tmp_path / "killed", random.Random(0), 0
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(data)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            for _ in range(draw.randint(0, 5)):  # some steps in, and then some milliseconds
                process.stdout.readline()
                process.stdin.write("\n")
                process.stdin.flush()
            time.sleep(draw.uniform(0.0, 0.015))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed == 10
    found = read_manifest(out)
    assert 5 < len(found["shards"]) < 126
    assert found["complete"] is False
    Pairs.verify(out)
    prepare_pairs(source, out, config, FakeEncoder())
    assert contents(out) == contents(tmp_path / "whole")


def test_copies_of_a_folder_are_the_same_pairs(pairs_folder, tmp_path):
    """No absolute path or time is kept: a copy is as good as the folder."""
    copy = shutil.copytree(pairs_folder, tmp_path / "copy")
    Pairs.verify(copy)
    assert np.array_equal(
        Pairs.open(copy).rows(np.arange(9))[1], Pairs.open(pairs_folder).rows(np.arange(9))[1]
    )
