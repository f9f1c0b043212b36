"""An evaluation as a folder: Markdown, JSON, plots, and a page that needs nothing else."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from unembed.errors import DataError, require_kind
from unembed.evaluation.bootstrap import Figure
from unembed.evaluation.evaluate import Evaluation, Figures
from unembed.evaluation.frontier import Frontier
from unembed.evaluation.metrics import ESSENTIAL, KINDS, METRICS
from unembed.evaluation.report.plots import draw_frontier, draw_plots
from unembed.evaluation.samples import LENGTH, Example, choose_examples
from unembed.files import as_path, atomic, write_json

_MOST_TEXTS = 500

# The browser itself refuses whatever is not in the page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #2a9d5c44; --elsewhere: #e9b44c55; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { background: #fff; display: inline-block; margin: .5rem 0; max-width: 100%; }
figure svg { height: auto; max-width: 100%; }
article { border-bottom: 1px solid var(--line); padding: .5rem 0; }
article p { margin: .1rem 0; }
small { opacity: .75; }
b { background: var(--right); } i { background: var(--elsewhere); }
b, i { font-style: normal; font-weight: inherit; border-radius: .2em; }
"""

_SCRIPT = """
const all = [...document.querySelectorAll("#browse article")];
const find = document.getElementById("find"), order = document.getElementById("order");
const list = document.getElementById("browse"), count = document.getElementById("count");
function show() {
  const word = find.value.toLowerCase();
  const value = (a) => Number(a.dataset[order.value === "index" ? "index" : "f1"]);
  const sign = order.value === "best" ? -1 : 1;
  const kept = all.filter((a) => a.textContent.toLowerCase().includes(word));
  kept.sort((a, b) => sign * (value(a) - value(b)));
  list.replaceChildren(...kept);
  count.textContent = kept.length + " of " + all.length;
}
find.addEventListener("input", show);
order.addEventListener("change", show);
show();
"""


def write_report(evaluation: Evaluation, folder: str | Path) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and ``plots/`` (PNG and SVG).

    Without matplotlib the plots are missing, and the notes of the report say so.

    Args:
        evaluation: What to report.
        folder: Made if it is not there; files of an earlier report are replaced.

    Raises:
        DataError: The folder cannot be written.
    """
    require_kind(evaluation, Evaluation, "an evaluation", "Make it with unembed.evaluate")
    folder = as_path(folder)
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        plots, missing = draw_plots(evaluation, folder / "plots")
        evaluation = replace(evaluation, notes=[*evaluation.notes, *missing])
        write_json(folder / "report.json", evaluation.to_dict())
        for name, text in (
            ("report.md", to_markdown(evaluation, list(plots))),
            ("report.html", to_page(evaluation, plots)),
        ):
            with atomic(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error


def write_frontier(frontier: Frontier, folder: Path) -> None:
    """Write ``frontier.json``, ``frontier.md`` and the curve as PNG and SVG.

    Args:
        frontier: What to report.
        folder: Made if it is not there.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = draw_frontier(frontier, folder)
        frontier = replace(frontier, notes=[*frontier.notes, *missing])
        write_json(folder / "frontier.json", frontier.to_dict())
        with atomic(folder / "frontier.md") as temporary:
            temporary.write_text(frontier.to_markdown(), encoding="utf-8")
    except OSError as error:
        raise DataError(f"a folder at {folder}", str(error), "Choose another --out") from error


# The page that stands by itself, and Markdown


