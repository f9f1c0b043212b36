"""What the figures mean: findings with severity by rule, evidence, what to do, and identifiers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from unembed.auditing.identify import Identity
from unembed.auditing.neighbours import Neighbours
from unembed.auditing.scoring import ANY, EXACT, F1, Figures
from unembed.auditing.sensitive import KINDS
from unembed.vectors.stores.store import StoreFacts

SEVERITIES = ("none", "low", "medium", "high", "critical")
VERSION = 1  # of the rule
# Steps of the rule; docs/audit.md says it in words
_HURT_CRITICAL, _HURT_HIGH, _EXACT_HIGH, _WORDS_MEDIUM = 0.25, 0.10, 0.05, 0.10

INVERSION_IDS = {
    "OWASP": ["LLM09:2026", "LLM08:2025", "LLM02:2026"],
    "AISVS": ["v1.0-C8.2.1", "v1.0-C5.2.7", "v1.0-C11.1.3", "v1.0-C11.2.2"],
    "MITRE ATLAS": ["AML.T0085.000", "AML.T0024.001"],
    "NIST AI 100-2": ["NISTAML.032"],
    "GDPR": ["Art. 4(1)", "Art. 5(1)(f)", "Art. 32", "Art. 33"],
}
_ACCESS_IDS = {
    "OWASP": ["LLM09:2026", "LLM08:2025"],
    "AISVS": ["v1.0-C5.2.2", "v1.0-C8.1.1"],
    "MITRE ATLAS": ["AML.T0085.000"],
    "CWE": ["CWE-285", "CWE-732"],
    "GDPR": ["Art. 32"],
}


@dataclass(frozen=True)
class Finding:
    """Something that a reader should act on, or know.

    Attributes:
        id: Stays the same from one audit to the next.
        title: One line.
        severity: Of `SEVERITIES`.
        evidence: What was measured or observed, with its condition.
        reproduce: How to see it again.
        remedy: What to do.
        references: Catalogue → identifiers; of the GDPR pointers, no advice.
    """

    id: str
    title: str
    severity: str
    evidence: str
    reproduce: str
    remedy: str
    references: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Strongest:
    """The attack that got most, and what it is measured against.

    Attributes:
        name: Of the attack.
        access: What the attacker has.
        figures: Its figures.
        floor: Metric → the highest upper bound among the floors.
        easy: It needs the vectors alone.
    """

    name: str
    access: str
    figures: Figures
    floor: dict[str, float]
    easy: bool

    def gain(self, metric: str) -> float:
        """Lower end of a figure's interval above the highest floor; 0 where it is not."""
        figure = self.figures.get(metric)
        return 0.0 if figure is None else max(0.0, figure.low - self.floor.get(metric, 0.0))

    def above(self, metric: str) -> float:
        """The figure itself above the highest floor; negative where it is below."""
        figure = self.figures.get(metric)
        return 0.0 if figure is None else figure.mean - self.floor.get(metric, 0.0)

    @property
    def hurt(self) -> float:
        """The largest gain over all kinds of what hurts, numbers and any among them."""
        return max(self.gain(kind) for kind in (*KINDS, ANY))


