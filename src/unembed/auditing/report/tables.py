"""The rows and sentences that the page and the Markdown share."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise

from unembed.auditing.attacks import WORDS
from unembed.auditing.conclude import CONSTANT, SHUFFLED
from unembed.auditing.result import AuditReport
from unembed.auditing.scoring import ANY, F1, MEANS, Figures
from unembed.auditing.sensitive import KINDS
from unembed.evaluation.bootstrap import Figure

Row = tuple[str, ...]

_ALIKE = ("--collection", "--column", "--text-column", "--checkpoint")  # as `defend` has them


def headline(report: AuditReport) -> str:
    """What a manager takes away: a sentence with its conditions."""
    if report.strongest is None:
        return (
            "Whether text comes back was not measured: no text lies beside the vectors, so there "
            "is nothing to compare recovered texts with."
        )
    hurt, f1 = best_figure(report, ANY), best_figure(report, F1)
    parts = []
    if hurt is not None:
        parts.append(
            f"{hurt.mean:.0%} of the names, numbers and other details that hurt (guessing: at most "
            f"{guess(report, ANY):.0%})"
        )
    if f1 is not None:
        parts.append(
            f"the words to a token F1 of {f1.mean:.2f} (guessing: at most {guess(report, F1):.2f})"
        )
    access = report.attacks[report.strongest]["access"]
    return (
        f"With {access}, an attacker recovers {' and '.join(parts)}. Measured on "
        f"{report.attacks[report.strongest]['records']:,} records."
    )


def defend_command(report: AuditReport) -> str | None:
    """The command that measures what would protect the vectors; None where no text is there."""
    if report.strongest is None:
        return None
    _, _, store, *words = shlex.split(report.settings["command"])
    options = [word for pair in pairwise(words) if pair[0] in _ALIKE for word in pair]
    return shlex.join(["unembed", "defend", store, *options])


def best_figure(report: AuditReport, metric: str) -> Figure | None:
    """A figure of the attack that got most; None where there is none."""
    if report.strongest is None:
        return None
    figure: Figure | None = report.attacks[report.strongest]["figures"].get(metric)
    return figure


def guess(report: AuditReport, metric: str) -> float:
    """The highest upper end among that attack's floors that know nothing of the vector."""
    own = f"{SHUFFLED} ({report.strongest})"
    names = (own if own in report.floors else SHUFFLED, CONSTANT)
    figures = [report.floors[name].get(metric) for name in names if name in report.floors]
    return max((figure.high for figure in figures if figure is not None), default=0.0)


def length_note(report: AuditReport) -> str | None:
    """What long texts mean for the figures; None where there are none."""
    longer, longest = (
        report.read[k] for k in ("longer_than_the_inverter_writes", "longest_the_inverter_writes")
    )
    if not longer:
        return None
    return (
        f"{longer} of {report.read['with_text']} texts are longer than the {longest} tokens this "
        "inverter writes. Their token F1 is that of the window of the text it fits best, or of the "
        "whole where that is better, for the floors too; exact match cannot happen; what hurts is "
        "counted over the whole text. An inverter trained on longer texts may recover more."
        + (
            f" {WORDS.capitalize()}: those that a linear map gives at least even odds, in no order."
            if WORDS in report.attacks
            else ""
        )
    )


def facts(report: AuditReport) -> list[Row]:
    """What the store is, a fact a row."""
    store, identity, reading = report.store, report.identity, report.read
    left_out = "; ".join(f"{count} × {why}" for why, count in reading["left_out"].items())
    lowest, mean, highest = identity.norms
    verdict = f"verdict: {identity.verdict}"
    if identity.cosine is not None:
        verdict += f", cosine {identity.cosine:.3f} on {identity.compared} texts embedded again"
    rows = [
        ("store", f"{store.kind}, {store.collection}; this reader was tested {store.tested}"),
        ("rows", f"{store.count:,}; read {reading['rows']:,}, with text {reading['with_text']:,}"),
        ("left out", left_out or "none"),
        (
            "vectors",
            f"{store.dimension} dimensions, {store.stored_type}, metric "
            f"{store.metric or 'not known'}; exact: {store.lossy or 'yes'}",
        ),
        (
            "lengths",
            f"{lowest:g} to {highest:g}, mean {mean:g}; the mean vector's {identity.mean_length:g}",
        ),
        ("encoder", f"{identity.encoder}: {verdict}"),
        ("what would explain it", identity.differs or ""),
        ("candidates by dimension", identity.candidates),
        ("index", store.index or "not observed"),
        ("text beside", store.text or "none"),
        ("deleted rows", store.deleted or "none observed"),
        ("tenants", ", ".join(store.tenants)),
        ("login", store.authentication),
        ("encryption", store.encryption),
        ("row-level security", store.row_security or "not applicable"),
        ("not read", "; ".join(store.not_read) or "nothing else was seen"),
        ("what hurts was found by", report.settings["sensitive_found_by"]),
        ("seed", str(report.settings["seed"])),
    ]
    return [row for row in rows if row[1]]


def figure_rows(report: AuditReport, names: tuple[str, ...]) -> Iterator[Row]:
    """A row an attack and a floor, a column a metric."""
    for name, attack in report.attacks.items():
        if attack["figures"]:
            yield (name, *cells(attack["figures"], names))
    for name, floor in report.floors.items():
        yield (name, *cells(floor, names))


def unscored_rows(report: AuditReport) -> Iterator[Row]:
    """Confidence and cosine of attacks whose texts had nothing to be compared with."""
    for name, attack in report.attacks.items():
        yield (
            name,
            attack["access"],
            str(attack["records"]),
            "none" if attack["mean_confidence"] is None else f"{attack['mean_confidence']:.2f}",
            "none" if attack["mean_cosine"] is None else f"{attack['mean_cosine']:.2f}",
        )


def breakdown(groups: dict[str, dict[str, Figures]]) -> Iterator[Row]:
    """Group, attack or floor, records, token F1, what hurts."""
    for group, attacks in groups.items():
        for attack, table in attacks.items():
            figure = table.get(F1)
            if figure is not None:
                yield (group, attack, str(figure.n), cell(figure), cell(table.get(ANY)))


def cells(table: Figures, names: tuple[str, ...]) -> list[str]:
    """The figures of a row."""
    return [cell(table.get(name)) for name in names]


def cell(figure: Figure | None) -> str:
    """A figure with its interval and what it counts; "none" where no record has it."""
    if figure is None:
        return "none"
    return f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}] ({figure.n})"


METRIC_TABLES = {"How much came back": MEANS, "What hurts": (*KINDS, ANY)}
HOW_TO_READ = (
    "Mean [95% bootstrap interval] (records it could be computed for; of what hurts the number of "
    "items). Shares and cosines are 0 to 1. The floors know nothing of the vector, but for the "
    "nearest other text of a corpus, which plain search finds: what they reach is no leak of the "
    "inverter. Cosine is no evidence of recovery: wrong texts reach high ones."
)
PROTECTION = "What would protect these vectors, and what it costs their search, is measured by"
