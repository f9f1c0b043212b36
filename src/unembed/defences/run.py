"""Comparison of defences on a user's own vectors: every defence against every attacker."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from unembed.data.readers import require_texts
from unembed.decoding import Decoding
from unembed.decoding.settings import as_decoding
from unembed.defences.comparison import Comparison
from unembed.defences.defence import Defence, parse_defences, with_none
from unembed.defences.leak import Progress
from unembed.defences.records import Queries, Records
from unembed.defences.result import DefenceReport
from unembed.encoders.base import Encoder
from unembed.errors import ConfigError, DataError
from unembed.inverter import Inverter

UNFINISHED = ".unfinished"  # folder of recoveries and estimates, removed at the end
ATTACKERS = ("U", "A1", "R", "L")  # those of `all`; A2 is named
_LEAST_RECORDS = 8


def defend(  # noqa: PLR0913 - the front door; all but the first have a default
    records: Records,
    *,
    queries: Queries | None = None,
    defences: str | Sequence[Defence] = "all",
    attackers: str = "all",
    pairs: Sequence[int] = (10, 100, 1000),
    budget: float = 0.02,
    held_out: int = 200,
    corpus: Path | None = None,
    corpus_column: str = "text",
    overlap: float = 0.1,
    minutes: float = 5.0,
    to: Inverter | str = "minilm",
    encoder: Encoder | None = None,
    decoding: Decoding | str = "greedy",
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> DefenceReport:
    """Measure leak and utility of every defence against attackers who know of it.

    Held-out records are attacked; leaked pairs and the attacker's own texts are others.

    Args:
        records: Of the store; `read_records` reads them from a file.
        queries: What users ask; 200 of the records themselves if not given, without labels.
        defences: Names as `parse_defences` reads them, or defences; undefended is always there.
        attackers: Of ``U,A1,A2,R,L``, separated by commas; ``all`` leaves A2 out.
        pairs: Of R, how many leaked each time.
        budget: Share of the utility that a recommended defence may cost.
        held_out: Records attacked, at most half.
        corpus: A file of texts that the attacker has; if not given they are the records that are
            not held out, and a share ``overlap`` of the held-out ones for L.
        corpus_column: Column of its texts.
        overlap: Share of the held-out texts in the corpus of L, 0 to 1.
        minutes: Of A2's training, for each defence.
        to: The attacker's inverter, or its name.
        encoder: Of the records; needed for a corpus and for defences that change texts.
        decoding: How the inverter decodes.
        seed: Of everything drawn.
        folder: Keeps what is finished, so that the same call goes on after a kill.
        progress: Called with (stage, done, total).

    Raises:
        DataError: Too few records, or vectors that the inverter does not read.
        ConfigError: An unknown defence or attacker, or a number out of range.
    """
    selection = parse_defences(defences) if isinstance(defences, str) else with_none(defences)
    lenient = isinstance(defences, str) and "all" in defences.split(",")
    inverter = Inverter.from_pretrained(to) if isinstance(to, str) else to
    names = parse_attackers(attackers)
    _check(records, inverter, budget, overlap, pairs, held_out)
    if corpus is not None:
        require_texts(corpus, corpus_column)
    run = Comparison(records, inverter, encoder, _unfinished(folder), progress, seed)
    run.split(held_out, max(pairs))
    run.read_corpus(corpus, corpus_column, overlap)
    run.plan(names, sorted(set(pairs)), as_decoding(decoding, {}), minutes)
    run.set_queries(queries)
    rows = run.rows(selection, lenient)
    settings = {
        "encoder": inverter.encoder.name,
        "records": len(records),
        "held_out": len(run.held_out),
        "queries": len(run.queries.vectors),
        "labels": run.queries.relevant is not None,
        "pairs": sorted(set(pairs)),
        "attackers": ",".join(names),
        "corpus": "" if corpus is None else corpus.name,
        "overlap": overlap if corpus is None else None,
        "minutes": minutes if "A2" in names else None,
        "decoding": str(decoding),
        "longer_than_the_inverter_writes": run.meter.longer,
        "seed": seed,
    }
    report = DefenceReport(rows, run.floors, run.access, run.metric, budget, settings, run.notes)
    if folder is not None:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return report


def _check(
    records: Records,
    inverter: Inverter,
    budget: float,
    overlap: float,
    pairs: Sequence[int],
    held_out: int,
) -> None:
    for name, value in (("--budget", budget), ("--overlap", overlap)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} from 0 to 1", f"{value:g}", f"Correct {name}")
    if not pairs or min(pairs) < 1 or held_out < 1:
        raise ConfigError("pairs and held-out records of 1 or more", f"{pairs}", "Correct --pairs")
    if len(records) < _LEAST_RECORDS:
        raise DataError(
            f"at least {_LEAST_RECORDS} records with a text and a vector",
            f"{len(records)}",
            "Choose another file",
        )
    if records.vectors.shape[1] != inverter.encoder.dimension:
        raise DataError(
            f"vectors of {inverter.encoder.dimension} dimensions, which the inverter of "
            f"{inverter.encoder.name} reads",
            f"{records.vectors.shape[1]}",
            "Pass --checkpoint with an inverter of that encoder",
        )


def parse_attackers(text: str) -> list[str]:
    """Names of attackers, ``all`` for those of ``ATTACKERS``.

    Raises:
        ConfigError: An unknown one, or none.
    """
    names = [n for w in text.split(",") for n in (ATTACKERS if w.strip() == "all" else [w.strip()])]
    unknown = [name for name in names if name not in (*ATTACKERS, "A2")]
    if unknown or not names:
        raise ConfigError("attackers of U, A1, A2, R, L or all", repr(text), "Correct --attackers")
    if names == ["L"]:
        names = ["U", "L"]
    return list(dict.fromkeys(names))


def parse_pairs(text: str) -> list[int]:
    """Numbers of leaked pairs, separated by commas.

    Raises:
        ConfigError: Something else, or none.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigError("numbers of pairs: 10,100,1000", repr(text), "Correct --pairs")
    return sorted({int(word) for word in words})


def _unfinished(folder: Path | None) -> Path | None:
    """Where recoveries lie until all are there: for nobody else to read."""
    if folder is None:
        return None
    try:
        (folder / UNFINISHED).mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error
    return folder / UNFINISHED
