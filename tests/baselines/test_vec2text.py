from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unembed.baselines import vec2text
from unembed.baselines.vec2text import Vec2Text, calls_at_most

TRUTH = "cat dog bird"


@pytest.mark.parametrize(
    ("steps", "beams", "calls"),
    [(0, 4, 1), (1, 1, 2), (2, 2, 7), (4, 2, 15), (8, 2, 31), (4, 4, 53), (8, 4, 117),
     (16, 4, 245), (8, 8, 457), (50, 8, 3145)],
)  # fmt: skip
def test_calls_at_most_is_the_count_of_the_loop(steps, beams, calls):
    assert calls_at_most(steps, beams) == calls


class Scripted:
    """Stands for `write_texts`: the base says a text, the corrector the next ones of a script."""

    def __init__(self, encoder, first, script):
        self.ids, self.first, self.script = encoder.tokenizer, first, list(script)
        self.given = []

    def __call__(self, network, ids, embedding, hypothesis=None, beams=1):
        self.given.append(SimpleNamespace(embedding=embedding, hypothesis=hypothesis))
        if network == "inverter":
            texts = [[self.first]] * len(embedding)
        else:
            texts = self.script.pop(0)
            assert len(texts) == len(embedding)
            assert all(len(row) == beams for row in texts)
        rows = [self.ids.pack(self.ids.encode(row), 8).astype(np.int64) for row in texts]
        return torch.from_numpy(np.stack(rows)), torch.zeros(len(texts), beams)


def run(encoder, monkeypatch, first, script, beams):
    scripted = Scripted(encoder, first, script)
    monkeypatch.setattr(vec2text, "write_texts", scripted)
    system = Vec2Text("inverter", "corrector", encoder.tokenizer, encoder)
    results = system.correct(encoder.encode([TRUTH]), len(script), beams)
    return results, scripted


def test_correct_goes_on_from_the_nearest_different_texts(encoder, monkeypatch):
    script = [
        [["cat dog", "cat"]],
        # Of four texts two are the same; the nearest two different ones go on
        [["cat dog fish", "cat dog fish"], ["sun moon", "dog cat bird"]],
        [["red", "blue"], ["cat dog bird", "green"]],
    ]
    results, scripted = run(encoder, monkeypatch, "cat sun", script, beams=2)
    texts = encoder.tokenizer.decode(scripted.given[3].hypothesis.tolist())
    assert set(texts) == {"cat dog fish", "dog cat bird"}
    # The corrector sees e beside the embeddings of its hypotheses
    size = encoder.identity.dimension
    given = scripted.given[3].embedding.numpy()
    np.testing.assert_allclose(given[:, :size], encoder.encode([TRUTH] * 2), atol=1e-6)
    np.testing.assert_allclose(given[:, size:], encoder.encode(texts), atol=1e-6)
    assert encoder.tokenizer.decode(results[-1].tokens.tolist()) == [TRUTH]
    assert float(results[-1].cosines[0]) == pytest.approx(1.0, abs=1e-5)
    # 1, 2, 3 of 4 different, 4 texts embedded; each survivor is written to once a step
    assert [int(r.calls[0]) for r in results] == [1, 3, 6, 10]
    assert [r.passes for r in results] == [1, 2, 4, 6]


def test_correct_remembers_the_nearest_text_of_all_steps(encoder, monkeypatch):
    script = [[["cat dog bird"]], [["sun"]], [["moon"]]]
    results, _ = run(encoder, monkeypatch, "rain", script, beams=1)
    texts = [encoder.tokenizer.decode(r.tokens.tolist())[0] for r in results]
    assert texts == ["rain", TRUTH, TRUTH, TRUTH]
    assert [int(r.calls[0]) for r in results] == [1, 2, 3, 4]
