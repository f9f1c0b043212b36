"""Recoveries → figures, floors, the worst records, findings: the end of an audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from unembed.auditing.attacks import (
    LOOKUP,
    VECTOR_ONLY,
    WITH_PROBE,
    Attack,
    Corpus,
    constant,
)
from unembed.auditing.findings import Evidence, Strongest, make_findings
from unembed.auditing.identify import Identity
from unembed.auditing.neighbours import Neighbours, find_neighbours
from unembed.auditing.result import AuditReport, ShownRecord
from unembed.auditing.scoring import ANY, F1, Figures, Record, Scorer, figures
from unembed.auditing.sensitive import Masker
from unembed.encoders.vectors import as_unit_vectors
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.rows import derangement
from unembed.inverter import Inverter
from unembed.vectors.stores.store import Store, VectorBatch

SHUFFLED, CONSTANT = "floor: another record's recovery", "floor: one text for all"
NEAREST = "floor: nearest other text of the corpus"  # what search gives without an inverter
_MOST_RECORDS = 20
_MOST_CHARS = 1000
_LEAST = 2  # records that can be scored beside a floor
_MOST_GROUPS = 20
_SIGNS = ".,;:!?\"'()"

Recoveries = Mapping[str, Mapping[int, Recovery]]
Scores = Mapping[str, Mapping[int, dict[str, Any]]]


@dataclass
class Conclusion:
    """All that the end of an audit needs.

    Attributes:
        store: Read by now.
        inverter: The attacker's.
        batch: The sample.
        records: Its rows that have a text.
        groups: The field grouped by, one value a row.
        corpus: Of the auditor's.
        identity: Of the vectors.
        attacks: That were run.
        settings: How the audit was made.
        notes: So far.
    """

    store: Store
    inverter: Inverter
    batch: VectorBatch
    records: list[Record]
    groups: list[Any] | None
    corpus: Corpus | None
    identity: Identity
    attacks: list[Attack]
    settings: dict[str, Any]
    notes: list[str]

    def report(self, recoveries: Recoveries) -> AuditReport:
        """Score what came back, and conclude.

        Args:
            recoveries: Attack → index of the record → recovery.
        """
        scorer = Scorer(self.inverter.tokenizer, self.inverter.length - 1)
        scores = {
            name: {r.row: scorer.measure(r, items[r.row]) for r in self.records if r.row in items}
            for name, items in recoveries.items()
        }
        if 0 < len(self.records) < _LEAST:
            self.notes.append("a single record has a text: no floor can be computed")
        floors = self._floors(scorer, recoveries)
        seed = self.settings["seed"]
        table = {name: figures(list(values.values()), seed) for name, values in scores.items()}
        floor_figures = {name: figures(list(v.values()), seed) for name, v in floors.items()}
        neighbours = find_neighbours(self.batch.ids, self.batch.vectors, self.groups, self.corpus)
        strongest = self._strongest(table, floor_figures) if self.records else None
        evidence = self._evidence(strongest, neighbours)
        everything = {**scores, **floors}
        return AuditReport(
            store=self.store.facts,
            identity=self.identity,
            read=self._reading(),
            attacks={a.name: self._describe(a, recoveries, table) for a in self.attacks},
            floors=floor_figures,
            by_length=self._broken_down(everything, lambda record: record.length),
            by_group={}
            if self.groups is None
            else self._broken_down(everything, lambda record: record.group or "none"),
            leak=None if strongest is None else _leak(strongest),
            strongest=None if strongest is None else strongest.name,
            records=[] if strongest is None else self._worst(strongest.name, recoveries, scores),
            neighbours=neighbours,
            findings=make_findings(evidence),
            settings=self.settings,
            notes=self.notes,
        )

    def _floors(
        self, scorer: Scorer, recoveries: Recoveries
    ) -> dict[str, dict[int, dict[str, Any]]]:
        """What an inverter must beat: another record's recovery, one text for all, and search.

        Search answers with the nearest text of the corpus that is not the record's own: where the
        corpus has that too, finding it is the lookup's success, and no floor.
        """
        if len(self.records) < _LEAST:
            return {}
        floors: dict[str, dict[int, dict[str, Any]]] = {}
        for attack in self.attacks:
            items = recoveries[attack.name]
            records = [record for record in self.records if record.row in items]
            if len(records) < _LEAST:
                continue
            other = derangement(len(records))
            floors[self._shuffle_label(attack.name)] = {
                record.row: scorer.measure(
                    record, replace(items[records[other[place]].row], cosine=None)
                )
                for place, record in enumerate(records)
            }
        first, records = recoveries[self.attacks[0].name], self.records
        if self.batch.vectors.shape[1] == self.inverter.encoder.dimension:
            text = constant(first, self.inverter, self.batch.vectors)
            floors[CONSTANT] = {r.row: scorer.measure(r, text) for r in records}
        if self.corpus is not None:
            unit = as_unit_vectors(self.batch.vectors, self.batch.vectors.shape[1])
            answers = self.corpus.answers(
                unit[[r.row for r in records]], self.inverter, [r.text for r in records]
            )
            floors[NEAREST] = {
                record.row: scorer.measure(record, answer)
                for record, answer in zip(records, answers, strict=True)
            }
        return floors

    def _strongest(
        self, table: Mapping[str, Figures], floors: Mapping[str, Figures]
    ) -> Strongest | None:
        """The attack that gets most above its floors; search is one of all but the lookup."""
        candidates = [
            Strongest(
                a.name,
                a.access,
                table[a.name],
                _bounds(floors, [*self._guesses(a.name), *([] if a.name == LOOKUP else [NEAREST])]),
                a.access in (VECTOR_ONLY, WITH_PROBE),
            )
            for a in self.attacks
            if table[a.name]
        ]
        return max(candidates, key=lambda s: (s.hurt, s.gain(F1), s.above(F1)), default=None)

    def _shuffle_label(self, attack: str) -> str:
        return SHUFFLED + ("" if attack == self.attacks[0].name else f" ({attack})")

    def _guesses(self, attack: str) -> tuple[str, str]:
        """The floors of an attack that know nothing of the vector."""
        return self._shuffle_label(attack), CONSTANT

    @cached_property
    def _names(self) -> frozenset[str]:
        """Names of all records: at the beginning of a sentence another record tells them."""
        return frozenset(name for record in self.records for name in record.spans.get("names", ()))

    def _evidence(self, strongest: Strongest | None, neighbours: Neighbours) -> Evidence:
        longest = self.inverter.length - 1
        return Evidence(
            facts=self.store.facts,
            identity=self.identity,
            strongest=strongest,
            scored=len(self.records),
            longer=sum(len(record.token_ids) > longest for record in self.records),
            longest=longest,
            neighbours=neighbours,
            group_by=self.settings["group_by"],
            command=self.settings["command"],
        )

    def _reading(self) -> dict[str, Any]:
        longest = self.inverter.length - 1
        return {
            "rows": len(self.batch),
            "left_out": dict(sorted(self.store.left_out.items())),
            "with_text": len(self.records),
            "longer_than_the_inverter_writes": sum(
                len(record.token_ids) > longest for record in self.records
            ),
            "longest_the_inverter_writes": longest,
        }

    def _describe(
        self,
        attack: Attack,
        recoveries: Recoveries,
        table: Mapping[str, Figures],
    ) -> dict[str, Any]:
        items = list(recoveries[attack.name].values())
        sure = [float(np.mean(i.confidences)) for i in items if i.confidences]
        cosines = [i.cosine for i in items if i.cosine is not None]
        return {
            "access": attack.access,
            "records": len(items),
            "figures": table[attack.name] or None,
            "mean_confidence": round(float(np.mean(sure)), 4) if sure else None,
            "mean_cosine": round(float(np.mean(cosines)), 4) if cosines else None,
            "settings": attack.settings,
        }

    def _broken_down(
        self,
        scores: Scores,
        label: Callable[[Record], str],
    ) -> dict[str, dict[str, Figures]]:
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(label(record), []).append(record)
        largest = sorted(groups, key=lambda name: (-len(groups[name]), name))[:_MOST_GROUPS]
        seed = self.settings["seed"]
        return {
            name: {
                attack: figures([of[r.row] for r in groups[name] if r.row in of], seed)
                for attack, of in scores.items()
            }
            for name in sorted(largest, key=_by_number)
        }

    def _worst(
        self,
        name: str,
        recoveries: Recoveries,
        scores: Scores,
    ) -> list[ShownRecord]:
        """The records of which most came back: by what hurts, then by token F1."""

        def hurt(row: int) -> int:
            return sum(v[0] for v in scores[name][row].values() if isinstance(v, tuple))

        there = [record for record in self.records if record.row in scores[name]]
        order = sorted(there, key=lambda r: (-hurt(r.row), -scores[name][r.row][F1], r.id))
        distinct = {(r.text, recoveries[name][r.row].text): r for r in reversed(order)}
        first = {record.row for record in distinct.values()}  # of equal records the first
        return [
            self._show(name, record, recoveries[name][record.row], scores[name][record.row])
            for record in order
            if record.row in first
        ][:_MOST_RECORDS]

    def _show(
        self, attack: str, record: Record, recovery: Recovery, values: Mapping[str, Any]
    ) -> ShownRecord:
        original = record.text[:_MOST_CHARS]
        has = {word.strip(_SIGNS).casefold() for word in record.text.split()}
        words = [(word, word.strip(_SIGNS).casefold() in has) for word in recovery.text.split()]
        if not self.settings["show_pii"]:
            masker = Masker(record.spans, names=self._names)
            original = masker.text(original)
            words = [(masker.text(word), right) for word, right in words]
        return ShownRecord(
            id=record.id,
            attack=attack,
            length=record.length,
            group=record.group,
            f1=round(float(values[F1]), 4),
            hurt={kind: v for kind, v in values.items() if isinstance(v, tuple)},
            original=original,
            words=words,
        )


def _bounds(floors: Mapping[str, Figures], names: Iterable[str]) -> dict[str, float]:
    """Metric → the highest upper end among some floors, as far as they are there."""
    bounds: dict[str, float] = {}
    for name in names:
        for metric, figure in floors.get(name, {}).items():
            if figure is not None:
                bounds[metric] = max(bounds.get(metric, 0.0), figure.high)
    return bounds


def _leak(strongest: Strongest) -> float:
    """The larger of the share of what hurts that came back, and token F1 above the floor."""
    hurt, f1 = strongest.figures.get(ANY), strongest.figures.get(F1)
    shares = [0.0]
    if hurt is not None:
        shares.append(hurt.mean)
    if f1 is not None:
        shares.append(f1.mean - strongest.floor.get(F1, 0.0))
    return round(max(shares), 6)


def _by_number(name: str) -> tuple[int, str]:
    first = name.split(" ", maxsplit=1)[0]
    return (int(first), name) if first.isdecimal() else (1 << 30, name)
