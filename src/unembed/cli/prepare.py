"""`prepare`, `preflight` and `inspect`: text → pairs, and what is in them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from unembed.cli.options import (
    ApiBaseOption,
    ConfigOption,
    DeviceOption,
    MaxCallsOption,
    PriceOption,
    QuietOption,
    SeedOption,
    SetOption,
    TrustOption,
    VerboseOption,
    api_settings,
    interruptible,
    make_encoder,
    refuse_idle,
    require_place,
    show_usage,
)

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

_STAGE_1 = ("langs", "n_samples", "lang_column", "chars", "near_duplicates", "seed")
_STAGE_2 = (
    "config",
    "limit",
    "verify",
    "no_verify",
    "settings",
    "device",
    "dtype",
    "encode_batch",
    "trust_remote_code",
    "api_base",
    "max_calls",
    "price",
    "ray",
    "workers",
)


def prepare(
    context: typer.Context,
    out: PreparedOption = None,
    sources: SourcesOption = None,
    stage: StageOption = 2,
    config: ConfigOption = "minilm",
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Stop at about so many pairs."),
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option("--no-verify", help="Do not check the shards found and mend damaged ones."),
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", hidden=True)] = False,  # as without it
    settings: SetOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    encode_batch: BatchOption = None,
    trust_remote_code: TrustOption = False,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    langs: LangsOption = None,
    n_samples: SamplesOption = None,
    lang_column: LangColumnOption = "lang",
    chars: CharsOption = (10, 100_000),
    near_duplicates: NearOption = None,
    seed: DrawOption = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Stage 1: collect text. Stage 2: text → (tokens, embedding) pairs. Killed, each resumes."""
    from unembed.cli.display import PrepareDisplay
    from unembed.config import load_config
    from unembed.data.prepare import prepare_pairs
    from unembed.data.readers import count_texts, require_texts
    from unembed.files import file_format, text_files

    _refuse_other_stage(context, stage)
    out = out or Path("data", "raw" if stage == 1 else Path(config).stem)
    if stage == 1:
        specs = [(spec, column, lang_column) for spec in sources or ["c4"]]
        options = {"seed": seed or 0, "near_duplicates": near_duplicates}
        with interruptible("the same command goes on after the last finished shard"):
            _collect(specs, out, langs, n_samples, chars, options)
        return
    source = _one_source(sources)
    configuration = load_config(config, settings or [])
    require_texts(source, column)  # before the encoder is loaded
    if {file_format(file) for file in text_files(source)} == {".txt"}:
        refuse_idle(context, "for texts in columns only", str(source), "column")
    api = api_settings(api_base, max_calls, price)
    options = {**configuration.encoder.model_dump(), "batch_size": encode_batch, **api}
    load = partial(make_encoder, options, device, trust_remote_code)
    way_on = "the same command goes on after the last finished shard"
    with interruptible(way_on), _cluster(ray, workers, device, dtype, load) as run:
        encoder = load(dtype)
        show_usage(context, encoder)
        with PrepareDisplay(count_texts(source), limit) as display:
            manifest = prepare_pairs(
                source,
                out,
                configuration,
                encoder,
                column=column,
                limit=limit,
                verify=verify or not no_verify,
                progress=display.update,
                run=run,
            )
    pairs = sum(shard["pairs"] for shard in manifest["shards"])
    shards = len(manifest["shards"])
    typer.echo(f"{pairs} pair{'s' * (pairs != 1)} in {shards} shard{'s' * (shards != 1)} in {out}")


