import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import unembed
from unembed.config import Config, load_config, shipped_configs, validate_config
from unembed.denoiser import DenoiserSizes
from unembed.encoders.api import load_api_encoder
from unembed.encoders.sentence import load_encoder
from unembed.errors import ConfigError, UnembedError

PACKAGE = Path(unembed.__file__).parent
SHIPPED = sorted((PACKAGE / "configs").rglob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(name_or_path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(name_or_path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("text", ["data: {a: 8}\ndata: {a: 9}", "data: {a: 8, a: 9}"])
def test_load_config_a_key_twice_is_refused(tmp_path, text):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"the key '(data|a)' twice"):
        load_config(tmp_path / "twice.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_load_config_every_shipped_configuration_loads_and_says_what_its_file_says(path):
    loaded = load_config(path).model_dump()
    for section, values in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert {key: loaded[section][key] for key in values} == values


def test_shipped_configs_shipped_names_reach_every_file():
    assert sorted(shipped_configs().values()) == SHIPPED
    for name, path in shipped_configs().items():
        assert load_config(name) == load_config(path)


def test_load_config_an_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "# nothing\n")) == Config()


def test_validate_config_a_configuration_survives_json(tiny_config):
    assert validate_config(tiny_config.model_dump(mode="json"), "a checkpoint") == tiny_config


def test_load_config_a_loaded_configuration_cannot_change():
    config = load_config("minilm")
    with pytest.raises(ValidationError, match="frozen"):
        config.training.lr = 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # unknown keys
        ("trainer: {}", ["'trainer'", "encoder, data, denoiser, diffusion, training"]),
        ("training:\n  learning_rate: 0.1", ["'training.learning_rate'", "lr", "warmup_steps"]),
        # wrong types
        ("training:\n  steps: many", ["training.steps", "'many'", "valid integer"]),
        ("training:\n  steps: 10.5", ["training.steps", "10.5", "valid integer"]),
        ("training:\n  steps: '10'", ["training.steps", "'10'", "valid integer"]),
        ("training:\n  steps: true", ["training.steps", "True", "valid integer"]),
        ("encoder:\n  name: 7", ["encoder.name", "7", "valid string"]),
        ("encoder: all-MiniLM-L6-v2", ["encoder", "'all-MiniLM-L6-v2'", "EncoderSection"]),
        ("encoder:", ["encoder", "None", "EncoderSection"]),
        # values out of range
        ("training:\n  steps: 0", ["training.steps", "found 0", "greater than or equal to 1"]),
        ("training:\n  lr: 0", ["training.lr", "found 0", "greater than 0"]),
        ("training:\n  lr: .nan", ["training.lr", "nan", "finite number"]),
        ("training:\n  clip_norm: .inf", ["training.clip_norm", "inf", "finite number"]),
        ("training:\n  ema_decay: 1", ["training.ema_decay", "found 1", "less than 1"]),
        ("training:\n  seed: -1", ["training.seed", "found -1", "greater than or equal to 0"]),
        ("data:\n  length: 3", ["data.length", "found 3", "greater than or equal to 4"]),
        ("data:\n  length: 4096", ["data.length", "4096", "less than or equal to 2048"]),
        ("data:\n  pack: 1.5", ["data.pack", "1.5", "less than or equal to 1"]),
        ("denoiser:\n  token_table: zeros", ["denoiser.token_table", "'zeros'", "'encoder'"]),
        ("diffusion:\n  schedule: cosine", ["diffusion.schedule", "'cosine'", "'linear'"]),
        ("diffusion:\n  weight: 1", ["diffusion.weight", "'reciprocal-t', 'elbo' or 'uniform'"]),
        # the whole range, whichever end was passed
        ("training:\n  lr: 5", ["training.lr:", "found 5", "a number above 0 and at most 1)"]),
        ("data:\n  length: 2", ["data.length", "a whole number at least 4 and at most 2048)"]),
        (
            "training:\n  batch_size: 0",
            ["training.batch_size:", "found 0", "at least 1 or 'auto')"],
        ),
        ("training:\n  patience: -1", ["training.patience:", "at least 1 or null)"]),
        ("training:\n  milestones: [0]", ["training.milestones:", "found 0", "list, each a whole"]),
        ("training:\n  compile: 1", ["training.compile:", "found 1", "true or false)"]),
        # values that do not go together
        ("data:\n  min_tokens: 40", ["data", "min_tokens (40)", "length - 1 (31)"]),
        ("data:\n  language: de", ["data", "language (de)", "sentencex"]),
        ("denoiser:\n  heads: 7", ["denoiser", "heads (7)", "hidden (768)"]),
        ("training:\n  steps: 10", ["training", "warmup_steps (1000)", "steps (10)"]),
        (
            "training:\n  steps: 2000\n  milestones: [500, 3000]",
            ["training", "milestones (3000)", "steps (2000)"],
        ),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(tmp_path, text, said):
    path = write(tmp_path, text)
    message = refusal(path)
    assert [part for part in [*said, str(path)] if part not in message] == []
    assert "{" not in message, "not the whole section"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: [1, 2", "expected YAML in"),
        ("a: b: c", "expected YAML in"),
        ("- one\n- two", "found list"),
        ("just words", "found str"),
    ],
)
def test_load_config_a_file_that_is_not_a_yaml_mapping_is_refused(tmp_path, text, said):
    path = write(tmp_path, text)
    message = refusal(path)
    assert said in message
    assert str(path) in message