def to_page(evaluation: Evaluation, plots: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        evaluation: What to report; every text in it is escaped.
        plots: Name → SVG, put into the page.
    """
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>What the embeddings gave away</title>",
            f"<style>{_STYLE}</style></head><body>",
            "<h1>What the embeddings gave away</h1>",
            f"<p><strong>{escape(evaluation.verdict)}</strong></p>",
            *_facts(evaluation),
            *_tables(evaluation),
            *(f"<figure>{svg}</figure>" for svg in plots.values()),
            *_selection(evaluation),
            *_browsable(evaluation.examples),
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def _facts(evaluation: Evaluation) -> Iterator[str]:
    yield "<ul>"
    for name, fact in described(evaluation):
        yield f"<li>{escape(name)}: {escape(fact)}</li>"
    for note in evaluation.notes:
        yield f"<li>note: {escape(note)}</li>"
    yield f"</ul><p>{escape(HOW_TO_READ)}</p>"


def _tables(evaluation: Evaluation) -> Iterator[str]:
    for table in tables(evaluation):
        yield f'<h2>{escape(table.title)}</h2><div class="wide"><table>'
        yield _cells("th", table.columns)
        for row in table.rows:
            yield _cells("td", row)
        yield "</table></div>"


def _cells(tag: str, values: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"


def _selection(evaluation: Evaluation) -> Iterator[str]:
    seed = evaluation.settings["seed"]
    yield "<h2>Examples</h2>"
    rule = examples_rule(seed).replace("Bold", "Green").replace("italic", "yellow")
    yield f"<p>{escape(rule)}</p>"
    for name, examples in choose_examples(evaluation.examples, seed).items():
        yield f"<h3>{escape(name.capitalize())}</h3>"
        yield from (_article([example]) for example in examples)


def _browsable(examples: Sequence[Example]) -> Iterator[str]:
    texts: dict[int, list[Example]] = {}
    for example in examples:
        texts.setdefault(example.index, []).append(example)
    groups = list(texts.values())[:_MOST_TEXTS]
    yield f"<h2>Originals beside recoveries</h2><p>{len(groups)} texts.</p>"
    yield (
        '<p><label>Find <input id="find" type="search"></label> '
        '<label>Order <select id="order"><option value="index">as evaluated</option>'
        '<option value="best">best first</option><option value="worst">worst first</option>'
        '</select></label> <span id="count" role="status"></span></p>'
    )
    yield '<div id="browse">'
    yield from (_article(of_one) for of_one in groups)
    yield "</div>"


def _article(examples: Sequence[Example]) -> str:
    """Write one text: the original and what each attack recovered."""
    first = examples[0]
    labels = " · ".join(first.labels.values())
    lines = [
        f'<article data-index="{first.index}" data-f1="{first.f1:.4f}">',
        f"<p><small>original {escape(labels)}</small><br>{escape(first.original)}</p>",
    ]
    for example in examples:
        cosine = "none" if example.cosine is None else f"{example.cosine:.2f}"
        about = f"{example.row} · F1 {example.f1:.2f} · cosine {cosine}"
        recovered = "".join(_html_piece(*piece) for piece in example.tokens)
        lines.append(f"<p><small>{escape(about)}</small><br>{recovered}</p>")
    return "".join([*lines, "</article>"])


def _html_piece(piece: str, mark: str) -> str:
    tag = {"right": "b", "elsewhere": "i"}.get(mark)
    return escape(piece) if tag is None else f"<{tag}>{escape(piece)}</{tag}>"


_TABLES = {
    "Tokens": (*METRICS[:5], "informative recall"),
    "Texts": (
        "BLEU (sentence)",
        "BLEU (corpus)",
        "ROUGE-L",
        "cosine",
        "length error",
        "length bias",
    ),
    "What stands in them": KINDS,
    "Confidence and cost": ("calibration error", "passes", "encoder calls", "milliseconds"),
}
_BY = {LENGTH: "tokens", "domain": "domain", "lang": "language"}
MISSING = "missing"
HOW_TO_READ = (
    "Mean [95% bootstrap interval] (texts it could be computed for). BLEU is 0 to 100, length "
    "error and bias (below 0: too short) in tokens, shares and cosines 0 to 1."
)


@dataclass(frozen=True)
class TableOf:
    """A table: title, names of the columns, rows of cells, and how many of these are names."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 1


def tables(evaluation: Evaluation) -> Iterator[TableOf]:
    """Yield a table of all rows × all metrics, then every breakdown with the essential ones."""
    for title, metrics in _TABLES.items():
        yield TableOf(title, ("", *metrics), _lines(evaluation.rows, metrics))
    for label, groups in evaluation.breakdowns.items():
        rows = [
            (name, *line) for name, group in groups.items() for line in _lines(group, ESSENTIAL)
        ]
        yield TableOf(f"By {_BY[label]}", (_BY[label], "", *ESSENTIAL), rows, 2)


def _lines(rows: dict[str, Figures], metrics: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [(name, *(cell(figures[m]) for m in metrics)) for name, figures in rows.items()]


def cell(figure: Figure | None) -> str:
    """A figure with its interval and number of texts; ``missing`` where there is none."""
    if figure is None:
        return MISSING
    digits = 3 if max(abs(figure.mean), abs(figure.high)) < 10 else 1  # noqa: PLR2004 - width
    mean, low, high = (f"{value:.{digits}f}" for value in (figure.mean, figure.low, figure.high))
    return f"{mean} [{low}, {high}] ({figure.n})"


def described(evaluation: Evaluation) -> list[tuple[str, str]]:
    """List how the evaluation was made, a fact a line."""
    settings = evaluation.settings
    encoder = settings["encoder"]
    facts = [
        ("texts", f"{settings['texts']} pieces, seed {settings['seed']}"),
        ("encoder", f"{encoder['name']}, {encoder['dimension']} dimensions"),
        ("vectors", f"{settings['vectors']}"),
    ]
    for name, attack in settings["attacks"].items():
        steps = f"{attack['steps']} steps"
        options = "".join(f", {key}={value}" for key, value in attack["options"].items())
        if attack["guidance"]:
            options += ", guidance {:g} to {:g}".format(*attack["guidance"])
        options += f", repetition {attack['repetition']:g}"
        calls = f", at most {attack['encoder_calls']} calls" if attack["encoder_calls"] else ""
        some = f"; {attack['limit']} of the texts" if attack["limit"] else ""
        about = f"{attack['strategy']}, {steps}{options}; {attack['threat_model']}{calls}{some}"
        facts.append((name, about))
    facts.append(("baselines decoded by", settings["controls_decoded_by"]["strategy"]))
    return facts


_SIGNS = re.compile(r"([\\`*_\[|~$])")


def to_markdown(evaluation: Evaluation, plots: Sequence[str]) -> str:
    """The report's text.

    Args:
        evaluation: What to report.
        plots: Names of the files under ``plots/``, without their ends.
    """
    seed = evaluation.settings["seed"]
    verdict = f"**{escape_markdown(evaluation.verdict)}**"
    lines = ["# What the embeddings gave away", "", verdict, ""]
    lines += [
        f"- {escape_markdown(name)}: {escape_markdown(fact)}"
        for name, fact in described(evaluation)
    ]
    lines += [f"- note: {escape_markdown(note)}" for note in evaluation.notes]
    lines += ["", HOW_TO_READ, ""]
    for table in tables(evaluation):
        lines += [f"## {escape_markdown(table.title)}", "", *_table(table), ""]
    lines += [f"![{name}](plots/{name}.svg)" for name in plots]
    lines += ["", "## Examples", "", examples_rule(seed), ""]
    for name, examples in choose_examples(evaluation.examples, seed).items():
        lines += [f"### {name.capitalize()}", "", *_examples(examples), ""]
    return "\n".join(lines).rstrip() + "\n"


def examples_rule(seed: int) -> str:
    """Say how the examples were chosen."""
    return (
        "Texts in the order of their token-set F1 cut into thirds, some of each drawn with seed "
        f"{seed}. Bold: the right token in its place; italic: a token of the original elsewhere."
    )


def _table(table: TableOf) -> Iterator[str]:
    yield f"| {' | '.join(table.columns)} |"
    yield f"|{'---|' * len(table.columns)}"
    for row in table.rows:
        names = [escape_markdown(name) for name in row[: table.names]]
        yield f"| {' | '.join([*names, *row[table.names :]])} |"


def _examples(examples: Sequence[Example]) -> Iterator[str]:
    cosines = ["none" if e.cosine is None else f"{e.cosine:.2f}" for e in examples]
    yield "| original | recovered | F1 | cosine |"
    yield "|---|---|---|---|"
    for example, cosine in zip(examples, cosines, strict=True):
        recovered = "".join(_markdown_piece(*piece) for piece in example.tokens)
        yield f"| {escape_markdown(example.original)} | {recovered} | {example.f1:.2f} | {cosine} |"


def _markdown_piece(piece: str, mark: str) -> str:
    sign = {"right": "**", "elsewhere": "*"}.get(mark, "")
    bare = piece.strip()
    if not bare or not sign:
        return escape_markdown(piece)
    # An HTML tag, as bold that starts inside a word is not Markdown everywhere
    tag = "b" if sign == "**" else "i"
    before, after = piece.partition(bare)[0], piece.rpartition(bare)[2]
    return f"{before}<{tag}>{escape_markdown(bare)}</{tag}>{after}"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, one line."""
    return _SIGNS.sub(r"\\\1", html.escape(" ".join(text.split("\n")), quote=False))
