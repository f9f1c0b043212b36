"""`evaluate`: how much of held-out texts comes back from their vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.cli.options import (
    ApiBaseOption,
    CheckpointOption,
    DenoiserDtypeOption,
    DeviceOption,
    EncoderOption,
    MaxCallsOption,
    PriceOption,
    QuietOption,
    RangesOption,
    SeedOption,
    SkipBadOption,
    StepsOption,
    StrategiesOption,
    StrategyOption,
    TextColumnOption,
    TrustOption,
    VectorsOption,
    VerboseOption,
    api_settings,
    encoder_settings,
    interruptible,
    make_encoder,
    make_inverter,
    note,
    opened,
    refuse_idle,
    refuse_idle_calls,
    show_usage,
)
from unembed.errors import ConfigError, DataError, EncoderError

TextsOption = Annotated[
    Path | None,
    typer.Option("--texts", help="Held-out texts: Parquet, JSONL, CSV, plain; or a folder."),
]
TrainPairsOption = Annotated[
    Path | None,
    typer.Option("--train-pairs", help="Prepared training pairs, for the nearest-text baseline."),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--column",
        "--key",
        help="Column or key of the texts (text if not set); with --embedding of the vectors.",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--out", help="FILE.json: the figures. A folder: the report; goes on there."),
]

# What nobody means as the name of a folder
_FILES = (".csv", ".html", ".jsonl", ".md", ".npy", ".parquet", ".pdf", ".tsv", ".txt", ".yaml")


def evaluate(
    context: typer.Context,
    texts: TextsOption = None,
    embedding: VectorsOption = None,
    checkpoint: CheckpointOption = None,
    train_pairs: TrainPairsOption = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Pieces to evaluate.")] = 1000,
    column: ColumnOption = None,
    text_column: TextColumnOption = None,
    ranges: RangesOption = None,
    skip_bad: SkipBadOption = False,
    strategy: StrategyOption = "greedy",
    strategies: StrategiesOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    out: ReportOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    encoder: EncoderOption = None,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure what held-out texts' embeddings give away, beside baselines.

    --embedding: stored vectors with the texts beside them (--text-column), or in --texts.
    """
    from unembed.cli.display import StageDisplay, show_evaluation
    from unembed.data.pairs import Pairs, write_json
    from unembed.evaluation.report import write_report

    folder = _folder(out, [path for path in (texts, embedding) if path is not None])
    if embedding is None:
        idle = ("text_column", "ranges", "skip_bad")
        refuse_idle(context, "with --embedding only", "--texts alone", *idle)
    passages = None
    if embedding is None or texts is not None:
        passages = _passages(texts, column if embedding is None else text_column)
    specs = _strategies(context, strategy, strategies, steps)
    source = None if embedding is None else _source(embedding, column, skip_bad, ranges)
    if source is not None and texts is None:
        _require_texts(source)
    pairs = Pairs.open(train_pairs) if train_pairs is not None else None
    inverter = make_inverter(checkpoint, None, device, dtype)
    needed = source is None or encoder is not None or _ask_encoder(specs, steps)
    where = encoder_settings(inverter, encoder) | api_settings(api_base, max_calls, price)
    model = _encoder(inverter, needed, where, device, trust_remote_code)
    show_usage(context, model)
    way_on = "the same command goes on" if folder else "with --out FOLDER it could have gone on"
    with interruptible(way_on), opened(source) as vectors, StageDisplay() as display:
        if vectors is not None:
            passages = _stored(vectors, inverter, text_column or "text", passages)
        report = unembed.evaluate(
            inverter,
            model,
            passages,
            train_pairs=pairs,
            limit=limit,
            strategy=specs,
            steps=steps,
            seed=seed,
            folder=folder,
            progress=display.update,
            announce=display.say,
        )
    if vectors is not None:
        left_out = [f"vectors left out: {reason}" for reason in vectors.describe_left_out()]
        report = replace(report, notes=[*vectors.notes, *left_out, *report.notes])
    if folder is not None:
        write_report(report, folder)
    elif out is not None:
        write_json(out, report.to_dict())
    show_evaluation(report, as_json)