def preflight(
    context: typer.Context,
    config: ConfigOption = "minilm",
    data: Annotated[
        Path | None, typer.Option("--data", help="Compare with the encoder of prepared pairs.")
    ] = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Check an encoder on known texts: dimension, unit length, determinism, prompt, agreement."""
    from unembed.cli.display import show_preflight
    from unembed.config import load_config
    from unembed.data.pairs import Pairs
    from unembed.encoders.fingerprint import PROBES
    from unembed.encoders.fingerprint import preflight as run_preflight

    configuration = load_config(config, settings or [])
    pairs = Pairs.open(data) if data is not None else None
    api = api_settings(api_base, max_calls, price)
    options = {**configuration.encoder.model_dump(), **api}
    encoder = make_encoder(options, device, trust_remote_code, dtype)
    show_usage(context, encoder)
    expected = pairs.fingerprint if pairs is not None else None
    if pairs is not None:
        pairs.encoder.require_same(encoder.identity, "pairs", has_vectors=expected is not None)
    report = run_preflight(encoder, PROBES, expected)
    show_preflight(report, as_json)
    if not report.passed:
        raise typer.Exit(1)


def inspect(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder of prepared pairs.")],
    examples: Annotated[int, typer.Option("--examples", min=0, help="Texts to show.")] = 5,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw the histograms (needs matplotlib).")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--source", help="Their source: counts languages by its column.")
    ] = None,
    lang_column: LangColumnOption = "lang",
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what is in a folder of pairs: counts, languages, lengths, sizes, fingerprint, texts."""
    from unembed.cli.display import show_inspection
    from unembed.data.inspect import inspect_pairs, plot_inspection

    if source is None:
        refuse_idle(context, "with --source only", "none", "lang_column")
    if png is not None:
        require_place(png, "--png", ".png")
    report = inspect_pairs(data, examples, seed, source, lang_column)
    if png is not None:
        plot_inspection(report, png)
    show_inspection(report, as_json)


def _refuse_other_stage(context: typer.Context, stage: int) -> None:
    """Refuse options that this stage would ignore.

    Raises:
        ConfigError: One of them was given.
    """
    from unembed.errors import ConfigError

    other, names = (2, _STAGE_2) if stage == 1 else (1, _STAGE_1)
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{parameter.opts[0]} with --stage {other} only",
                f"it with --stage {stage}",
                "Leave it out",
            )


def _one_source(sources: list[str] | None) -> Path:
    from unembed.errors import ConfigError

    collected = Path("data", "raw")
    if not sources and collected.is_dir():
        return collected
    if not sources or len(sources) > 1:
        problem = f"{len(sources)}" if sources else f"none, and no folder {collected}"
        raise ConfigError(
            "one --source", problem, "Pass one file or folder (--stage 1 mixes several)"
        )
    if not sources[0].strip():
        raise ConfigError("one --source", repr(sources[0]), "Pass a file or folder")
    return Path(sources[0])


def _cluster(ray: str | None, workers: int | None, device: str, dtype: str, load: Any) -> Any:
    """Choose who makes the shards, as a context: this process, or workers of a Ray cluster."""
    from unembed.errors import ConfigError

    if ray is None:
        if workers is not None:
            raise ConfigError("--workers with --ray only", str(workers), "Add --ray local")
        return nullcontext()
    from unembed.data.ray import ray_runner
    from unembed.device import choose_compute

    here = choose_compute(device, dtype, training=False)
    alike = partial(load, str(here.dtype).removeprefix("torch."), here.device.type)
    return ray_runner(ray, workers, alike, gpus=device != "cpu")


def _collect(
    specs: list[tuple[str, str, str]],
    out: Path,
    langs: str | None,
    samples: int | None,
    chars: tuple[int, int],
    options: dict[str, Any],
) -> None:
    """Stage 1 of `prepare`."""
    from unembed.cli.display import CollectDisplay, show_collection
    from unembed.data.collect.collect import CollectSettings, collect_texts
    from unembed.data.collect.filters import Limits
    from unembed.data.collect.sources import parse_source
    from unembed.errors import ConfigError

    if langs is None or samples is None:
        absent = {"--langs": langs, "--n-samples": samples}
        missing = "no " + " and no ".join(flag for flag, value in absent.items() if value is None)
        raise ConfigError(
            "--langs and --n-samples with --stage 1", missing, "Add --langs en,de --n-samples 10000"
        )
    names = tuple(name.strip() for name in langs.split(","))
    settings = CollectSettings(names, samples, limits=Limits(*chars), **options)
    with CollectDisplay(samples) as display:
        manifest = collect_texts(
            [parse_source(*spec) for spec in specs], out, settings, display.update
        )
        display.finish(manifest["counts"]["kept"])
    show_collection(manifest, out)
