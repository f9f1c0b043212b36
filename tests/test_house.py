"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

import unembed

PACKAGE = Path(unembed.__file__).parent
FILES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# What each part imports of the others. A part is a folder or a file of the package; the table is
# compared for equality, so that an arrow which is no longer needed goes as well.
IMPORTS = {
    "__init__": "auditing defences encoders errors evaluation inverter vectors",
    "__main__": "cli",
    "auditing": "decoding encoders errors evaluation files inverter tokenizer vectors",
    "backends": "denoiser device diffusion errors files",
    "baselines": "checkpoints decoding device diffusion encoders files tokenizer",
    "checkpoints": "denoiser encoders errors files tokenizer",
    "cli": "auditing backends checkpoints config data decoding defences demo device encoders "
    "errors evaluation files inverter tokenizer training vectors",
    "config": "errors files",
    "data": "config encoders errors files tokenizer",
    "decoding": "diffusion errors tokenizer",
    "defences": "auditing data decoding denoiser diffusion encoders errors evaluation files "
    "inverter training vectors",
    "demo": "decoding encoders errors evaluation inverter tokenizer vectors",
    "denoiser": "errors",
    "device": "errors",
    "diffusion": "device",
    "encoders": "device errors files tokenizer",
    "errors": "",
    "evaluation": "config data decoding denoiser encoders errors files inverter tokenizer vectors",
    "files": "errors",
    "inverter": "backends checkpoints decoding denoiser device diffusion encoders errors "
    "files tokenizer",
    "tokenizer": "errors files",
    "training": "checkpoints config data decoding denoiser device diffusion encoders "
    "errors files inverter tokenizer",
    "vectors": "data decoding encoders errors files inverter",
}

HEAVY = """
accelerate datasets datasketch fastapi huggingface_hub numpy pandas prometheus_client py3langid
pyarrow pydantic ray safetensors scipy sentence_transformers sklearn starlette tokenizers torch
transformers uvicorn yaml
""".split()


def part(file):
    return file.split("/")[0].removesuffix(".py")


def imports(tree):
    """Parts of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = node.module == "unembed"
            names = [f"unembed.{a.name}" for a in node.names] if inside else [node.module]
        else:
            continue
        for name in names:
            if name.startswith("unembed."):
                yield name.split(".")[1]


def definitions(tree):
    """Every function and class with its dotted name; those inside functions are private."""

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                yield f"{prefix}{child.name}", child
                inside = "" if isinstance(child, ast.ClassDef) else "_local."
                yield from visit(child, f"{prefix}{child.name}.{inside}")
            else:
                yield from visit(child, prefix)

    yield from visit(tree, "")


def test_imports_are_those_of_the_table():
    seen = {part(file): set() for file in FILES}
    for file, tree in FILES.items():
        seen[part(file)] |= set(imports(tree)) - {part(file)}
    assert seen == {name: set(names.split()) for name, names in IMPORTS.items()}


def test_imports_point_one_way():
    arrows = {name: set(names.split()) for name, names in IMPORTS.items()}
    while arrows:
        leaves = {name for name, names in arrows.items() if not names}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: names - leaves for name, names in arrows.items() if name not in leaves}


def test_the_import_reader_sees_every_kind_of_import():
    code = """
import unembed.config
from unembed.data.pairs import Pairs
from unembed import device
def later():
    from unembed.errors import DataError
    import numpy, unembed.inverter as it
if TYPE_CHECKING:
    from unembed.denoiser import Denoiser
"""
    found = sorted(imports(ast.parse(code)))
    assert found == ["config", "data", "denoiser", "device", "errors", "inverter"]


@pytest.mark.parametrize("module", ["unembed", "unembed.cli.main"])
def test_importing_does_nothing(module, tmp_path):
    code = f"""
import json, os, sys
before = dict(os.environ)
import {module}
loaded = sorted({{name.split(".")[0] for name in sys.modules}})
print(json.dumps([loaded, dict(os.environ) == before]))
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, untouched = json.loads(done.stdout)
    assert "unembed" in loaded
    assert set(loaded) & set(HEAVY) == set()
    assert untouched, "the environment was changed"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", [file for file in FILES if file != "__main__.py"])
def test_a_module_only_defines(file):
    """At the top of a file names are imported and bound; nothing is done for its effect."""
    for node in FILES[file].body:
        place = f"line {node.lineno} does something on import"
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING", place
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), place
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t for target in targets for t in getattr(target, "elts", [target])]
            assert all(isinstance(name, ast.Name) for name in names), place
        else:
            allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, *FUNCTIONS)
            assert isinstance(node, allowed), place


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_short(file):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 450
    lengths = {
        name: node.end_lineno - node.lineno + 1
        for name, node in definitions(FILES[file])
        if isinstance(node, FUNCTIONS)
    }
    allowed = {("training/loop.py", "train"): 150}  # a loop is read top to bottom
    too_long = {n: k for n, k in lengths.items() if k > allowed.get((file, n), 80)}
    assert too_long == {}


def test_most_functions_fit_in_a_dozen_lines():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for tree in FILES.values()
        for _, node in definitions(tree)
        if isinstance(node, FUNCTIONS)
    )
    assert lengths[len(lengths) // 2] <= 12


@pytest.mark.parametrize("file", FILES)
def test_what_is_public_is_documented(file):
    assert ast.get_docstring(FILES[file])
    bare = [
        name
        for name, node in definitions(FILES[file])
        if not any(word.startswith("_") for word in name.split(".")) and not ast.get_docstring(node)
    ]
    assert bare == []


@pytest.mark.parametrize("file", FILES)
def test_nothing_prints_pickles_or_swallows(file):
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "torch.load", "torch.save"), f"line {node.lineno}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
    loaded = {
        alias.name
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not loaded & {"pickle", "dill", "joblib"}


def test_devices_are_chosen_in_one_place():
    for file, tree in FILES.items():
        if file != "device.py":
            text = ast.unparse(tree)
            assert "is_available()" not in text, file
            assert ".cuda()" not in text, file


# The front door


@pytest.mark.parametrize("name", unembed.__all__)
def test_every_promised_name_is_there(name):
    assert getattr(unembed, name).__name__ == name
    assert name in dir(unembed)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'unembed' has no attribute 'inverter_of_dreams'"):
        _ = unembed.inverter_of_dreams


def test_the_example_of_the_front_door_is_true():
    failed, tried = doctest.testmod(unembed)
    assert (failed, tried > 0) == (0, True)


def test_typing_information_ships():
    assert (PACKAGE / "py.typed").is_file()
