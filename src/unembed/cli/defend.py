"""`defend`: which protection is worth what, measured on a user's own vectors; a defended copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unembed.cli.audit import (
    AskOption,
    CollectionOption,
    ColumnOption,
    StoreArgument,
    TextOption,
    ask_secret,
    show_left_out,
)
from unembed.cli.options import (
    CheckpointOption,
    DenoiserDtypeOption,
    DeviceOption,
    EncoderOption,
    QuietOption,
    SeedOption,
    TrustOption,
    VerboseOption,
    encoder_settings,
    interruptible,
    make_encoder,
    make_inverter,
    note,
    refuse_idle,
)
from unembed.errors import ConfigError, UnembedError

if TYPE_CHECKING:
    from unembed.defences.result import DefenceReport
    from unembed.encoders.base import Encoder
    from unembed.inverter import Inverter

QueriesOption = Annotated[
    Path | None,
    typer.Option("--queries", help="Queries: embedding or text, and relevant: ids to be found."),
]
DefencesOption = Annotated[
    str,
    typer.Option("--defences", help="all, or rotation,gaussian:cosine=0.96,file.py:MyDefence."),
]
AttackersOption = Annotated[
    str, typer.Option("--attackers", help="U,A1,A2,R,L; all leaves A2 (training) out.")
]
PairsOption = Annotated[
    str, typer.Option("--pairs", metavar="10,100,1000", help="Leaked pairs that R has.")
]
BudgetOption = Annotated[
    float, typer.Option("--budget", min=0.0, max=1.0, help="Share of utility it may cost.")
]
HeldOutOption = Annotated[
    int, typer.Option("--held-out", min=2, help="Records that are attacked; at most half.")
]
CorpusOption = Annotated[
    Path | None, typer.Option("--corpus", help="Texts that an attacker has; for A1, A2 and L.")
]
OverlapOption = Annotated[
    float,
    typer.Option(
        "--overlap", min=0.0, max=1.0, help="Without --corpus: share of attacked texts L has."
    ),
]
MinutesOption = Annotated[
    float, typer.Option("--minutes", min=0.0, help="A2 trains so long for each defence.")
]
WriteOption = Annotated[
    str | None,
    typer.Option("--write", metavar="DEFENCE", help="Write a defended copy to --out; no report."),
]
KeepOption = Annotated[
    str | None, typer.Option("--keep", help="With --write: columns of the copy: id,title.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Folder of the report; with --write a .parquet.")
]
IdOption = Annotated[
    str | None,
    typer.Option("--id-column", help="Field of the ids, if not the store's own; of files: id."),
]
_OF_THE_REPORT = (
    *("queries", "defences", "attackers", "pairs", "budget", "sample", "held_out", "corpus"),
    *("overlap", "minutes", "checkpoint", "encoder", "seed", "text_column", "id_column", "dtype"),
)


def defend(
    context: typer.Context,
    store: StoreArgument,
    queries: QueriesOption = None,
    defences: DefencesOption = "all",
    attackers: AttackersOption = "all",
    pairs: PairsOption = "10,100,1000",
    budget: BudgetOption = 0.02,
    sample: Annotated[int, typer.Option("--sample", min=8, help="Records to draw.")] = 2000,
    held_out: HeldOutOption = 200,
    corpus: CorpusOption = None,
    overlap: OverlapOption = 0.1,
    minutes: MinutesOption = 5.0,
    out: OutOption = Path("defences"),
    write: WriteOption = None,
    keep: KeepOption = None,
    collection: CollectionOption = None,
    column: ColumnOption = None,
    text_column: TextOption = None,
    id_column: IdOption = None,
    ask_password: AskOption = False,
    checkpoint: CheckpointOption = None,
    encoder: EncoderOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure what protects vectors, against attackers who know of it, and what it costs."""
    ask = ask_secret if ask_password else None
    where: dict[str, Any] = {"collection": collection, "column": column, "ask": ask}
    if write is not None:
        refuse_idle(context, "without --write", f"--write {write}", *_OF_THE_REPORT)
        _write(store, write, out, keep, where)
        return
    refuse_idle(context, "with --write only", "none", "keep")
    from unembed.cli.display import StageDisplay
    from unembed.defences.attackers import parse_attackers
    from unembed.defences.comparison import defend as run
    from unembed.defences.defence import parse_defences
    from unembed.defences.records import open_records, read_queries, read_records
    from unembed.defences.report import write_report

    parse_defences(defences)  # what is wrong fails before anything is loaded
    parse_attackers(attackers)
    counts = _counts(pairs)
    opened, field = open_records(store, id_column=id_column, text_column=text_column, **where)
    with opened:
        inverter = make_inverter(checkpoint, None, device, dtype)
        model = _encoder(inverter, encoder, device, trust_remote_code)
        users = None
        if queries is not None:
            users = read_queries(queries, model, inverter.encoder.dimension)
        labels = [] if users is None else users.relevant or []
        relevant = frozenset[str]().union(*labels)
        records = read_records(opened, sample, seed, id_column=field, relevant=relevant)
    with StageDisplay() as display, interruptible("the same command goes on from there"):
        report = run(
            records,
            queries=users,
            defences=defences,
            attackers=attackers,
            pairs=counts,
            budget=budget,
            held_out=held_out,
            corpus=corpus,
            overlap=overlap,
            minutes=minutes,
            to=inverter,
            encoder=model,
            seed=seed,
            folder=out,
            progress=display.update,
        )
    write_report(report, out)
    _show(report, out)


def _show(report: DefenceReport, out: Path) -> None:
    for sentence in report.recommendation():
        typer.echo(sentence)
    for line in report.notes:
        note(line)
    typer.echo(f"the report: {out / 'report.html'}")


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigError("numbers of pairs: 10,100,1000", repr(text), "Correct --pairs")
    return [int(word) for word in words]


def _encoder(
    inverter: Inverter, where: str | None, device: str, trust_remote_code: bool
) -> Encoder | None:
    """The encoder; None where it is not asked for and cannot be loaded."""
    try:
        model: Encoder = make_encoder(encoder_settings(inverter, where), device, trust_remote_code)
        inverter.require_encoder(model)
    except (UnembedError, OSError) as error:
        if where is not None:
            raise
        note(f"the encoder could not be loaded: {error}")
        return None
    return model


def _write(address: str, name: str, out: Path, keep: str | None, where: dict[str, Any]) -> None:
    from unembed.cli.display import StageDisplay
    from unembed.defences.defence import parse_defence
    from unembed.defences.write import write_copy
    from unembed.vectors.stores.address import open_store

    defence = parse_defence(name)
    fields = [part.strip() for part in (keep or "").split(",") if part.strip()]
    with open_store(address, keep=fields, **where) as store, StageDisplay() as display:
        paths = write_copy(store, defence, out, display.update)
    show_left_out(store.left_out)
    typer.echo("written: " + ", ".join(map(str, paths)))
    for path in paths:
        if path.name.endswith(".secret.safetensors"):
            note(f"{path} is the key: keep it apart from the copy")
