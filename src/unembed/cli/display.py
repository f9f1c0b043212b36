"""Output of the commands: progress, tables, tokens appearing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from unembed.cli.options import OUTPUT
from unembed.encoders.base import EncoderIdentity
from unembed.errors import DataError
from unembed.files import install_line

if TYPE_CHECKING:  # torch is 200 MB that collecting texts does not need
    from unembed.data.collect.collect import CollectProgress
    from unembed.data.inspect import Inspection
    from unembed.data.prepare import PrepareProgress
    from unembed.decoding.strategy import DecodingStep, Inversion, OnStep
    from unembed.encoders.fingerprint import Preflight
    from unembed.evaluation.bootstrap import Figure
    from unembed.evaluation.evaluate import Evaluation
    from unembed.tokenizer import TextTokenizer
    from unembed.vectors.invert import RoundTrip
    from unembed.vectors.read import Chunk, VectorFile

_SURE, _UNSURE = 0.7, 0.3
_VERDICTS = {True: "[green]passed[/]", False: "[red]failed[/]", None: ""}
_PICTURE_COLUMNS, _FRAMES = 110, 7
_MOST_LANGUAGES = 12  # languages


def _bar(*columns: str) -> Progress:
    """A progress bar on standard error, so that standard output stays clean for pipes."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in columns),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Display:
    """A progress bar as a context manager."""

    def __init__(self, *columns: str) -> None:
        self.bar = _bar(*columns)
        self.bar.disable = OUTPUT.quiet
        self.started = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        if self.started and not self.bar.disable:  # Rich before 15 ends a hidden bar's line
            self.bar.stop()

    def start(self) -> None:
        """Show it; before there is progress an error would stand below an empty bar."""
        if not self.started:
            self.bar.start()
            self.started = True


class PrepareDisplay(_Display):
    """Passages or pairs done, pairs a second, time left."""

    def __init__(self, passages: int, limit: int | None) -> None:
        super().__init__("{task.fields[pairs]} pairs, {task.fields[rate]:.0f}/s")
        self.limit = limit
        self.first: PrepareProgress | None = None
        total = limit if limit is not None else passages
        self.task = self.bar.add_task("preparing", total=total, pairs=0, rate=0.0)

    def update(self, progress: PrepareProgress) -> None:
        """Show how far the preparation is."""
        self.start()
        if self.first is None:
            self.first = progress
        elapsed = self.bar.tasks[0].elapsed or 1.0
        self.bar.update(
            self.task,
            completed=progress.pairs if self.limit is not None else progress.passages,
            pairs=progress.pairs,
            rate=(progress.pairs - self.first.pairs) / elapsed,
        )


class CollectDisplay(_Display):
    """Texts kept and read, and time left."""

    def __init__(self, samples: int) -> None:
        super().__init__("{task.fields[read]} read")
        self.task = self.bar.add_task("collecting", total=samples, read=0)

    def update(self, progress: CollectProgress) -> None:
        """Show how far the collection is."""
        self.start()
        self.bar.update(self.task, completed=progress.samples, read=progress.texts)

    def finish(self, count: int) -> None:
        """Show that all are there; progress comes now and then only."""
        self.bar.update(self.task, completed=count)


class StageDisplay(_Display):
    """Progress display with a bar per stage of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, Any] = {}

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is."""
        self.start()
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(escape(stage), total=total or None)
        self.bar.update(self.tasks[stage], completed=done)

    def say(self, text: str) -> None:
        """Write a remark above the bars."""
        if not OUTPUT.quiet:
            self.bar.console.print(Text(text), soft_wrap=True)


class TrainingDisplay(_Display):
    """The last logged figures beside a bar of steps; validations stay on the screen.

    A terminal that is gone (SIGHUP) must not end the run before it has saved.
    """

    def __init__(self, steps: int) -> None:
        super().__init__("{task.fields[figures]}")
        # Of several processes the first
        self.bar.disable = OUTPUT.quiet or os.environ.get("RANK", "0") != "0"
        self.task = self.bar.add_task("training", total=steps, figures="")

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            super().__exit__(*error)

    def log(self, record: dict[str, float]) -> None:
        """Show a record of ``metrics.jsonl``."""
        step = int(record["step"])
        with suppress(OSError):
            self.start()
            if "validation_loss" in record and not OUTPUT.quiet:
                figures = ", ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "step")
                self.bar.console.print(f"step {step}: {figures}")
                return
            figures = f"loss {record['loss']:.3f}  {record['samples_per_second']:.0f} samples/s"
            self.bar.update(self.task, completed=step, figures=figures)


