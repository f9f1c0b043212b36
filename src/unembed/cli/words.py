"""`words`: which words a vector says are in its text, and learning to tell them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unembed.cli.options import (
    DeviceOption,
    KeyOption,
    SeedOption,
    SkipBadOption,
    TrustOption,
    VectorColumnOption,
    VectorsOption,
    is_given,
    make_encoder,
    note_idle,
    opened,
    refuse_idle,
)

if TYPE_CHECKING:
    from unembed.vectors.words import Word, WordProbe


def words(
    context: typer.Context,
    text: Annotated[
        str | None, typer.Option("--text", help="Embed this, and ask about it.")
    ] = None,
    embedding: VectorsOption = None,
    key: KeyOption = None,
    column: VectorColumnOption = None,
    skip_bad: SkipBadOption = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Words for each vector.")] = 50,
    names: Annotated[bool, typer.Option("--names", help="Names alone.")] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Also words that one text in ten has.")
    ] = False,
    probe: Annotated[
        str | None, typer.Option("--probe", help="Shipped name (minilm), or folder of --fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    fit: Annotated[
        Path | None,
        typer.Option(
            "--fit",
            help="Learn from these texts: Parquet, JSONL, txt; with --column from a Parquet that "
            "also holds their vectors.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --fit: the folder.")] = None,
    text_column: Annotated[
        str, typer.Option("--text-column", help="With --fit: the column of the text.")
    ] = "text",
    limit: Annotated[
        int, typer.Option("--limit", min=200, help="With --fit: texts drawn and embedded.")
    ] = 20_000,
    encoder: Annotated[
        str, typer.Option("--encoder", help="Where the encoder is, or with --fit which it is.")
    ] = "",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Tell which words are in the text behind a vector, of any length, with calibrated odds."""
    from unembed.errors import ConfigError

    inputs = {"--text": text, "--embedding": embedding, "--fit": fit}
    flags = [name for name, value in inputs.items() if value is not None]
    if len(flags) != 1:
        actual = " and ".join(flags) or "none"
        raise ConfigError("one of --text, --embedding and --fit", actual, "Pass one of them")
    _refuse_idle(context, flags[0])
    if fit is not None:
        if out is None:
            raise ConfigError("--out FOLDER with --fit", "none", "Say where the probe is to be")
        name = key or column
        source = None if name is None else (name, encoder or "unknown", skip_bad)
        kind = {"name": encoder or "all-MiniLM-L6-v2", "revision": None, "prompt": None}

        def make() -> Any:
            return make_encoder(kind, device, trust_remote_code, "auto")

        _fit(fit, text_column, out, limit, seed, source, make)
        return
    from unembed.vectors.words import WordProbe

    reader = WordProbe.from_pretrained(probe or "minilm")
    choice: dict[str, Any] = {"top": top, "common": common, "names": names}
    if text is not None:
        identity = reader.encoder
        settings = {**identity.to_dict(), "name": encoder or identity.name}
        del settings["dimension"], settings["weights_digest"]
        model = make_encoder(settings, device, trust_remote_code)
        identity.require_same(model.identity, "vectors")
        _show(reader.most_probable(model.encode([text]), **choice), [0], as_json)
        return
    assert embedding is not None
    _of_file(reader, embedding, key or column, skip_bad, choice, as_json)


def _of_file(
    reader: WordProbe,
    path: Path,
    key: str | None,
    skip_bad: bool,
    choice: dict[str, Any],
    as_json: bool,
) -> None:
    """The words behind each vector of a file, and what is strange about the vectors."""
    from unembed.cli.display import show_left_out, show_notes
    from unembed.vectors.read import VectorFile

    with opened(VectorFile(path, key, skip_bad)) as file:
        for chunk in file.chunks(reader.encoder.dimension):
            file.compare(chunk, reader.statistics, reader.encoder.name)
            show_notes(file)
            _show(reader.most_probable(chunk.vectors, **choice), chunk.rows, as_json)
        show_left_out(file.describe_left_out())


