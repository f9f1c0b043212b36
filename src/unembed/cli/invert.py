"""`invert`: vectors → texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.cli.options import (
    CallsOption,
    CheckOption,
    CheckpointOption,
    DenoiserDtypeOption,
    DeviceOption,
    EncoderOption,
    GuidanceOption,
    KeepOption,
    KeyOption,
    LengthOption,
    OptionOption,
    RangesOption,
    RecoveredOption,
    RepetitionOption,
    SeedOption,
    SkipBadOption,
    StepsOption,
    StrategyOption,
    TrustOption,
    VectorBatchOption,
    VectorColumnOption,
    VectorsOption,
    encoder_settings,
    make_encoder,
    make_inverter,
    read_decoding,
)


def invert(
    text: Annotated[
        str | None, typer.Option("--text", help="Embed this, invert it, compare.")
    ] = None,
    embedding: VectorsOption = None,
    key: KeyOption = None,
    column: VectorColumnOption = None,
    keep: KeepOption = None,
    ranges: RangesOption = None,
    skip_bad: SkipBadOption = False,
    check: CheckOption = False,
    batch_size: VectorBatchOption = None,
    out: RecoveredOption = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Use the weights shipped for this config.")
    ] = None,
    checkpoint: CheckpointOption = None,
    strategy: StrategyOption = "greedy",
    option: OptionOption = None,
    guidance: GuidanceOption = None,
    repetition: RepetitionOption = None,
    encoder_calls: CallsOption = 0,
    steps: StepsOption = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the tokens appearing.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="With --text: save the recovery as a picture.")
    ] = None,
    encoder: EncoderOption = None,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Recover the text behind an embedding, from the vector alone unless calls are allowed."""
    from unembed.errors import EmbeddingError

    if text is not None and not text.strip():
        raise EmbeddingError("a text with at least one visible character", repr(text), "Type one")
    if (text is None) == (embedding is None):
        actual = "neither" if text is None else "both"
        raise EmbeddingError("either --text or --embedding", actual, "Pass one of them")
    if text is None:
        _refuse_without("--text", "--embedding", svg=svg)
    else:
        switches = {"skip_bad": skip_bad or None, "check": check or None}
        files = {"out": out, "key": key, "column": column, "keep": keep, "ranges": ranges}
        _refuse_without("--embedding", "--text", **files, **switches, batch_size=batch_size)
    from unembed.cli.display import save_picture, show_round_trip, watcher
    from unembed.vectors.invert import invert_text

    settings = steps, guidance, repetition, encoder_calls, length
    decoding = read_decoding(strategy, option, *settings)
    decoding.check(has_encoder=decoding.encoder_calls > 0)
    source = (
        None if embedding is None else _source(embedding, key or column, skip_bad, keep, ranges)
    )
    inverter = make_inverter(checkpoint, config, device, dtype)
    model: Any = None
    if text is not None or decoding.encoder_calls or check:
        model = make_encoder(encoder_settings(inverter, encoder), device, trust_remote_code)
    options: dict[str, Any] = {"decoding": decoding, "seed": seed}
    trace: list[Any] = []
    if svg is not None:
        options["on_step"] = trace.append
    elif watch and not as_json:
        options["on_step"] = watcher(inverter.tokenizer)
    if text is not None:
        trip = invert_text(inverter, model, text, **options)
        show_round_trip(trip, as_json)
        if svg is not None:
            save_picture(svg, trip, trace, inverter.tokenizer)
        return
    options |= {"encoder": model, "batch_size": batch_size or 64, "check": model if check else None}
    with _opened(source) as vectors:
        _invert_vectors(inverter, vectors, out, as_json, options)


def _source(
    path: Path, key: str | None, skip_bad: bool, keep: str | None, ranges: str | None
) -> Any:
    from unembed.vectors.numbers import Ranges
    from unembed.vectors.read import VectorFile

    columns = [name.strip() for name in (keep or "").split(",") if name.strip()]
    limits = None if ranges is None else Ranges.parse(ranges)
    return VectorFile(path, key, skip_bad, columns, limits)


def _refuse_without(needed: str, actual: str, **options: Any) -> None:
    """Refuse options that do nothing without another one."""
    from unembed.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} with {needed} only", actual, "Leave it out")


@contextmanager
def _opened(source: Any) -> Iterator[Any]:
    """The vectors, those of standard input from a temporary file."""
    from unembed.vectors.read import STDIN, standard_input

    if str(source.path) != STDIN:
        yield source
        return
    with standard_input(sys.stdin.buffer, source) as vectors:
        yield vectors


def _invert_vectors(
    inverter: unembed.Inverter,
    source: Any,
    out: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """The vectors of a file, to another file or to the terminal."""
    from unembed.cli.display import show_left_out, show_notes, stream_inversions
    from unembed.vectors.invert import invert_stream

    try:
        if out is None:
            stream_inversions(invert_stream(inverter, source, **options), as_json, source)
        else:
            _write(inverter, source, out, options)
    except KeyboardInterrupt:
        fix = "the same command goes on from there" if out else "with --out the texts are kept"
        typer.echo(f"stopped; {fix}", err=True)
        raise typer.Exit(130) from None
    show_notes(source)
    show_left_out(source.describe_left_out())


def _write(inverter: unembed.Inverter, source: Any, out: Path, options: dict[str, Any]) -> None:
    from unembed.cli.display import StageDisplay, show_notes
    from unembed.vectors.invert import invert_to_file

    with StageDisplay() as display:

        def progress(stage: str, count: int, total: int) -> None:
            show_notes(source)  # before hours are spent on the rest
            display.update(stage, count, total)

        count = invert_to_file(inverter, source, out, progress=progress, **options)
    typer.echo(f"{count} texts in {out}")
