"""`evaluate`: how much of held-out texts comes back from their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import unembed
from unembed.cli.align import show_curve, warn
from unembed.cli.options import (
    AlignOption,
    CheckpointOption,
    DenoiserDtypeOption,
    DeviceOption,
    EncoderOption,
    SeedOption,
    StepsOption,
    StrategiesOption,
    StrategyOption,
    TrustOption,
    encoder_settings,
    make_encoder,
    make_inverter,
    read_decoding,
)
from unembed.errors import ConfigError


def evaluate(
    texts: Annotated[Path, typer.Option("--texts", help="Held-out texts: Parquet, JSONL, txt.")],
    checkpoint: CheckpointOption = None,
    train_pairs: Annotated[
        Path | None,
        typer.Option(
            "--train-pairs", help="Prepared training pairs, for the nearest-text baseline."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Pieces to evaluate.")] = 1000,
    column: Annotated[str, typer.Option("--column", help="Column that holds the text.")] = "text",
    strategy: StrategyOption = "greedy",
    strategies: StrategiesOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="FILE.json: the figures. A folder: the report; goes on there."),
    ] = None,
    align: AlignOption = None,
    vectors: Annotated[
        str | None,
        typer.Option(
            "--vectors",
            help="With --align: column of --texts that holds their vectors; the usual names are "
            "tried.",
        ),
    ] = None,
    align_curve: Annotated[
        str | None,
        typer.Option(
            "--align-curve",
            metavar="1,10,…",
            help="Leak against the number of leaked pairs, with vectors beside --texts.",
        ),
    ] = None,
    leaked: Annotated[
        Path | None,
        typer.Option("--leaked", help="For --align-curve: pairs of text and vector that leaked."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure what held-out texts' embeddings give away, beside baselines."""
    from unembed.cli.display import StageDisplay, show_evaluation
    from unembed.data.manifest import write_json
    from unembed.data.pairs import Pairs
    from unembed.errors import DataError
    from unembed.evaluation.leaked import LeakedPairs
    from unembed.evaluation.leaked import align_curve as measure_curve
    from unembed.evaluation.report import write_curve, write_report
    from unembed.evaluation.samples import PassageFile
    from unembed.files import require_apart

    if out is not None and not out.parent.is_dir():
        raise DataError(f"a folder for {out}", f"nothing at {out.parent}", "Create it first")
    folder = out if out is not None and out.suffix != ".json" else None
    if folder is not None:
        require_apart(texts, folder)
    counts = _counts(align_curve, leaked, align, strategies)
    paired = align is not None or counts is not None or vectors is not None
    held_out = LeakedPairs(texts, column, vectors)
    passages = held_out if paired else PassageFile(texts, column)
    next(iter(passages), None)  # a wrong file fails before the encoder is loaded
    pairs = Pairs.open(train_pairs) if train_pairs is not None else None
    inverter = make_inverter(checkpoint, None, device, dtype).aligned(align)
    warn(inverter.alignment)
    model = make_encoder(encoder_settings(inverter, encoder), device, trust_remote_code)
    if counts is not None and leaked is not None:
        pool = LeakedPairs(leaked, column, vectors)
        how = read_decoding(strategy, steps=steps)
        with StageDisplay() as display:
            curve = measure_curve(
                inverter, model, pool, held_out, counts,
                limit=limit, decoding=how, seed=seed, progress=display.update,
            )  # fmt: skip
        if out is not None:
            write_curve(curve, out)
        show_curve(curve, as_json)
        return
    with StageDisplay() as display:
        report = unembed.evaluate(
            inverter,
            model,
            passages,
            train_pairs=pairs,
            limit=limit,
            strategy=strategies.split(",") if strategies is not None else strategy,
            steps=steps,
            seed=seed,
            folder=folder,
            progress=display.update,
        )
    if folder is not None:
        write_report(report, folder)
    elif out is not None:
        write_json(out, report.to_dict())
    show_evaluation(report, as_json)


def _counts(
    curve: str | None, leaked: Path | None, align: str | None, strategies: str | None
) -> list[int] | None:
    """The numbers of pairs of a curve, ascending; None where none was asked for."""
    if curve is None:
        if leaked is not None:
            raise ConfigError("--leaked with --align-curve", "no --align-curve", "Pass both")
        return None
    numbers = [number.strip().replace("_", "") for number in curve.split(",")]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ConfigError("numbers of pairs as 1,10,100", repr(curve), "Correct --align-curve")
    if leaked is None:
        raise ConfigError("the pairs that leaked, for --align-curve", "none", "Pass --leaked")
    for flag, value in (("--align", align), ("--strategies", strategies)):
        if value is not None:
            raise ConfigError("--align-curve by itself", flag, "Leave one of them out")
    return sorted({int(number) for number in numbers})