def inversion_severity(strongest: Strongest, exposed: bool) -> tuple[str, str]:
    """Severity of what comes back: a rule, no feeling.

    By the lower end of the 95% interval above the highest floor: *high* where 10% of a kind of
    what hurts comes back, or 5% of the texts whole; *critical* where 25% of a kind does; *medium*
    where token F1 is .10 above the floor; *low* where it is above it at all. One step up where the
    vectors could be read without any login, one down where the attack needs more than the vectors.

    Args:
        strongest: The attack that got most.
        exposed: No login was needed to read the vectors, or any would do.

    Returns:
        Severity, and the step of the rule it comes from.
    """
    level, why = 0, "nothing is plainly above the highest floor"
    if strongest.gain(F1) > 0:
        level, why = 1, "token F1 is above the highest floor"
    if strongest.gain(F1) >= _WORDS_MEDIUM:
        level, why = 2, f"token F1 is {_WORDS_MEDIUM:.2f} or more above the highest floor"
    if strongest.gain(EXACT) >= _EXACT_HIGH:
        level, why = 3, f"{_EXACT_HIGH:.0%} or more of the texts come back whole"
    if strongest.hurt >= _HURT_HIGH:
        level, why = 3, f"{_HURT_HIGH:.0%} or more of a kind of what hurts comes back"
    if strongest.hurt >= _HURT_CRITICAL:
        level, why = 4, f"{_HURT_CRITICAL:.0%} or more of a kind of what hurts comes back"
    if level:
        level += int(exposed) - int(not strongest.easy)
        why += ", one step up as no login was needed" if exposed else ""
        why += "" if strongest.easy else ", one step down as it needs more than the vectors"
    return SEVERITIES[min(max(level, 0), len(SEVERITIES) - 1)], why


@dataclass(frozen=True)
class Evidence:
    """All that findings are made from."""

    facts: StoreFacts
    identity: Identity
    strongest: Strongest | None
    scored: int
    longer: int
    longest: int
    neighbours: Neighbours
    group_by: str | None
    command: str


def make_findings(evidence: Evidence) -> list[Finding]:
    """All findings, the most severe first."""
    findings = [*_inversion(evidence), *_access(evidence), *_storage(evidence), *_places(evidence)]
    return sorted(findings, key=lambda f: -SEVERITIES.index(f.severity))


def open_to_all(facts: StoreFacts) -> bool:
    """Whether whoever reaches the store, or has any login of it, can read it."""
    return "none was needed" in facts.authentication or "PUBLIC" in facts.authentication


def _share(figures: Figures, metric: str) -> str:
    figure = figures.get(metric)
    if figure is None:
        return "none in the sample"
    return f"{figure.mean:.1%} [{figure.low:.1%}, {figure.high:.1%}] of {figure.n}"


def _inversion(e: Evidence) -> Iterator[Finding]:
    best = e.strongest
    if best is None:
        yield Finding(
            "inversion-not-measured",
            "Whether text comes back was not measured",
            "none",
            "No text lies beside the vectors that were read, so recovered texts have nothing to "
            "be compared with; their confidence and cosine are no evidence of recovery.",
            e.command,
            "Name the column of the texts with --text-column, or audit a copy that has them.",
            INVERSION_IDS,
        )
        return
    kinds = ", ".join(
        f"{kind} {_share(best.figures, kind)}" for kind in KINDS if best.figures.get(kind)
    )
    condition = (
        f"An attacker who has {best.access} ({best.name}), encoder {e.identity.encoder}, "
        f"{e.scored} records with a text"
    )
    if e.longer:
        condition += f", {e.longer} of them longer than the {e.longest} tokens the inverter writes"
    exact = _share(best.figures, EXACT)
    f1 = best.figures[F1]
    words = (
        ""
        if f1 is None
        else (
            f"token F1 {f1.mean:.2f} [{f1.low:.2f}, {f1.high:.2f}], highest floor "
            f"{best.floor.get(F1, 0.0):.2f}"
        )
    )
    severity, why = inversion_severity(best, open_to_all(e.facts))
    title = (
        "Text comes back from the vectors alone" if best.easy else "Text comes back from vectors"
    )
    yield Finding(
        "embedding-inversion",
        title if severity != "none" else "No more text comes back than guessing gives",
        severity,
        f"{condition}: {words}; whole texts {exact}. What hurts: {kinds or 'none in the sample'}. "
        f"Why {severity}: {why}. A stronger attack may recover more: this is a lower bound for "
        "this encoder, these lengths and this access.",
        e.command,
        "Treat the vectors as the text: the same access control, retention, deletion and breach "
        "duties. Mask or drop sensitive fields before embedding. Do not return vectors or raw "
        "scores from the API, and limit queries per principal.",
        INVERSION_IDS,
    )