def watcher(tokenizer: TextTokenizer) -> OnStep:
    """A callback that shows the first sequence of a batch filling up, step by step."""
    live = Live(console=Console(), auto_refresh=False, transient=True)

    def show(step: DecodingStep) -> None:
        if step.index == 1:
            live.start()
        live.update(_step_line(step, tokenizer), refresh=True)
        if step.index == step.total:
            live.stop()

    return show


def _step_line(step: DecodingStep, tokenizer: TextTokenizer) -> Text:
    """The first sequence of a batch: masks as blocks, tokens coloured by confidence."""
    ids, confidences = step.tokens[0].tolist(), step.confidences[0].tolist()
    line = Text(f"{step.index:3d}/{step.total}  ")
    for name, token, confidence in zip(tokenizer.token_strings(ids), ids, confidences, strict=True):
        if token == tokenizer.mask_id:
            line.append("░░ ", style="dim")
        elif token not in tokenizer.special_ids:
            line.append(f"{name} ", style=_style(confidence))
    return line


def save_picture(
    path: Path, trip: RoundTrip, steps: Sequence[DecodingStep], tokenizer: TextTokenizer
) -> None:
    """An SVG of a recovery: some of its steps, then the result.

    Raises:
        DataError: The file cannot be written.
    """
    console = Console(record=True, width=_PICTURE_COLUMNS, file=StringIO(), force_terminal=True)
    frames = sorted({round(i * (len(steps) - 1) / (_FRAMES - 1)) for i in range(_FRAMES)})
    for index in frames:
        console.print(_step_line(steps[index], tokenizer))
        console.print()
    console.print(_round_trip_table(trip))
    try:
        path.write_text(console.export_svg(title="unembed invert"), encoding="utf-8")
    except OSError as error:
        raise DataError(f"a place to write {path}", str(error), "Choose another --svg") from error


def _style(confidence: float) -> str:
    if confidence >= _SURE:
        return "green"
    return "yellow" if confidence >= _UNSURE else "red"


def show_round_trip(trip: RoundTrip, as_json: bool) -> None:
    """Original, recovered text, cosine and time."""
    if as_json:
        _print_json(asdict(trip))
        return
    Console().print(_round_trip_table(trip))


def _round_trip_table(trip: RoundTrip) -> Table:
    inversion = trip.inversion
    cosine = "not measured: no text was recovered"
    if trip.cosine is not None:
        cosine = f"{trip.cosine:.3f} (recovered text embedded again)"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("original", Text(trip.original))
    table.add_row("recovered", Text(inversion.text, style="green"))
    table.add_row("cosine", cosine)
    table.add_row("tokens leaked", f"{trip.token_recall:.0%} of the distinct tokens")
    table.add_row(
        "time",
        f"{trip.seconds:.2f} s, {inversion.passes} denoiser pass{'es' * (inversion.passes != 1)}, "
        f"{inversion.encoder_calls} encoder call{'s' * (inversion.encoder_calls != 1)}",
    )
    return table


def show_collection(manifest: dict[str, Any], out: Path) -> None:
    """Texts of each language, what was left out and why, and what was not to be had."""
    counts, shards = manifest["counts"], manifest["shards"]
    count = f"{len(shards)} shard{'s' * (len(shards) != 1)}"
    sys.stdout.write(f"{counts['kept']} texts in {count} in {out}\n")
    summary = ", ".join(
        f"{lang} {numbers.get('kept', 0)}" for lang, numbers in counts["langs"].items()
    )
    sys.stdout.write(f"languages: {summary}\n")
    reasons = ", ".join(f"{name} {times}" for name, times in counts["left_out"].items())
    sys.stdout.write(f"left out of {counts['read']} read: {reasons or 'none'}\n")
    for lang, numbers in counts["langs"].items():
        if numbers.get("kept", 0) < numbers["wanted"]:
            sys.stdout.write(f"note: {lang}: the sources end before {numbers['wanted']} texts\n")
    for item in counts["missing"]:
        sys.stdout.write(f"note: {item['source']} has no texts in {item['lang']}\n")
    if counts["not_remembered"]:
        sys.stdout.write(
            f"note: {counts['not_remembered']} texts were too many to remember as seen\n"
        )


def stream_inversions(
    stream: Iterable[tuple[Chunk, list[Inversion]]], as_json: bool, source: VectorFile
) -> None:
    """Print one recovered text a line, or a JSON array of recoveries, as they come."""
    from unembed.vectors.output import named_columns

    is_open = False
    for chunk, inversions in stream:
        show_notes(source)
        for index, item in enumerate(inversions):
            if not as_json:
                sys.stdout.write(item.text + "\n")
                continue
            columns = {name: values[index] for name, values in chunk.columns.items()}
            record = {"row": chunk.rows[index], **asdict(item)} | named_columns(columns)
            text = to_json(record).replace("\n", "\n  ")
            sys.stdout.write(f"{',' if is_open else '['}\n  {text}")
            is_open = True
        sys.stdout.flush()
    if as_json:
        sys.stdout.write("\n]\n" if is_open else "[]\n")