def test_load_config_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"training:\n  steps: \xff\xfe")
    assert f"expected YAML in {path}" in refusal(path)


def test_load_config_a_missing_file_is_refused_with_the_shipped_names(tmp_path):
    message = refusal(tmp_path / "none.yaml")
    assert "none.yaml" in message
    assert "minilm" in message
    assert "minilm" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.lr=3e-4", "training", "lr", 3e-4),
        ("training.lr=1E-2", "training", "lr", 1e-2),
        ("training.steps=5000", "training", "steps", 5000),
        ("data.seed=-3", "data", "seed", -3),
        ("data.pack=0", "data", "pack", 0.0),
        ("encoder.name=org/model", "encoder", "name", "org/model"),
        ("encoder.prompt=null", "encoder", "prompt", None),
        ("encoder.prompt='query: '", "encoder", "prompt", "query: "),
        ("encoder.prompt=a=b", "encoder", "prompt", "a=b"),
        ("encoder.revision='12345'", "encoder", "revision", "12345"),
        ("diffusion.schedule=linear", "diffusion", "schedule", "linear"),
    ],
)
def test_overrides_apply_with_their_type(override, section, key, value):
    config = load_config("minilm", [override])
    found = getattr(getattr(config, section), key)
    assert found == value
    assert type(found) is type(value)
    untouched = load_config("minilm").model_dump()
    assert {**untouched, section: {**untouched[section], key: value}} == config.model_dump()


def test_load_config_the_last_override_wins_and_comes_before_the_checks(tmp_path):
    bad = write(tmp_path, "training:\n  steps: 0")
    config = load_config(bad, ["training.steps=7", "training.steps=2000"])
    assert config.training.steps == 2000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr", "section.key=value"),
        ("lr=1", "section.key=value"),
        (".lr=1", "section.key=value"),
        ("a..c=1", "section.key=value"),
        ("data.length.x=1", "a section 'length'"),
        ("data.vocabulary.most=1", "data.vocabulary.most"),
        ("training.lr=fast", "training.lr"),
        ("training.momentum=1", "training.momentum"),
        ("optimizer.lr=1", "'optimizer'"),
        ("training.lr=", "training.lr"),
        ("data.pack=[", "data.pack=["),
        ("data.pack={a", "data.pack={a"),
    ],
)
def test_load_config_a_bad_override_is_refused(override, said):
    assert said in refusal("minilm", [override])


def test_an_override_of_something_that_is_no_section_is_refused(tmp_path):
    message = refusal(write(tmp_path, "data: 3"), ["data.length=16"])
    assert "expected a section 'data'; found 3" in message


# No key may be read into the configuration and then ignored.


def attributes_read():
    """(what it is read from, attribute) of every attribute in the package, `config.py` aside."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "config.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    read.add((ast.unparse(node.value).rsplit(".")[-1], node.attr))
    return read


@pytest.mark.parametrize("section", ["data", "diffusion", "training"])
def test_load_config_every_key_is_read_somewhere(section):
    fields = Config.model_fields[section].annotation.model_fields
    read = {attr for base, attr in attributes_read() if base in (section, "settings", "process")}
    assert set(fields) - read == set()


def test_load_encoder_every_key_of_the_encoder_is_an_argument_of_its_loader():
    fields = Config.model_fields["encoder"].annotation.model_fields
    loaders = [inspect.signature(loader).parameters for loader in (load_encoder, load_api_encoder)]
    assert set(fields) - set(loaders[0]) == {"api_base", "cache", "max_calls", "price"}
    assert set(fields) - set(loaders[0]) - set(loaders[1]) == set()


def test_denoiser_sizes_every_key_of_the_denoiser_is_one_of_its_sizes_or_read():
    fields = Config.model_fields["denoiser"].annotation.model_fields
    sizes = {field.name for field in dataclasses.fields(DenoiserSizes)}
    assert set(fields) - sizes == {"token_table"}
    assert ("denoiser", "token_table") in attributes_read()


def test_load_config_a_bad_value_from_the_command_line_is_not_blamed_on_the_file():
    with pytest.raises(ConfigError, match=r"found 5 in .*minilm\.yaml with --set training\.lr=5"):
        load_config("minilm", ["training.lr=5"])


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "[" * 30_000,
        "a: 1\n" * 20_000,
        "training: {steps: " + "9" * 5000 + "}",
        "training: {steps: " + "x" * 60_000 + "}",
        "training: {steps: 2020-99-99}",
        "a: !!python/object/apply:os.system ['true']",
        "a: \0",
        "1: 2",
        "data: {null: 16}",
        "data: {yes: 16}",
        "2026-11-29: {length: 16}",
        "? [1, 2]\n: 3",
        "? " + "x" * 50_000 + "\n: 3",
        "data: {? " + "x" * 50_000 + " : 3}",
    ],
)
def test_load_config_refuses_a_hostile_file_in_a_line(content, tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 5000, "2020-99-99", "9" * 5000, "!!python/x"])
def test_load_config_refuses_a_hostile_override(value):
    with pytest.raises(ConfigError) as caught:
        load_config("minilm", [f"training.steps={value}"])
    assert len(str(caught.value)) < 1000


def test_load_config_refuses_what_is_no_path_or_override():
    for name in (None, 3, {"training": {}}, ""):
        with pytest.raises(UnembedError, match="a path; found"):
            load_config(name)
    with pytest.raises(ConfigError, match=r"section.key=value; found 3"):
        load_config("minilm", [3])
