"""`train`, `plot` and `export`: pairs → an inverter."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from unembed.cli.options import (
    ConfigOption,
    DeviceOption,
    QuietOption,
    SetOption,
    TrustOption,
    VerboseOption,
    make_encoder,
    refuse_idle,
    require_place,
    show_usage,
)

# The options of `plot` and `export`
RunsArgument = Annotated[list[Path], typer.Argument(help="Folders of training runs.")]
PictureOption = Annotated[Path, typer.Option("--out", help="The picture: .png or .svg.")]
AxisOption = Annotated[str, typer.Option("--x", help="steps, samples or hours.")]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="float16, bfloat16 or int8 (weight-only).")
]
ShardOption = Annotated[
    str, typer.Option("--shard-size", help="Larger weights are cut into files: 500MB, 4GB.")
]
FiguresOption = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Figures for the card: what `evaluate --out` wrote."),
]
CardOption = Annotated[
    Path | None, typer.Option("--card", help="Model card (Markdown) in place of the one made.")
]
GuidanceOption = Annotated[
    Path | None,
    typer.Option("--data", help="The run's pairs: fits guidance, which makes texts nearer."),
]
OnnxOption = Annotated[
    Path | None,
    typer.Option("--onnx", help="Also write the denoiser as ONNX (OUT/denoiser.onnx is used)."),
]

_STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
_SAME_REQUEST = 2.0  # seconds


def train(
    context: typer.Context,
    data: Annotated[Path, typer.Option("--data", help="Folder of prepared pairs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    config: ConfigOption = "minilm",
    settings: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a denoiser on prepared pairs.

    Ctrl-C, SIGTERM and SIGHUP save and end it with exit code 130, 143 or 129; --resume goes on.
    """
    from unembed.cli.display import TrainingDisplay
    from unembed.config import load_config
    from unembed.data.pairs import Pairs
    from unembed.device import choose_compute
    from unembed.training.checkpoint import LATEST, PREVIOUS
    from unembed.training.loop import train as run_training

    configuration = load_config(config, settings or [])
    pairs = Pairs.open(data)
    Pairs.verify(data)
    _notes([pairs.outdated] if pairs.outdated else [])
    words = encoder = None
    # Killed before its first save, a run has a folder and starts anew
    has_state = any((out / name).exists() for name in (LATEST, PREVIOUS))
    from_words = configuration.denoiser.token_table == "encoder" and not (resume and has_state)
    if from_words:
        _require_own_tokenizer(pairs.manifest)
    embeds = configuration.training.decoded_cosine or configuration.training.feedback > 0
    if from_words or embeds:
        encoder = make_encoder(configuration.encoder.model_dump(), "cpu", trust_remote_code)
        show_usage(context, encoder)
        pairs.require_encoder(encoder)
        words = encoder.word_embeddings() if from_words else None
    with TrainingDisplay(configuration.training.steps) as display, StopSignal() as stop:
        progress = run_training(
            configuration,
            data,
            out,
            choose_compute(device),
            words=words,
            encoder=encoder if embeds else None,
            resume=resume,
            on_log=display.log,
            should_stop=stop.requested,
        )
    best = f"{progress.best_loss:.4f}" if progress.best_loss < float("inf") else "not measured yet"
    figures = f"step {progress.step}, best validation loss {best}, in {out}"
    complete = progress.out_of_patience(configuration.training.patience)
    if complete or progress.step >= configuration.training.steps:
        typer.echo(figures)
        return
    remaining = configuration.training.steps - progress.step
    # Of several processes any may have got the signal, for all of them
    number = stop.number or signal.SIGTERM
    with suppress(OSError):  # after SIGHUP nobody may be there to read it
        typer.echo(
            f"unfinished: {number.name} at {figures}; {remaining} steps are left: "
            "the same command with --resume goes on",
            err=True,
        )
    raise typer.Exit(128 + number)


def _require_own_tokenizer(manifest: dict[str, Any]) -> None:
    """Words of the encoder start the table of its own tokenizer only."""
    from unembed.data.pairs import piece_settings
    from unembed.errors import ConfigError

    other = piece_settings(manifest)["vocabulary"]["tokenizer"]
    if other is not None:
        raise ConfigError(
            "denoiser.token_table: random for pairs of another tokenizer than the encoder's",
            f"encoder, and pairs of the tokenizer {other}",
            "Pass --set denoiser.token_table=random",
        )


def plot(
    runs: RunsArgument,
    out: PictureOption,
    x: AxisOption = "steps",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw the training and validation curves of one or several runs (needs matplotlib)."""
    from unembed.training.curves import save_curves

    require_place(out, "--out", ".png", ".svg")
    _notes(save_curves(runs, out, x))
    typer.echo(f"curves in {out}")


def export(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[Path, typer.Argument(help="Folder for the inverter.")],
    which: Annotated[str, typer.Option("--which", help="best, latest or milestone-N.")] = "best",
    weights: WeightsOption = "float16",
    shard_size: ShardOption = "4GB",
    evaluation: FiguresOption = None,
    card: CardOption = None,
    onnx: OnnxOption = None,
    data: GuidanceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Turn a training run into the folder that `invert` loads: averaged weights, card, curves."""
    from unembed.backends.onnx import require_onnx
    from unembed.checkpoints import Storage
    from unembed.data.pairs import Pairs
    from unembed.inverter import export_folder
    from unembed.training.export import export_run

    if card is not None:
        refuse_idle(context, "without --card only", "--card in place of it", "evaluation")
    if onnx is not None:
        require_onnx()
        if onnx.absolute().parent != out.absolute():  # that folder is made
            require_place(onnx, "--onnx", ".onnx")
    storage = Storage(weights, shard_size)
    text = _read_card(card) if card is not None else None
    pairs = None if data is None else Pairs.open(data)
    notes = export_run(
        run, out, which=which, storage=storage, card=text, evaluation=evaluation, pairs=pairs
    )
    _notes(notes)
    if onnx is not None:
        export_folder(out, onnx)
    typer.echo(f"inverter in {out}")


def _read_card(path: Path) -> str:
    from unembed.errors import DataError
    from unembed.files import read_bounded

    try:
        return read_bounded(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"Markdown in UTF-8 at {path}", str(error), "Correct --card") from error


def _notes(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to save and stop; a second one stops at once.

    One soon after the first is the same request: a batch system tells a whole job, and a launcher
    among it tells its processes again. SIGHUP stays ignored where it is (`nohup`).

    Attributes:
        number: The first signal that came; None before.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        self._time = 0.0  # of the first
        self._before: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Check whether a signal has come."""
        return self.number is not None

    def __enter__(self) -> StopSignal:
        for number in map(signal.Signals, _STOP_SIGNALS):
            if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._time = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._time > _SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)
