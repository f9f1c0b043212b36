"""The options that commands share, and the longer ones: their names, limits and help."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import unembed
from unembed.encoders import API_PREFIX
from unembed.errors import ConfigError
from unembed.files import is_folder

if TYPE_CHECKING:
    from unembed.decoding import Decoding


@dataclass
class Output:
    """How much a command says on standard error.

    Attributes:
        quiet: No progress and no remarks; notes on what a result means, and errors, stay.
        verbose: Also what libraries say, and where an error came from.
    """

    quiet: bool = False
    verbose: bool = False


OUTPUT = Output()
# Libraries that warn of what is no fault of a user's: a cache folder, an operator not there
_TALKATIVE = ("matplotlib", "torch.onnx", "torchvision")


def _set_quiet(value: bool) -> bool:
    OUTPUT.quiet = value
    return value


def _set_verbose(value: bool) -> bool:
    OUTPUT.verbose = value
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.NOTSET if value else logging.ERROR)
    return value


QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_set_quiet, help="No progress, only results, notes and errors."
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_set_verbose,
        help="Also what libraries say, and the place of an error.",
    ),
]
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
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Where the inverter's encoder is, if not under its own name; openai:MODEL: an API.",
    ),
]
ApiBaseOption = Annotated[
    str | None,
    typer.Option("--api-base", help="With openai:MODEL: address of the API, up to /v1."),
]
MaxCallsOption = Annotated[
    int | None,
    typer.Option("--max-calls", min=1, metavar="N", help="With openai:MODEL: most requests."),
]
PriceOption = Annotated[
    float | None,
    typer.Option("--price", min=0.0, metavar="X", help="With openai:MODEL: of a million tokens."),
]
StrategyOption = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="greedy, entropy-bounded, euler, euler-remask, two-stage, best-of, residual or "
        "guided-search, also with settings: greedy:steps=16. Below are the options of each.",
    ),
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="Of the strategy: name=value, see below. Repeatable."),
]
GuidanceOption = Annotated[
    tuple[float, float] | None,
    typer.Option("--guidance", help="Classifier-free guidance: first and last strength."),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(
        "--repetition",
        min=0.0,
        help="Nats off a token for each time the text has it already (2 if not set); 0: off.",
    ),
]
CallsOption = Annotated[
    int,
    typer.Option("--encoder-calls", min=0, help="Texts that may be embedded for each vector."),
]
LengthOption = Annotated[
    int | None,
    typer.Option("--length", min=1, help="Content tokens of every text; found if not set."),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Denoiser passes for each text (8 if not set).")
]
CheckpointOption = Annotated[
    str | None,
    typer.Option("--checkpoint", help="Shipped name, folder or Hub repository of an inverter."),
]
StrategiesOption = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        help="Several to compare: greedy,greedy:steps=8,… or all (docs/evaluation.md).",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything drawn.")]

# The options of `invert` for files
VectorsOption = Annotated[
    Path | None,
    typer.Option(
        "--embedding",
        help="Vectors: .npy, .npz, .safetensors, .parquet, .arrow, .feather, .json, .jsonl, .csv, "
        ".tsv (the last four also .gz or .zst), a folder of them, or - for standard input.",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Array of an archive; key of JSON, or a path of keys: data.*.embedding. The usual "
        "names are found.",
    ),
]
VectorColumnOption = Annotated[
    str | None,
    typer.Option("--column", help="Column of a table that holds the vectors, or a path in it."),
]
TextColumnOption = Annotated[
    str | None,
    typer.Option("--text-column", help="With --embedding: column of the texts (text if not set)."),
]
KeepOption = Annotated[
    str | None,
    typer.Option("--keep", help="Columns or keys to write beside each text: id,doc."),
]
RangesOption = Annotated[
    str | None,
    typer.Option(
        "--ranges",
        help="Undo an 8-bit quantisation: LOW,HIGH, or a .npy of [2, D] ranges or of vectors it "
        "was calibrated on.",
    ),
]
VectorBatchOption = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Vectors decoded together; 64 if not set.")
]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="Embed each text again; write the cosine with its vector."),
]
SkipBadOption = Annotated[
    bool, typer.Option("--skip-bad", help="Pass over vectors that cannot be inverted; count them.")
]
RecoveredOption = Annotated[
    Path | None,
    typer.Option("--out", help="With --embedding: write the texts to a .jsonl or .parquet."),
]

# Of `invert` and `evaluate`
DenoiserDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the denoiser: float32 (a CPU's, if not set: the same text on each), bfloat16, "
        "float16, or auto (what is quickest here; that of strategies that call the encoder).",
    ),
]

# Written out, so that --help needs not load them; a test compares them with the registry
STRATEGY_OPTIONS = {
    "greedy": "order=confidence lengths=1",
    "entropy-bounded": "gamma=0.1 lengths=1",
    "euler": "temperature=1.0 top_p=1.0",
    "euler-remask": "temperature=1.0 top_p=1.0 threshold=1.0 probability=0.05",
    "two-stage": "noise=0.3 temperature=1.0 top_p=1.0",
    "best-of": "samples=16 temperature=0.7 top_p=1.0 stop_cosine=0.9999",
    "residual": "gamma=0.5 stop_cosine=0.9999",
    "guided-search": "beam=4 proposals=8 rounds=6 gamma=0.5 steering=0.8 gain=0.005 "
    "open_weights=False stop_cosine=0.9999",
}
_HEADING = "Strategies with their options and defaults (docs/decoding.md explains them):"
_LINES = (f"{name}: {options}" for name, options in STRATEGY_OPTIONS.items())
STRATEGIES_EPILOG = "\n\n".join((_HEADING, *_LINES))


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave the option of a parameter, whatever its value."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_idle(context: typer.Context, condition: str, actual: str, *names: str) -> None:
    """Refuse options that have no effect without another, or beside it.

    Args:
        context: Of the command.
        condition: What they need: ``with --embedding only``.
        actual: What is there in its place.
        *names: Of their parameters.

    Raises:
        ConfigError: One of them was given.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if is_given(context, name):
            raise ConfigError(f"{flags[name]} {condition}", actual, "Leave it out")


