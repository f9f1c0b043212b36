"""An evaluation as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from unembed.evaluation.evaluate import Evaluation
from unembed.evaluation.examples import Example, choose_examples
from unembed.evaluation.report.tables import HOW_TO_READ, TableOf, described, tables

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
