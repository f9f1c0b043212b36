"""`audit` and `read`: vector stores, what they give away, and their vectors as a file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import unembed
from unembed.cli.options import (
    CheckpointOption,
    DeviceOption,
    SeedOption,
    is_given,
    make_inverter,
    refuse_idle,
)

if TYPE_CHECKING:
    from unembed.auditing.result import AuditReport
    from unembed.errors import StoreError
    from unembed.vectors.stores.store import Store

StoreArgument = Annotated[
    str,
    typer.Argument(
        metavar="STORE",
        help="postgresql://…?table=…&column=…, qdrant://, chroma://, milvus://, redis://, "
        "elasticsearch://, opensearch://, or a path (docs/audit.md).",
    ),
]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", "--table", help="Table, collection or index.")
]
ColumnOption = Annotated[str | None, typer.Option("--column", help="Column of the vectors.")]
TextOption = Annotated[
    str | None, typer.Option("--text-column", help="Column of the text; usual names are found.")
]
AskOption = Annotated[
    bool, typer.Option("--ask-password", help="Ask for a password that no variable holds.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be read and what not; read no vector.")
]
SampleOption = Annotated[int, typer.Option("--sample", min=1, help="Rows to draw.")]
ToOption = Annotated[str, typer.Option("--to", help="The attacker's inverter, a shipped one.")]
MadeByOption = Annotated[
    str | None, typer.Option("--encoder", help="That made the vectors, if not the inverter's.")
]
HowOption = Annotated[
    str, typer.Option("--strategy", help="How the inverter decodes (docs/decoding.md).")
]
CallsOption = Annotated[
    int, typer.Option("--encoder-calls", min=0, help="Also attack with so many calls a record.")
]
ProbeOption = Annotated[
    Path | None,
    typer.Option("--probe", help="Of words, for long texts: a folder of `unembed words --fit`."),
]
MapOption = Annotated[
    Path | None,
    typer.Option("--align", help="A map of `unembed align` from the store's space."),
]
PairsOption = Annotated[
    int,
    typer.Option("--align-from-store", min=0, help="Make such a map from N rows; score others."),
]
CorpusOption = Annotated[
    Path | None, typer.Option("--corpus", help="Texts an attacker may have, to look up in.")
]
GroupOption = Annotated[
    str | None, typer.Option("--group-by", help="A field to break figures down by: tenant.")
]
ShowOption = Annotated[
    bool, typer.Option("--show-pii", help="Show what hurts unmasked in the report.")
]
_NOT_FINDING = ("out", "fail_over", "device")  # options on which no finding depends
ReportOption = Annotated[Path, typer.Option("--out", help="Folder of the report.")]
FailOption = Annotated[
    float | None,
    typer.Option("--fail-over", min=0.0, max=1.0, help="Exit with 1 if more leaks (0 to 1)."),
]


def read(
    store: StoreArgument,
    out: Annotated[Path | None, typer.Option("--out", help="The .parquet to write.")] = None,
    collection: CollectionOption = None,
    column: ColumnOption = None,
    text_column: TextOption = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Fields to write too: a,b.")] = None,
    ask_password: AskOption = False,
    dry_run: DryOption = False,
) -> None:
    """Read the vectors of a store into a Parquet file; nothing is written to the store."""
    from unembed.cli.display import StageDisplay
    from unembed.errors import ConfigError
    from unembed.vectors.stores.export import export_store

    if out is None and not dry_run:
        raise ConfigError("--out or --dry-run", "neither", "Pass one of them")
    fields = [name.strip() for name in (keep or "").split(",") if name.strip()]
    with _open(store, collection, column, text_column, fields, ask_password) as opened:
        if dry_run or out is None:
            _show_facts(opened)
            return
        with StageDisplay() as display:
            rows = export_store(opened, out, lambda n, all_: display.update("reading", n, all_))
        show_left_out(opened.left_out)
    typer.echo(f"{rows} vectors in {out}")


def audit(
    context: typer.Context,
    store: StoreArgument,
    sample: SampleOption = 1000,
    seed: SeedOption = 0,
    collection: CollectionOption = None,
    column: ColumnOption = None,
    text_column: TextOption = None,
    to: ToOption = "minilm",
    checkpoint: CheckpointOption = None,
    encoder: MadeByOption = None,
    strategy: HowOption = "greedy",
    encoder_calls: CallsOption = 0,
    probe: ProbeOption = None,
    align: MapOption = None,
    align_from_store: PairsOption = 0,
    corpus: CorpusOption = None,
    group_by: GroupOption = None,
    show_pii: ShowOption = False,
    out: ReportOption = Path("report"),
    fail_over: FailOption = None,
    ask_password: AskOption = False,
    dry_run: DryOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Invert a sample of a vector store and report what it gives away.

    Exit code 0; 1 if more leaks than --fail-over; 2 if the store could not be audited.
    """
    if checkpoint is not None:
        refuse_idle(context, "without --checkpoint only", "both", "to")
    fields = [] if group_by is None else [group_by]
    with _open(store, collection, column, text_column, fields, ask_password) as opened:
        if dry_run:
            _show_facts(opened, min(sample, opened.facts.count))
            return
        _require_text(opened, fail_over)
        from unembed.auditing.report import write_report
        from unembed.cli.display import StageDisplay
        from unembed.files import make_folder

        make_folder(out)
        inverter = make_inverter(checkpoint or to, None, device)
        try:
            with StageDisplay() as display:
                report = unembed.audit(
                    opened,
                    sample=sample,
                    seed=seed,
                    to=inverter,
                    encoder=encoder,
                    decoding=strategy,
                    align=align,
                    align_from_store=align_from_store,
                    corpus=corpus,
                    encoder_calls=encoder_calls,
                    probe=probe,
                    group_by=group_by,
                    show_pii=show_pii,
                    folder=out,
                    progress=display.update,
                    name=store,
                    command=_command(context),
                )
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from there", err=True)
            raise typer.Exit(130) from None
    write_report(report, out)
    _show_report(report, out)
    _require_less(report, fail_over)


