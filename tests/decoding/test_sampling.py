"""Draws follow the distribution asked for, in time steps of the schedule in use."""

import pytest
import torch

from unembed.decoding import SequenceSpec
from unembed.decoding.euler import Euler, EulerRemask, TwoStage
from unembed.decoding.logits import nucleus_floor, sample, uniforms
from unembed.diffusion import Linear, LogLinear

MASK = 3


def grid(n: int) -> torch.Tensor:
    """Evenly spread numbers in [0, 1): with them a draw is an exact quantile."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def shares(logits, n=10_000, **options) -> list[float]:
    tokens, _ = sample(logits.expand(n, -1).clone(), grid(n), **options)
    return (torch.bincount(tokens, minlength=logits.shape[-1]) / n).tolist()


LOGITS = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()


def test_sample_draws_have_the_probabilities_of_the_logits():
    assert shares(LOGITS) == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=1e-3)


def test_sample_temperature_sharpens_and_zero_takes_the_likeliest():
    squared = [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38, 0.0]
    assert shares(LOGITS, temperature=0.5) == pytest.approx(squared, abs=1e-3)
    for cold in (0.0, 1e-300, 1e-38, 1e-4):
        assert shares(LOGITS, temperature=cold) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.5, [1, 0, 0, 0]), (0.51, [0.625, 0.375, 0, 0]), (0.8, [0.625, 0.375, 0, 0])],
)
def test_sample_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, expected):
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).log()
    assert shares(logits, top_p=top_p) == pytest.approx(expected, abs=1e-3)


def test_sample_a_nucleus_too_small_for_float32_is_the_likeliest_token():
    assert shares(LOGITS, top_p=1e-308) == [1.0, 0.0, 0.0, 0.0]


def test_nucleus_floor_a_wide_nucleus_is_found_too():
    p = torch.full((2, 1000), 1e-3)
    p[1] = 0.0
    p[1, 7] = 1.0
    floor = nucleus_floor(p, 0.9)
    torch.testing.assert_close(floor, torch.tensor([1e-3, 1.0]))


@pytest.mark.slow
def test_sample_rare_tokens_are_drawn_as_often_as_they_should_be():
    """The tail that coarse noise cuts off: a thousand tokens of 1e-5 each."""
    p = torch.full((1, 1001), 1e-5)
    p[0, 0] = 0.99
    tokens, _ = sample(p.log().expand(20_000, -1), grid(20_000))
    assert float((tokens > 0).double().mean()) == pytest.approx(0.01, rel=0.02)
    assert len(tokens.unique()) > 150


def test_sample_the_confidence_is_the_denoiser_s_own_probability():
    tokens, sure = sample(LOGITS.expand(3, -1), torch.tensor([0.1, 0.6, 0.9]), 0.5, 0.9)
    torch.testing.assert_close(sure, torch.tensor([0.5, 0.3, 0.2])[tokens])


@pytest.mark.parametrize("u", [0.0, 1.0 - 2**-53])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_sample_what_is_ruled_out_is_never_drawn(u, place):
    logits = torch.zeros(1, 5)
    logits[0, place] = -torch.inf
    tokens, _ = sample(logits, torch.tensor([u], dtype=torch.float64))
    assert tokens.item() != place and 0 <= tokens.item() < 5


def test_uniforms_each_sequence_has_its_own_numbers():
    def made():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]

    whole = uniforms(made(), (2, 6), torch.zeros(1))
    assert whole.shape == (3, 2, 6) and whole.dtype == torch.float64
    assert torch.equal(uniforms(made()[1:2], (2, 6), torch.zeros(1))[0], whole[1])


class Uniform:
    """Every token is as likely as the others; counts the rows it is asked about."""

    def __init__(self) -> None:
        self.times, self.rows = [], 0

    def __call__(self, tokens, embedding, t, where):
        self.times.extend(t.tolist())
        self.rows += len(tokens)
        return torch.zeros(int(where.sum()), 4)


def decode(strategy, schedule, steps, batch=400, length=8, denoiser=None, shown=None):
    return strategy(
        denoiser or Uniform(),
        torch.zeros(batch, 2),
        SequenceSpec(length, MASK, schedule),
        steps=steps,
        generators=[torch.Generator().manual_seed(row) for row in range(batch)],
        on_step=None if shown is None else shown.append,
    )


@pytest.mark.parametrize("schedule", [Linear(), LogLinear(5.0)])
def test_euler_the_share_of_masks_follows_the_schedule(schedule):
    """After the step to s a position is masked with probability (1 - alpha_s) / (1 - alpha_1)."""
    shown = []
    decode(Euler(), schedule, 5, shown=shown)
    s = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0])
    expected = (1 - schedule.alpha(s)) / (1 - schedule.alpha(torch.tensor(1.0)))
    found = torch.stack([step.mask_ratio.mean() for step in shown])
    # 3200 positions: four standard deviations are 0.036
    torch.testing.assert_close(found, expected, atol=0.036, rtol=0)


def test_euler_the_denoiser_is_told_the_time_and_asked_only_where_something_happens():
    denoiser = Uniform()
    decoded = decode(Euler(), LogLinear(5.0), 10, denoiser=denoiser)
    assert {round(t * 10, 4) for t in denoiser.times} <= set(range(1, 11))
    assert denoiser.rows == int(decoded.passes.sum()) < 0.8 * 10 * 400


def test_euler_tokens_are_drawn_evenly_from_an_even_distribution():
    decoded = decode(Euler(), Linear(), 4)
    counts = torch.bincount(decoded.tokens.flatten(), minlength=3) / decoded.tokens.numel()
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.034, rtol=0)


def test_euler_remask_remasking_takes_back_the_share_it_should():
    shown = []
    decode(EulerRemask(probability=0.3), Linear(), 2, shown=shown)
    assert float(shown[0].mask_ratio.mean()) == pytest.approx(0.5 + 0.5 * 0.3, abs=0.036)
    assert float(shown[1].mask_ratio.mean()) == 0.0


def test_euler_remask_a_threshold_takes_back_doubtful_tokens_only():
    for threshold, share in ((0.2, 0.5), (0.4, 1.0)):  # every draw has a confidence of 1/3
        shown = []
        decode(EulerRemask(threshold=threshold, probability=1.0), Linear(), 2, shown=shown)
        assert float(shown[0].mask_ratio.mean()) == pytest.approx(share, abs=0.036)


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_two_stage_the_second_stage_starts_from_the_hypothesis_noised_as_asked(noise):
    shown = []
    decode(TwoStage(noise=noise), Linear(), 10, shown=shown)
    assert float(shown[4].mask_ratio.mean()) == 0.0
    # The sixth pass unmasks a fifth of what was masked again.
    assert float(shown[5].mask_ratio.mean()) == pytest.approx(0.8 * noise, abs=0.036)
    assert float(shown[9].mask_ratio.mean()) == 0.0
