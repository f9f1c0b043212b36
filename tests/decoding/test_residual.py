"""Residual steering: its equation, its calls, and that it only gets nearer."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.decoding.test_encoder_strategies import TEXTS, decode, out_of_reach
from unembed.decoding.best_of import BestOf
from unembed.decoding.residual import Residual, SteeredVectors
from unembed.errors import ConfigError


class Listener:
    """A denoiser that writes down the vectors it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, tokens, embedding, t, where):
        self.seen.append(embedding.clone())
        return torch.zeros(int(where.sum()), 5)


def test_steered_vectors_add_gamma_times_the_residual(inverter, encoder):
    from tests.decoding.test_encoder_strategies import canvas_of

    spec, target = canvas_of(inverter), torch.from_numpy(out_of_reach(3))
    steered, denoiser = SteeredVectors(target, 0.5), Listener()
    denoiser_vectors = out_of_reach(2, seed=1)
    wanted = target.clone()
    for _ in range(2):
        steered.update([2, 0], denoiser_vectors)
        residual = target[[2, 0]] - torch.from_numpy(denoiser_vectors)
        wanted[[2, 0]] += 0.5 * residual
    inner = inverter.denoiser

    def listening(tokens, embedding, t, where):
        denoiser.seen.append(embedding.clone())
        return inner(tokens, embedding, t, where)

    with torch.inference_mode():
        steered.decode([0, 1, 2], listening, spec, 2)
    torch.testing.assert_close(denoiser.seen[0], F.normalize(wanted, dim=1))


@pytest.mark.parametrize("budget", [1, 2, 9])
def test_residual_starts_with_greedy_and_keeps_the_nearest(inverter, encoder, budget):
    targets = encoder.encode(TEXTS)
    greedy, _ = decode(BestOf(samples=1), inverter, encoder, targets, 1)
    result, oracle = decode(Residual(), inverter, encoder, targets, budget)
    texts = inverter.tokenizer.decode(result.tokens.tolist())
    starts = inverter.tokenizer.decode(greedy.tokens.tolist())
    for text, start, seen, cosine in zip(
        texts, starts, oracle.seen, result.cosines.tolist(), strict=True
    ):
        assert next(iter(seen)) == start
        assert cosine == pytest.approx(max(seen.values())) == pytest.approx(seen[text])
    assert (result.encoder_calls <= budget).all()
    assert torch.equal(result.encoder_calls, oracle.calls)


def test_residual_gets_nearer_than_greedy(inverter, encoder):
    targets = encoder.encode(TEXTS)
    greedy, _ = decode(BestOf(samples=1), inverter, encoder, targets, 1)
    result, _ = decode(Residual(), inverter, encoder, targets, 30)
    assert (result.cosines >= greedy.cosines - 1e-6).all()
    assert result.cosines.mean() > greedy.cosines.mean()


def test_residual_without_steps_ends_when_nothing_is_new(inverter, encoder):
    result, oracle = decode(Residual(gamma=0.0), inverter, encoder, out_of_reach(2), 50)
    assert oracle.calls.tolist() == [1, 1]
    assert (result.passes > 0).all()


def test_residual_does_not_depend_on_the_company(inverter, encoder):
    targets = encoder.encode(TEXTS)
    together, _ = decode(Residual(), inverter, encoder, targets, 8)
    apart = [decode(Residual(), inverter, encoder, targets[k : k + 1], 8)[0] for k in range(3)]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in apart]))
    assert torch.equal(together.passes, torch.cat([one.passes for one in apart]))


def test_residual_tells_its_steps(inverter, encoder):
    steps = []
    result, _ = decode(Residual(), inverter, encoder, out_of_reach(2), 6, on_step=steps.append)
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].total == steps[-1].index
    assert torch.equal(steps[-1].tokens, result.tokens)
    assert (np.diff([step.cosines.numpy() for step in steps], axis=0) >= 0).all()


def test_residual_refuses_a_negative_step():
    with pytest.raises(ConfigError, match="expected gamma "):
        Residual(gamma=-1.0)
