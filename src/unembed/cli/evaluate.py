"""`evaluate`: how much of held-out texts comes back from their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import unembed
from unembed.cli.options import (
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
)


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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure what held-out texts' embeddings give away, beside baselines."""
    from unembed.cli.display import StageDisplay, show_evaluation
    from unembed.data.pairs import Pairs, write_json
    from unembed.errors import DataError
    from unembed.evaluation.report import write_report
    from unembed.evaluation.samples import PassageFile
    from unembed.files import require_apart

    if out is not None and not out.parent.is_dir():
        raise DataError(f"a folder for {out}", f"nothing at {out.parent}", "Create it first")
    folder = out if out is not None and out.suffix != ".json" else None
    if folder is not None:
        require_apart(texts, folder)
    passages = PassageFile(texts, column)
    next(iter(passages), None)  # a wrong file fails before the encoder is loaded
    pairs = Pairs.open(train_pairs) if train_pairs is not None else None
    inverter = make_inverter(checkpoint, None, device, dtype)
    model = make_encoder(encoder_settings(inverter, encoder), device, trust_remote_code)
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