def note_idle(context: typer.Context, why: str, *names: str) -> None:
    """Note options that have no effect here, but may stand in a command that is used often."""
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in names:
        if is_given(context, name):
            note(f"{flags[name]} has no effect: {why}")


def note(text: str) -> None:
    """Write a note to standard error."""
    typer.echo(f"note: {text}", err=True)


def remark(text: str) -> None:
    """Write to standard error what --quiet silences."""
    if not OUTPUT.quiet:
        typer.echo(text, err=True)


def require_place(path: Path, flag: str, *suffixes: str) -> None:
    """Refuse a file that cannot be written there before anything is done for it.

    Args:
        path: Of the file.
        flag: The option, for messages.
        *suffixes: One of these ends its name.

    Raises:
        ConfigError: Another ending, a folder, or no folder to be in.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} that ends in {' or '.join(suffixes)}", str(path), "Rename it")
    if is_folder(path) or not is_folder(path.absolute().parent):
        there = "a folder" if is_folder(path) else f"no folder {path.parent}"
        raise ConfigError(f"a place to write {path}", there, f"Correct {flag}")


class _Stopped(KeyboardInterrupt):
    """A signal that asks to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def interruptible(way_on: str) -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGHUP one line and the exit code 128 + signal.

    Args:
        way_on: What the line says after "stopped": how the work can go on.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(number)

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup
            with suppress(ValueError):  # not the main thread
                before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        with suppress(OSError):  # after SIGHUP nobody may be there to read it
            typer.echo(f"stopped; {way_on}", err=True)
        raise typer.Exit(128 + getattr(error, "number", signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def opened(source: Any) -> Iterator[Any]:
    """The vectors of a `VectorFile`, those of standard input from a temporary file."""
    from unembed.vectors.read import STDIN, standard_input

    if source is None or str(source.path) != STDIN:
        yield source
        return
    with standard_input(sys.stdin.buffer, source) as vectors:
        yield vectors


def make_encoder(
    settings: dict[str, Any],
    device: str,
    trust_remote_code: bool,
    dtype: str = "float32",
    only_on: str | None = None,
) -> Any:
    """The encoder; in float32, as a vector store's owner would run it, unless speed matters.

    With ``only_on``, the number format is for that type of device, and chosen on others.
    """
    from unembed.device import choose_compute

    compute = choose_compute(device, dtype, training=False)
    if only_on not in (None, compute.device.type):
        compute = choose_compute(device, training=False)
    name, options = settings["name"], {k: v for k, v in settings.items() if k != "name"}
    return unembed.load_encoder(
        name, **options, trust_remote_code=trust_remote_code, compute=compute
    )


def api_settings(
    api_base: str | None, max_calls: int | None, price: float | None
) -> dict[str, Any]:
    """Those of the options for an API that were given, as settings for `make_encoder`."""
    settings = {"api_base": api_base, "max_calls": max_calls, "price": price}
    return {key: value for key, value in settings.items() if value is not None}


def show_usage(context: typer.Context, encoder: Any) -> None:
    """When the command ends, well or not, say what an encoder behind an API was asked for."""
    usage = getattr(encoder, "usage", None)
    if usage is not None:
        name = encoder.identity.name
        context.call_on_close(lambda: remark(f"{name}: {usage.describe()}"))


def encoder_settings(inverter: unembed.Inverter, where: str | None = None) -> dict[str, Any]:
    """Collect what `make_encoder` needs to load the encoder that an inverter inverts.

    With ``where`` it is taken from there; whether it is the same one shows its digest, or, behind
    an API, its vectors.
    """
    identity = inverter.encoder
    files = {"pooling": identity.pooling, "backend": identity.backend}
    settings = {"name": identity.name, "revision": identity.revision, **files}
    if where is not None:
        is_remote = where.startswith(API_PREFIX)  # which knows neither
        settings = {"name": where, "revision": None, **({} if is_remote else files)}
    return {**settings, "prompt": identity.prompt, "truncate_dim": identity.truncate_dim}


def make_inverter(
    checkpoint: str | None, config: str | None, device: str, dtype: str | None = None
) -> unembed.Inverter:
    """The inverter of a checkpoint, of a configuration's name, or the one that ships."""
    from unembed.checkpoints import shipped_inverters

    shipped = shipped_inverters()
    if config is not None and config not in shipped:
        raise ConfigError(
            f"--config with the name of weights that ship ({', '.join(shipped)})",
            repr(config),
            "Pass the folder that `unembed export` wrote as --checkpoint",
        )
    return unembed.Inverter.from_pretrained(checkpoint or config or "minilm").to(device, dtype)


def read_decoding(
    strategy: str,
    options: list[str] | None = None,
    steps: int | None = None,
    guidance: tuple[float, float] | None = None,
    repetition: float | None = None,
    encoder_calls: int = 0,
    length: int | None = None,
) -> Decoding:
    """Parse ``--strategy`` and add what other options say of decoding.

    Raises:
        ConfigError: No such strategy or option, one said twice, or a value out of range.
    """
    from unembed.decoding import Decoding

    settings = {
        "steps": steps,
        "guidance": None if guidance is None else "{!r}/{!r}".format(*guidance),
        "repetition": repetition,
        "encoder_calls": encoder_calls or None,
        "length": length,
    }
    words = [f"{name}={value}" for name, value in settings.items() if value is not None]
    for option in options or []:
        name, equals, _ = option.partition("=")
        if not equals or not name:
            raise ConfigError("an option of the form name=value", repr(option), "Correct --option")
    decoding = Decoding.parse(":".join([strategy, *words, *(options or [])]))
    refuse_idle_calls(decoding)
    return decoding


def refuse_idle_calls(decoding: Decoding) -> None:
    """Refuse encoder calls for a strategy that makes none.

    Raises:
        ConfigError: There are such.
    """
    if decoding.encoder_calls and not decoding.strategy.needs_encoder:
        raise ConfigError(
            "encoder calls (--encoder-calls) with best-of, residual or guided-search only",
            f"{decoding.encoder_calls} with {decoding.name}, which makes none",
            "Leave them out, or choose one of these strategies",
        )
