import itertools
import math

import pytest
import torch

from tests.fakes import TableDenoiser
from unembed.diffusion import (
    MIN_T,
    WEIGHTS,
    CorruptedBatch,
    Linear,
    LogLinear,
    ScoredPadding,
    corrupt_batch,
    cross_entropy_of,
    diffusion_loss,
    draw_masks,
    make_schedule,
    sample_timesteps,
)

MASK = 4
VOCABULARY = 5
SCHEDULES = [LogLinear(5.0), LogLinear(1.0), Linear()]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_elbo_weight_is_the_derivative_of_alpha(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.elbo_weight(t), -slope / (1 - alpha))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_falls_from_one_and_timestep_inverts_it(schedule):
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert (alpha.diff() < 0).all()
    assert float(schedule.alpha(torch.zeros(1))) == 1.0
    torch.testing.assert_close(schedule.timestep(1.0 - alpha), t, rtol=1e-6, atol=1e-6)
    assert float(schedule.timestep(torch.ones(1))) == 1.0


def test_log_linear_is_the_report_s_schedule():
    t = torch.tensor([0.0, 0.2, 1.0])
    torch.testing.assert_close(
        LogLinear(5.0).alpha(t), torch.tensor([1.0, math.exp(-1), math.exp(-5)])
    )


def test_the_report_s_weight_is_the_elbo_s_only_for_linear_masking():
    t = torch.linspace(0.1, 1.0, 10)
    torch.testing.assert_close(WEIGHTS["reciprocal-t"](Linear(), t), WEIGHTS["elbo"](Linear(), t))
    assert not torch.allclose(
        WEIGHTS["reciprocal-t"](LogLinear(), t), WEIGHTS["elbo"](LogLinear(), t), rtol=0.1
    )


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_sample_timesteps_timesteps_hit_every_stratum_once(batch):
    t = sample_timesteps(batch, generator(batch))
    strata = ((t - MIN_T) / (1 - MIN_T) * batch).floor().clamp(max=batch - 1).long()
    assert sorted(strata.tolist()) == list(range(batch))
    assert t.min() >= MIN_T and t.max() <= 1.0


@pytest.mark.parametrize("name", ["log-linear", "linear"])
def test_mask_ratios_cover_zero_to_one_as_the_schedule_says(name):
    """The share masked follows 1 - alpha_t at every t; in training too (training/test_loop.py)."""
    schedule = make_schedule(name, 5.0)
    x0 = torch.zeros(4096, 64, dtype=torch.long)
    batch = corrupt_batch(x0, schedule, WEIGHTS["elbo"], MASK, generator())
    ratio = batch.masked.float().mean(dim=1)
    wanted = 1.0 - schedule.alpha(batch.t)
    # Binomial over 64 positions: five standard deviations, and five positions where these vanish
    assert ((ratio - wanted).abs() < 5 * (wanted * (1 - wanted) / 64).sqrt() + 0.08).all()
    for low, high in itertools.pairwise([0.0, 0.05, 0.3, 0.6, 0.9, 1.0]):
        assert ((ratio >= low) & (ratio <= high)).any(), (low, high)
    expected = {"linear": 0.5, "log-linear": 1 - (1 - math.exp(-5)) / 5}[name]
    assert abs(float(ratio.mean()) - expected) < 0.01


def test_corrupt_batch_masks_and_leaves_the_rest():
    x0 = torch.randint(0, 4, (50, 20), generator=generator())
    ratio = torch.linspace(0, 1, 50)
    masked = draw_masks((50, 20), ratio, generator(1))
    assert not masked[0].any() and masked[-1].all()
    batch = corrupt_batch(x0, Linear(), WEIGHTS["elbo"], MASK, generator(1))
    assert (batch.xt[batch.masked] == MASK).all()
    assert (batch.xt[~batch.masked] == x0[~batch.masked]).all()
    assert torch.equal(batch.targets, x0[batch.masked]) and batch.positions == x0.numel()


