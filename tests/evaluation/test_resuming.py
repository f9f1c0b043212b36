"""An evaluation that was stopped goes on, and ends as if it had not been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unembed.errors import DataError
from unembed.evaluation import rows as recovering
from unembed.evaluation.cache import FOLDER
from unembed.evaluation.evaluate import evaluate
from unembed.files import locked
from unembed.inverter import Inverter

ROOT = Path(__file__).parents[2]


def without_time(report):
    found = report.to_dict()
    groups = [group for groups in found["breakdowns"].values() for group in groups.values()]
    for rows in [found["rows"], *groups]:
        for row in rows.values():
            row.pop("milliseconds")
    return found


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(recovering, "BATCH", 8)


@pytest.mark.parametrize("after", [0, 1, 3, 5, 7])
def test_evaluate_finished_rows_are_not_done_again(
    lookup_of, encoder, pieces, passages, tmp_path, after, small_batches
):
    texts = [piece.text for piece in pieces[::2]]
    whole = evaluate(lookup_of(texts), encoder, passages, limit=20)
    first = lookup_of(texts)
    first.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, encoder, passages, limit=20, folder=tmp_path)
    second = lookup_of(texts)
    again = evaluate(second, encoder, passages, limit=20, folder=tmp_path)
    assert without_time(again) == without_time(whole)
    done = sum(count for count, _ in first.calls)
    assert sum(count for count, _ in second.calls) == 3 * 20 - done
    third = lookup_of(texts)
    third.stop_after = 0
    assert without_time(evaluate(third, encoder, passages, limit=20, folder=tmp_path)) == (
        without_time(whole)
    )


def test_evaluate_other_settings_are_decoded_anew(lookup, encoder, passages, tmp_path):
    evaluate(lookup, encoder, passages, limit=20, folder=tmp_path)
    done = len(lookup.calls)
    evaluate(lookup, encoder, passages, limit=20, folder=tmp_path, seed=1)
    evaluate(lookup, encoder, passages[1:], limit=20, folder=tmp_path)
    assert len(lookup.calls) == 3 * done
    evaluate(
        lookup, encoder, passages, limit=20, folder=tmp_path, strategy=["greedy", "greedy:steps=2"]
    )
    new = [options["decoding"].steps for _, options in lookup.calls[3 * done :]]
    assert set(new) == {2, 8}


PROGRAM = """
import sys, time
from pathlib import Path
from unembed.encoders.base import FakeEncoder
from unembed.evaluation import rows as recovering
from unembed.evaluation.evaluate import evaluate
from unembed.inverter import Inverter
recovering.BATCH = 4
folder, texts, out = sys.argv[1:]
inverter = Inverter.from_pretrained(folder)
invert = Inverter.invert
calls = []
def stuck(*given, **options):
    calls.append(given)
    if len(calls) > 2:
        time.sleep(600)
    return invert(*given, **options)
Inverter.invert = stuck
evaluate(inverter, FakeEncoder(), Path(texts).read_text().splitlines(), folder=Path(out), limit=16)
"""


@pytest.mark.slow
def test_evaluate_a_killed_process_goes_on(
    inverter_folder, encoder, passages, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "report"
    arguments = [sys.executable, "-c", PROGRAM, inverter_folder, text_file, out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen([*map(str, arguments)], env=environment) as process:
        deadline = time.monotonic() + 120
        while (rows := lines(out)) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    assert rows == 8, "killed on the way, in the third of four batches"
    inverter = Inverter.from_pretrained(inverter_folder)
    counted, invert = [], Inverter.invert

    def counting(self, vectors, **options):
        counted.append(len(vectors))
        return invert(self, vectors, **options)

    monkeypatch.setattr(Inverter, "invert", counting)
    again = evaluate(inverter, encoder, passages, folder=out, limit=16)
    assert sum(counted) <= 3 * 16 - rows
    assert without_time(again) == without_time(evaluate(inverter, encoder, passages, limit=16))


def lines(out):
    """Finished recoveries of the inverter's row."""
    found = list(out.glob("decoded/inverter-*.jsonl"))
    return max(0, found[0].read_bytes().count(b"\n") - 1) if found else 0


def test_evaluate_refuses_a_folder_that_is_written_to(lookup, encoder, passages, tmp_path):
    (tmp_path / FOLDER).mkdir()
    with locked(tmp_path / FOLDER), pytest.raises(DataError, match="another process"):
        evaluate(lookup, encoder, passages, limit=20, folder=tmp_path)
    assert not lookup.calls
