"""The audit: what is in the store, how an attacker would read it, how much that gives him."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unembed.audit.attacks import (
    WITH_CALLS,
    WITH_MAP,
    WITH_PAIRS,
    Align,
    Attack,
    Corpus,
    FitAlign,
    Progress,
    constant,
    inversion,
    lookup,
    run_attack,
    split_pairs,
)
from unembed.audit.findings import Evidence, Finding, Strongest, make_findings
from unembed.audit.identify import Identity, identify
from unembed.audit.neighbours import Neighbours, find_neighbours
from unembed.audit.scoring import ANY, F1, Figures, Record, Scorer, figures, make_records
from unembed.audit.sensitive import Masker, make_finder
from unembed.decoding import Decoding
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.errors import ConfigError, StoreError, UnembedError
from unembed.evaluation.cache import FOLDER
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.rows import derangement
from unembed.inverter import Inverter
from unembed.vectors.stores.address import open_store
from unembed.vectors.stores.store import Store, StoreFacts, VectorBatch

SCHEMA = 1
SHOWN = 20
SHUFFLED, CONSTANT = "floor: another record's recovery", "floor: one text for all"
_CALLED_ROWS = 32  # records the encoder is called for
_SHOWN_CHARS = 1000
_LEAST = 2  # records that can be scored beside a floor
_MOST_GROUPS = 20


@dataclass(frozen=True)
class ShownRecord:
    """A record beside what came back of it, for the report.

    Attributes:
        id: Of the record in the store.
        attack: That recovered it.
        length: Bucket of its length in tokens.
        group: Its value of the field grouped by.
        f1: Token F1.
        hurt: Kind → (recovered, in all).
        original: The text, what hurts in it masked unless it was to be shown.
        words: The recovery, each word with whether the original has it; masked likewise.
    """

    id: str
    attack: str
    length: str
    group: str | None
    f1: float
    hurt: dict[str, tuple[int, int]]
    original: str
    words: list[tuple[str, bool]]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        store: Facts about the store.
        identity: What its vectors look like, and whose they are.
        read: Rows read, rows left out by reason, records with a text.
        attacks: Name → access, records, figures (None where no text lies beside the vectors), mean
            confidence and mean cosine of what came back, which are no evidence of recovery.
        floors: Name → figures of what knows nothing of the vector.
        by_length: Bucket of tokens → attack → figures.
        by_group: Value of the field → attack → figures.
        leak: What ``--fail-over`` is compared with: the larger of the share of what hurts that
            came back and of token F1 above the highest floor; None where it was not measured.
        strongest: The attack that got most.
        records: The twenty records of which most came back.
        neighbours: What the places of the vectors give away.
        findings: With severity, the most severe first.
        settings: How it was made.
        notes: What a reader should know beside.
    """

    store: StoreFacts
    identity: Identity
    read: dict[str, Any]
    attacks: dict[str, dict[str, Any]]
    floors: dict[str, Figures]
    by_length: dict[str, dict[str, Figures]]
    by_group: dict[str, dict[str, Figures]]
    leak: float | None
    strongest: str | None
    records: list[ShownRecord]
    neighbours: Neighbours
    findings: list[Finding]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def severity(self) -> str:
        """Of the most severe finding."""
        return self.findings[0].severity if self.findings else "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, as ``audit-report.schema.json`` describes it."""
        return {"schema": SCHEMA, "severity": self.severity, **asdict(self)}