def test_corrupt_batch_cuts_the_parts_of_a_batch_from_the_whole():
    x0 = torch.randint(0, MASK, (9, 12), generator=generator())

    def draw(rows):
        given = {"batch": 9, "rows": rows}
        return corrupt_batch(x0[rows], Linear(), WEIGHTS["elbo"], MASK, generator(1), **given)

    whole, parts = draw(slice(None)), [draw(slice(0, 4)), draw(slice(4, 9))]
    for name in ("xt", "t", "masked", "targets", "weights"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    assert [part.positions for part in parts] == [whole.positions] * 2  # the global normaliser


def test_scored_padding_gives_the_loss_of_all_of_it_on_average():
    """Content is scored as before, padding a quarter as often with four times the weight."""
    pad_id, x0 = 3, torch.randint(0, 3, (9, 12), generator=generator())
    x0[:, 7:] = pad_id
    shares, totals, plain_totals = [], [], []
    for seed in range(200):
        batches = [
            corrupt_batch(x0, LogLinear(), WEIGHTS["elbo"], MASK, generator(seed), padding=padding)
            for padding in (None, ScoredPadding(pad_id, 0.25))
        ]
        plain, sampled = batches
        assert torch.equal(sampled.xt, plain.xt) and torch.equal(sampled.masked, plain.masked)
        content = [b.targets != pad_id for b in batches]
        for name in ("index", "targets", "weights"):
            same = [getattr(b, name)[c] for b, c in zip(batches, content, strict=True)]
            assert torch.equal(*same), name
        shares.append(float((~content[1]).sum() / (~content[0]).sum()))
        plain_totals.append(float(plain.weights[~content[0]].sum()))
        totals.append(float(sampled.weights[~content[1]].sum()))
    assert 0.23 < sum(shares) / len(shares) < 0.27
    assert 0.9 < sum(totals) / sum(plain_totals) < 1.1


def test_scored_padding_is_the_same_for_several_processes_as_for_one():
    x0, padding = torch.full((9, 12), 3), ScoredPadding(3, 0.3)
    whole, first, second = (
        corrupt_batch(
            *(x0[rows], LogLinear(), WEIGHTS["uniform"], MASK, generator()),
            **{"batch": 9, "rows": rows, "padding": padding},
        )
        for rows in (slice(None), slice(0, 4), slice(4, 9))
    )
    assert 0 < len(whole.index) < 0.5 * whole.masked.sum()
    assert torch.equal(torch.cat([first.index, second.index + 4 * 12]), whole.index)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_corrupt_batch_the_loss_equals_a_brute_force_sum(schedule, weight):
    x0 = torch.randint(0, 4, (6, 5), generator=generator(3))
    embedding = torch.randn(6, 3, generator=generator(4))
    batch = corrupt_batch(x0, schedule, WEIGHTS[weight], MASK, generator(5))
    denoiser = TableDenoiser(VOCABULARY)
    loss, losses = diffusion_loss(cross_entropy_of(denoiser), batch, embedding)

    total, count = 0.0, 0
    everywhere = torch.ones_like(batch.masked)
    for row in range(6):
        t = float(batch.t[row])
        logits = denoiser(batch.xt, embedding, batch.t, everywhere).view(6, 5, -1)[row]
        for position in range(5):
            if not batch.masked[row, position]:
                continue
            scores = [math.exp(float(x)) for x in logits[position]]
            probability = scores[int(x0[row, position])] / sum(scores)
            w = {
                "reciprocal-t": 1 / t,
                "uniform": 1.0,
                "elbo": 1 / t
                if isinstance(schedule, Linear)
                else schedule.rate
                * math.exp(-schedule.rate * t)
                / (1 - math.exp(-schedule.rate * t)),
            }[weight]
            total -= w * math.log(probability)
            count += 1
    assert count == len(losses) > 0
    assert float(loss) == pytest.approx(total / 30, rel=1e-5)


def test_the_elbo_does_not_depend_on_the_schedule():
    """Its value is an integral over the mask ratio: any schedule that covers (0, 1) gives it."""
    x0 = torch.tensor([[0, 1]])
    embedding = torch.randn(1, 3, generator=generator(4))
    denoiser = TableDenoiser(VOCABULARY)

    def exact(schedule) -> float:
        # enumerate the masks of both positions; integrate over t by the midpoint rule
        total = 0.0
        grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        middle = ((grid[1:] + grid[:-1]) / 2).clamp(min=1e-9)
        alpha, weight = schedule.alpha(middle), schedule.elbo_weight(middle)
        for mask in ([True, False], [False, True], [True, True]):
            masked = torch.tensor([mask])
            xt = torch.where(masked, MASK, x0)
            # t enters only through the probability of the mask here
            batch = CorruptedBatch.from_masks(x0, xt, masked, torch.zeros(1), torch.ones(1), 2)
            loss, _ = diffusion_loss(cross_entropy_of(denoiser), batch, embedding)
            hidden = sum(mask)
            chance = (1 - alpha) ** hidden * alpha ** (2 - hidden)
            total += float((chance * weight).mean()) * float(loss)
        return total

    # rate 20 covers ratios up to 1 - e^-20
    assert exact(LogLinear(20.0)) == pytest.approx(exact(Linear()), rel=2e-3)


def test_diffusion_loss_no_masked_position_is_a_zero_loss():
    x0 = torch.zeros(2, 3, dtype=torch.long)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    batch = CorruptedBatch.from_masks(x0, x0, nothing, torch.rand(2), torch.ones(2), 6)
    loss, losses = diffusion_loss(
        cross_entropy_of(TableDenoiser(VOCABULARY)), batch, torch.zeros(2, 3)
    )
    assert float(loss) == 0.0 and len(losses) == 0


def test_corrupt_batch_is_decided_by_its_generator():
    x0 = torch.randint(0, 4, (8, 10), generator=generator())
    one, two = (corrupt_batch(x0, Linear(), WEIGHTS["elbo"], MASK, generator(9)) for _ in range(2))
    assert torch.equal(one.masked, two.masked) and torch.equal(one.t, two.t)
    other = corrupt_batch(x0, Linear(), WEIGHTS["elbo"], MASK, generator(10))
    assert not torch.equal(one.masked, other.masked)
