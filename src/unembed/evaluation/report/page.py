"""An evaluation as one HTML page: tables, plots and a list to browse; it loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from unembed.evaluation.evaluate import Evaluation
from unembed.evaluation.examples import Example, choose_examples
from unembed.evaluation.report.tables import HOW_TO_READ, described, examples_rule, tables

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
            *_facts(evaluation),
            *_tables(evaluation),
            *(f"<figure>{svg}</figure>" for svg in plots.values()),
            *_chosen(evaluation),
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


def _chosen(evaluation: Evaluation) -> Iterator[str]:
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
    shown = list(texts.values())[:_MOST_TEXTS]
    yield f"<h2>Originals beside recoveries</h2><p>{len(shown)} texts.</p>"
    yield (
        '<p><label>Find <input id="find" type="search"></label> '
        '<label>Order <select id="order"><option value="index">as evaluated</option>'
        '<option value="best">best first</option><option value="worst">worst first</option>'
        '</select></label> <span id="count" role="status"></span></p>'
    )
    yield '<div id="browse">'
    yield from (_article(of_one) for of_one in shown)
    yield "</div>"


def _article(examples: Sequence[Example]) -> str:
    """One text: the original and what each attack recovered."""
    first = examples[0]
    labels = " · ".join(first.labels.values())
    lines = [
        f'<article data-index="{first.index}" data-f1="{first.f1:.4f}">',
        f"<p><small>original {escape(labels)}</small><br>{escape(first.original)}</p>",
    ]
    for example in examples:
        cosine = "none" if example.cosine is None else f"{example.cosine:.2f}"
        about = f"{example.row} · F1 {example.f1:.2f} · cosine {cosine}"
        recovered = "".join(_marked(*piece) for piece in example.tokens)
        lines.append(f"<p><small>{escape(about)}</small><br>{recovered}</p>")
    return "".join([*lines, "</article>"])


def _marked(piece: str, mark: str) -> str:
    tag = {"right": "b", "elsewhere": "i"}.get(mark)
    return escape(piece) if tag is None else f"<{tag}>{escape(piece)}</{tag}>"
