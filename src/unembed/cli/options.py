"""The options that commands share, and the longer ones: their names, limits and help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import unembed
from unembed.errors import ConfigError

if TYPE_CHECKING:
    from unembed.decoding import Decoding

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Shipped name or path of a YAML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override: section.key=value. Repeatable.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with an encoder."),
]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", help="Where the inverter's encoder is, if not under its own name."),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="greedy, entropy-bounded, euler, euler-remask, two-stage, best-of or guided-search, "
        "also with settings: greedy:steps=16 (docs/decoding.md).",
    ),
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Of the strategy: name=value (docs/decoding.md). Repeatable."),
]
GuidanceOption = Annotated[
    tuple[float, float] | None,
    typer.Option("--guidance", help="Classifier-free guidance: first and last strength."),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(
        "--repetition",
        min=0.0,
        help="Nats off a token for each time the text has it already (2 if not set); 0: off.",
    ),
]
CallsOption = Annotated[
    int,
    typer.Option("--encoder-calls", min=0, help="Texts that may be embedded for each vector."),
]
LengthOption = Annotated[
    int | None,
    typer.Option("--length", min=1, help="Content tokens of every text; found if not set."),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoiser passes for each text (8 if not set).")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", help="Shipped name, folder or Hub repository of an inverter."),
]
StrategiesOption = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        help="Several to compare: greedy,greedy:steps=8,… or all (docs/evaluation.md).",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything drawn.")]

# The options of `invert` for files
VectorsOption = Annotated[
    Path | None,
    typer.Option(
        "--embedding",
        help="Vectors: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .json, .jsonl, .csv, "
        ".tsv (the last four also .gz or .zst), a folder of them, or - for standard input.",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Array of an archive; key of JSON, or a path: response.body.data.0.embedding. The "
        "usual names are found.",
    ),
]
VectorColumnOption = Annotated[
    str | None,
    typer.Option("--column", help="Column of a table that holds the vectors, or a path in it."),
]
KeepOption = Annotated[
    str | None,
    typer.Option("--keep", help="Columns or keys to write beside each text: id,doc."),
]
RangesOption = Annotated[
    str | None,
    typer.Option(
        "--ranges",
        help="Undo an 8-bit quantisation: LOW,HIGH, or a .npy of [2, D] ranges or of vectors it "
        "was calibrated on.",
    ),
]
VectorBatchOption = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Vectors decoded together; 64 if not set.")
]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="Embed each text again; write the cosine with its vector."),
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Pass over vectors that cannot be inverted; count them.")
]
RecoveredOption = Annotated[
    Path | None,
    typer.Option("--out", help="With --embedding: write the texts to a .jsonl or .parquet."),
]

OnnxOption = Annotated[
    Path | None,
    typer.Option("--onnx", help="Also write the denoiser as ONNX (OUT/denoiser.onnx is used)."),
]

# The options of `prepare --stage 1`
SourcesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        metavar="PATH",
        help="Parquet, JSONL, CSV, TSV or plain text, all but Parquet also .gz or .zst, or a "
        "folder of them. Stage 1 also: c4 (if not set), hf:NAME[:CONFIG][:COLUMN] and any with "
        ":WEIGHT; repeatable. "
        "Stage 2 takes data/raw if not set.",
    ),
]
StageOption = Annotated[
    int,
    typer.Option("--stage", min=1, max=2, metavar="1|2", help="1: collect text. 2: text → pairs."),
]
LangsOption = Annotated[
    str | None, typer.Option("--langs", help="Stage 1: en,zh,…; each gets the same share.")
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--n-samples", min=1, metavar="N", help="Stage 1: texts in all."),
]
LangColumnOption = Annotated[str, typer.Option("--lang-column", help="Column of the language.")]
DrawOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="N", help="Stage 1: mixes and shuffles; 0 if not set."),
]
CharsOption = Annotated[
    tuple[int, int],
    typer.Option("--chars", min=1, metavar="MIN MAX", help="Stage 1: shortest and longest text."),
]
NearOption = Annotated[
    float | None,
    typer.Option(
        "--near-duplicates",
        min=0.1,
        max=0.95,
        metavar="SHARE",
        help="Stage 1: leave out texts about this similar (say 0.8) to another, by MinHash.",
    ),
]

# Of `prepare --stage 2`
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", help="Of the encoder: auto (what is quickest here), float32, bfloat16, float16."
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--encode-batch",
        min=1,
        metavar="N",
        help="Texts encoded at once; by their tokens if not set.",
    ),
]
PreparedOption = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder for the texts (data/raw if not set) or pairs (data/CONFIG)."
    ),
]

# Of `prepare --stage 2` beyond one machine
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Stage 2 on a Ray cluster (extra distributed): local, auto or HOST:PORT.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="With --ray: processes; one per GPU, or machine, if not set.",
    ),
]

# Of `invert` and `evaluate`
DenoiserDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the denoiser: float32 (a CPU's, if not set: the same text on each), bfloat16, "
        "float16, or auto (what is quickest here).",
    ),
]

# The options of `plot` and `export`
RunsArgument = Annotated[list[Path], typer.Argument(help="Folders of training runs.")]
PictureOption = Annotated[Path, typer.Option("--out", help="The picture: .png or .svg.")]
AxisOption = Annotated[str, typer.Option("--x", help="steps, samples or hours.")]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="float16, bfloat16 or int8 (weight-only).")
]
ShardOption = Annotated[
    str, typer.Option("--shard-size", help="Larger weights are cut into files: 500MB, 4GB.")
]
FiguresOption = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Figures for the card: what `evaluate --out` wrote."),
]
CardOption = Annotated[
    Path | None, typer.Option("--card", help="Model card (Markdown) in place of the one made.")
]


def make_encoder(
    settings: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    dtype: str = "float32",
    only_on: str | None = None,
) -> Any:
    """The encoder; in float32, as a vector store's owner would run it, unless speed matters.

    With ``only_on``, the number format is for that type of device, and chosen on others.
    """
    from unembed.device import choose_compute

    compute = choose_compute(device, dtype, training=False)
    if only_on not in (None, compute.device.type):
        compute = choose_compute(device, training=False)
    name, options = settings["name"], {k: v for k, v in settings.items() if k != "name"}
    return unembed.load_encoder(
        name, **options, trust_remote_code=trust_remote_code, compute=compute
    )


def encoder_settings(inverter: unembed.Inverter, where: str | None = None) -> dict[str, Any]:
    """What `make_encoder` needs to load the encoder that an inverter inverts.

    With ``where`` it is taken from there; whether it is the same one shows its digest.
    """
    identity = inverter.encoder
    settings = {"name": identity.name, "revision": identity.revision}
    if where is not None:
        settings = {"name": where, "revision": None}
    shape = {"pooling": identity.pooling, "truncate_dim": identity.truncate_dim}
    return {**settings, "prompt": identity.prompt, **shape}


def make_inverter(
    checkpoint: str | None, config: str | None, device: str, dtype: str | None = None
) -> unembed.Inverter:
    """The inverter of a checkpoint, of a configuration's name, or the one that ships."""
    from unembed.config import load_config

    if config is not None:
        load_config(config)
    name = checkpoint or (Path(config).stem if config is not None else "minilm")
    return unembed.Inverter.from_pretrained(name).to(device, dtype)


def read_decoding(
    strategy: str,
    options: list[str] | None = None,
    steps: int | None = None,
    guidance: tuple[float, float] | None = None,
    repetition: float | None = None,
    encoder_calls: int = 0,
    length: int | None = None,
) -> Decoding:
    """How to decode: the text of ``--strategy`` with what other options add to it.

    Raises:
        ConfigError: No such strategy or option, one said twice, or a value out of range.
    """
    from unembed.decoding import Decoding

    settings = {
        "steps": steps,
        "guidance": None if guidance is None else "{!r}/{!r}".format(*guidance),
        "repetition": repetition,
        "encoder_calls": encoder_calls or None,
        "length": length,
    }
    words = [f"{name}={value}" for name, value in settings.items() if value is not None]
    for option in options or []:
        name, equals, _ = option.partition("=")
        if not equals or not name:
            raise ConfigError("an option of the form name=value", repr(option), "Correct --option")
    return Decoding.parse(":".join([strategy, *words, *(options or [])]))
