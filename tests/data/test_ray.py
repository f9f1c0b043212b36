"""Shards made by workers: with a real Ray cluster once, else by the worker in this process."""

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from unembed.config import Config
from unembed.data import ray as distributed
from unembed.data.pairs import MANIFEST, read_manifest, shard_names
from unembed.data.prepare import prepare_pairs
from unembed.data.ray import ShardWorker, Share, plan_share, ray_runner
from unembed.data.shards import MadeShard, PassageReader
from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import PROBES
from unembed.errors import ConfigError, DataError, EncoderError


def contents(folder):
    """Every file of a folder but the lock, name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# A real cluster

DRIVER = """
import json, os, socket, sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from unembed.config import Config
from unembed.data.ray import ray_runner
from unembed.data.prepare import prepare_pairs
from unembed.encoders.base import FakeEncoder

class Dying(FakeEncoder):
    # The first worker to come to its third shard is killed in the middle of it
    shards = -1  # the probe texts are no shard

    def __init__(self, folder):
        super().__init__()
        (Path(folder) / f"worker-{os.getpid()}").touch()
        self.killed = Path(folder) / "killed"

    def encode(self, texts, progress=None):
        self.shards += 1
        with suppress(FileExistsError):
            if self.shards == 2:
                self.killed.touch(exist_ok=False)
                os.kill(os.getpid(), 9)
        return super().encode(texts, progress)

source, out, config, folder = sys.argv[1:]
config = Config.model_validate(json.loads(config))
before = dict(os.environ)
with ray_runner("local", 2, partial(Dying, folder)) as run:
    import ray
    dashboard = socket.socket().connect_ex(("127.0.0.1", 8265)) == 0
    print(os.environ["RAY_USAGE_STATS_ENABLED"], dashboard, flush=True)
    manifest = prepare_pairs(Path(source), Path(out), config, FakeEncoder(), run=run)
