import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from unembed.denoiser import Denoiser, preset
from unembed.device import choose_compute
from unembed.diffusion import WEIGHTS, LogLinear, corrupt_batch, cross_entropy_of, diffusion_loss
from unembed.training import metrics_log as speed
from unembed.training.metrics_log import Clock, product_rate, step_operations


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_that_pytorch_counts(frozen):
    sizes = preset("small", vocab_size=500, embedding_dim=48, length=16)
    denoiser = Denoiser(sizes)
    denoiser.token_table.weight.requires_grad_(not frozen)

    def everywhere(xt, embedding, t, index):  # as the trainer runs the network
        h = denoiser.hidden_states(xt, embedding, t).flatten(0, 1)[index]
        return F.linear(h, denoiser.token_table.weight, denoiser.output_bias)

    x0 = torch.randint(0, 499, (4, 16))
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], 499, torch.Generator())
    with FlopCounterMode(display=False) as counter:
        diffusion_loss(cross_entropy_of(everywhere), batch, torch.randn(4, 48))[0].backward()
    ours = step_operations(sizes, 4, len(batch.index), not frozen)
    # What needs no gradient (the inputs of the first layers) makes the count a little smaller
    assert 0.97 * ours < counter.get_total_flops() <= ours


def test_the_rate_of_products_is_measured_once(monkeypatch):
    compute = choose_compute("cpu", "float32")
    assert 1e8 < product_rate(compute) < 1e15
    assert product_rate(compute) == product_rate(choose_compute("cpu", "float32"))


def test_a_clock_leaves_pauses_out_and_goes_on_where_a_run_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    clock = Clock(step=10, seconds=7.0, samples=32, operations=1e9, rate=4e9)
    now[0] += 2.0
    with clock.paused():
        now[0] += 50.0
    figures = clock.speed(step=14)
    assert figures == {"samples_per_second": 64.0, "share_of_peak": 0.5}
    assert clock.total() == 59.0
