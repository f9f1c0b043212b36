"""The tables of a report as plain rows, whatever they are written in later."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.evaluate import LENGTH, Evaluation, Figures
from unembed.evaluation.examples import Example, choose_examples
from unembed.evaluation.metrics import ESSENTIAL, KINDS, METRICS

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
        steps = f"{attack['steps']} steps"
        chosen = "".join(f", {key}={value}" for key, value in attack["options"].items())
        if attack["guidance"]:
            chosen += ", guidance {:g} to {:g}".format(*attack["guidance"])
        chosen += f", repetition {attack['repetition']:g}"
        calls = f", at most {attack['encoder_calls']} calls" if attack["encoder_calls"] else ""
        some = f"; {attack['limit']} of the texts" if attack["limit"] else ""
        about = f"{attack['strategy']}, {steps}{chosen}; {attack['threat_model']}{calls}{some}"
        facts.append((name, about))
    facts.append(("controls decoded by", settings["controls_decoded_by"]["strategy"]))
    return facts


_SIGNS = re.compile(r"([\\`*_\[|~$])")


def to_markdown(evaluation: Evaluation, plots: Sequence[str]) -> str:
    """The report's text.

    Args:
        evaluation: What to report.
        plots: Names of the files under ``plots/``, without their ends.
    """
    seed = evaluation.settings["seed"]
    lines = ["# What the embeddings gave away", ""]
    lines += [f"- {escape(name)}: {escape(fact)}" for name, fact in described(evaluation)]
    lines += [f"- note: {escape(note)}" for note in evaluation.notes]
    lines += ["", HOW_TO_READ, ""]
    for table in tables(evaluation):
        lines += [f"## {escape(table.title)}", "", *_table(table), ""]
    lines += [f"![{name}](plots/{name}.svg)" for name in plots]
    lines += ["", "## Examples", "", examples_rule(seed), ""]
    for name, chosen in choose_examples(evaluation.examples, seed).items():
        lines += [f"### {name.capitalize()}", "", *_examples(chosen), ""]
    return "\n".join(lines).rstrip() + "\n"


def examples_rule(seed: int) -> str:
    """How the examples were chosen."""
    return (
        "Texts in the order of their token-set F1 cut into thirds, some of each drawn with seed "
        f"{seed}. Bold: the right token in its place; italic: a token of the original elsewhere."
    )


def _table(table: TableOf) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{'---|' * len(table.columns)}"
    for row in table.rows:
        names = [escape(name) for name in row[: table.names]]
        yield f"| {' | '.join([*names, *row[table.names :]])} |"


def _examples(examples: Sequence[Example]) -> Iterator[str]:
    cosines = ["none" if e.cosine is None else f"{e.cosine:.2f}" for e in examples]
    yield "| original | recovered | F1 | cosine |"
    yield "|---|---|---|---|"
    for example, cosine in zip(examples, cosines, strict=True):
        recovered = "".join(_marked(*piece) for piece in example.tokens)
        yield f"| {escape(example.original)} | {recovered} | {example.f1:.2f} | {cosine} |"


def _marked(piece: str, mark: str) -> str:
    sign = {"right": "**", "elsewhere": "*"}.get(mark, "")
    bare = piece.strip()
    if not bare or not sign:
        return escape(piece)
    # An HTML tag, as bold that starts inside a word is not Markdown everywhere
    tag = "b" if sign == "**" else "i"
    before, after = piece.partition(bare)[0], piece.rpartition(bare)[2]
    return f"{before}<{tag}>{escape(bare)}</{tag}>{after}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    return _SIGNS.sub(r"\\\1", html.escape(" ".join(text.split("\n")), quote=False))