def _folder(out: Path | None, sources: list[Path]) -> Path | None:
    """The folder of the report, if --out is one; a wrong --out fails before anything is done."""
    from unembed.files import require_apart

    if out is None:
        return None
    if not out.absolute().parent.is_dir():
        raise DataError(f"a folder for {out}", f"nothing at {out.parent}", "Create it first")
    for source in sources:
        require_apart(source, out)
    if out.suffix == ".json":
        if out.is_dir():
            raise DataError(f"a file at {out}", "a folder", "Choose another --out")
        return None
    if out.is_file() or (out.suffix.lower() in _FILES and not out.is_dir()):
        there = "a file" if out.is_file() else f"the name of a {out.suffix} file"
        fix = "Say FILE.json for the figures, or a folder for the whole report"
        raise DataError("--out as FILE.json or a folder", f"{out}, {there}", fix)
    return out


def _passages(texts: Path | None, column: str | None) -> Any:
    """The texts to cut and embed; a wrong file fails before the encoder is loaded."""
    from unembed.evaluation.samples import PassageFile
    from unembed.files import file_format, text_files

    if texts is None:
        raise ConfigError("--texts, or --embedding", "neither", "Pass the texts to measure")
    if column is not None and {file_format(file) for file in text_files(texts)} == {".txt"}:
        raise ConfigError("--column for texts in columns only", f"{texts}", "Leave it out")
    passages = PassageFile(texts, column or "text")
    next(iter(passages), None)
    return passages


def _source(path: Path, column: str | None, skip_bad: bool, ranges: str | None) -> Any:
    from unembed.vectors.numbers import Ranges
    from unembed.vectors.read import STDIN, VectorFile

    limits = None if ranges is None else Ranges.parse(ranges)
    source = VectorFile(path, column, skip_bad, ranges=limits)
    if str(path) != STDIN:
        source.parts()  # a wrong path fails before the inverter is loaded
    return source


def _require_texts(source: Any) -> None:
    """Refuse vectors that have no texts beside them, and no file of texts either."""
    from unembed.vectors.read import STDIN, file_kind

    bare = str(source.path) != STDIN and {file_kind(path) for path in source.parts()}
    if bare and bare <= {".npy", ".npz"}:
        raise ConfigError(
            f"--texts with {source.path}, which holds vectors alone",
            "none",
            "Pass a file with one text a vector, in the same order",
        )


def _stored(source: Any, inverter: unembed.Inverter, column: str, passages: Any) -> Any:
    """The stored vectors with their texts, of the same table or of a file of their own."""
    from unembed.evaluation.samples import StoredPassages

    return StoredPassages(source, inverter.encoder.dimension, column, passages)


def _strategies(
    context: typer.Context, strategy: str, strategies: str | None, steps: int | None
) -> str | list[str]:
    """How to decode; settings that nothing would come of are refused."""
    from unembed.evaluation.rows import name_attacks

    if strategies is not None:
        refuse_idle(context, "without --strategies only", "both", "strategy")
    specs = strategy if strategies is None else strategies.split(",")
    attacks = name_attacks(specs, steps)
    for attack in attacks.values():
        refuse_idle_calls(attack.decoding)
    if steps is not None and name_attacks(specs, 1) == name_attacks(specs, 2):
        raise ConfigError("--steps for a strategy that does not say", str(specs), "Leave it out")
    return specs


def _ask_encoder(specs: str | list[str], steps: int | None) -> bool:
    from unembed.evaluation.rows import name_attacks

    attacks = name_attacks(specs, steps).values()
    return any(attack.decoding.strategy.needs_encoder for attack in attacks)


def _encoder(
    inverter: unembed.Inverter, needed: bool, where: dict[str, Any], device: str, trust: bool
) -> Any:
    """The encoder; None where stored vectors can be measured without one that is not here."""
    try:
        model = make_encoder(where, device, trust)
        inverter.require_encoder(model)
    except EncoderError as error:
        if needed:
            raise
        note(f"the encoder is not at hand, so no cosine is measured: {error}")
        return None
    return model
