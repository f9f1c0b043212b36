"""`invert`: vectors → texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import unembed
from unembed.cli.align import AlignOption, warn
from unembed.cli.evaluate import CorpusOption, require_search
from unembed.cli.options import (
    ApiBaseOption,
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
    MaxCallsOption,
    OptionOption,
    PriceOption,
    QuietOption,
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
    VerboseOption,
    api_settings,
    encoder_settings,
    interruptible,
    is_given,
    make_encoder,
    make_inverter,
    note,
    note_idle,
    opened,
    read_decoding,
    refuse_idle,
    require_place,
    show_usage,
)

_OF_FILES = (
    *("out", "key", "column", "keep", "ranges", "skip_bad", "check", "batch_size", "align"),
)


def invert(
    context: typer.Context,
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
    align: AlignOption = None,
    strategy: StrategyOption = "greedy",
    option: OptionOption = None,
    guidance: GuidanceOption = None,
    repetition: RepetitionOption = None,
    encoder_calls: CallsOption = 0,
    corpus: CorpusOption = None,
    steps: StepsOption = None,
    length: LengthOption = None,
    seed: SeedOption = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the tokens appearing.")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="With --text: save the recovery as a picture.")
    ] = None,
    encoder: EncoderOption = None,
    api_base: ApiBaseOption = None,
    max_calls: MaxCallsOption = None,
    price: PriceOption = None,
    device: DeviceOption = "auto",
    dtype: DenoiserDtypeOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Recover the text behind an embedding, from the vector alone unless calls are allowed."""
    _require_one(text, embedding)
    _refuse_all_idle(context, text, out)
    if svg is not None:
        require_place(svg, "--svg", ".svg")
    settings = steps, guidance, repetition, encoder_calls, length
    decoding = read_decoding(strategy, option, *settings)
    require_search(corpus, [decoding.name])
    decoding.check(has_encoder=True)  # it is loaded where it is called
    source = (
        None if embedding is None else _source(embedding, key or column, skip_bad, keep, ranges)
    )
    with_encoder = text is not None or decoding.encoder_calls > 0 or check
    _note_idle(context, decoding.name, with_encoder)
    if source is not None and out is not None:
        _require_apart(source, out)
    inverter = make_inverter(checkpoint, config, device, dtype).aligned(align)
    warn(inverter.alignment)
    model: Any = None
    if with_encoder:
        where = encoder_settings(inverter, encoder) | api_settings(api_base, max_calls, price)
        model = make_encoder(where, device, trust_remote_code)
        show_usage(context, model)
    options: dict[str, Any] = {"decoding": decoding, "seed": seed}
    if corpus is not None:
        options["corpus"] = _corpus(corpus, inverter)
    if text is not None:
        _invert_text(inverter, model, text, as_json, watch, svg, options)
        return
    if watch:
        options["on_step"] = _watcher(inverter)
    options |= {"encoder": model, "batch_size": batch_size or 64, "check": model if check else None}
    with opened(source) as vectors:
        _invert_vectors(inverter, vectors, out, as_json, options)


def _require_one(text: str | None, embedding: Path | None) -> None:
    from unembed.encoders.base import is_blank
    from unembed.errors import EmbeddingError

    if text is not None and is_blank(text):
        raise EmbeddingError("a text with at least one visible character", repr(text), "Type one")
    if (text is None) == (embedding is None):
        actual = "neither" if text is None else "both"
        raise EmbeddingError("either --text or --embedding", actual, "Pass one of them")


def _note_idle(context: typer.Context, strategy: str, with_encoder: bool) -> None:
    if not with_encoder:
        api = ("api_base", "max_calls", "price")
        note_idle(context, "no text is embedded", "encoder", "trust_remote_code", *api)
    if strategy in ("greedy", "entropy-bounded"):
        note_idle(context, f"{strategy} draws nothing", "seed")


def _refuse_all_idle(context: typer.Context, text: str | None, out: Path | None) -> None:
    """Refuse options that would have no effect beside the others.

    Raises:
        ConfigError: One was given.
    """
    if text is None:
        refuse_idle(context, "with --text only", "--embedding", "svg")
    else:
        refuse_idle(context, "with --embedding only", "--text", *_OF_FILES)
    if out is not None:
        refuse_idle(context, "without --out only", "--out", "as_json")
    if is_given(context, "checkpoint"):
        refuse_idle(context, "without --checkpoint only", "--checkpoint", "config")
    if is_given(context, "key"):
        refuse_idle(context, "without --key only", "--key, which says the same", "column")
    if is_given(context, "as_json"):
        refuse_idle(context, "without --json only", "--json", "watch")


def _watcher(inverter: unembed.Inverter) -> Any:
    from unembed.cli.display import watcher

    return watcher(inverter.tokenizer)


def _invert_text(
    inverter: unembed.Inverter,
    encoder: Any,
    text: str,
    as_json: bool,
    watch: bool,
    svg: Path | None,
    options: dict[str, Any],
) -> None:
    """A text's own embedding, inverted and compared with it."""
    from unembed.cli.display import save_picture, show_round_trip
    from unembed.vectors.invert import invert_text

    tokens, most = len(inverter.tokenizer.encode([text])[0]), inverter.length - 1
    if tokens > most:
        note(f"the text has {tokens} tokens, and this inverter writes at most {most} of them")
    trace: list[Any] = []
    callbacks = [trace.append] if svg is not None else []
    callbacks += [_watcher(inverter)] if watch else []

    def on_step(step: Any) -> None:
        for callback in callbacks:
            callback(step)

    with_steps = {"on_step": on_step} if callbacks else {}
    trip = invert_text(inverter, encoder, text, **options, **with_steps)
    show_round_trip(trip, as_json)
    if svg is not None:
        save_picture(svg, trip, trace, inverter.tokenizer)


def _require_apart(source: Any, out: Path) -> None:
    """Refuse a place for the texts before the inverter is loaded."""
    from unembed.vectors.output import require_writable
    from unembed.vectors.read import STDIN

    require_writable(out, [] if str(source.path) == STDIN else source.parts())


def _corpus(folder: Path, inverter: unembed.Inverter) -> Any:
    from unembed.data.pairs import CorpusSearch, Pairs

    pairs = Pairs.open(folder)
    inverter.encoder.require_same(pairs.encoder, "the corpus")
    return CorpusSearch(pairs, inverter.tokenizer)


def _source(
    path: Path, key: str | None, skip_bad: bool, keep: str | None, ranges: str | None
) -> Any:
    from unembed.vectors.numbers import Ranges
    from unembed.vectors.read import STDIN, VectorFile

    columns = [name.strip() for name in (keep or "").split(",") if name.strip()]
    limits = None if ranges is None else Ranges.parse(ranges)
    source = VectorFile(path, key, skip_bad, columns, ranges=limits)
    if str(path) != STDIN:
        source.parts()  # a wrong path fails before the inverter is loaded
    return source


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

    way_on = "the same command goes on from there" if out else "with --out the texts are kept"
    with interruptible(way_on):
        if out is None:
            stream_inversions(invert_stream(inverter, source, **options), as_json, source)
        else:
            _write(inverter, source, out, options)
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
