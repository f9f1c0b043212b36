"""A run's settings: YAML read into frozen pydantic models, where an unknown key is an error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unembed.errors import ConfigError
from unembed.files import as_path, is_file, read_bounded

_MOST_BYTES = 1 << 16  # of a configuration file
_MOST_CHARS = 200  # letters of a value in a message

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of every section: no unknown keys, no changes after loading, no guessed types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class EncoderSection(Section):
    """The embedding model under attack.

    Attributes:
        name: A name of the catalogue, a local folder, a Hub repository, or ``openai:MODEL`` for a
            model behind an OpenAI-compatible API.
        revision: The Hub revision (a branch, tag or commit).
        prompt: Text put before each document; null takes what the model's own files or the
            catalogue say.
        prompt_name: In place of ``prompt``: the name that the text has in the model's own files.
        pooling: How token vectors become one, for a model whose files do not say it: ``mean``,
            ``cls``, ``lasttoken``, ``max``.
        truncate_dim: Dimensions kept of a Matryoshka model, at length 1 again; null keeps what the
            model's files say. Of an API it is asked for as ``dimensions``.
        backend: What runs the model: ``torch``, or ``onnx`` for a folder with an .onnx file.
        api_base: Of ``openai:MODEL``: the address of the API, up to ``/v1``; OpenAI's if null.
        max_calls: Of ``openai:MODEL``: most requests of a command.
        price: Of ``openai:MODEL``: what a million tokens cost, for the sum that is shown.
        cache: Of ``openai:MODEL``: folder of the answers; ``~/.cache/unembed`` if null.
    """

    name: str = "all-MiniLM-L6-v2"
    revision: str | None = None
    prompt: str | None = None
    prompt_name: str | None = None
    pooling: str | None = None
    truncate_dim: Positive | None = None
    backend: Literal["torch", "onnx"] | None = None
    api_base: str | None = None
    max_calls: Positive | None = None
    price: Annotated[float, Field(ge=0.0)] | None = None
    cache: str | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> EncoderSection:
        if self.prompt is not None and self.prompt_name is not None:
            raise ValueError(f"prompt_name ({self.prompt_name}) must be null where prompt is given")
        return self


class VocabularySection(Section):
    """Settings of the vocabulary: which tokens the denoiser knows.

    Attributes:
        min_count: Keep tokens that occur at least this often in the pieces, and the single letters
            and bytes that spell the others; null keeps all.
        tokenizer: Folder or Hub repository of another tokenizer than the encoder's own, which null
            takes. The token table then starts at random: ``denoiser.token_table``.
    """

    tokenizer: str | None = None
    min_count: Positive | None = None


class DataSection(Section):
    """Settings of the data: how raw text becomes pieces.

    Attributes:
        length: Positions L of the denoiser: content, end token and padding.
        min_tokens: Shortest piece kept, in content tokens.
        pack: Share of passages whose neighbouring sentences are packed into pieces of up to L-1
            tokens; in the rest each sentence is a piece of its own.
        seed: Draws which passages are packed.
        passages_per_shard: Passages of source text in a shard, the unit of resuming.
        windows: Times each passage is cut, every time from another place; pieces that come out
            twice are kept once.
        segmenter: Where sentences end: ``regex``, at the end marks of many scripts, or
            ``sentencex``, the library, which also knows abbreviations.
        language: ISO 639 code of the language whose rules ``sentencex`` follows.
        vocabulary: Trimming of the vocabulary.
    """

    length: Annotated[int, Field(ge=4, le=2048)] = 32
    min_tokens: Positive = 5
    pack: Fraction = 0.5
    seed: int = 0
    passages_per_shard: Positive = 8192
    windows: Annotated[int, Field(ge=1, le=64)] = 1
    segmenter: Literal["regex", "sentencex"] = "regex"
    language: str = "en"
    vocabulary: VocabularySection = VocabularySection()

    @model_validator(mode="after")
    def _settings_go_together(self) -> DataSection:
        if self.segmenter == "regex" and self.language != "en":
            rules = "is for segmenter sentencex; regex has one set of rules"
            raise ValueError(f"language ({self.language}) {rules}")
        if self.min_tokens >= self.length:
            most = f"must be at most length - 1 ({self.length - 1})"
            raise ValueError(f"min_tokens ({self.min_tokens}) {most}")
        return self


class DenoiserSection(Section):
    """Sizes of the network and how it starts.

    Attributes:
        hidden: Hidden size H.
        layers: Transformer blocks.
        heads: Attention heads; must divide ``hidden``.
        feed_forward: Width of each block's feed-forward layer.
        prefix: Positions at the beginning that three of four steps train on alone; 0: none does.
        token_table: Start it from the encoder's words, and the direct path from pairs; or random.
    """

    hidden: Positive = 768
    layers: Positive = 8
    heads: Positive = 12
    feed_forward: Positive = 3072
    prefix: Annotated[int, Field(ge=0)] = 0
    token_table: Literal["encoder", "random"] = "encoder"

    @model_validator(mode="after")
    def _heads_divide(self) -> DenoiserSection:
        if self.hidden % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide hidden ({self.hidden})")
        return self


class DiffusionSection(Section):
    """The forward process and the weight of its loss.

    Attributes:
        schedule: ``log-linear`` (alpha = exp(-rate * t)) or ``linear`` (alpha = 1 - t).
        rate: lambda of the log-linear schedule; the linear one ignores it.
        weight: ``reciprocal-t`` (1/t, the method's report), ``elbo`` (exact for the schedule) or
            ``uniform`` (every masked token counts the same).
    """

    schedule: Literal["log-linear", "linear"] = "log-linear"
    rate: Annotated[float, Field(gt=0.0, le=50.0)] = 5.0
    weight: Literal["reciprocal-t", "elbo", "uniform"] = "reciprocal-t"


class TrainingSection(Section):
    """The optimiser, its schedule, and how often things are saved and measured.

    Attributes:
        steps: Optimiser steps of the whole run.
        batch_size: Pairs in one forward pass, over all processes; ``auto`` takes the largest power
            of two that fits, up to 4096 a process.
        accumulate: Forward passes per optimiser step.
        lr: Peak learning rate, reached after ``warmup_steps``, then down to ``final_lr`` times the
            peak as ``schedule`` says.
        schedule: ``cosine`` falls from the warm-up to the end; ``wsd`` stays at the peak and falls
            in the last ``decay_steps`` only, so that a run can be made longer before these.
        decay_steps: Of ``wsd``; a tenth of ``steps`` when null.
        table_lr: Learning rate of the token table as a share of ``lr``; 0 keeps the table as it
            started, which is quicker and keeps rare words where the encoder put them.
        weight_decay: AdamW's, on matrices only (not norms, biases or embeddings).
        clip_norm: Largest gradient norm.
        start_from: An inverter whose weights the run starts from (shipped name, folder or Hub
            repository) in place of random ones; its sizes, tokenizer and encoder must be the run's.
        condition_dropout: Share of the pairs trained without their embedding, for guidance.
        embedding_noise: Length of the noise added to each embedding, as a share of its own.
        self_context: Share of the visible tokens replaced by the denoiser's own samples.
        feedback: Share of the pairs whose visible tokens are a hypothesis with errors, and that see
            its embedding too, as guided search does (loads the encoder, which embeds them).
        scored_padding: Share of the masked padding that is scored, weighted up to stand for all of
            it; a third of the positions is padding, which is soon predicted almost surely.
        sampled_vocabulary: Tokens beside a batch's targets over which its softmax is taken, half
            of them the most frequent and half random; null takes the whole vocabulary.
        ema_decay: Decay of the averaged weights; the early average is shorter.
        seed: Of the weights, the order of the data, the timesteps and the masks.
        eval_every: Steps between validations.
        save_every: Steps between saves of the latest state.
        log_every: Steps between lines of the log.
        validation_pairs: Pairs held out from the prepared data, never trained on.
        decoded_pairs: How many of them are also decoded from a full mask at each validation.
        decoded_cosine: Embed what was decoded and log its cosine (loads the encoder).
        patience: Validations without a new best loss after which the run stops; null never stops.
        milestones: Steps whose averaged weights are kept as ``milestone-N.safetensors``.
        on_bad_loss: A step whose loss is not finite or explodes is never applied; then ``stop``
            ends the run with a message and ``skip`` counts it and goes on.
        explosion: A loss explodes above this many times its running average.
        resident: Keep the pairs in the device's memory: ``auto`` where they fit on a GPU.
        static_shapes: Pad the masked positions of a batch to a constant number, with weight 0.
        compile: Run the network through ``torch.compile``.
        shard: Of several processes give each a share of weights, gradients, moments and averages
            in place of a copy (FSDP), for a denoiser too large for one device.
        tensorboard: Write curves for TensorBoard too, where that package is installed.
    """

    steps: Positive = 200_000
    batch_size: Positive | Literal["auto"] = 512
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 3e-4
    final_lr: Fraction = 0.05
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_steps: Positive | None = None
    table_lr: Fraction = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    start_from: str | None = None
    condition_dropout: Fraction = 0.0
    embedding_noise: Fraction = 0.0
    self_context: Fraction = 0.0
    feedback: Fraction = 0.0
    scored_padding: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    sampled_vocabulary: Annotated[int, Field(ge=2)] | None = None
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    seed: Seed = 0
    eval_every: Positive = 1000
    save_every: Positive = 500
    log_every: Positive = 50
    validation_pairs: Positive = 2048
    decoded_pairs: Annotated[int, Field(ge=0)] = 64
    decoded_cosine: bool = False
    patience: Positive | None = None
    milestones: list[Positive] = []
    on_bad_loss: Literal["stop", "skip"] = "stop"
    explosion: Annotated[float, Field(gt=1.0)] = 10.0
    resident: Literal["auto", "always", "never"] = "auto"
    static_shapes: bool = False
    compile: bool = False
    shard: bool = False
    tensorboard: bool = True

    @model_validator(mode="after")
    def _numbers_go_together(self) -> TrainingSection:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})"
            )
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(f"decay_steps ({self.decay_steps}) needs schedule: wsd")
        if self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and decay_steps ({self.decay_steps}) must be "
                f"at most steps ({self.steps})"
            )
        if max(self.milestones, default=0) > self.steps:
            raise ValueError(
                f"milestones ({max(self.milestones)}) must be at most steps ({self.steps})"
            )
        if self.shard and self.batch_size == "auto":
            raise ValueError("batch_size must be a number with shard: auto tries a whole copy")
        return self

    @property
    def pairs_a_pass(self) -> int:
        """``batch_size`` once it is a number: ``auto`` becomes one when a run starts."""
        assert isinstance(self.batch_size, int)
        return self.batch_size


class Config(Section):
    """Configuration of a run; each section has the defaults of the reference size."""

    encoder: EncoderSection = EncoderSection()
    data: DataSection = DataSection()
    denoiser: DenoiserSection = DenoiserSection()
    diffusion: DiffusionSection = DiffusionSection()
    training: TrainingSection = TrainingSection()


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, name → file."""
    folder = Path(str(resources.files("unembed") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name_or_path: A shipped name (``minilm``) or the path of a YAML file.
        overrides: ``section.key=value`` strings, applied in order over the file; a key inside a
            key is ``section.key.key=value``.

    Raises:
        ConfigError: No such file, not YAML, an unknown key, a wrong type or a value out of range.
    """
    shipped = shipped_configs()
    path = shipped.get(str(name_or_path), as_path(name_or_path))
    if not is_file(path):
        raise ConfigError(
            f"a configuration file or one of {', '.join(shipped)}",
            f"{str(name_or_path)!r}",
            "Pass --config with a shipped name or the path of a YAML file",
        )
    try:
        data = _load_yaml(read_bounded(path, _MOST_BYTES).decode("utf-8")) or {}
    except (yaml.YAMLError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"YAML in {path}", reason, "Correct the file") from error
    if not isinstance(data, dict):
        raise ConfigError(f"a mapping in {path}", type(data).__name__, "Correct the file")
    for override in overrides:
        _apply(data, override)
    suffix = "".join(f" with --set {override}" for override in overrides)
    return validate_config(data, where=f"{path}{suffix}")


class _Loader(yaml.SafeLoader):
    """Reads plain values and no aliases, of which a few lines can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, or raise YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name); write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, or raise YAMLError for a key that is no text or stands twice."""
        names: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {_shorten(key)}, which is no text")
            if key in names:
                reason = "twice, of which only one would count"
                raise yaml.YAMLError(f"the key {_shorten(key)} {reason}")
            names.add(key)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(text: str) -> Any:
    """Read YAML, or raise YAMLError or ValueError where it is none."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} …"


def validate_config(data: dict[str, Any], where: str) -> Config:
    """Check plain data (from YAML or JSON) against the models.

    Raises:
        ConfigError: Names the first offending key, its value and what is allowed.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            fields = ", ".join(_section_of(first["loc"][:-1])[0].model_fields)
            actual = f"unknown key {_shorten(key)} in {where}"
            raise ConfigError(f"one of the keys {fields}", actual, "Correct the key") from error
        section, keys = _section_of(first["loc"])
        key = ".".join(keys) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        if keys and keys[-1] in section.model_fields:
            message = f"{message} ({_allowed(section.model_json_schema()['properties'][keys[-1]])})"
        # Values that do not go together are named in the message
        value = "these values" if first["type"] == "value_error" else _shorten(first["input"])
        expected = f"{key}: {message[0].lower()}{message[1:]}"
        raise ConfigError(expected, f"{value} in {where}", f"Correct {key}") from error


def _section_of(location: Sequence[int | str]) -> tuple[type[Section], list[str]]:
    """The section that a validation error is about, and the names on the way, the key's included.

    What pydantic adds behind a key (which kind of a union, which item of a list) is left out.
    """
    model: type[Section] = Config
    names: list[str] = []
    for part in map(str, location):
        names.append(part)
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            break
        model = annotation
    return model, names


_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "null": "null"} | {
    "boolean": "true or false"
}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


def _allowed(schema: dict[str, Any]) -> str:
    """Say in words what a key's JSON schema allows: its kind and its whole range."""
    if "anyOf" in schema:
        return " or ".join(map(_allowed, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"a list, each {_allowed(schema['items'])}"
    bounds = " and ".join(f"{w} {schema[k]:g}" for k, w in _BOUNDS.items() if k in schema)
    return f"{_KINDS.get(schema.get('type', ''), 'a section')} {bounds}".rstrip()


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = str(override).partition("=")
    *sections, last = key.split(".")
    if not separator or not sections or not all((*sections, last)):
        expected = "an override of the form section.key=value"
        raise ConfigError(expected, repr(override), "Correct --set")
    section: Any = data
    for name in sections:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"a section {name!r}", _shorten(section), "Correct the file or --set")
    expected = "a YAML value after the equals sign"
    try:
        value = _load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(expected, _shorten(override), "Correct --set") from error
    if isinstance(value, str) and value == text:
        # YAML 1.1 reads 3e-4 as a string, which no user means unless it is quoted.
        with suppress(ValueError):
            value = float(value)
    section[last] = value