def audit(  # noqa: PLR0913 - the front door; all but the first have a default
    store: Store | str | Path,
    *,
    sample: int = 1000,
    seed: int = 0,
    to: Inverter | str = "minilm",
    encoder: Encoder | str | None = None,
    decoding: Decoding | str = "greedy",
    align: Align | None = None,
    align_from_store: int = 0,
    fit_align: FitAlign | None = None,
    corpus: Path | str | None = None,
    corpus_column: str = "text",
    encoder_calls: int = 0,
    group_by: str | None = None,
    text_column: str | None = None,
    show_pii: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Read a sample of a vector store, invert it, and say what that means.

    Args:
        store: An open store, or the address of one (docs/audit.md lists the forms).
        sample: Rows to draw.
        seed: Of everything drawn: two runs with one seed give one report.
        to: The attacker's inverter, or its name.
        encoder: That made the vectors; the inverter's if not given.
        decoding: How the inverter decodes.
        align: A map of the store's vectors into the inverter's space.
        align_from_store: Make such a map from this many rows that have a text, and score it on
            others.
        fit_align: What makes it.
        corpus: A file of texts such as an attacker may have, for the lookup.
        corpus_column: Column of its texts.
        encoder_calls: Let the attacker call the encoder so often for each of 32 records.
        group_by: A field of the store to break figures down by, such as the tenant.
        text_column: Where the text is, if not under a usual name.
        show_pii: Show what hurts unmasked in the records of the report.
        folder: Keeps recoveries while it runs, so that the same call goes on after a kill.
        progress: Called with (stage, done, total).

    Raises:
        StoreError: The store cannot be read, or its vectors fit no attack.
        ConfigError: A setting that does not exist or does not go with the others.
    """
    report = progress or (lambda stage, done, total: None)
    settings: dict[str, Any] = {
        "store": str(store) if isinstance(store, (str, Path)) else store.facts.collection,
        "sample": sample,
        "seed": seed,
        "decoding": str(decoding),
        "corpus": str(corpus or ""),
        "align_from_store": align_from_store,
        "encoder_calls": encoder_calls,
        "group_by": group_by,
        "show_pii": show_pii,
    }
    with ExitStack() as stack:
        if isinstance(store, (str, Path)):
            keep = () if group_by is None else (group_by,)
            store = stack.enter_context(open_store(store, text_column=text_column, keep=keep))
        inverter = Inverter.from_pretrained(to) if isinstance(to, str) else to
        run = _Run(store, inverter, settings, folder, report)
        run.load_encoders(encoder)
        run.read(sample, seed, group_by)
        run.identify()
        if corpus is not None:
            run.read_corpus(Path(corpus), corpus_column)
        run.plan(decoding, seed, encoder_calls)
        run.plan_alignment(decoding, seed, align, (align_from_store, fit_align))
        result = run.attack()
    if folder is not None:  # recovered texts unmasked, of no use once all are there
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return result


class _Run:
    """One audit on its way from the store to the report."""

    def __init__(
        self,
        store: Store,
        inverter: Inverter,
        settings: dict[str, Any],
        folder: Path | None,
        progress: Progress,
    ) -> None:
        self.store, self.inverter, self.settings = store, inverter, settings
        self.folder, self.progress = folder, progress
        self.notes: list[str] = []
        self.attacks: list[Attack] = []
        self.corpus: Corpus | None = None
        self.home: Encoder | None = None  # of the inverter's space
        self.victim: Encoder | None = None  # of the store's vectors

    def load_encoders(self, encoder: Encoder | str | None) -> None:
        """The encoder of the store, if it is named, and that of the inverter."""
        identity = self.inverter.encoder
        if isinstance(encoder, str):
            encoder = load_encoder(encoder)
        if encoder is not None and encoder.identity.key == identity.key:
            self.home = self.victim = encoder
            return
        self.victim = encoder
        try:
            self.home = load_encoder(
                identity.name, revision=identity.revision, prompt=identity.prompt
            )
        except (UnembedError, OSError) as error:
            self.notes.append(f"the inverter's encoder could not be loaded: {error}")
        if encoder is None:
            self.victim = self.home

    def read(self, sample: int, seed: int, group_by: str | None) -> None:
        """Draw the sample and find what hurts in it."""
        if sample < 1:
            raise ConfigError("a sample of at least 1 row", str(sample), "Correct --sample")
        self.progress("reading the store", 0, sample)
        self.batch: VectorBatch = self.store.sample(sample, seed)
        self.progress("reading the store", len(self.batch), len(self.batch))
        self.groups = None if group_by is None else self.batch.payload[group_by]
        finder, named = make_finder()
        self.settings["sensitive_found_by"] = named
        self.records = make_records(
            self.batch.ids,
            self.batch.texts or [],
            self.groups,
            self.inverter.tokenizer,
            finder,
        )

    def identify(self) -> None:
        """Say whose vectors they are."""
        batch = self.batch
        self.identity = identify(batch.vectors, batch.texts, self.inverter, self.victim)
        if self.identity.verdict == "different":
            self.notes.append(
                "the vectors are not those of the encoder they were compared with: what the "
                "inverter makes of them means little without --encoder or a map (--align)"
            )

    def read_corpus(self, path: Path, column: str) -> None:
        """Embed an attacker's own texts."""
        if self.victim is None or self.victim.identity.dimension != self.batch.vectors.shape[1]:
            self.notes.append("corpus: not looked up, the store's encoder cannot be run here")
            return
        self.corpus = Corpus.read(path, column, self.victim, self.progress)

    def plan(self, decoding: Decoding | str, seed: int, encoder_calls: int) -> None:
        """The attacks without a map."""
        decoding = Decoding.parse(decoding) if isinstance(decoding, str) else decoding
        decoding.check(has_encoder=decoding.encoder_calls > 0)
        if self.batch.vectors.shape[1] == self.inverter.encoder.dimension:
            self.attacks.append(inversion(self.inverter, decoding, seed, encoder=self.home))
            if encoder_calls:
                self._plan_calls(seed, encoder_calls)
        if self.corpus is not None:
            self.attacks.append(lookup(self.inverter, self.corpus))

    def _plan_calls(self, seed: int, calls: int) -> None:
        if self.home is None:
            raise ConfigError("the encoder, to be called", "none here", "Pass --encoder")
        called = Decoding.parse(f"guided-search:encoder_calls={calls}")
        made = inversion(
            self.inverter,
            called,
            seed,
            encoder=self.home,
            name="inverter and encoder",
            access=WITH_CALLS.format(n=calls),
        )
        rows = tuple(record.row for record in self.records[:_CALLED_ROWS])
        self.attacks.append(Attack(made.name, made.access, made.recover, made.settings, rows))

    def plan_alignment(
        self,
        decoding: Decoding | str,
        seed: int,
        align: Align | None,
        from_store: tuple[int, FitAlign | None],
    ) -> None:
        """The attack through a map: one that is given, or one made from some rows of the store."""
        decoding = Decoding.parse(decoding) if isinstance(decoding, str) else decoding
        pairs, fit = from_store
        if align is not None:
            self.attacks.append(
                inversion(
                    self.inverter,
                    decoding,
                    seed,
                    encoder=self.home,
                    align=align,
                    access=WITH_MAP,
                    name="inverter through a map",
                )
            )
        if pairs:
            self.attacks.append(self._aligned(decoding, seed, pairs, fit))
        if not self.attacks:
            raise StoreError(
                f"vectors of {self.inverter.encoder.dimension} dimensions, which the inverter of "
                f"{self.inverter.encoder.name} reads",
                f"{self.batch.vectors.shape[1]} dimensions ({self.identity.candidates})",
                "Pass --checkpoint with an inverter of that encoder, or --align with a map",
            )

    def _aligned(self, decoding: Decoding, seed: int, pairs: int, fit: FitAlign | None) -> Attack:
        if fit is None or self.home is None:
            raise ConfigError(
                "a way to make a map from pairs, and the inverter's encoder",
                "none here",
                "Pass --align with a map, or leave --align-from-store out",
            )
        if len(self.records) < 2 * _LEAST:
            raise StoreError(
                "rows with a text, to make a map from",
                str(len(self.records)),
                "Name the column of the texts with --text-column",
            )
        known, rest = split_pairs(len(self.records), pairs, seed)
        texts = [self.records[place].text for place in known]
        rows = [self.records[place].row for place in known]
        made = inversion(
            self.inverter,
            decoding,
            seed,
            encoder=self.home,
            align=fit(self.batch.vectors[rows], self.home.encode(texts)),
            access=WITH_PAIRS.format(n=len(known)),
            name="inverter through pairs of the store",
        )
        scored = tuple(self.records[place].row for place in rest)
        return Attack(made.name, made.access, made.recover, made.settings, scored)

    # What came of it

    def attack(self) -> AuditReport:
        """Run the attacks, score them, and conclude."""
        recoveries = {
            attack.name: run_attack(
                attack, self.batch.ids, self.batch.vectors, self.folder, self.progress
            )
            for attack in self.attacks
        }
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
            read=self._read(),
            attacks={a.name: self._described(a, recoveries, table) for a in self.attacks},
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
        self, scorer: Scorer, recoveries: Mapping[str, dict[int, Recovery]]
    ) -> dict[str, dict[int, dict[str, Any]]]:
        """What knows nothing of the vector: another record's recovery, and one text for all."""
        first = recoveries[self.attacks[0].name]
        records = [record for record in self.records if record.row in first]
        if len(records) < _LEAST:
            return {}
        other = derangement(len(records))
        floors = {
            SHUFFLED: {
                record.row: scorer.measure(record, first[records[other[place]].row])
                for place, record in enumerate(records)
            }
        }
        if self.batch.vectors.shape[1] == self.inverter.encoder.dimension:
            text = constant(first, self.inverter, self.batch.vectors)
            floors[CONSTANT] = {r.row: scorer.measure(r, text) for r in records}
        return floors

    def _strongest(
        self, table: Mapping[str, Figures], floors: Mapping[str, Figures]
    ) -> Strongest | None:
        bounds: dict[str, float] = {}
        for of_one in floors.values():
            for name, figure in of_one.items():
                if figure is not None:
                    bounds[name] = max(bounds.get(name, 0.0), figure.high)
        candidates = [
            Strongest(a.name, a.access, table[a.name], bounds, place == 0)
            for place, a in enumerate(self.attacks)
            if table[a.name]
        ]
        return max(candidates, key=lambda s: (s.hurt, s.gain(F1)), default=None)

    def _evidence(self, strongest: Strongest | None, neighbours: Neighbours) -> Evidence:
        longest = self.inverter.length - 1
        words = ["unembed", "audit", repr(self.settings["store"])]
        for name in ("sample", "seed", "group_by", "align_from_store", "encoder_calls", "corpus"):
            if self.settings[name]:
                words += [f"--{name.replace('_', '-')}", str(self.settings[name])]
        return Evidence(
            facts=self.store.facts,
            identity=self.identity,
            strongest=strongest,
            scored=len(self.records),
            longer=sum(len(record.token_ids) > longest for record in self.records),
            longest=longest,
            neighbours=neighbours,
            group_by=self.settings["group_by"],
            command=" ".join(words),
        )

    def _read(self) -> dict[str, Any]:
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

    def _described(
        self,
        attack: Attack,
        recoveries: Mapping[str, dict[int, Recovery]],
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
        scores: Mapping[str, Mapping[int, dict[str, Any]]],
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
        recoveries: Mapping[str, dict[int, Recovery]],
        scores: Mapping[str, Mapping[int, dict[str, Any]]],
    ) -> list[ShownRecord]:
        """The records of which most came back: by what hurts, then by token F1."""

        def hurt(row: int) -> int:
            return sum(v[0] for v in scores[name][row].values() if isinstance(v, tuple))

        there = [record for record in self.records if record.row in scores[name]]
        order = sorted(there, key=lambda r: (-hurt(r.row), -scores[name][r.row][F1], r.id))
        return [
            self._shown(name, record, recoveries[name][record.row], scores[name][record.row])
            for record in order[:SHOWN]
        ]

    def _shown(
        self, attack: str, record: Record, recovery: Recovery, values: Mapping[str, Any]
    ) -> ShownRecord:
        original = record.text[:_SHOWN_CHARS]
        has = {word.strip(".,;:!?\"'()").casefold() for word in record.text.split()}
        words = [
            (word, word.strip(".,;:!?\"'()").casefold() in has) for word in recovery.text.split()
        ]
        if not self.settings["show_pii"]:
            masker = Masker(record.spans)
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
