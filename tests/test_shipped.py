"""The weights that ship, with the real encoder: they invert, and the embedding is what does it."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from unembed.decoding import STRATEGIES, Decoding, strategy_fields
from unembed.evaluation.evaluate import evaluate
from unembed.inverter import Inverter, shipped_inverters
from unembed.vectors.words import WordProbe, shipped_probes

ROOT = Path(__file__).parents[1]

SENTENCES = [
    "The patient was admitted on Monday with chest pain.",
    "How do I reset the password of my email account?",
    "The court ruled that the contract was not valid.",
    "She bought two tickets for the concert in London.",
    "The server returned an error because the disk was full.",
    "I love this restaurant, the pizza is great.",
    "Please send the invoice to our office by Friday.",
    "The film was boring and far too long.",
    "Plants use sunlight to make sugar from water and carbon dioxide.",
    "My flight to Paris leaves at nine in the morning.",
    "What are the side effects of this drug?",
    "The bank raised interest rates for the third time this year.",
]


@pytest.fixture(scope="module")
def inverter() -> Inverter:
    return Inverter.from_pretrained("minilm")


@pytest.mark.slow
def test_they_beat_the_shuffled_control_clearly(inverter, minilm):
    report = evaluate(inverter, minilm, SENTENCES, limit=None, steps=8)
    own, shuffled = report.rows["inverter"], report.rows["shuffled embedding"]
    for metric, margin in (("token-set F1", 0.15), ("cosine", 0.2)):
        assert own[metric].mean > shuffled[metric].mean + margin, metric


PROSE = [
    "The committee put off the vote until the new members had read the full report on housing.",
    "After the storm the fishermen went back to the harbour and saw that most of their boats were "
    "badly damaged.",
    "Our grandmother told us about the winter when the river froze and people walked across it to "
    "the other village.",
    "The hospital will close two of its wards because there are not enough nurses to staff them.",
    "To cancel the subscription, send us an email with your customer number at least two weeks "
    "before the renewal date.",
    "The price of coffee rose by nearly ten percent this month after heavy rain destroyed a large "
    "part of the harvest in Brazil.",
    "He was born in a small town in Texas and moved to California with his family when he was "
    "eleven years old.",
    "The new version fixes several security problems and makes the phone much faster, according to "
    "the company.",
]


def test_the_default_does_not_end_prose_too_early(inverter, minilm):
    lengths = np.array([len(ids) for ids in minilm.tokenizer.encode(PROSE)])
    vectors = minilm.encode(PROSE)

    def bias(decoding):
        found = [len(item.token_ids) for item in inverter.invert(vectors, decoding=decoding)]
        return float(np.mean(found - lengths))

    assert abs(bias("greedy")) < min(3.0, -bias("greedy:lengths=0"))


def test_they_belong_to_the_packaged_encoder(inverter, minilm):
    inverter.encoder.require_same(minilm.identity, "vectors")
    assert inverter.tokenizer.digest == minilm.tokenizer.digest


def test_bfloat16_writes_nearly_the_same(minilm):
    inverter, vectors = Inverter.from_pretrained("minilm"), minilm.encode(SENTENCES)
    expected = inverter.invert(vectors, steps=4)
    found = inverter.to("cpu", "bfloat16").invert(vectors, steps=4)
    same = [
        a == b
        for x, y in zip(expected, found, strict=True)
        for a, b in zip(x.token_ids, y.token_ids, strict=False)
    ]
    assert np.mean(same) > 0.8


def test_they_are_small_and_documented():
    folder = shipped_inverters()["minilm"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 60e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    training = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]
    assert f"{training['step']:,}" in card and f"{training['pairs']:,}" in card


def test_the_readme_s_python_runs(minilm, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr("unembed.encoders.sentence.load_encoder", lambda *args: minilm)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def tree_of_the_readme():
    """What each line names, as paths of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```\n(src/unembed/\n.*?)```", text, flags=re.DOTALL)
    folders: list[Path] = []  # the last folder at each depth
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        inside = folders[depth - 1] if depth else ROOT
        is_name = re.compile(r"[\w/-]+(\.py|/)").fullmatch
        paths = [inside / name for name in itertools.takewhile(is_name, line.split())]
        assert paths, f"a line without a name: {line}"
        folders[depth:] = paths[-1:]
        yield from paths


def test_the_readme_s_tree_is_there_and_complete():
    named = set(tree_of_the_readme())
    assert sorted(str(path) for path in named if not path.exists()) == []
    # A folder of which a module is named is named whole
    source = ROOT / "src"
    modules = {path for path in named if path.suffix == ".py" and path.is_relative_to(source)}
    for folder in {path.parent for path in modules}:
        inside = {path for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        inside -= named | {parent for path in named for parent in path.parents}
        assert sorted(path.name for path in inside if not path.name.startswith("__")) == [], folder
    assert {ROOT / name for name in ("examples", "benchmarks", "tests", "docs")} <= named


def test_any_length_of_text_gives_an_answer(inverter, minilm):
    texts = ["Hi.", "word " * 200]
    results = inverter.invert(minilm.encode(texts), steps=4)
    assert len(results) == 2 and all(len(r.token_ids) <= inverter.length for r in results)
    assert np.isfinite([c for r in results for c in r.confidences]).all()


@pytest.mark.slow
def test_the_python_of_the_decoding_page_runs(minilm, monkeypatch, capsys):
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr("unembed.encoders.sentence.load_encoder", lambda *args: minilm)
    exec("\n".join(blocks), {})
    out = capsys.readouterr().out
    assert re.search(r"\b([1-4])/\1 0%", out), "the last step was not shown"


def test_the_python_of_the_words_page_runs(minilm, monkeypatch, capsys):
    text = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr("unembed.encoders.sentence.load_encoder", lambda *args: minilm)
    exec(code, {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 and "heart" in [line[0] for line in lines]


def test_the_word_probe_belongs_to_the_packaged_encoder_and_is_small(minilm):
    probe = WordProbe.from_pretrained("minilm")
    probe.encoder.require_same(minilm.identity, "vectors")
    assert sum(path.stat().st_size for path in shipped_probes()["minilm"].iterdir()) < 8e6
    text = SENTENCES[0]
    found = probe.most_probable(minilm.encode([text]), 10)[0]
    assert {word.word for word in found} & {"patient", "chest", "pain", "admitted"}


def test_the_decoding_page_names_every_option_with_its_default():
    text = (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8")
    for name in (name for name in STRATEGIES if not Decoding.of(name).strategy.needs_encoder):
        assert f"`{name}`" in text
        for option, default in {f.name: f.default for f in strategy_fields(name)}.items():
            shown = f"{default:g}" if isinstance(default, float) else str(default)
            assert f"`{option}` ({shown})" in text, f"{name}: {option} ({shown})"