def show_notes(source: VectorFile) -> None:
    """Print what is strange about the vectors on standard error, each note once."""
    while len(source.notes) > len(source.notes_shown):
        note = source.notes[len(source.notes_shown)]
        source.notes_shown.append(note)
        sys.stderr.write(f"note: {note}\n")


def show_left_out(reasons: list[str]) -> None:
    """Vectors passed over, by reason, on standard error."""
    for reason in reasons:
        sys.stderr.write(f"note: vectors left out: {reason}\n")


def show_evaluation(report: Evaluation, as_json: bool) -> None:
    """Rows times metrics, each with its interval and sample size."""
    if as_json:
        _print_json(report.to_dict())
        return
    from unembed.evaluation.metrics import ESSENTIAL

    settings, attacks = report.settings, report.settings["attacks"]
    first = f"{settings['strategy']}, {settings['passes']:g} passes, {settings['threat_model']}"
    how = first if len(attacks) == 1 else f"{len(attacks)} strategies"
    table = Table(
        title=f"{settings['texts']} texts, {how}, decoded from fully masked",
        caption="mean (n), 95% bootstrap interval",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    for name in (*ESSENTIAL, "passes", "calls"):
        table.add_column(name, no_wrap=name not in ESSENTIAL)
    for row, figures in report.rows.items():
        table.add_row(
            Text(row),
            *(_figure(figures[name]) for name in ESSENTIAL),
            *(_plain_mean(figures[name]) for name in ("passes", "encoder calls")),
        )
    console = Console()
    console.print(Text(report.verdict))
    console.print()
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"))


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "missing"
    low, high = (f"{end:.3f}" for end in (figure.low, figure.high))
    return f"{figure.mean:.3f} ({figure.n})\n{low}–{high}"


def _plain_mean(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.mean:g}"


def show_preflight(report: Preflight, as_json: bool) -> None:
    """Print a table of the checks, one line each."""
    if as_json:
        _print_json(report.to_dict())
        return
    table = Table(title=Text(EncoderIdentity.from_dict(report.encoder).describe()), box=None)
    for name in ("check", "", "found"):
        table.add_column(name, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, _VERDICTS[check.passed], Text(check.found))
    table.add_row("fingerprint (SHA-256)", "", report.fingerprint["sha256"])
    Console().print(table)


def show_inspection(report: Inspection, as_json: bool) -> None:
    """Print what a folder of pairs holds, one line a fact."""
    if as_json:
        _print_json(report.to_dict())
        return
    quantiles = ", ".join(f"{share}%: {tokens}" for share, tokens in report.quantiles().items())
    before = report.vocabulary.get("before_trimming")
    size = f"{report.vocabulary['size']:,}" + (f" (trimmed from {before:,})" if before else "")
    shards = f"{report.shards}, {report.bytes / 2**20:.1f} MiB"
    line = install_line("languages")
    languages = f"not known: `{line}` to detect them, or pass --source"
    if report.languages:
        languages = f"{_counts(report.languages, _MOST_LANGUAGES)} ({report.languages_are})"
    rows = {
        "pairs": f"{report.pairs:,}",
        "shards": shards if report.complete else f"{shards}, not complete",
        "encoder": EncoderIdentity.from_dict(report.encoder).describe(),
        "fingerprint": report.fingerprint or "none: prepared by an older version",
        "source": ", ".join(f"{key} {value}" for key, value in report.source.items()),
        "vocabulary": f"{size}, {report.distinct_tokens:,} occur",
        "content tokens": quantiles,
        "left out": _counts(report.dropped) or "nothing was recorded",
        "languages": languages,
        "writing systems": f"{_counts(report.writing)} (letters in a sample)",
    }
    if report.outdated is not None:
        rows["note"] = report.outdated
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for text in report.examples:
        table.add_row("", Text(text, style="green"))
    Console().print(table)


def _counts(counts: dict[str, int], most: int | None = None) -> str:
    items = list(counts.items())
    parts = [f"{name} {count:,}" for name, count in items[:most]]
    rest = items[len(parts) :]
    if rest:
        parts.append(f"{len(rest)} others {sum(count for _, count in rest):,}")
    return ", ".join(parts)


def _print_json(data: Any) -> None:
    sys.stdout.write(to_json(data) + "\n")


def to_json(data: Any) -> str:
    """Write JSON with the signs that standard output can take, the others escaped."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(data, ensure_ascii=not unicode, indent=2)
