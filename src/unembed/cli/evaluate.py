"""`evaluate`: how much of held-out texts comes back from their vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.cli.align import AlignCurveOption, AlignOption, LeakedOption, show_curve, warn
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
    read_decoding,
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

CorpusOption = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        help="Prepared pairs of texts like those under attack: guided search starts from the "
        "nearest. An access class of its own.",
    ),
]
FrontierOption = Annotated[
    bool,
    typer.Option("--frontier", help="What encoder calls buy: metrics after 0, 2, 7, 15, 31..."),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", min=2, help="Pieces to evaluate (1000); with --frontier of each length (64)."
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Longest pieces of the texts; 31 if not set."),
]

# What nobody means as the name of a folder
_FILES = (".csv", ".html", ".jsonl", ".md", ".npy", ".parquet", ".pdf", ".tsv", ".txt", ".yaml")


def evaluate(
    context: typer.Context,
    texts: TextsOption = None,
    embedding: VectorsOption = None,
    checkpoint: CheckpointOption = None,
    train_pairs: TrainPairsOption = None,
    corpus: CorpusOption = None,
    frontier: FrontierOption = False,
    limit: LimitOption = None,
    max_tokens: MaxTokensOption = None,
    column: ColumnOption = None,
    text_column: TextColumnOption = None,
    ranges: RangesOption = None,
    skip_bad: SkipBadOption = False,
    strategy: StrategyOption = "greedy",
    strategies: StrategiesOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    align: AlignOption = None,
    align_curve: AlignCurveOption = None,
    leaked: LeakedOption = None,
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
    from unembed.data.pairs import Pairs

    # Options and files that are wrong fail before anything is loaded
    folder = _folder(out, [path for path in (texts, embedding) if path is not None])
    passages = _held_out(context, texts, embedding, column, text_column)
    counts = _counts(context, align_curve, leaked, embedding)
    if frontier:
        strategy = _searching(context, strategy)
    specs = _strategies(context, strategy, strategies, steps)
    require_search(corpus, [specs] if isinstance(specs, str) else specs)
    source = None if embedding is None else _source(embedding, texts, column, skip_bad, ranges)
    pairs = Pairs.open(train_pairs) if train_pairs is not None else None

    # The inverter and its encoder
    inverter = make_inverter(checkpoint, None, device, dtype).aligned(align)
    warn(inverter.alignment)
    needs_encoder = (
        source is None or encoder is not None or _ask_encoder(specs, steps) or bool(counts)
    )
    where = encoder_settings(inverter, encoder) | api_settings(api_base, max_calls, price)
    model = _encoder(context, inverter, needs_encoder, where, device, trust_remote_code)

    # The curve of leaked pairs, the frontier of encoder calls, or the report
    task = _Task(inverter, model, limit, out, folder, as_json, max_tokens)
    if counts:
        options = {"decoding": read_decoding(strategy, steps=steps), "seed": seed}
        return _curve(task, (leaked, embedding), (text_column or "text", column), counts, options)
    similar = Pairs.open(corpus) if corpus is not None else None
    decoding = {"strategy": specs, "steps": steps, "seed": seed, "corpus": similar}
    if frontier:
        return _frontier(task, passages, decoding)
    return _report(task, (source, text_column or "text", passages), pairs, decoding)


@dataclass(frozen=True)
class _Task:
    """What is measured, how much of it, and where the figures go."""

    inverter: unembed.Inverter
    encoder: Any
    limit: int | None
    out: Path | None
    folder: Path | None
    as_json: bool
    max_tokens: int | None = None

    @property
    def way_on(self) -> str:
        """What to do after an interruption."""
        return (
            "the same command goes on" if self.folder else "with --out FOLDER it could have gone on"
        )


def _report(task: _Task, texts: tuple[Any, str, Any], pairs: Any, decoding: dict[str, Any]) -> None:
    """Measure held-out texts, or stored vectors with theirs; write the report and print it."""
    from unembed.cli.display import StageDisplay, show_evaluation
    from unembed.evaluation.report import write_report
    from unembed.evaluation.samples import StoredPassages
    from unembed.files import write_json

    source, column, passages = texts
    with interruptible(task.way_on), opened(source) as vectors, StageDisplay() as display:
        if vectors is not None:
            passages = StoredPassages(vectors, task.inverter.dimension, column, passages)
        report = unembed.evaluate(
            task.inverter,
            task.encoder,
            passages,
            train_pairs=pairs,
            limit=task.limit or 1000,
            max_tokens=task.max_tokens,
            folder=task.folder,
            progress=display.update,
            announce=display.say,
            **decoding,
        )
    if vectors is not None:
        left_out = [f"vectors left out: {reason}" for reason in vectors.describe_left_out()]
        report = replace(report, notes=[*vectors.notes, *left_out, *report.notes])
    if task.folder is not None:
        write_report(report, task.folder)
    elif task.out is not None:
        write_json(task.out, report.to_dict())
    show_evaluation(report, task.as_json)


def _frontier(task: _Task, passages: Any, decoding: dict[str, Any]) -> None:
    """Measure, write and print what encoder calls buy."""
    from unembed.cli.display import StageDisplay, to_json
    from unembed.evaluation.frontier import PER_LENGTH, measure_frontier
    from unembed.evaluation.report import write_frontier
    from unembed.files import write_json

    with interruptible(task.way_on), StageDisplay() as display:
        curve = measure_frontier(
            task.inverter,
            task.encoder,
            passages,
            limit=task.limit or PER_LENGTH,
            folder=task.folder,
            progress=display.update,
            **decoding,
        )
    if task.folder is not None:
        write_frontier(curve, task.folder)
    elif task.out is not None:
        write_json(task.out, curve.to_dict())
    typer.echo(to_json(curve.to_dict()) if task.as_json else curve.to_markdown())


def _curve(
    task: _Task,
    files: tuple[Any, Any],
    columns: tuple[str, str | None],
    counts: list[int],
    options: dict[str, Any],
) -> None:
    """Measure, write and print the leak against the number of leaked pairs."""
    from unembed.cli.display import StageDisplay
    from unembed.evaluation.leaked import LeakedPairs, align_curve
    from unembed.evaluation.report.plots import write_curve

    leaked, held_out = (LeakedPairs(file, *columns) for file in files)
    with interruptible("nothing is kept"), StageDisplay() as display:
        options |= {"limit": task.limit or 500, "progress": display.update}
        curve = align_curve(task.inverter, task.encoder, leaked, held_out, counts, **options)
    if task.out is not None:
        write_curve(curve, task.out)
    show_curve(curve, task.as_json)


def _searching(context: typer.Context, strategy: str) -> str:
    """The strategy of a frontier, guided search unless told; what it does not take is refused."""
    refuse_idle(
        context, "without --frontier only", "--frontier", "embedding", "train_pairs", "max_tokens"
    )
    return "guided-search" if strategy == "greedy" else strategy


def require_search(corpus: Path | None, names: Sequence[str]) -> None:
    """Refuse a corpus that no strategy would look at.

    Raises:
        ConfigError: There is one, and guided search is not among the strategies.
    """
    if corpus is not None and not any("guided-search" in name or name == "all" for name in names):
        raise ConfigError("--corpus with guided-search", ", ".join(names), "Choose that strategy")


def _folder(out: Path | None, sources: list[Path]) -> Path | None:
    """The folder of the report, if --out is one; a wrong --out fails before anything is done."""
    from unembed.files import is_file, is_folder, require_apart

    if out is None:
        return None
    if not is_folder(out.absolute().parent):
        raise DataError(f"a folder for {out}", f"nothing at {out.parent}", "Create it first")
    for source in sources:
        require_apart(source, out)
    if out.suffix == ".json":
        if is_folder(out):
            raise DataError(f"a file at {out}", "a folder", "Choose another --out")
        return None
    if is_file(out) or (out.suffix.lower() in _FILES and not is_folder(out)):
        there = "a file" if is_file(out) else f"the name of a {out.suffix} file"
        fix = "Say FILE.json for the figures, or a folder for the whole report"
        raise DataError("--out as FILE.json or a folder", f"{out}, {there}", fix)
    return out


def _held_out(
    context: typer.Context,
    texts: Path | None,
    embedding: Path | None,
    column: str | None,
    text_column: str | None,
) -> Any:
    """The texts of a file of their own; None where stored vectors have them beside them."""
    if embedding is None:
        idle = ("text_column", "ranges", "skip_bad")
        refuse_idle(context, "with --embedding only", "--texts alone", *idle)
        return _passages(texts, column)
    refuse_idle(context, "with --texts alone only", "--embedding", "max_tokens")
    return None if texts is None else _passages(texts, text_column)


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


def _source(
    path: Path, texts: Path | None, column: str | None, skip_bad: bool, ranges: str | None
) -> Any:
    """The stored vectors; a wrong file, or one without texts, fails before anything is loaded."""
    from unembed.vectors.numbers import Ranges
    from unembed.vectors.read import STDIN, VectorFile

    limits = None if ranges is None else Ranges.parse(ranges)
    source = VectorFile(path, column, skip_bad, ranges=limits)
    if str(path) != STDIN:
        source.parts()
    if texts is None:
        _require_texts(source)
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
    context: typer.Context,
    inverter: unembed.Inverter,
    needs_encoder: bool,
    where: dict[str, Any],
    device: str,
    trust: bool,
) -> Any:
    """The encoder; None where stored vectors can be measured without one that is not here."""
    try:
        model = make_encoder(where, device, trust)
        inverter.require_encoder(model)
    except EncoderError as error:
        if needs_encoder:
            raise
        note(f"the encoder is not at hand, so no cosine is measured: {error}")
        return None
    show_usage(context, model)
    return model


def _counts(
    context: typer.Context, curve: str | None, leaked: Path | None, embedding: Path | None
) -> list[int]:
    """The numbers of pairs of a curve, ascending; none where no curve was asked for."""
    if curve is None:
        refuse_idle(context, "with --align-curve only", "--leaked alone", "leaked")
        return []
    numbers = [number.strip().replace("_", "") for number in curve.split(",")]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ConfigError("numbers of pairs as 1,10,100", repr(curve), "Correct --align-curve")
    if leaked is None or embedding is None:
        raise ConfigError(
            "--leaked, the pairs that leaked, and --embedding, held-out vectors with their texts",
            "--align-curve without one of them",
            "Pass both",
        )
    idle = (
        "align",
        "strategies",
        "texts",
        "train_pairs",
        "ranges",
        "skip_bad",
        "frontier",
        "corpus",
    )
    refuse_idle(context, "without --align-curve only", "--align-curve", *idle)
    return sorted({int(number) for number in numbers})
