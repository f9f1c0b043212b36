"""Every defence against every attacker, one after the other, on held-out records."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unembed.data.readers import read_texts
from unembed.decoding import Decoding
from unembed.defences.attackers import (
    Attacker,
    Case,
    Denoising,
    Realignment,
    Unaware,
    fit_width,
    mean_cosine,
)
from unembed.defences.defence import ALL, Defence, Vectors
from unembed.defences.leak import (
    F1,
    STAGE,
    LeakMeter,
    Progress,
    Scores,
    array_digest,
    cached_array,
)
from unembed.defences.records import Queries, Records
from unembed.defences.result import NEEDS_PAIRS, DefenceRow
from unembed.defences.retrain import retrain
from unembed.defences.utility import OVERLAP, Ranking, rank, utilities
from unembed.encoders.base import Encoder, is_unicode
from unembed.errors import ConfigError, DataError, UnembedError
from unembed.evaluation.bootstrap import Figure, draw_blocks, summarise
from unembed.evaluation.metrics import Recovery
from unembed.inverter import Inverter

_MOST_CORPUS = 200_000  # texts of a corpus that are embedded
_OWN_QUERIES = 200
_LEVELS = (0.025, 0.975)


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
        self._plain: tuple[Ranking, dict[str, list[float]], Scores] | None = None
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
        texts, vectors = self.records.texts, self.records.vectors
        if path is None:
            share = self.held_out[: round(overlap * len(self.held_out))]
            rows = np.concatenate([self.rest, share])
            self.public, self.public_texts = vectors[self.rest], [texts[i] for i in self.rest]
            self.corpus, self.corpus_texts = vectors[rows], [texts[i] for i in rows]
            return
        lines = [t for t in read_texts(path, column) if t.strip() and is_unicode(t)][:_MOST_CORPUS]
        encoded = None if self.encoder is None else self._encode(lines, "embedding the corpus")
        if encoded is None or not lines:
            raise DataError("texts of a corpus, and the encoder", f"{path}", "Correct --corpus")
        self.public = self.corpus = encoded
        self.public_texts = self.corpus_texts = lines

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
        one: list[Attacker] = [Unaware()] if "U" in names else []
        one += [Denoising()] if "A1" in names else []
        one += [Realignment(count) for count in counts] if "R" in names else []
        self.attackers = one
        self.access = {attacker.name: attacker.access for attacker in one}
        self.minutes = minutes if "A2" in names else None
        if self.minutes is not None:
            self.access["A2"] = (
                "as A1; his inverter trained on vectors he defended himself, "
                f"{minutes:g} minutes of processor time"
            )
        self.looks_up = "L" in names
        held = [self.records.texts[i] for i in self.held_out]
        ids = [self.records.ids[i] for i in self.held_out]
        self.meter = LeakMeter(
            self.inverter, decoding, ids, held, self.seed, self.folder, self.progress
        )

    def set_queries(self, queries: Queries | None) -> None:
        """The user's queries, or records themselves."""
        if queries is None:
            own = np.random.default_rng([self.seed, 5]).permutation(len(self.records))[:200]
            queries = Queries(self.records.vectors[own], None, own.tolist())
            self.notes.append(
                "no queries were given: 200 records stand for them, and utility is the overlap of "
                "their neighbours with the undefended ones"
            )
        elif queries.relevant is not None:
            there = set(self.records.ids)
            keep = [i for i, ids in enumerate(queries.relevant) if ids & there]
            if not keep:
                raise DataError(
                    "queries whose `relevant` names ids of records",
                    "none that does",
                    "Say which column holds the ids with --id-column",
                )
            if len(keep) < len(queries.relevant):
                self.notes.append(
                    f"{len(queries.relevant) - len(keep)} queries find no record that is here"
                )
            queries = Queries(queries.vectors[keep], [queries.relevant[i] & there for i in keep])
        self.queries = queries

    # Rows

    def rows(self, defences: list[Defence], lenient: bool) -> list[DefenceRow]:
        """A row for each defence; of those of `all`, one that cannot run here is a note."""
        rows = []
        each = len(self.held_out) * (len(self.attackers) + (self.minutes is not None))
        self.meter.planned = each * len(defences)
        for place, defence in enumerate(defences):
            self.meter.done = place * each
            try:
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
        stored = self._applied(defence, clean)
        case = Case(
            defence,
            recipe,
            stored,
            stored[self.held_out],
            self.public,
            stored[self.pairs],
            self.records.vectors[self.pairs],
            self.inverter.encoder,
            self.seed,
        )
        # Attackers
        estimates, scores = self._attacked(case, name), dict[str, Scores]()
        for attacker, vectors in estimates.items():
            recoveries = self.meter.decode(vectors)
            scores[attacker] = self.meter.score(recoveries)
            if not self.floors:
                self._set_floors(recoveries)
        if self.minutes is not None and not defence.identity:
            scores["A2"] = self._retrained(case, name)
        scores |= self._looked_up(estimates)
        # Utility
        ranking = rank(defence, self.queries, stored, clean)
        plain = ranking if self._plain is None else self._plain[0]
        values = utilities(self.records.ids, self.queries, plain)(ranking)
        strongest = max(scores, key=lambda n: _mean(scores[n]))
        self.metric = next(iter(values))
        if self._plain is None:
            self._plain = ranking, values, scores[strongest]
        return self._concluded(case, clean, scores, values, ranking, estimates)

    def _concluded(
        self,
        case: Case,
        clean: Vectors,
        scores: dict[str, Scores],
        values: dict[str, list[float]],
        ranking: Ranking,
        estimates: dict[str, Vectors],
    ) -> DefenceRow:
        assert self._plain is not None
        strongest = max(scores, key=lambda n: _mean(scores[n]))
        apart = [n for n in scores if not n.startswith(NEEDS_PAIRS)]
        identification, identifier = self._identify(estimates)
        defence, same = case.defence, case.store.shape == clean.shape
        notes = []
        if defence.rerank:
            notes.append("leak is that of the codes: the float vectors must lie elsewhere")
        return DefenceRow(
            defence=str(defence),
            about=defence.describe(),
            secret=defence.secret,
            leak={n: {m: summarise(v, self.seed) for m, v in s.items()} for n, s in scores.items()},
            strongest=strongest,
            without_pairs=max(apart, key=lambda n: _mean(scores[n]), default=None),
            gain=_difference(self._plain[2][F1], scores[strongest][F1], self.seed),
            identification=identification,
            identifier=identifier,
            utility={name: summarise(v, self.seed) for name, v in values.items()},
            loss=_loss(self._plain[1][self.metric], values[self.metric], self.seed),
            cosine=mean_cosine(case.store, self.records.vectors) if same else None,
            bytes_each=defence.bytes_each(case.store.shape[1]),
            milliseconds=round(ranking.milliseconds, 3),
            notes=notes,
        )

    def _clean(self, defence: Defence) -> Vectors:
        """The encoder's vectors of what the defence embeds."""
        texts = defence.rewrite(self.records.texts)
        if texts is None:
            return self.records.vectors
        vectors = self._encode(texts, f"embedding for {defence}")
        if vectors is None:
            raise ConfigError(
                f"the encoder {self.inverter.encoder.name}, to embed texts again for {defence}",
                "none here",
                "Pass --encoder, or leave the defence out",
            )
        return vectors

    def _applied(self, defence: Defence, clean: Vectors) -> Vectors:
        """What the store holds; whatever a user's own defence does wrong is one line."""
        number = zlib.crc32(str(defence).encode())
        try:
            defence.fit(clean, np.random.default_rng([self.seed, 6, number]))
            stored = np.asarray(defence.apply(clean, np.random.default_rng([self.seed, 7, number])))
        except UnembedError:
            raise
        except Exception as error:  # a user's own class
            raise ConfigError(
                f"{defence} to be applied", f"{type(error).__name__}: {error}", "Correct it"
            ) from error
        if stored.ndim != 2 or len(stored) != len(clean) or not np.isfinite(stored).all():  # noqa: PLR2004
            raise ConfigError(
                f"{defence} to give {len(clean)} finite vectors",
                f"shape {list(stored.shape)}",
                "Correct it",
            )
        return stored.astype(np.float32)

    # Attackers

    def _attacked(self, case: Case, name: str) -> dict[str, Vectors]:
        """Attacker → estimates of the held-out vectors; without those who do what U does."""
        estimates = {}
        data = array_digest(case.store, case.public, case.pairs_stored, case.pairs_clean)
        for attacker in self.attackers:
            key = {"defence": name, "attacker": attacker.name, "data": data, "seed": self.seed}

            def make(attacker: Attacker = attacker) -> Vectors | None:
                return attacker.estimate(case)

            vectors = cached_array(self.folder, key, make)
            if vectors is not None:
                estimates[attacker.name] = vectors
        if not estimates:  # undefended, and U was not asked for
            estimates["U"] = fit_width(case.held_out, case.dimension)
        return estimates

    def _retrained(self, case: Case, name: str) -> Scores:
        assert self.minutes is not None
        prepare = Denoising().prepare(case)
        inverter = retrain(
            self.inverter,
            self.public_texts,
            lambda step: prepare(case.simulate(step)),
            self.minutes,
            seed=self.seed,
            folder=self.folder,
            name=name,
            progress=self.progress,
        )
        vectors = prepare(case.held_out)
        return self.meter.score(self.meter.decode(vectors, inverter))

    def _looked_up(self, estimates: dict[str, Vectors]) -> dict[str, Scores]:
        """L: the corpus searched with the best estimate that needs no pair, and with the best."""
        if not self.looks_up:
            return {}
        scores = {}
        apart = [n for n in estimates if not n.startswith("R")]
        aligned = [n for n in estimates if n.startswith("R")]
        for names, has in ((apart, "A1"), (aligned, "pairs")):
            if names:
                label = "L" if has == "A1" else f"L+{names[-1]}"
                self.access[label] = (
                    "a corpus of texts, some of them the store's, the encoder, and what "
                    f"{'A1' if label == 'L' else names[-1]} has"
                )
                recoveries = self.meter.look_up(
                    estimates[names[-1]], self.corpus_texts, self.corpus
                )
                scores[label] = self.meter.score(recoveries)
        return scores

    def _identify(self, estimates: dict[str, Vectors]) -> tuple[Figure | None, str | None]:
        """How many records are told from all others by their own text."""
        best: tuple[float, str, list[float]] | None = None
        for name, vectors in estimates.items():
            nearest = (vectors @ self.records.vectors.T).argmax(axis=1)
            hits = (nearest == self.held_out).astype(float).tolist()
            if best is None or sum(hits) > best[0]:
                best = sum(hits), name, hits
        if best is None:
            return None, None
        return summarise(best[2], self.seed), best[1]

    def _set_floors(self, recoveries: Sequence[Recovery]) -> None:
        """What the undefended recoveries give of other texts, and one text for all."""
        shuffled = self.meter.shuffled(recoveries)
        mean = self.records.vectors.mean(axis=0, keepdims=True)
        (item,) = self.inverter.invert(mean, decoding=self.meter.decoding, seed=self.seed)
        constant = self.meter.score([Recovery(item.text, item.token_ids)] * len(recoveries))
        for name, scores in (("another text's recovery", shuffled), ("one text for all", constant)):
            self.floors[name] = {m: summarise(v, self.seed) for m, v in scores.items()}


def _mean(scores: Scores) -> float:
    """Token F1, which every text has."""
    return float(np.mean([value or 0.0 for value in scores[F1]]))


def _difference(
    plain: Sequence[float | None], other: Sequence[float | None], seed: int
) -> Figure | None:
    pairs = zip(plain, other, strict=True)
    return summarise([a - b for a, b in pairs if a is not None and b is not None], seed)


def _loss(plain: Sequence[float], other: Sequence[float], seed: int) -> Figure | None:
    """1 - mean / undefended mean, with the interval of queries drawn anew for both."""
    before, after = np.array(plain), np.array(other)
    if before.sum() == 0:
        return None
    weights = draw_blocks(len(before), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = 1.0 - (weights @ after) / (weights @ before)
    low, high = np.quantile(drawn[np.isfinite(drawn)], _LEVELS)
    return Figure(float(1.0 - after.sum() / before.sum()), float(low), float(high), len(before))
