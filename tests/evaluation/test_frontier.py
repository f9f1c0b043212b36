"""The frontier: each point is what a search with so few calls gives; it resumes; its means."""

import json
from dataclasses import replace

import numpy as np
import pytest

from unembed.decoding import Decoding
from unembed.errors import ConfigError
from unembed.evaluation import frontier
from unembed.evaluation.frontier import measure_frontier
from unembed.evaluation.report import write_frontier

MARKS = (0, 1, 3, 7, 12)
STRATEGIES = ["guided-search:rounds=2:proposals=3", "residual", "best-of:samples=12"]


@pytest.fixture
def measure(inverter, encoder, passages):
    def run(**settings):
        given = {"strategy": STRATEGIES[0], "marks": MARKS, "limit": 3, **settings}
        return measure_frontier(inverter, encoder, passages, **given)

    inverter.to(
        "cpu", "float32"
    )  # searches too: what they start from is then greedy's to the digit
    yield run
    inverter.to("cpu")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_with_fewer_calls_is_the_start_of_one_with_more(
    inverter, encoder, pieces, strategy
):
    vectors = encoder.encode([piece.text for piece in pieces[:3]])
    seen = [[] for _ in vectors]
    decoding = replace(Decoding.parse(strategy), encoder_calls=max(MARKS))
    inverter.invert(
        vectors,
        decoding=decoding,
        encoder=encoder,
        on_call=lambda row, ids, cosine, calls: seen[row].append((cosine, ids)),
    )
    for mark in MARKS[1:]:
        few = inverter.invert(
            vectors, decoding=replace(decoding, encoder_calls=mark), encoder=encoder
        )
        for one, calls in zip(few, seen, strict=True):
            cosine, ids = max(calls[:mark], key=lambda call: call[0])
            assert one.cosine == pytest.approx(cosine)
            assert one.token_ids == [ids[k] for k in inverter.tokenizer.content_positions(ids)]


def test_measure_frontier_only_gets_nearer_and_starts_without_a_call(measure):
    curve = measure(strategy=STRATEGIES)
    assert list(curve.points) == STRATEGIES
    for buckets in curve.points.values():
        for marks in buckets.values():
            assert tuple(marks) == MARKS
            cosines = [figures["cosine"].mean for figures in marks.values()]
            assert (np.diff(cosines) > -1e-6).all()  # the same but for rounding
            assert cosines[0] == pytest.approx(cosines[1])  # the first call embeds the greedy text


def test_measure_frontier_weighs_the_lengths_by_their_shares(measure):
    curve = measure()
    ((_, buckets),) = curve.points.items()
    assert sum(curve.shares.values()) == pytest.approx(1.0)
    for mark in MARKS:
        wanted = sum(share * buckets[b][mark]["cosine"].mean for b, share in curve.shares.items())
        assert buckets["all"][mark]["cosine"].mean == pytest.approx(wanted)
        figure = buckets["all"][mark]["cosine"]
        assert figure.low <= figure.mean <= figure.high
        assert figure.n == sum(curve.settings["texts"].values())


def test_measure_frontier_goes_on_where_it_was_killed(measure, tmp_path, monkeypatch):
    whole = measure()
    assert measure(folder=tmp_path).points == whole.points
    files = sorted((tmp_path / "decoded").iterdir())
    for file in files:  # cut in the middle of a text, and in the middle of a line
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[: len(MARKS) + 3]) + lines[-1][:9], encoding="utf-8")
    searched = []
    search = frontier._Search._recover
    monkeypatch.setattr(
        frontier._Search,
        "_recover",
        lambda self, samples, first: searched.append(len(samples)) or search(self, samples, first),
    )
    assert measure(folder=tmp_path).points == whole.points
    assert sum(searched) == sum(max(n - 1, 0) for n in whole.settings["texts"].values())
    searched.clear()
    assert measure(folder=tmp_path).points == whole.points
    assert searched == []


def test_measure_frontier_stops_at_the_calls_of_a_strategy(measure):
    curve = measure(strategy="residual:encoder_calls=3")
    assert all(tuple(marks) == (0, 1, 3) for marks in next(iter(curve.points.values())).values())


def test_measure_frontier_refuses_what_calls_no_encoder(measure):
    with pytest.raises(ConfigError, match="expected strategies that call the encoder"):
        measure(strategy="greedy")


def test_write_frontier_writes_table_figures_and_picture(measure, tmp_path):
    curve = measure()
    write_frontier(curve, tmp_path / "report")
    figures = json.loads((tmp_path / "report" / "frontier.json").read_text(encoding="utf-8"))
    assert set(figures["points"]) == {STRATEGIES[0]}
    table = (tmp_path / "report" / "frontier.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| all |")]
    assert len(rows) == len(MARKS)
    svg = (tmp_path / "report" / "frontier.svg").read_text(encoding="utf-8")
    assert "encoder calls" in svg and "exact match" in svg


def test_draw_takes_each_length_with_its_share(inverter, passages):
    samples = frontier.Samples(passages, inverter.tokenizer, frontier.cutting(inverter))
    chosen, shares = frontier.draw_by_length(samples, 32, 2, 0)
    sizes = np.array([len(sample.token_ids) for sample in samples])
    for name, some in chosen.items():
        low, high = (int(end) for end in name.split("-"))
        assert len(some) == min(2, int(((sizes >= low) & (sizes <= high)).sum()))
        assert all(low <= len(sample.token_ids) <= high for sample in some)
        assert shares[name] == pytest.approx(((sizes >= low) & (sizes <= high)).mean())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"marks": []}, "marks: numbers of encoder calls; found none"),
        ({"marks": [-1, 2]}, r"marks\[0\] as a whole number of at least 0"),
        ({"marks": ["2"]}, r"marks\[0\] as a whole number"),
        ({"limit": 0}, "limit as a whole number of at least 1"),
        ({"seed": "a"}, "seed as a whole number"),
        ({"folder": 3}, "folder as a path"),
        ({"progress": 3}, "progress as a function"),
        ({"corpus": "x"}, "corpus as pairs"),
    ],
)
def test_measure_frontier_refuses_settings_of_another_kind(measure, setting, message):
    with pytest.raises(ConfigError, match=message):
        measure(**setting)
