"""What defences are worth, as one value; and what follows from it in two sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from unembed.defences.leak import F1
from unembed.evaluation.bootstrap import Figure

SCHEMA = 1  # version of the JSON
NEEDS_PAIRS = ("R", "L+R")  # how names of attackers begin who know stored vectors of some texts
_LABELS = {"U": "unaware", "A1": "aware", "A2": "aware, retrained", "L": "lookup"}

NOT_PROTECTED = (
    "Whoever can call the encoder and the store's search with queries of his own, scores returned.",
    "An attacker stronger than these: a larger inverter, one trained on the store's domain, "
    "calls of the encoder for each vector, alignment without pairs by adversarial training.",
    "Membership and neighbourhood: near vectors stay near under every defence that keeps rankings.",
    "A secret that lies beside the vectors, in the same backup or with the same rights; and known "
    "texts, which whoever writes into the store can make.",
    "Exact vectors that a store keeps beside a quantised index, old versions and backups.",
)


@dataclass(frozen=True)
class DefenceRow:
    """A defence against every attacker.

    Attributes:
        defence: With its settings, as `--defences` reads it.
        about: What it does.
        secret: Whether it rests on a secret.
        leak: Attacker → metric → figure.
        strongest: The attacker of the highest token F1: he decides the row.
        without_pairs: The strongest of those who know no stored vector of a text; None where none
            of them was asked.
        gain: Token F1 that the strongest attacker loses against the undefended vectors, the
            same texts compared.
        identification: Share of the attacked records whose own text is the nearest to the best
            estimate of their vector, among the texts of all records.
        identifier: The attacker who made that estimate.
        utility: Metric → figure over the queries.
        loss: Share of the deciding metric that the defence costs, the same queries compared.
        cosine: Mean cosine of stored with plain vectors; None where dimensions differ.
        bytes_each: Of a stored vector.
        milliseconds: A query takes by exhaustive search.
        notes: What else there is to know.
    """

    defence: str
    about: str
    secret: bool
    leak: dict[str, dict[str, Figure | None]]
    strongest: str
    without_pairs: str | None
    gain: Figure | None
    identification: Figure | None
    identifier: str | None
    utility: dict[str, Figure | None]
    loss: Figure | None
    cosine: float | None
    bytes_each: int
    milliseconds: float
    notes: list[str] = field(default_factory=list)

    def f1(self, attacker: str | None = None) -> Figure:
        """Token F1 of an attacker, the strongest if not given."""
        figure = self.leak[attacker or self.strongest][F1]
        assert figure is not None
        return figure


@dataclass(frozen=True)
class DefenceReport:
    """Defences, attackers and utility side by side.

    Attributes:
        rows: Undefended first.
        floors: Name → metric → figure of what knows nothing of the vector.
        attackers: Name → what he has.
        metric: Of utility that decides: ``nDCG@10``, or ``top-10 overlap`` without labels.
        budget: Share of it that a defence may cost.
        settings: How it was made.
        notes: What is missing, and why.
    """

    rows: list[DefenceRow]
    floors: dict[str, dict[str, Figure | None]]
    attackers: dict[str, str]
    metric: str
    budget: float
    settings: dict[str, Any]
    notes: list[str]

    @property
    def floor(self) -> float:
        """The upper end of the highest floor's token F1."""
        ends = [f.high for floor in self.floors.values() if (f := floor[F1]) is not None]
        return max(ends, default=0.0)

    @property
    def within(self) -> list[DefenceRow]:
        """The defences that cost no more than the budget, least leak first."""
        rows = [r for r in self.rows[1:] if r.loss is not None and r.loss.mean <= self.budget]
        return sorted(rows, key=lambda row: row.f1().mean)

    def recommendation(self) -> tuple[str, str]:
        """Two sentences: the best defence at matched utility, and the conditions."""
        plain, share = self.rows[0], f"{self.budget:.0%} of {self.metric}"
        pairs = max((int(n[1:]) for n in self.attackers if n[0] == "R"), default=0)
        best = next(iter(self.within), None)
        if best is None:
            return (
                f"No defence of those tried stays within {share}.",
                "Treat the vectors as the texts themselves: access, encryption, deletion.",
            )
        if best.gain is None or best.gain.low <= 0:
            first = (
                f"Within {share} no defence takes anything measurable from the strongest attacker: "
                f"the best, {best.defence}, leaves a token F1 of {_range(best.f1())}, undefended "
                f"vectors {_range(plain.f1())} (guessing {self.floor:.2f})."
            )
        else:
            first = (
                f"Within {share} {best.defence} protects best: the strongest attacker "
                f"({attacker_label(best.strongest)}) recovers texts to a token F1 of "
                f"{_range(best.f1())} in place of {_range(plain.f1())} (guessing {self.floor:.2f})."
            )
        return first, self._conditions(pairs)

    def _conditions(self, pairs: int) -> str:
        secret = [r for r in self.within if r.secret and r.without_pairs is not None]
        best = min(secret, key=lambda row: row.f1(row.without_pairs).mean, default=None)
        general = (
            f"That holds for {self.settings['encoder']}, these records and these attackers"
            + (f", up to {pairs:,} leaked pairs" if pairs else "")
        )
        if best is None or best.f1(best.without_pairs).mean >= self.rows[0].f1().mean:
            return f"{general}; whatever is chosen, keep the vectors as safe as the texts."
        if not pairs:
            return (
                f"{general}; {best.defence} rests on a secret, and nobody was asked who knows "
                "texts with their stored vectors, which such defences fall to (--attackers R)."
            )
        alone, broken = best.f1(best.without_pairs), best.f1()
        return (
            f"{general}; while no text is known together with its stored vector, {best.defence} "
            f"leaves {_range(alone)}, and against {attacker_label(best.strongest)} "
            f"{_range(broken)}, so its key has to change before that many can leak, and lie apart "
            "from the vectors."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        first, second = self.recommendation()
        return {
            "schema": SCHEMA,
            "recommendation": [first, second],
            "not_protected": list(NOT_PROTECTED),
            **asdict(self),
        }


def attacker_label(name: str) -> str:
    """An attacker in words: ``R100`` is "100 leaked pairs", ``L+R100`` a lookup with them."""
    if name in _LABELS:
        return _LABELS[name]
    lookup, _, pairs = name.rpartition("R")
    return ("lookup with " if lookup else "") + f"{int(pairs):,} leaked pairs"


def _range(figure: Figure) -> str:
    return f"{figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}]"
