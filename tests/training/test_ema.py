import torch

from unembed.training.step import EMA


def test_it_follows_the_recurrence():
    module = torch.nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    expected = [p.detach().clone() for p in module.parameters()]
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [
            decay * e + (1 - decay) * p.detach()
            for e, p in zip(expected, module.parameters(), strict=True)
        ]
    for average, wanted in zip(ema.averages, expected, strict=True):
        torch.testing.assert_close(average, wanted)


def test_applied_swaps_and_restores_even_after_an_error():
    module = torch.nn.Linear(3, 2)
    ema = EMA(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(7.0)
    try:
        with ema.applied():
            assert not (module.weight == 7.0).any()
            raise KeyError
    except KeyError:
        pass
    assert (module.weight == 7.0).all()


def test_averages_are_float32_whatever_the_module_is():
    module = torch.nn.Linear(3, 2).bfloat16()
    ema = EMA(module, decay=0.9)
    ema.update(1)
    assert all(average.dtype == torch.float32 for average in ema.averages)
