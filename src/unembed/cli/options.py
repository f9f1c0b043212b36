"""The options that commands share, and the longer ones: their names, limits and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    typer.Option("--embedding", help="Vectors: .npy, .npz, .parquet, .jsonl (plain, .gz or .zst)."),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", help="Array of an .npz (not needed for a single one); key of a .jsonl."),
]
VectorColumnOption = Annotated[
    str | None, typer.Option("--column", help="Column of a .parquet that holds the vectors.")
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
        help="Parquet, JSONL, plain text, the last two also .gz or .zst, or a folder of them. "
        "Stage 1 also: c4 (if not set), hf:NAME[:CONFIG][:COLUMN], any with :WEIGHT; repeatable. "
        "Stage 2 takes data/raw if not set.",
    ),
]
StageOption = Annotated[
    int, typer.Option("--stage", min=1, max=2, help="1: collect text. 2: text → pairs.")
]
LangsOption = Annotated[
    str | None, typer.Option("--langs", help="Stage 1: en,zh,…; each gets the same share.")
]
SamplesOption = Annotated[
    int | None, typer.Option("--n-samples", min=1, help="Stage 1: texts in all.")
]
LangColumnOption = Annotated[str, typer.Option("--lang-column", help="Column of the language.")]
DrawOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Stage 1: mixes and shuffles; 0 if not set.")
]
CharsOption = Annotated[
    tuple[int, int], typer.Option("--chars", min=1, help="Stage 1: shortest and longest text.")
]
NearOption = Annotated[
    float | None,
    typer.Option(
        "--near-duplicates",
        min=0.1,
        max=0.95,
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
        "--encode-batch", min=1, help="Texts encoded at once; by their tokens if not set."
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
        "--workers", min=1, help="With --ray: processes; one per GPU, or machine, if not set."
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
