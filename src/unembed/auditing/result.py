"""What an audit found, as one value: for Python, and for every form of the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from unembed.auditing.findings import Finding
from unembed.auditing.identify import Identity
from unembed.auditing.neighbours import Neighbours
from unembed.auditing.scoring import Figures
from unembed.vectors.stores.store import StoreFacts

SCHEMA = 1  # version of the JSON


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
