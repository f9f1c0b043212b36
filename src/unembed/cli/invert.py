"""`invert`: vectors → texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.cli.loading import encoder_settings, make_encoder, make_inverter, read_decoding
from unembed.cli.options import (
    CallsOption,
    CheckpointOption,
    DenoiserDtypeOption,
    DeviceOption,
    EncoderOption,
    GuidanceOption,
    KeyOption,
    OptionOption,
    RecoveredOption,
    RepetitionOption,
    SeedOption,
    SkipBadOption,
    StepsOption,
    StrategyOption,
    TrustOption,
    VectorColumnOption,
    VectorsOption,
)


def invert(
    text: Annotated[
        str | None, typer.Option("--text", help="Embed this, invert it, compare.")
    ] = None,
    embedding: VectorsOption = None,
    key: KeyOption = None,
    column: VectorColumnOption = None,
    skip_bad: SkipBadOption = False,
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
        found = "neither" if text is None else "both"
        raise EmbeddingError("either --text or --embedding", found, "Pass one of them")
    for_files = {"--out": out, "--key": key, "--column": column, "--skip-bad": skip_bad or None}
    _only_with("--embedding", for_files if text is not None else {}, "--text")
    _only_with("--text", {"--svg": svg} if text is None else {}, "--embedding")
    from unembed.cli.display import save_picture, show_round_trip, watcher
    from unembed.vectors.invert import invert_text
    from unembed.vectors.read import VectorFile

    decoding = read_decoding(strategy, option, steps, guidance, repetition, encoder_calls)
    decoding.check(has_encoder=decoding.encoder_calls > 0)
    source = None if embedding is None else VectorFile(embedding, key or column, skip_bad)
    inverter = make_inverter(checkpoint, config, device, dtype)
    model: Any = None
    if text is not None or encoder_calls or decoding.encoder_calls:
        model = make_encoder(encoder_settings(inverter, encoder), device, trust_remote_code)
    options: dict[str, Any] = {"decoding": decoding, "seed": seed}
    seen: list[Any] = []
    if svg is not None:
        options["on_step"] = seen.append
    elif watch and not as_json:
        options["on_step"] = watcher(inverter.tokenizer)
    if source is not None:
        options["encoder"] = model
        _invert_vectors(inverter, source, out, as_json, options)
        return
    assert text is not None
    trip = invert_text(inverter, model, text, **options)
    show_round_trip(trip, as_json)
    if svg is not None:
        save_picture(svg, trip, seen, inverter.tokenizer)


def _only_with(needed: str, options: dict[str, Any], given: str) -> None:
    from unembed.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} with {needed} only", given, "Leave it out")


def _invert_vectors(
    inverter: unembed.Inverter,
    source: Any,
    out: Path | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """The vectors of a file, to another file or to the terminal."""
    from unembed.cli.display import StageDisplay, show_inversions, show_left_out
    from unembed.vectors.invert import invert_file, invert_to_file

    if out is None:
        show_inversions(invert_file(inverter, source, **options), as_json)
    else:
        with StageDisplay() as display:
            count = invert_to_file(inverter, source, out, progress=display.update, **options)
        typer.echo(f"{count} texts in {out}")
    show_left_out(source.describe_left_out())
