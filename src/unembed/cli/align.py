"""`align`: pairs of text and vector → a map for vectors of an encoder nobody trained for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unembed.cli.options import (
    ApiBaseOption,
    DeviceOption,
    EncoderOption,
    MaxCallsOption,
    PriceOption,
    SeedOption,
    TrustOption,
    api_settings,
    encoder_settings,
    interruptible,
    make_encoder,
    make_inverter,
    refuse_idle,
    show_usage,
)
from unembed.encoders import API_PREFIX
from unembed.errors import ConfigError
from unembed.files import make_folder

if TYPE_CHECKING:
    from unembed.encoders.alignment import Alignment
    from unembed.evaluation.leaked import AlignCurve, LeakedPairs

AlignOption = Annotated[
    str | None,
    typer.Option(
        "--align", help="Vectors of another encoder: the folder of a map by `unembed align`."
    ),
]
AlignCurveOption = Annotated[
    str | None,
    typer.Option(
        "--align-curve",
        metavar="1,10,100",
        help="With --embedding: leak against the number of leaked pairs, those of --leaked.",
    ),
]
LeakedOption = Annotated[
    Path | None,
    typer.Option("--leaked", help="For --align-curve: pairs of text and vector that leaked."),
]
MapsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--align",
        help="Offer a map by `unembed align`, for vectors of another encoder. Repeatable.",
    ),
]


PairsArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Texts and their vectors: Parquet, JSONL, CSV, or a folder by `unembed prepare`."
    ),
]
TextsOption = Annotated[
    Path | None,
    typer.Option("--texts", help="In place of PAIRS: texts, which --from embeds."),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="With --texts: the encoder to read: openai:MODEL, a folder, a Hub repository.",
    ),
]
ToOption = Annotated[
    str, typer.Option("--to", help="The inverter: shipped name, folder or Hub repository.")
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--column",
        "--key",
        help="Column or key of the vector; usual names are tried. With --texts: of the text.",
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Use the first so many pairs; with --texts so many typical texts."
    ),
]


def align(
    context: typer.Context,
    pairs: PairsArgument = None,
    texts: TextsOption = None,
    source: FromOption = None,
    to: ToOption = "minilm",
    out: Annotated[Path, typer.Option("--out", help="Folder for the map.")] = Path("alignment"),
    column: ColumnOption = None,
    text_column: Annotated[
        str, typer.Option("--text-column", help="Column or key of the text.")
    ] = "text",
    name: Annotated[
        str | None, typer.Option("--name", help="Of the encoder that made the vectors.")
    ] = None,
    limit: LimitOption = None,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Learn from leaked pairs how vectors of another encoder are to be read by an inverter."""
    from unembed.cli.display import StageDisplay, to_json
    from unembed.evaluation.leaked import LeakedPairs, align_pairs

    api = api_settings(api_base, max_calls, price)  # of whichever encoder is behind one
    from_api = source is not None and source.startswith(API_PREFIX)
    if source is None:
        refuse_idle(context, "with --from only", "no encoder to embed texts with", "texts")
        if pairs is None:
            raise ConfigError("PAIRS, or --texts with --from", "neither", "Pass the leaked pairs")
        leaked = LeakedPairs(pairs, text_column, column)
        next(leaked.blocks(), None)  # a wrong file fails before the encoder is loaded
    else:
        settings = {"name": source, **(api if from_api else {})}
        leaked = _texts(context, pairs, texts, column, settings, device, trust_remote_code)
    make_folder(out, keep=False)  # before what takes long
    inverter = make_inverter(to, None, device)
    where = encoder_settings(inverter, encoder)
    where |= {} if from_api and not where["name"].startswith(API_PREFIX) else api
    model = make_encoder(where, device, trust_remote_code)
    show_usage(context, model)
    way_on = "the same command begins anew, but answers of an API are kept"
    with interruptible(way_on), StageDisplay() as display:
        alignment = align_pairs(
            inverter,
            model,
            leaked,
            name=name or (out.resolve().name if source is None else source),
            limit=limit,
            seed=seed,
            progress=display.update,
        )
    alignment.save(out)
    if as_json:
        facts = {"out": str(out), "read": leaked.row_count, "left_out": alignment.left_out}
        sys.stdout.write(to_json({**describe(alignment), **facts}) + "\n")
    else:
        show_alignment(alignment, out)
    if alignment.left_out:
        typer.echo(
            f"note: of {leaked.row_count} rows left out: {leaked.describe_left_out()}", err=True
        )
    warn(alignment)


def _texts(
    context: typer.Context,
    pairs: Path | None,
    texts: Path | None,
    column: str | None,
    source: dict[str, Any],
    device: str,
    trust_remote_code: bool,
) -> LeakedPairs:
    """Texts to be embedded for the pairs; a wrong file fails before the encoder is loaded."""
    from unembed.data.readers import require_texts
    from unembed.evaluation.leaked import LeakedPairs

    if texts is None or pairs is not None:
        there = "PAIRS, which have their vectors" if pairs is not None else "nothing to embed"
        raise ConfigError("--texts FILE with --from", there, "Pass one: PAIRS, or --texts")
    refuse_idle(context, "with PAIRS only", "--texts, whose column is --column", "text_column")
    require_texts(texts, column or "text")
    model = make_encoder(source, device, trust_remote_code)
    show_usage(context, model)
    return LeakedPairs(texts, column or "text", encoder=model)


def describe(alignment: Alignment) -> dict[str, Any]:
    """What a map promises, as plain data for JSON."""
    return {
        "method": alignment.method,
        "pairs": alignment.pairs,
        "penalty": alignment.penalty,
        "leave_one_out_cosine": alignment.cosines,
        "dimension": alignment.dimension,
        "digest": alignment.digest,
    }


def show_alignment(alignment: Alignment, out: Path) -> None:
    """The map, each method's leave-one-out cosine, and what to do with it."""
    typer.echo(alignment.describe())
    if alignment.cosines:
        scores = sorted(alignment.cosines.items(), key=lambda item: -item[1])
        typer.echo(
            "leave-one-out cosine: " + ", ".join(f"{name} {score:.3f}" for name, score in scores)
        )
    typer.echo(f"in {out}: unembed invert --align {out} --embedding VECTORS")


def warn(alignment: Alignment | None) -> None:
    """Say on standard error that a map predicts nothing, with numbers."""
    doubt = None if alignment is None else alignment.doubt()
    if doubt is not None:
        typer.echo(f"note: {doubt}", err=True)


def show_curve(curve: AlignCurve, as_json: bool) -> None:
    """The leak by number of pairs, floors and ceiling, each with its interval."""
    from unembed.cli.display import to_json
    from unembed.evaluation.report.plots import curve_table

    if as_json:
        sys.stdout.write(to_json(curve.to_dict()) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *rows = (row[:5] + row[6:] for row in curve_table(curve))  # without token-set F1
    texts = curve.settings["texts"]
    table = Table(title=f"{texts} held-out texts; mean, 95% bootstrap interval", box=None)
    for cell in header[:4]:
        table.add_column(cell, overflow="fold")
    for cell in header[4:]:
        table.add_column(cell.replace(", ", ",\n"), no_wrap=True)
    for row in rows:  # each interval below its mean, so that 80 columns are enough
        table.add_row(
            *(Text(cell.replace(" [", "\n").replace(", ", "–").rstrip("]")) for cell in row)
        )
    console = Console()
    console.print(table)
    for note in curve.notes:
        console.print(Text(f"note: {note}"))
