"""Comparison of defences on a user's own vectors: every defence against every attacker."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unembed.data.readers import require_texts
from unembed.decoding import Decoding
from unembed.decoding.settings import as_decoding
from unembed.defences.attackers import (
    Attacker,
    Case,
    Denoising,
    Floats,
    Realignment,
    Unaware,
    fit_width,
    mean_cosine,
    parse_attackers,
    parse_pairs,
)
from unembed.defences.defence import (
    ALL,
    Defence,
    Vectors,
    as_defences,
)
from unembed.defences.leak import (
    F1,
    STAGE,
    LeakMeter,
    Progress,
    Scores,
    array_digest,
    cached_array,
    identify,
)
from unembed.defences.records import Queries, Records, as_queries, as_records, own_queries
from unembed.defences.result import NEEDS_PAIRS, DefenceReport, DefenceRow
from unembed.defences.retrain import retrain
from unembed.defences.utility import OVERLAP, Ranking, rank, relative_loss, utilities
from unembed.defences.write import fit_and_apply, rewrite, try_out
from unembed.encoders import as_encoder
from unembed.encoders.base import Encoder
from unembed.errors import (
    DataError,
    UnembedError,
    require_callable,
    require_number,
    require_path,
    require_text,
    require_whole,
)
from unembed.evaluation.bootstrap import Figure, summarise
from unembed.evaluation.cache import as_folder, unfinished_folder
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import corpus_texts
from unembed.inverter import Inverter
from unembed.vectors.invert import as_inverter

_OWN_QUERIES = 200
_LEAST_MINUTES, _MOST_MINUTES = 1e-6, 1e6
_RERANKED = "leak is that of the codes: the float vectors must lie elsewhere"


def defend(  # noqa: PLR0913 - the front door; all but the first have a default
    records: Records,
    *,
    queries: Queries | None = None,
    defences: str | Sequence[Defence | str] = "all",
    attackers: str | Sequence[str] = "all",
    pairs: Iterable[int] = (10, 100, 1000),
    budget: float = 0.02,
    held_out: int = 200,
    corpus: Path | str | None = None,
    corpus_column: str = "text",
    overlap: float = 0.1,
    minutes: float = 5.0,
    to: Inverter | str | Path = "minilm",
    encoder: Encoder | str | Path | None = None,
    decoding: Decoding | str = "greedy",
    seed: int = 0,
    folder: Path | str | None = None,
    progress: Progress | None = None,
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
        DataError: Too few records, or records, queries or a corpus that are none.
        EmbeddingError: Vectors that the inverter does not read.
        EncoderError: An encoder that is not the inverter's.
        ConfigError: An unknown defence or attacker, a number out of range, a value of another kind.
    """
    lenient = isinstance(defences, str) and "all" in defences.split(",")
    selection, names = as_defences(defences), parse_attackers(attackers)
    counts = parse_pairs(pairs)
    held_out, seed = require_whole(held_out=(held_out, 1), seed=(seed, 0))
    budget, overlap = require_number(budget=(budget, 0.0, 1.0), overlap=(overlap, 0.0, 1.0))
    (minutes,) = require_number(minutes=(minutes, _LEAST_MINUTES, _MOST_MINUTES))
    require_path(corpus=corpus)
    require_text(corpus_column=corpus_column)
    require_callable(progress=progress)
    keep_in, source = as_folder(folder), None if corpus is None else Path(corpus)
    inverter, decoding = as_inverter(to), as_decoding(decoding, {})
    decoding.check(has_encoder=False)
    records, queries, model = _inputs(records, queries, encoder, inverter)
    if source is not None:
        require_texts(source, corpus_column)
    required = [each for each in selection if not (lenient and str(each) in ALL)]
    try_out(required, records.vectors, model is not None)
    with unfinished_folder(keep_in) as work_folder:
        run = Comparison(records, inverter, model, work_folder, progress or _silent, seed)
        run.split(held_out, max(counts) if "R" in names else 0)
        run.read_corpus(source, corpus_column, overlap)
        run.plan(names, counts, decoding, minutes)
        run.set_queries(queries)
        rows = run.rows(selection, lenient)
        settings = run.settings(counts, names, source, overlap, decoding)
    return DefenceReport(rows, run.floors, run.access, run.metric, budget, settings, run.notes)