def _refuse_idle(context: typer.Context, source: str) -> None:
    """Refuse options that have no effect with the one of --text, --embedding and --fit.

    Raises:
        ConfigError: One was given.
    """
    if source == "--fit":
        asking = ("top", "names", "common", "probe", "as_json")
        refuse_idle(context, "without --fit only", source, *asking)
    else:
        refuse_idle(context, "with --fit only", source, "out", "text_column", "limit")
    if source == "--text":
        files = ("key", "column", "skip_bad")
        refuse_idle(context, "with --embedding or --fit only", source, *files)
    if is_given(context, "key"):
        refuse_idle(context, "without --key only", "--key, which says the same", "column")
    if source != "--fit":
        note_idle(context, "nothing is drawn", "seed")
    if source == "--embedding":
        idle = ("encoder", "device", "trust_remote_code")
        note_idle(context, "no text is embedded", *idle)


def _fit(
    texts: Path,
    text_column: str,
    out: Path,
    limit: int,
    seed: int,
    source: tuple[str, str, bool] | None,
    make: Callable[[], Any],
) -> None:
    """Learn a probe from texts that are embedded here, or from stored vectors."""
    from unembed.cli.display import StageDisplay
    from unembed.data.pieces import chunks_of
    from unembed.data.readers import read_texts
    from unembed.files import make_folder
    from unembed.vectors.words import TEXTS_PER_PAIR, fit_words

    model: Any = None
    corpus: list[str] = []
    if source is not None:
        identity, chunks, vectors = _stored_pairs(texts, text_column, *source, limit, seed)
    else:
        passages = list(read_texts(texts, text_column))
        model, pool = make(), chunks_of(passages, TEXTS_PER_PAIR * limit, seed)
        chunks, corpus = pool[:limit], pool[limit:]
    make_folder(out, keep=False)  # before what takes long
    with StageDisplay() as display:
        if model is not None:
            finished = 0

            def count(some: int) -> None:
                nonlocal finished
                finished += some
                display.update("embedding", finished, len(chunks))

            identity, vectors = model.identity, model.encode(chunks, count)
        encode = None if model is None else model.encode
        probe = fit_words(
            identity,
            chunks,
            vectors,
            encode=encode,
            corpus=corpus,
            seed=seed,
            progress=display.update,
        )
    probe.save(out)
    names = f"{len(probe.names)} of them names"
    typer.echo(f"{len(probe.words)} words, {names}, from {len(chunks)} texts in {out}")


def _stored_pairs(
    path: Path,
    text_column: str,
    vector_column: str,
    encoder: str,
    skip_bad: bool,
    limit: int,
    seed: int,
) -> tuple[Any, list[str], Any]:
    """Read texts with their stored vectors [N, D] from a file of both, and name what made them.

    Raises:
        DataError: The file is damaged.
        EmbeddingError: It has no such column, or the vectors are none, or not all of one size.
    """
    import numpy as np

    from unembed.encoders.base import EncoderIdentity
    from unembed.encoders.vectors import as_unit_vectors
    from unembed.vectors.read import VectorFile, vector_size

    file = VectorFile(path, vector_column, skip_bad, keep=[text_column])
    size = vector_size(file)
    rows = set(np.random.default_rng(seed).permutation(len(file))[:limit].tolist())
    texts: list[str] = []
    vectors = []
    for chunk in file.chunks(size):
        places = [place for place, row in enumerate(chunk.rows) if row in rows]
        texts += [str(chunk.columns[text_column][place] or "") for place in places]
        vectors.append(chunk.vectors[places])
    numbers = as_unit_vectors(np.concatenate(vectors), size)
    return EncoderIdentity(encoder, None, size, "", ""), texts, numbers


def _show(rows: Sequence[Sequence[Word]], numbers: Sequence[int], as_json: bool) -> None:
    """Print the words behind each vector with their probabilities; as JSON one line a vector."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    for number, words in zip(numbers, rows, strict=True):
        if as_json:
            record = {"row": number, "words": [asdict(word) for word in words]}
            sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
            continue
        table = Table(title=f"vector {number}", box=None, padding=(0, 2, 0, 0))
        table.add_column("word")
        for title in ("probability", "share of all texts"):
            table.add_column(title, justify="right")
        for word in words:
            name = Text(word.word, style="bold" if word.is_name else "")
            table.add_row(name, f"{word.probability:.3f}", f"{word.base_rate:.4f}")
        Console().print(table)
