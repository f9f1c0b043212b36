import re
import sys
import tomllib
from pathlib import Path

import pytest

from unembed import files as sources
from unembed.errors import ConfigError
from unembed.files import EXTRAS, atomic, has_extra, install_line, require_extra


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


_IMPORTED = {"faiss_cpu": "faiss", "opensearch_py": "opensearchpy", "pylance": "lance"}


def test_the_extras_are_those_of_pyproject():
    path = Path(__file__).parents[1] / "pyproject.toml"
    extras = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(extras) - {"dev", "embedded"}
    for name, packages in EXTRAS.items():
        stated = [re.split(r"[>\[=]", line)[0].replace("-", "_") for line in extras[name]]
        assert sorted(packages) == sorted(_IMPORTED.get(package, package) for package in stated)


def test_remove_unfinished_removes_what_atomic_left_and_nothing_else(tmp_path):
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / ".data.json.0123456789abcdef.tmp").write_text("half")
    sources.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