def _access(e: Evidence) -> Iterator[Finding]:
    facts = e.facts
    files = facts.authentication.startswith("none: ")
    if files or open_to_all(facts):
        yield Finding(
            "no-login",
            "The vectors can be read without a login" if files else "The vectors are open",
            "low" if files else "high",
            f"{facts.authentication}; encryption: {facts.encryption}.",
            e.command,
            "Keep the files where only the application may read them, and encrypt the disk."
            if files
            else "Require a login, and give each application the collections it needs.",
            _ACCESS_IDS,
        )
    if facts.row_security and "passed over" in facts.row_security:
        yield Finding(
            "row-security-bypassed",
            "Row-level security does not bind this login",
            "low",
            f"row-level security: {facts.row_security}.",
            e.command,
            "Use FORCE ROW LEVEL SECURITY, and a login without BYPASSRLS for applications.",
            _ACCESS_IDS,
        )


def _storage(e: Evidence) -> Iterator[Finding]:
    facts = e.facts
    if facts.text:
        yield Finding(
            "text-beside-vectors",
            "The text lies beside the vectors",
            "low",
            f"{facts.text!r} holds the text in the clear: who reads the store needs no attack.",
            e.command,
            "Keep both under one access rule; encrypting or deleting the text alone leaves the "
            "vector, which this audit measures.",
            {"OWASP": ["LLM02:2026"], "AISVS": ["v1.0-C5.2.7"], "GDPR": ["Art. 32"]},
        )
    if facts.deleted:
        yield Finding(
            "deleted-rows-readable",
            "Deleted rows can still be read",
            "medium",
            f"There are {facts.deleted}.",
            e.command,
            "Compact and clean up old versions within the time that erasure allows; backups too.",
            {"OWASP": ["LLM09:2026"], "AISVS": ["v1.0-C8.3.1"], "GDPR": ["Art. 17"]},
        )
    if facts.index and "quantised" in facts.index:
        yield Finding(
            "quantised-index-no-defence",
            "A quantised index is no defence",
            "none",
            f"index: {facts.index}.",
            e.command,
            "Do not count it as one.",
            {"OWASP": ["LLM09:2026"]},
        )
    if facts.lossy:
        yield Finding(
            "lossy-vectors",
            "The store holds a lossy copy of the vectors",
            "none",
            f"{facts.lossy}. The attacks were run on what the store gives back.",
            e.command,
            "Do not rely on it: an attacker can train on vectors of the same kind.",
            {"OWASP": ["LLM09:2026"]},
        )


def _places(e: Evidence) -> Iterator[Finding]:
    places = e.neighbours
    if places.across:
        yield Finding(
            "duplicates-across-groups",
            f"The same content lies under different values of {e.group_by}",
            "medium",
            f"{places.across} pairs of the sample have a cosine of .98 or more across groups.",
            e.command,
            "Check whether a search of one tenant can return rows of another.",
            {"OWASP": ["LLM09:2026"], "AISVS": ["v1.0-C8.1.1", "v1.0-C8.1.3"], "CWE": ["CWE-200"]},
        )
    if places.members:
        yield Finding(
            "membership",
            "Whether a known text is in the store can be told",
            "low",
            f"{places.members} texts of the corpus have a vector of the sample at a cosine of .99 "
            "or more. Whoever can search and sees scores can ask the same.",
            e.command,
            "Do not return raw scores; limit queries per principal.",
            {"OWASP": ["LLM09:2026"], "NIST AI 100-2": ["NISTAML.033"], "AISVS": ["v1.0-C11.2.5"]},
        )
    if places.outliers:
        yield Finding(
            "outliers",
            "Some vectors lie far from all others",
            "none",
            f"{len(places.outliers)} or more, among them {', '.join(places.outliers[:5])}.",
            e.command,
            "Look at them before they are searched: poisoned rows and broken ones look like this.",
            {"AISVS": ["v1.0-C8.2.2"]},
        )