same = dict(os.environ) == before
shards = len(manifest["shards"])
print(f"{shards} shards, connected: {ray.is_initialized()}, environment as before: {same}")
"""


@pytest.fixture
def temporary():
    """A folder for temporary files whose path is short enough for that of a socket in it."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_two_workers_one_of_them_killed_make_the_bytes_of_a_single_process(
    passages, tiny_config, tmp_path, temporary
):
    source = tmp_path / "texts.txt"
    source.write_text("".join(line + "\n" for line in passages), encoding="utf-8")
    data = tiny_config.model_dump()
    data["data"].update(passages_per_shard=4, vocabulary={"min_count": 3})
    prepare_pairs(source, tmp_path / "single", Config.model_validate(data), FakeEncoder())
    for name in ("seen", "home"):
        (tmp_path / name).mkdir()
    given = (source, tmp_path / "ray", json.dumps(data), tmp_path / "seen")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, given)],
        env={**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 False" in done.stderr, "usage statistics are off and there is no dashboard"
    assert done.stdout == "11 shards, connected: False, environment as before: True\n"
    assert (tmp_path / "seen" / "killed").exists()
    workers = {path.name for path in (tmp_path / "seen").glob("worker-*")}
    assert len(workers) >= 2, "another took the place of the one that was killed"
    assert contents(tmp_path / "ray") == contents(tmp_path / "single")
    assert list((tmp_path / "home").iterdir()) == [], "nothing is left in the home folder"
    assert list(temporary.iterdir()) == [], "nothing is left of the cluster"


# Workers in this process


class Cluster:
    """Stands for Ray: two workers, whose shards come back in another order."""

    def __init__(self, load, ahead=3):
        self.load, self.ahead, self.asked = load, ahead, 0

    def __call__(self, job, tasks, report):
        cluster = self

        class Rows:
            def iter_rows(self):
                workers = [ShardWorker(job, cluster.load) for _ in range(2)]
                for start in range(0, len(todo), cluster.ahead):
                    for number, task in reversed(
                        list(enumerate(todo[start : start + cluster.ahead]))
                    ):
                        cluster.asked += 1
                        yield workers[number % 2](distributed.asdict(task))

        todo = []

        def dataset(ray, share, load, given_job, given):
            nonlocal job
            job = given_job
            todo.extend(given)
            return Rows()

        class FakeRay:
            class exceptions:  # noqa: N801 - as in the library
                class RayError(Exception):
                    pass

            shutdown = staticmethod(lambda: None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "_dataset", dataset)
            yield from distributed._make_on_ray(
                FakeRay, Share(2, 1, 0), self.load, job, tasks, report
            )


def test_prepare_pairs_shards_that_finish_in_another_order_make_the_same_folder(
    text_file, tiny_config, tmp_path, pairs_folder
):
    seen = []
    prepare_pairs(
        *(text_file, tmp_path / "out", tiny_config, FakeEncoder()),
        run=Cluster(FakeEncoder),
        progress=seen.append,
    )
    assert contents(tmp_path / "out") == contents(pairs_folder)
    assert [step.shards for step in seen] == [1, 2, 3, 4, 5, 6]


def test_prepare_pairs_the_limit_leaves_nothing_of_what_workers_made_ahead(
    text_file, tiny_config, tmp_path, pairs_folder
):
    for name, run in (("single", None), ("workers", Cluster(FakeEncoder))):
        prepare_pairs(*(text_file, tmp_path / name, tiny_config, FakeEncoder()), limit=5, run=run)
    assert len(read_manifest(tmp_path / "workers")["shards"]) == 1
    assert contents(tmp_path / "workers") == contents(tmp_path / "single")
    prepare_pairs(
        *(text_file, tmp_path / "workers", tiny_config, FakeEncoder()), run=Cluster(FakeEncoder)
    )
    assert contents(tmp_path / "workers") == contents(pairs_folder)


def test_prepare_pairs_damaged_and_missing_shards_are_made_in_one_go(
    text_file, tiny_config, tmp_path, pairs_folder
):
    out = tmp_path / "out"
    prepare_pairs(text_file, out, tiny_config, FakeEncoder(), limit=30)
    (out / shard_names(0)[1]).write_bytes(b"")
    stale = out / f"{shard_names(2)[0]}.12345678-try0.tmp"
    stale.touch()
    cluster = Cluster(FakeEncoder)
    prepare_pairs(text_file, out, tiny_config, FakeEncoder(), run=cluster)
    assert contents(out) == contents(pairs_folder)
    asked = cluster.asked
    prepare_pairs(text_file, out, tiny_config, FakeEncoder(), run=cluster)
    assert cluster.asked == asked, "a finished folder needs no worker"


class Broken(FakeEncoder):
    """One bad vector in the shard that has this text."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def encode(self, texts, progress=None):
        vectors = super().encode(texts, progress)
        if self.text in texts:
            vectors[0] = np.nan
        return vectors


def test_prepare_pairs_an_error_of_a_worker_is_the_single_processes_and_what_came_before_is_kept(
    text_file, tiny_config, tmp_path, pairs_folder
):
    manifest = read_manifest(pairs_folder)
    fake = FakeEncoder()
    tokens = np.load(pairs_folder / shard_names(2)[0])
    text = fake.tokenizer.decode(tokens[:1])[0]
    with pytest.raises(EncoderError, match="finite vectors of unit length"):
        prepare_pairs(
            *(text_file, tmp_path / "out", tiny_config, fake), run=Cluster(partial(Broken, text))
        )
    kept = read_manifest(tmp_path / "out")["shards"]
    assert kept == manifest["shards"][: len(kept)]
    assert not list((tmp_path / "out").glob("*.tmp"))
    prepare_pairs(text_file, tmp_path / "out", tiny_config, fake, run=Cluster(FakeEncoder))
    assert contents(tmp_path / "out") == contents(pairs_folder)


class Elsewhere(FakeEncoder):
    """Embeds elsewhere than the driver's."""

    def encode(self, texts, progress=None):
        return super().encode(texts, progress)[:, ::-1]


@pytest.mark.parametrize("load", [Elsewhere, partial(FakeEncoder, 16)])
def test_prepare_pairs_a_worker_with_another_encoder_is_refused(
    text_file, tiny_config, tmp_path, load
):
    with pytest.raises(EncoderError, match="expected pairs of"):
        prepare_pairs(*(text_file, tmp_path / "out", tiny_config, FakeEncoder()), run=Cluster(load))


def test_prepare_pairs_a_disk_that_fails_once_is_tried_again(
    text_file, tiny_config, tmp_path, pairs_folder, monkeypatch
):
    monkeypatch.setattr(distributed, "_PAUSE", 0.0)
    fsync, failures = os.fsync, [3]

    def flaky(descriptor):
        if MANIFEST in os.path.realpath(f"/proc/self/fd/{descriptor}"):
            return
        failures[0] -= 1
        if failures[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    out = tmp_path / "out"
    prepare_pairs(text_file, out, tiny_config, FakeEncoder(), run=Cluster(FakeEncoder))
    assert failures[0] < 0
    assert contents(out) == contents(pairs_folder)


def test_prepare_pairs_a_shard_that_fails_each_time_ends_the_preparation(
    text_file, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(distributed, "_PAUSE", 0.0)

    class Gone(FakeEncoder):
        def encode(self, texts, progress=None):
            if tuple(texts) != PROBES:
                raise OSError(errno.EIO, "Input/output error")
            return super().encode(texts, progress)

    with pytest.raises(DataError, match=r"shard 0 after 4 attempts.*Input/output error"):
        prepare_pairs(*(text_file, tmp_path / "out", tiny_config, FakeEncoder()), run=Cluster(Gone))
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_what_kills_every_worker_does_not_go_on_for_ever(text_file, tiny_config, tmp_path):
    class Killed(BaseException):
        pass

    class Deadly(FakeEncoder):
        def encode(self, texts, progress=None):
            if tuple(texts) != PROBES:
                raise Killed
            return super().encode(texts, progress)

    def run(job, tasks, report):
        task = distributed.asdict(next(iter(tasks)))
        answer = None
        while answer is None:
            try:
                answer = ShardWorker(job, Deadly)(task)
            except Killed:  # and another worker takes its place
                run.deaths += 1
        yield distributed._receive(answer)

    run.deaths = 0
    with pytest.raises(DataError, match="after 4 attempts; found its worker ended"):
        prepare_pairs(text_file, tmp_path / "out", tiny_config, FakeEncoder(), run=run)
    assert run.deaths == 4


def test_received_a_folder_that_is_not_shared_is_named(text_file, tiny_config, tmp_path):
    def elsewhere(job, tasks, report):
        yield MadeShard(0, {"passages": 8, "pairs": 9, "sha256": {"tokens-00000.npy": ""}}, ".x")

    with pytest.raises(DataError, match="an --out folder that all machines share"):
        prepare_pairs(text_file, tmp_path / "out", tiny_config, FakeEncoder(), run=elsewhere)

    def missing(job, tasks, report):
        job = distributed.replace(job, out=tmp_path / "none")
        task = distributed.asdict(next(iter(tasks)))
        yield distributed._receive(ShardWorker(job, FakeEncoder)(task))

    with pytest.raises(DataError, match="an --out folder that all machines share"):
        prepare_pairs(text_file, tmp_path / "out", tiny_config, FakeEncoder(), run=missing)


def test_a_source_is_read_in_any_order(text_file, passages):
    reader = PassageReader(text_file, "text")
    for first, count in ((0, 5), (5, 3), (20, 4), (2, 2), (40, 9), (42, 5), (0, 1)):
        assert reader.read(first, count) == passages[first : first + count]


# Connecting


@pytest.mark.slow
@pytest.mark.parametrize("address", ["nowhere", "host:", ":6379", "host:port", ""])
def test_ray_runner_an_address_must_be_one(address):
    with pytest.raises(ConfigError, match="--ray local, auto or HOST:PORT"), no_ray(address):
        pass


def no_ray(address):
    return ray_runner(address, 2, FakeEncoder)


def test_ray_runner_an_address_where_nothing_answers_is_an_error_at_once():
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"a Ray cluster at {address}"), no_ray(address):
            pass


def test_ray_runner_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=r"pip install .*\[distributed\]"), no_ray("local"):
        pass
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([{"CPU": 8}], None, True, Share(1, 8, 0)),
        ([{"CPU": 8}], 3, True, Share(3, 2, 0)),
        ([{"CPU": 4}, {"CPU": 4}], 3, True, Share(3, 2, 0)),
        ([{"CPU": 4}, {"CPU": 4}, {"CPU": 4}], 4, True, Share(4, 2, 0)),
        ([{"CPU": 2}, {"CPU": 16}, {}], None, True, Share(2, 8, 0)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 4}], None, True, Share(6, 1, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 1, True, Share(1, 1, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8}], 4, False, Share(4, 4, 0)),
    ],
)
def test_plan_share_the_cluster_is_split_so_that_every_worker_finds_room(
    nodes, workers, gpus, expected
):
    assert plan_share(nodes, workers, gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "what"), [([{"CPU": 2}], "2, the CPUs"), ([{"CPU": 64, "GPU": 1}], "1, the GPUs")]
)
def test_plan_share_more_workers_than_the_cluster_has_room_for_are_refused(nodes, what):
    with pytest.raises(ConfigError, match=f"--workers of at most {what}"):
        plan_share(nodes, 3)