def _command(context: typer.Context) -> str:
    """The command as it was typed, without what does not change what is found."""
    words = ["unembed", "audit", context.params["store"]]
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in ("store", *_NOT_FINDING) and is_given(context, name):
            value = context.params[name]
            words += [parameter.opts[0], *([] if value is True else [str(value)])]
    return shlex.join(words)


def _require_text(store: Store, limit: float | None) -> None:
    """Refuse a limit where nothing can be measured, before anything is read."""
    if limit is not None and store.facts.text is None:
        raise _no_text()


def _no_text() -> StoreError:
    from unembed.errors import StoreError

    return StoreError(
        "texts beside the vectors, for --fail-over",
        "none, so nothing can be measured",
        "Name their column with --text-column",
    )


def _require_less(report: AuditReport, limit: float | None) -> None:
    """Exit with 1 where more leaks than the limit."""
    if limit is None:
        return
    if report.leak is None:
        raise _no_text()
    if report.leak > limit:
        typer.echo(f"leak {report.leak:.3f} is over {limit:g}", err=True)
        raise typer.Exit(1)


def _open(
    address: str,
    collection: str | None,
    column: str | None,
    text_column: str | None,
    keep: list[str],
    ask_password: bool,
) -> Store:
    from unembed.vectors.stores.address import open_store

    return open_store(
        address,
        collection=collection,
        column=column,
        text_column=text_column,
        keep=keep,
        ask=ask_secret if ask_password else None,
    )


def _show_facts(store: Store, rows: int | None = None) -> None:
    """What is there, how many rows would be read, and what not."""
    for name, value in store.facts.to_dict().items():
        text: Any = "; ".join(value) if isinstance(value, list) else value
        label = "normalised by the store" if name == "normalised" else name.replace("_", " ")
        if text not in (None, ""):
            typer.echo(f"{label}: {text}")
    if rows is not None:
        typer.echo(f"would read: at most {rows} rows")
    typer.echo("nothing is written to the store")


def ask_secret(prompt: str) -> str:
    """A password from the terminal, not shown."""
    answer: str = typer.prompt(prompt, hide_input=True, err=True)
    return answer


def show_left_out(reasons: Mapping[str, int]) -> None:
    """A note for each reason why rows were not used."""
    for reason, count in reasons.items():
        typer.echo(f"note: left out: {count} × {reason}", err=True)


def _show_report(report: AuditReport, out: Path) -> None:
    from unembed.auditing.report.tables import headline

    typer.echo(headline(report))
    for finding in report.findings:
        typer.echo(f"{finding.severity:>8}  {finding.title}")
    show_left_out(report.read["left_out"])
    leak = "not measured" if report.leak is None else f"{report.leak:.3f}"
    typer.echo(f"leak: {leak}; the report: {out / 'report.html'}")
