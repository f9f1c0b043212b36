"""The commands: parse, call the front door, print.

Nothing heavy is imported before a command runs, so that ``unembed --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.errors import UnembedError

app = typer.Typer(
    name="unembed",
    help="How much text does an embedding give away? Turn vectors back into text, and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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
StrategyOption = Annotated[str, typer.Option("--strategy", help="Decoding strategy.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoiser passes; one per position if not set.")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", help="Shipped name, folder or Hub repository of an inverter."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything drawn.")]

# The options of `prepare --stage 1`
SourcesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Parquet, JSONL, plain text, the last two also .gz or .zst, or a folder of them. "
        "Stage 1 also: c4, hf:NAME[:CONFIG][:COLUMN], any of them with :WEIGHT; repeatable.",
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
LangColumnOption = Annotated[
    str, typer.Option("--lang-column", help="Stage 1: column of the language.")
]
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
        max=0.99,
        help="Stage 1: leave out texts about this similar (say 0.8) to another, by MinHash.",
    ),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"unembed {unembed.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """How much text does an embedding give away?"""


@app.command()
def prepare(
    out: Annotated[Path, typer.Option("--out", help="Folder for the texts or prepared pairs.")],
    sources: SourcesOption = None,
    stage: StageOption = 2,
    config: ConfigOption = "minilm",
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Stop at about this many pairs.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Check the shards found; damaged ones are made again."
        ),
    ] = True,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    langs: LangsOption = None,
    n_samples: SamplesOption = None,
    lang_column: LangColumnOption = "lang",
    chars: CharsOption = (10, 100_000),
    near_duplicates: NearOption = None,
    seed: DrawOption = None,
) -> None:
    """Stage 1: collect text. Stage 2: text → (tokens, embedding) pairs. Killed, each resumes."""
    from unembed.config import load_config
    from unembed.data.encode import prepare_pairs
    from unembed.data.sources import count_texts, read_texts
    from unembed.terminal import PrepareDisplay

    if stage == 1:
        _only_in_stage(2, {"--limit": limit})
        specs = [(spec, column, lang_column) for spec in sources or ["c4"]]
        wanted = {"seed": seed or 0, "near_duplicates": near_duplicates}
        _collect(specs, out, langs, n_samples, chars, wanted)
        return
    _only_in_stage(1, {"--langs": langs, "--n-samples": n_samples, "--seed": seed})
    _only_in_stage(1, {"--near-duplicates": near_duplicates})
    source = _one_source(sources)
    chosen = load_config(config, settings or [])
    next(read_texts(source, column), None)  # a wrong file fails before the encoder is loaded
    encoder = _encoder(chosen.encoder.model_dump(), device, trust_remote_code)
    with PrepareDisplay(count_texts(source), limit) as display:
        manifest = prepare_pairs(
            source,
            out,
            chosen,
            encoder,
            column=column,
            limit=limit,
            verify=verify,
            progress=display.update,
        )
    pairs = sum(shard["pairs"] for shard in manifest["shards"])
    typer.echo(f"{pairs} pairs in {len(manifest['shards'])} shards in {out}")


@app.command()
def preflight(
    config: ConfigOption = "minilm",
    data: Annotated[
        Path | None, typer.Option("--data", help="Compare with the encoder of prepared pairs.")
    ] = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Check an encoder on known texts: dimension, unit length, determinism, prompt, agreement."""
    from unembed.config import load_config
    from unembed.data.pairs import Pairs
    from unembed.encoders.preflight import PROBES
    from unembed.encoders.preflight import preflight as run_preflight
    from unembed.terminal import show_preflight

    chosen = load_config(config, settings or [])
    pairs = Pairs.open(data) if data is not None else None
    encoder = _encoder(chosen.encoder.model_dump(), device, trust_remote_code)
    if pairs is not None:
        pairs.encoder.require_same(encoder.identity, "pairs")
    expected = pairs.fingerprint if pairs is not None else None
    report = run_preflight(encoder, PROBES, expected)
    show_preflight(report, as_json)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    data: Annotated[Path, typer.Argument(help="Folder of prepared pairs.")],
    examples: Annotated[int, typer.Option("--examples", min=0, help="Texts to show.")] = 5,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw the histograms (needs unembed[plots]).")
    ] = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a folder of prepared pairs: counts, lengths, sizes, fingerprint, texts."""
    from unembed.data.inspect import inspect_pairs, plot_inspection
    from unembed.terminal import show_inspection

    report = inspect_pairs(data, examples, seed)
    if png is not None:
        plot_inspection(report, png)
    show_inspection(report, as_json)


@app.command()
def train(
    data: Annotated[Path, typer.Option("--data", help="Folder of prepared pairs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    config: ConfigOption = "minilm",
    settings: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Train a denoiser on prepared pairs. Ctrl-C or SIGTERM saves first; --resume goes on."""
    from unembed.config import load_config
    from unembed.data.pairs import Pairs
    from unembed.device import choose_compute
    from unembed.terminal import StopSignal, TrainingDisplay
    from unembed.training.loop import train as run_training

    chosen = load_config(config, settings or [])
    pairs = Pairs.open(data)
    Pairs.verify(data)
    words = None
    if chosen.denoiser.token_table == "encoder" and not (resume and out.exists()):
        encoder = _encoder(chosen.encoder.model_dump(), "cpu", trust_remote_code)
        pairs.require_encoder(encoder)
        words = encoder.word_embeddings()
    with TrainingDisplay(chosen.training.steps) as display, StopSignal() as stop:
        progress = run_training(
            chosen,
            data,
            out,
            choose_compute(device),
            words=words,
            resume=resume,
            on_log=display.log,
            should_stop=stop.requested,
        )
    best = f"{progress.best_loss:.4f}" if progress.best_loss < float("inf") else "not measured yet"
    typer.echo(f"step {progress.step}, best validation loss {best}, in {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path, typer.Argument(help="Folder for the inverter.")],
    which: Annotated[str, typer.Option("--which", help="best or latest.")] = "best",
    card: Annotated[Path | None, typer.Option("--card", help="Model card (Markdown).")] = None,
) -> None:
    """Turn a training run into the folder that `invert` loads (averaged weights, float16)."""
    from unembed.training.export import inverter_from_run

    text = card.read_text(encoding="utf-8") if card is not None else None
    inverter_from_run(run, which, text).save_pretrained(out)
    typer.echo(f"inverter in {out}")


