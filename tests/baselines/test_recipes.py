"""The recipe of Vec2Text's networks and the harness: both go on after a kill."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import peers, vec2text

from unembed.baselines.left_to_right import LeftToRight, PrefixSizes
from unembed.config import TrainingSection
from unembed.data.pairs import Pairs
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import Sample
from unembed.training.step import training_rows


def settings_of(**changes):
    return TrainingSection(
        steps=6, batch_size=4, warmup_steps=1, lr=1e-2, validation_pairs=8, log_every=2,
        save_every=2, sampled_vocabulary=16, **changes
    )  # fmt: skip


def run_of(pairs, path, steps, corrector=False):
    torch.manual_seed(0)
    sizes = PrefixSizes(pairs.tokenizer.size, 32, 12, 16, 1, 2, 16, 2, corrector)
    return vec2text.Run(LeftToRight(sizes), settings_of(), path), steps


def advance(pairs, path, steps, folder=None):
    run, _ = run_of(pairs, path, steps, folder is not None)
    run.settings = run.settings.model_copy(update={"steps": steps})
    vec2text.train(run, vec2text.Batches(pairs, run.settings, folder), path.with_suffix(".jsonl"))
    return run


def test_train_goes_on_where_it_was_stopped(pairs_folder, tmp_path):
    pairs = Pairs.open(pairs_folder)
    whole = advance(pairs, tmp_path / "whole.safetensors", 4)
    advance(pairs, tmp_path / "parts.safetensors", 2)
    parts = advance(pairs, tmp_path / "parts.safetensors", 4)
    assert parts.step == whole.step == 4
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "parts.jsonl").read_text().splitlines()
    ]
    assert steps == [2, 4]
    for averaged in (False, True):
        one, other = (
            vec2text.load_network(tmp_path / f"{name}.safetensors", averaged).state_dict()
            for name in ("whole", "parts")
        )
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_batches_show_the_samples_of_a_denoiser_and_teach_text_and_end(pairs_folder, tmp_path):
    pairs, settings = Pairs.open(pairs_folder), settings_of()
    x, e, index, targets, candidates = vec2text.Batches(pairs, settings, None).draw(3)
    rows = training_rows(12, 4, len(pairs) - 8, settings.seed) + 8
    ids, vectors = pairs.rows(rows)
    np.testing.assert_array_equal(x.numpy(), ids)
    np.testing.assert_allclose(e.numpy(), vectors)
    lengths = [len(pairs.tokenizer.content_positions(row)) + 1 for row in ids.tolist()]
    assert len(index) == sum(lengths)
    assert targets.tolist().count(pairs.tokenizer.end_id) == 4
    assert pairs.tokenizer.pad_id not in targets
    assert set(targets.tolist()) <= set(candidates.ids.tolist())


def test_corrector_learns_from_the_hypotheses_of_its_samples(pairs_folder, tmp_path, monkeypatch):
    pairs, settings = Pairs.open(pairs_folder), settings_of()
    folder = tmp_path / "hypotheses"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, pairs.tokenizer.size, (8, 12)).astype(np.uint16)
    embeddings = rng.standard_normal((8, 32)).astype(np.float16)
    np.save(folder / "tokens-00000.npy", tokens)
    np.save(folder / "embeddings-00000.npy", embeddings)
    x, e, index, _, _ = vec2text.Batches(pairs, settings, folder).draw(3)  # the second four again
    np.testing.assert_array_equal(x[:, :12].numpy(), tokens[4:])
    np.testing.assert_allclose(e[:, 32:].numpy(), embeddings[4:])
    rows = training_rows(4, 4, len(pairs) - 8, settings.seed) + 8
    np.testing.assert_array_equal(x[:, 12:].numpy(), pairs.rows(rows)[0])
    assert int(index.max()) < 4 * 12
    run = advance(pairs, tmp_path / "corrector.safetensors", 2, folder)
    assert run.step == 2


# The harness

TEXTS = ["the cat sat", "a dog ran off", "the red house", "green fish"]


@pytest.fixture
def systems(tmp_path, minilm):
    tokens = minilm.tokenizer.encode(TEXTS)
    samples = [Sample(text, ids, {}) for text, ids in zip(TEXTS, tokens, strict=True)]
    shipped = SimpleNamespace(tokenizer=minilm.tokenizer)
    return SimpleNamespace(
        work=tmp_path, samples=samples, buckets=["short", "long"] * 2, shipped=shipped,
        shares={"short": 0.75, "long": 0.25},
    )  # fmt: skip


def plan_of(calls, fail_at=None):
    def recover(first, samples):
        calls.append(first)
        if first == fail_at:
            raise KeyboardInterrupt
        good = [sample.text if k % 2 == 0 else "x" for k, sample in enumerate(samples)]
        return [
            {7: Recovery(text, s.token_ids if text == s.text else [1], cosine=0.5)}
            for text, s in zip(good, samples, strict=True)
        ]

    return peers.Plan("a system", peers.CALLS, 4, 2, recover)


def test_run_plan_goes_on_after_a_kill(systems):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        peers.run_plan(plan_of(calls, fail_at=2), systems)
    peers.run_plan(plan_of(calls), systems)
    peers.run_plan(plan_of(calls), systems)
    assert calls == [0, 2, 2]
    ((mark, results),) = peers.read_plan(plan_of([]), systems).items()
    assert mark == 7
    assert [sample.text for sample, _ in results] == TEXTS
    systems.samples[0] = Sample("another text", [5], {})
    with pytest.raises(SystemExit, match="other texts"):
        peers.read_plan(plan_of([]), systems)


def test_figures_of_weighs_each_length_by_its_share(systems):
    peers.run_plan(plan_of([]), systems)
    ((_, results),) = peers.read_plan(plan_of([]), systems).items()
    figures = peers.figures_of(results, systems)
    # Right are the first and the third text, both short
    for metric in ("exact match", "word F1", "token accuracy"):
        assert figures[metric].mean == pytest.approx(0.75)
        assert (figures[metric].low, figures[metric].high) == pytest.approx((0.75, 0.75))
    assert figures["cosine"].mean == pytest.approx(0.5)
    assert figures["names"] is None, "the texts have none"
    assert figures["passes"] is None


def test_print_tables_names_what_is_not_whole(systems, capsys):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        peers.run_plan(plan_of(calls, fail_at=2), systems)
    peers.print_tables([plan_of([])], systems)
    assert "| a system" not in (out := capsys.readouterr().out)
    assert "a system (n = 2 of 4)" in out
    peers.run_plan(plan_of(calls), systems)
    peers.print_tables([plan_of([])], systems)
    assert "| a system | 7 | 4 | 0.750 [0.750, 0.750] |" in capsys.readouterr().out
