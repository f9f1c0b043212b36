import json
import math
import sys
from xml.etree import ElementTree

import pytest

from unembed.errors import ConfigError, DataError, TrainingError
from unembed.training import curves
from unembed.training.curves import draw_curves, read_run, read_runs, save_curves
from unembed.training.metrics_log import METRICS


def write_run(folder, *, decoded=True, offset=0.0, steps=40, **more):
    """A log as the trainer writes it: a record every 2 steps, a validation every 10."""
    folder.mkdir(parents=True)
    records = []
    for step in range(2, steps + 1, 2):
        loss = 2.0 + offset + 8.0 * math.exp(-step / 10)
        records.append(
            {"step": step, "loss": loss, "seconds": 1800.0 * step, "samples": 96 * step, **more}
        )
        if step % 10 == 0:
            figures = {"validation_loss": loss, "masked_accuracy": step / 100}
            if decoded:
                figures["decoded_token_accuracy"] = step / 200
            records.append({"step": step, **figures, "samples": 96 * step})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / METRICS).write_text(text, encoding="utf-8")
    return folder


def words(path) -> list[str]:
    """The words of an SVG, which are kept as text."""
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()).strip() for node in root.iter() if node.tag.endswith("}text")]


@pytest.fixture
def drawn(monkeypatch):
    """Every line drawn: (panel, colour, x, y)."""
    lines = []
    original = curves._draw

    def spy(axes, panel, runs, axis):
        original(axes, panel, runs, axis)
        for line in axes.get_lines():
            lines.append((panel.title, line.get_color(), *map(list, line.get_data())))

    monkeypatch.setattr(curves, "_draw", spy)
    return lines


def test_an_svg_has_a_titled_panel_a_figure_and_names_its_runs(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("small_$1", "_large")]
    assert save_curves(runs, tmp_path / "curves.svg") == []
    found = words(tmp_path / "curves.svg")
    titles = {"loss", "masked accuracy", "decoded token accuracy"}
    assert titles | {"small_$1", "_large", "training"} <= set(found)
    assert found.count("optimiser steps") == 3


def test_save_curves_a_png_is_a_png_and_the_same_twice(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("one.png", "two.PNG"):
        save_curves([run], tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.PNG"))
    assert one.startswith(b"\x89PNG") and one == two
    assert draw_curves([read_run(run)[0]], kind="svg") == draw_curves(
        [read_run(run)[0]], kind="svg"
    )


@pytest.mark.parametrize(("axis", "per_step"), [("steps", 1.0), ("samples", 96.0), ("hours", 0.5)])
def test_draw_curves_every_axis_puts_every_figure_where_it_was_measured(
    tmp_path, drawn, axis, per_step
):
    run = write_run(tmp_path / "run")
    draw_curves([read_run(run)[0]], axis)
    (loss, held_out) = [(x, y) for title, _, x, y in drawn if title == "loss"]
    assert loss[0] == pytest.approx([per_step * step for step in range(2, 41, 2)])
    assert held_out[0] == pytest.approx([per_step * step for step in (10, 20, 30, 40)])
    (decoded,) = [(x, y) for title, _, x, y in drawn if title == "decoded token accuracy"]
    assert decoded[1] == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_runs_differ_in_colour_or_marker(tmp_path, drawn):
    looks = [curves._look(index) for index in range(49)]
    assert len(set(looks)) == 49
    assert len({colour for colour, _ in looks[:7]}) == len({marker for _, marker in looks[:7]}) == 7
    runs, _ = read_runs([write_run(tmp_path / name) for name in "ab"])
    draw_curves(runs)
    assert {colour for _, colour, _, _ in drawn} == {looks[0][0], looks[1][0]}


def test_a_figure_that_nobody_logged_leaves_its_panel_out_with_a_note(tmp_path, drawn):
    old = write_run(tmp_path / "old", decoded=False)
    assert save_curves([old], tmp_path / "x.png") == [
        "no decoded token accuracy in the log of old: that panel is left out"
    ]
    assert {title for title, *_ in drawn} == {"loss", "masked accuracy"}
    new = write_run(tmp_path / "new")
    assert save_curves([new, old], tmp_path / "x.png") == [
        "no decoded token accuracy in the log of old: that curve is left out"
    ]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    runs, _ = read_runs(folders)
    assert [run.name for run in runs] == [str(folder) for folder in folders]


def test_a_long_curve_is_drawn_as_means(tmp_path, drawn):
    run = write_run(tmp_path / "run", steps=2000)
    draw_curves([read_run(run)[0]])
    training = next((x, y) for title, _, x, y in drawn if title == "loss")
    assert len(training[0]) == 300
    assert sum(training[1]) / 300 == pytest.approx(2.0, abs=0.2)


def test_save_curves_damaged_lines_and_what_is_not_finite_are_left_out(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    with (run / METRICS).open("a") as file:
        file.write('{"step": 41, "loss": NaN}\n{"step": 42, "lo\n\n')
    notes = save_curves([run], tmp_path / "x.png")
    assert notes == [f"2 damaged lines of {run / METRICS} were left out"]
    assert max(x for title, _, xs, _ in drawn if title == "loss" for x in xs) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a run of `unembed train` at .*no metrics\.jsonl there"),
        ("", "found an empty file"),
        ("{\n{\n", "found 2 damaged lines"),
        ('{"step": 1, "lr": 1.0}\n', "in the logs; found none"),
    ],
)
def test_what_is_no_run_is_refused_and_nothing_written(tmp_path, content, message):
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        (run / METRICS).write_text(content)
    with pytest.raises(TrainingError, match=message):
        save_curves([run], tmp_path / "x.png")
    assert not list(tmp_path.glob("x.png*"))


def test_save_curves_a_log_that_does_not_count_is_refused_on_that_axis(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / METRICS).write_text('{"step": 1, "loss": 2.0}\n')
    for axis in ("samples", "hours"):
        with pytest.raises(TrainingError, match=r"log of run; found none.*--x "):
            save_curves([run], tmp_path / "x.png", axis)
    save_curves([run], tmp_path / "x.png")


def test_save_curves_bad_options_are_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"steps, samples, hours; found 'days'"):
        save_curves([run], tmp_path / "x.png", "days")
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        save_curves([run], tmp_path / "x.pdf")
    with pytest.raises(DataError, match="a place to write"):
        save_curves([run], tmp_path / "none" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[plots\]"):
        save_curves([run], tmp_path / "x.png")
