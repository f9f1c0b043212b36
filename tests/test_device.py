import os

import pytest
import torch

from unembed import device
from unembed.device import choose_compute
from unembed.errors import ConfigError


def test_auto_gives_a_usable_device_and_a_known_format():
    compute = choose_compute()
    assert torch.ones(2, device=compute.device).sum().item() == 2.0
    assert compute.dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("speedup", "expected"), [(4.3, torch.bfloat16), (0.5, torch.float32)])
def test_auto_uses_bfloat16_only_where_the_processor_is_quicker_with_it(
    monkeypatch, speedup, expected
):
    monkeypatch.setattr(device, "_cpu_speedup", lambda: speedup)
    assert choose_compute("cpu").dtype is expected


@pytest.mark.parametrize(
    ("rank", "name", "own"),
    [
        ("2", "cuda", "cuda:2"),
        ("2", "cuda:1", "cuda:1"),
        ("9", "cuda", "cuda"),
        ("2", "cpu", "cpu"),
    ],
)
def test_a_process_of_a_launcher_tries_its_own_device(monkeypatch, rank, name, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(device._own(torch.device(name))) == own


def test_cpu_speedup_the_speed_of_bfloat16_is_measured_once(monkeypatch):
    device._cpu_speedup.cache_clear()
    first = device._cpu_speedup()
    monkeypatch.setattr(device.time, "perf_counter", lambda: pytest.fail("measured again"))
    assert device._cpu_speedup() == first > 0


@pytest.mark.parametrize(("given", "limit"), [(None, "128"), ("7", "7")])
def test_choose_compute_bounds_the_kernels_that_onednn_keeps(monkeypatch, given, limit):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    choose_compute("cpu", "float32")
    assert os.environ[name] == limit


@pytest.mark.parametrize("name", ["toaster", "", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="--device auto") as caught:
        choose_compute(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choose_compute_takes_what_torch_has():
    compute = choose_compute(torch.device("cpu"), torch.float32)
    assert compute == choose_compute("cpu", "float32")
    with pytest.raises(ConfigError, match="a device that PyTorch can use here"):
        choose_compute(None)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"auto, float32, bfloat16, float16; found 'int8'"):
        choose_compute("cpu", "int8")


@pytest.mark.parametrize(
    ("bfloat16", "capability", "training", "expected"),
    [
        (True, (8, 0), False, torch.bfloat16),
        (False, (7, 5), False, torch.float16),
        (False, (7, 5), True, torch.float32),
        (False, (6, 1), False, torch.float32),
    ],
)
def test_quickest_format_a_gpu_without_bfloat16_encodes_in_float16_if_it_has_units_for_it(
    monkeypatch, bfloat16, capability, training, expected
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device._quickest_format(torch.device("cuda"), training) is expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_runs_products_in_the_chosen_format(dtype):
    compute = choose_compute("cpu", dtype)
    square = torch.eye(4)
    with compute.autocast():
        product = square @ square
    assert product.dtype is compute.dtype
    assert (square @ square).dtype is torch.float32
