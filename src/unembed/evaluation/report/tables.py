"""The tables of a report as plain rows, whatever they are written in later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unembed.evaluation.evaluate import LENGTH, Evaluation, Figures
from unembed.evaluation.metrics import ESSENTIAL, METRICS
from unembed.evaluation.spans import KINDS
from unembed.evaluation.summary import Figure

_TABLES = {
    "Tokens": (*METRICS[:5], "informative recall"),
    "Texts": ("BLEU (sentence)", "BLEU (corpus)", "ROUGE-L", "cosine", "length error"),
    "What stands in them": KINDS,
    "Confidence and cost": ("calibration error", "passes", "encoder calls", "milliseconds"),
}
_BY = {LENGTH: "tokens", "domain": "domain", "lang": "language"}
MISSING = "missing"
HOW_TO_READ = (
    "Mean [95% bootstrap interval] (texts it could be computed for). BLEU is 0 to 100, length "
    "error in tokens, shares and cosines 0 to 1."
)


@dataclass(frozen=True)
class TableOf:
    """A table: title, names of the columns, rows of cells, and how many of these are names."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1


def tables(evaluation: Evaluation) -> Iterator[TableOf]:
    """All rows × all metrics, then every breakdown with the essential ones."""
    for title, metrics in _TABLES.items():
        yield TableOf(title, ("", *metrics), _lines(evaluation.rows, metrics))
    for label, groups in evaluation.breakdowns.items():
        rows = [
            (name, *line) for name, group in groups.items() for line in _lines(group, ESSENTIAL)
        ]
        yield TableOf(f"By {_BY[label]}", (_BY[label], "", *ESSENTIAL), rows, 2)


def _lines(rows: dict[str, Figures], metrics: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [(name, *(cell(found[m]) for m in metrics)) for name, found in rows.items()]


def cell(figure: Figure | None) -> str:
    """A figure with its interval and number of texts; ``missing`` where there is none."""
    if figure is None:
        return MISSING
    digits = 3 if max(abs(figure.mean), abs(figure.high)) < 10 else 1  # noqa: PLR2004 - width
    mean, low, high = (f"{value:.{digits}f}" for value in (figure.mean, figure.low, figure.high))
    return f"{mean} [{low}, {high}] ({figure.n})"


def described(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How the evaluation was made, a fact a line."""
    settings = evaluation.settings
    encoder = settings["encoder"]
    facts = [
        ("texts", f"{settings['texts']} pieces, seed {settings['seed']}"),
        ("encoder", f"{encoder['name']}, {encoder['dimension']} dimensions"),
    ]
    for name, attack in settings["attacks"].items():
        steps = f"{attack['steps']} steps" if attack["steps"] else "as many steps as positions"
        chosen = "".join(f", {key}={value}" for key, value in attack["options"].items())
        if attack["guidance"]:
            chosen += ", guidance {:g} to {:g}".format(*attack["guidance"])
        if attack["repetition"] is not None:
            chosen += f", repetition {attack['repetition']:g}"
        calls = f", at most {attack['encoder_calls']} calls" if attack["encoder_calls"] else ""
        some = f"; {attack['limit']} of the texts" if attack["limit"] else ""
        about = f"{attack['strategy']}, {steps}{chosen}; {attack['threat_model']}{calls}{some}"
        facts.append((name, about))
    facts.append(("controls decoded by", settings["controls_decoded_by"]["strategy"]))
    return facts