@app.command()
def invert(
    text: Annotated[
        str | None, typer.Option("--text", help="Embed this, invert it, compare.")
    ] = None,
    embedding: Annotated[
        Path | None, typer.Option("--embedding", help=".npy with one vector [D] or many [N, D].")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Use the weights shipped for this config.")
    ] = None,
    checkpoint: CheckpointOption = None,
    strategy: StrategyOption = "greedy",
    steps: StepsOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the tokens appearing.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="With --text: save the recovery as a picture.")
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Recover the text behind an embedding, from the vector alone."""
    from unembed.errors import EmbeddingError

    if text is not None and not text.strip():
        raise EmbeddingError("a text with at least one visible character", repr(text), "Type one")
    if (text is None) == (embedding is None):
        found = "neither" if text is None else "both"
        raise EmbeddingError("either --text or --embedding", found, "Pass one of them")
    from unembed.inversion import invert_file, invert_text
    from unembed.terminal import save_picture, show_inversions, show_round_trip, watcher

    inverter = _inverter(checkpoint, config, device)
    options: dict[str, Any] = {"strategy": strategy, "steps": steps, "seed": seed}
    seen: list[Any] = []
    if svg is not None:
        options["on_step"] = seen.append
    elif watch and not as_json:
        options["on_step"] = watcher(inverter.tokenizer)
    if embedding is not None:
        show_inversions(invert_file(inverter, embedding, **options), as_json)
        return
    assert text is not None
    encoder = _encoder(_encoder_settings(inverter), device, trust_remote_code)
    trip = invert_text(inverter, encoder, text, **options)
    show_round_trip(trip, as_json)
    if svg is not None:
        save_picture(svg, trip, seen, inverter.tokenizer)


@app.command()
def evaluate(
    texts: Annotated[Path, typer.Option("--texts", help="Held-out texts: Parquet, JSONL, txt.")],
    checkpoint: CheckpointOption = None,
    train_pairs: Annotated[
        Path | None,
        typer.Option(
            "--train-pairs", help="Prepared training pairs, for the nearest-text control."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Pieces to evaluate.")] = 1000,
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    strategy: StrategyOption = "greedy",
    steps: StepsOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure what held-out texts' embeddings give away, beside controls."""
    from unembed.data.encode import write_json
    from unembed.data.pairs import Pairs
    from unembed.data.sources import read_texts
    from unembed.errors import DataError
    from unembed.terminal import StageDisplay, show_evaluation

    if out is not None and not out.parent.is_dir():
        raise DataError(f"a folder for {out}", f"nothing at {out.parent}", "Create it first")
    passages = list(read_texts(texts, column))
    pairs = Pairs.open(train_pairs) if train_pairs is not None else None
    inverter = _inverter(checkpoint, None, device)
    encoder = _encoder(_encoder_settings(inverter), device, trust_remote_code)
    with StageDisplay() as display:
        report = unembed.evaluate(
            inverter,
            encoder,
            passages,
            train_pairs=pairs,
            limit=limit,
            strategy=strategy,
            steps=steps,
            seed=seed,
            progress=display.update,
        )
    if out is not None:
        write_json(out, report.to_dict())
    show_evaluation(report, as_json)