def _inputs(
    records: Any, queries: Any, encoder: Any, inverter: Inverter
) -> tuple[Records, Queries | None, Encoder | None]:
    """What a caller hands over, checked before anything takes long."""
    records = as_records(records, inverter.encoder)
    if queries is not None:
        queries = as_queries(queries, inverter.encoder, len(records))
        queries.among(records.ids)
    model = as_encoder(encoder)
    if model is not None:
        inverter.require_encoder(model)
    return records, queries, model


def _silent(stage: str, done: int, total: int) -> None:
    """Nobody is told how far it is."""


class Comparison:
    """One comparison on its way from records to rows.

    Args:
        records: Of the store.
        inverter: The attacker's.
        encoder: Of the records, where it is here.
        folder: Keeps what is finished.
        progress: Called with (stage, done, total).
        seed: Of everything drawn.
    """

    def __init__(
        self,
        records: Records,
        inverter: Inverter,
        encoder: Encoder | None,
        folder: Path | None,
        progress: Progress,
        seed: int,
    ) -> None:
        self.records, self.inverter, self.encoder = records, inverter, encoder
        self.folder, self.progress, self.seed = folder, progress, seed
        self.notes = [f"left out: {n} × {why}" for why, n in records.left_out.items()]
        self.access: dict[str, str] = {}
        self.floors: dict[str, dict[str, Figure | None]] = {}
        self.metric = OVERLAP
        self._plain: tuple[Ranking, list[float], Floats] | None = None  # undefended
        doubt = inverter.fingerprint and inverter.fingerprint.statistics
        if doubt:
            strange = doubt.doubt(records.vectors, inverter.encoder.name)
            self.notes += [] if strange is None else [strange]

    # Who knows what

    def split(self, held_out: int, pairs: int) -> None:
        """Which records are attacked, which are the attacker's own, which leak as pairs."""
        order = np.random.default_rng([self.seed, 3]).permutation(len(self.records))
        count = min(held_out, len(order) // 2)
        self.held_out, self.rest = np.sort(order[:count]), np.sort(order[count:])
        self.pairs = np.random.default_rng([self.seed, 4]).permutation(self.rest)[:pairs]
        if len(self.pairs) < pairs:
            self.notes.append(
                f"{pairs:,} pairs: there are {len(self.pairs):,} records that are not held out"
            )

    def read_corpus(self, path: Path | None, column: str, overlap: float) -> None:
        """The attacker's own texts with their vectors, and the corpus he looks texts up in."""
        if path is None:
            share = self.held_out[: round(overlap * len(self.held_out))]
            self.public = self.records.part(self.rest)
            self.corpus = self.records.part(np.concatenate([self.rest, share]))
            return
        texts = corpus_texts(path, column)
        vectors = self._encode(texts, "embedding the corpus") if texts else None
        if vectors is None:
            raise DataError("texts of a corpus, and the encoder", f"{path}", "Correct --corpus")
        self.public = self.corpus = Records([str(i) for i in range(len(texts))], texts, vectors)

    def _encode(self, texts: list[str], stage: str) -> Vectors | None:
        encoder = self.encoder
        if encoder is None:
            return None

        def make() -> Vectors:
            done, parts = 0, []
            for start in range(0, len(texts), 256):
                parts.append(encoder.encode(texts[start : start + 256]))
                done += len(parts[-1])
                self.progress(stage, done, len(texts))
            return np.concatenate(parts)

        return cached_array(self.folder, {"texts": texts, "encoder": encoder.identity.key}, make)

    def plan(self, names: list[str], pairs: list[int], decoding: Decoding, minutes: float) -> None:
        """The attackers in the order of the tables."""
        counts = sorted({min(count, len(self.pairs)) for count in pairs})
        apart: list[Attacker] = [Unaware()] if "U" in names else []
        apart += [Denoising()] if "A1" in names else []
        aligned = [Realignment(count) for count in counts] if "R" in names else []
        self.attackers = [*apart, *aligned]
        self.access = {attacker.name: attacker.access for attacker in self.attackers}
        self.minutes = minutes if "A2" in names else None
        if self.minutes is not None:
            self.access["A2"] = (
                "as A1; his inverter trained on vectors he defended himself, "
                f"{minutes:g} minutes of processor time"
            )
        self.lookups: dict[str, list[str]] = {}  # label → whose estimates, the best last
        if "L" in names:
            self.lookups["L"] = [attacker.name for attacker in apart] or ["U"]
            if aligned:
                self.lookups[f"L+{aligned[-1].name}"] = [each.name for each in aligned]
        for label, whose in self.lookups.items():
            self.access[label] = (
                f"a corpus with some of the store's texts, the encoder, and what {whose[-1]} has"
            )
        targets = self.records.part(self.held_out)
        self.meter = LeakMeter(
            self.inverter,
            decoding,
            targets.ids,
            targets.texts,
            self.seed,
            self.folder,
            self.progress,
        )

    def set_queries(self, queries: Queries | None) -> None:
        """The user's queries, or records themselves."""
        if queries is None:
            self.queries = own_queries(self.records, _OWN_QUERIES, self.seed)
            self.notes.append(
                f"no queries were given: {len(self.queries.vectors)} records stand for them, and "
                "utility is the overlap of their neighbours with the undefended ones"
            )
            return
        self.queries = queries.among(self.records.ids)
        lost = len(queries.vectors) - len(self.queries.vectors)
        if lost:
            self.notes.append(f"{lost} queries find no record that is here")

    def settings(
        self,
        pairs: list[int],
        names: list[str],
        corpus: Path | None,
        overlap: float,
        decoding: Decoding,
    ) -> dict[str, Any]:
        """How the comparison was made, for the report."""
        return {
            "encoder": self.inverter.encoder.name,
            "records": len(self.records),
            "held_out": len(self.held_out),
            "queries": len(self.queries.vectors),
            "labels": self.queries.relevant is not None,
            "pairs": pairs,
            "attackers": ",".join(names),
            "corpus": "" if corpus is None else corpus.name,
            "overlap": overlap if corpus is None else None,
            "minutes": self.minutes,
            "decoding": str(decoding),
            "longer_than_the_inverter_writes": self.meter.longer,
            "seed": self.seed,
        }

    # Rows

    def rows(self, defences: list[Defence], lenient: bool) -> list[DefenceRow]:
        """A row for each defence; of those of `all`, one that cannot run here is a note."""
        rows = []
        each = len(self.held_out) * (len(self.attackers) + (self.minutes is not None))
        self.meter.planned = each * len(defences)
        for place, defence in enumerate(defences):
            self.meter.done = place * each
            try:
                if lenient:
                    try_out([defence], self.records.vectors, self.encoder is not None)
                rows.append(self._row(defence))
            except UnembedError as error:
                if not lenient or str(defence) not in ALL or not rows:
                    raise
                self.notes.append(f"{defence}: not measured, {error}")
        self.progress(STAGE, self.meter.planned, self.meter.planned)
        return rows

    def _row(self, defence: Defence) -> DefenceRow:
        name, recipe = str(defence), copy.deepcopy(defence)
        clean = self._clean(defence)
        store = fit_and_apply(defence, clean, self.seed)
        case = Case(
            defence,
            recipe,
            store,
            store[self.held_out],
            self.public.vectors,
            store[self.pairs],
            self.records.vectors[self.pairs],
            self.inverter.encoder,
            self.seed,
        )
        # Leak
        estimates, scores = self._estimates(case, name), dict[str, Scores]()
        for attacker, vectors in estimates.items():
            recoveries = self.meter.decode(vectors)
            scores[attacker] = self.meter.score(recoveries)
            if not self.floors:
                self._set_floors(recoveries)
        if self.minutes is not None and not defence.identity:
            scores["A2"] = self._retrain(case, name)
        scores |= self._look_up(estimates)
        f1 = {attacker: np.array(each[F1], float) for attacker, each in scores.items()}
        strongest = max(f1, key=lambda n: f1[n].mean())
        apart = [n for n in f1 if not n.startswith(NEEDS_PAIRS)]
        share, identifier = identify(estimates, self.records.vectors, self.held_out, self.seed)
        # Utility
        same = store.shape == clean.shape
        ranking = rank(defence, self.queries, store, clean)
        plain = ranking if self._plain is None else self._plain[0]
        values = utilities(self.records.ids, self.queries, plain)(ranking)
        self.metric = next(iter(values))
        if self._plain is None:
            self._plain = ranking, values[self.metric], f1[strongest]
        _, plain_values, plain_f1 = self._plain
        return DefenceRow(
            defence=name,
            about=defence.describe(),
            secret=defence.secret,
            leak={n: {m: summarise(v, self.seed) for m, v in s.items()} for n, s in scores.items()},
            strongest=strongest,
            without_pairs=max(apart, key=lambda n: f1[n].mean(), default=None),
            gain=summarise((plain_f1 - f1[strongest]).tolist(), self.seed),
            identification=share,
            identifier=identifier,
            utility={metric: summarise(v, self.seed) for metric, v in values.items()},
            loss=relative_loss(plain_values, values[self.metric], self.seed),
            cosine=mean_cosine(store, self.records.vectors) if same else None,
            bytes_each=defence.bytes_each(store.shape[1]),
            milliseconds=round(ranking.milliseconds, 3),
            notes=[_RERANKED] if defence.rerank else [],
        )

    def _clean(self, defence: Defence) -> Vectors:
        """The encoder's vectors of what the defence embeds."""
        texts = rewrite(defence, self.records.texts)
        if texts is None:
            return self.records.vectors
        vectors = self._encode(texts, f"embedding for {defence}")
        assert vectors is not None  # it was tried out
        return vectors

    # Attackers

    def _estimates(self, case: Case, name: str) -> dict[str, Vectors]:
        """Attacker → estimates of the held-out vectors; without those who do what U does."""
        estimates = {}
        data = array_digest(case.store, case.public, case.pairs_stored, case.pairs_clean)
        for attacker in self.attackers:
            key = {"defence": name, "attacker": attacker.name, "data": data, "seed": self.seed}
            vectors = cached_array(self.folder, key, partial(attacker.estimate, case))
            if vectors is not None:
                estimates[attacker.name] = vectors
        if not estimates:  # undefended, and U was not asked for
            estimates["U"] = fit_width(case.held_out, case.dimension)
        return estimates

    def _retrain(self, case: Case, name: str) -> Scores:
        assert self.minutes is not None
        inverter = retrain(
            self.inverter,
            self.public.texts,
            lambda step: case.undo(case.simulate(step)),
            self.minutes,
            seed=self.seed,
            folder=self.folder,
            name=name,
            progress=self.progress,
        )
        return self.meter.score(self.meter.decode(case.undo(case.held_out), inverter))

    def _look_up(self, estimates: dict[str, Vectors]) -> dict[str, Scores]:
        """L: the corpus searched with the best estimate that needs no pair, and with the best."""
        scores = {}
        for label, names in self.lookups.items():
            there = [name for name in names if name in estimates]
            if there:
                best, corpus = estimates[there[-1]], self.corpus
                nearest = self.meter.look_up(best, corpus.texts, corpus.vectors)
                scores[label] = self.meter.score(nearest)
        return scores

    def _set_floors(self, recoveries: Sequence[Recovery]) -> None:
        """What the undefended recoveries give of other texts, and one text for all."""
        shuffled = self.meter.shuffled(recoveries)
        mean = self.records.vectors.mean(axis=0, keepdims=True)
        (item,) = self.inverter.invert(mean, decoding=self.meter.decoding, seed=self.seed)
        constant = self.meter.score([Recovery(item.text, item.token_ids)] * len(recoveries))
        for name, scores in (("another text's recovery", shuffled), ("one text for all", constant)):
            self.floors[name] = {m: summarise(v, self.seed) for m, v in scores.items()}