def _only_in_stage(stage: int, options: dict[str, object]) -> None:
    from unembed.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} with --stage {stage} only", str(value), "Leave it out")


def _one_source(sources: list[str] | None) -> Path:
    from unembed.errors import ConfigError

    if not sources or len(sources) > 1:
        found = f"{len(sources)}" if sources else "none"
        raise ConfigError(
            "one --source", found, "Pass one file or folder (--stage 1 mixes several)"
        )
    return Path(sources[0])


def _collect(
    specs: list[tuple[str, str, str]],
    out: Path,
    langs: str | None,
    samples: int | None,
    chars: tuple[int, int],
    wanted: dict[str, Any],
) -> None:
    """Stage 1 of `prepare`."""
    from unembed.data.raw.collect import CollectSettings, collect_texts
    from unembed.data.raw.filters import Limits
    from unembed.data.raw.sources import parse_source
    from unembed.errors import ConfigError
    from unembed.terminal import CollectDisplay, show_collection

    if langs is None or samples is None:
        raise ConfigError("--langs and --n-samples", "not both", "Say for example --langs en,de")
    names = tuple(name.strip() for name in langs.split(","))
    settings = CollectSettings(names, samples, limits=Limits(*chars), **wanted)
    with CollectDisplay(samples) as display:
        manifest = collect_texts(
            [parse_source(*spec) for spec in specs], out, settings, display.update
        )
    show_collection(manifest, out)


def _encoder(settings: dict[str, Any], device: str, trust_remote_code: bool) -> Any:
    from unembed.device import choose_compute

    return unembed.load_encoder(
        settings.pop("name"),
        **settings,
        trust_remote_code=trust_remote_code,
        compute=choose_compute(device),
    )


def _encoder_settings(inverter: unembed.Inverter) -> dict[str, Any]:
    identity = inverter.encoder
    return {"name": identity.name, "revision": identity.revision, "prompt": identity.prompt}


def _inverter(checkpoint: str | None, config: str | None, device: str) -> unembed.Inverter:
    from unembed.config import load_config
    from unembed.device import choose_compute

    if config is not None:
        load_config(config)
    name = checkpoint or (Path(config).stem if config is not None else "minilm")
    return unembed.Inverter.from_pretrained(name).to(choose_compute(device))


def main() -> None:
    """Run the command line; an error the user can act on is one line and exit code 2."""
    try:
        app()
    except (UnembedError, OSError) as error:  # OSError: no permission, a full disk, a wrong path
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
