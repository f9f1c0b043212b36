"""Training speed: the trainer's step beside a plain loop, same network, same batch, in one run.

    python -m benchmarks.training [--size small|reference] [--batch 64] [--rounds 5]
    python -m benchmarks.training --device cuda --size reference --batch 1024
    python -m benchmarks.training --memory [--vocabulary 262144] [--memory-batch 512]

The plain loop projects every position onto the vocabulary, uses an unfused AdamW and a Python loop
for the averages, and reads the loss back every step. Both run in the number format that
`unembed train` chooses here (--dtype chooses another); --plain-dtype float32 lets the plain loop
do without mixed precision. Operations are those the model needs (masked positions only), so both
shares have the same numerator, and the denominator is the rate of a large product in that format.
On a GPU the trainer's side is compiled, with the pairs in its memory and constant shapes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.config import Config, validate_config
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import Compute, choose_compute
from unembed.diffusion import (
    WEIGHTS,
    corrupt_batch,
    diffusion_loss,
    make_schedule,
    mean_mask_ratio,
)
from unembed.training.distributed import Processes
from unembed.training.metrics_log import step_operations
from unembed.training.step import TrainState, draw_batch, make_state, step_generator, train_step

VOCABULARY, DIMENSION, LENGTH, MASK = 30_522, 384, 32, 103
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "layers": 2, "heads": 2, "feed_forward": 128},
    "small": {"hidden": 384, "layers": 4, "heads": 6, "feed_forward": 1536},
    "reference": {},  # the defaults of `DenoiserSizes`
}
STEPS_PER_ROUND = 2


def synthetic_pairs(count: int, vocabulary: int = VOCABULARY) -> Pairs:
    """Random pairs in memory, in the place of prepared ones."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1000, vocabulary, (count, LENGTH)).astype(np.uint32)
    vectors = generator.standard_normal((count, DIMENSION)).astype(np.float16)
    tokenizer = cast(Any, SimpleNamespace(mask_id=MASK, pad_id=0))
    return Pairs([tokens], [vectors], np.array([0, count]), {}, tokenizer)


def config_of(batch: int, device: torch.device) -> Config:
    """Settings of both loops."""
    on_gpu = device.type == "cuda"
    training = {
        "batch_size": batch,
        "steps": 1000,
        "warmup_steps": 1,
        "validation_pairs": 1,
        "resident": "always" if on_gpu else "never",
        "compile": on_gpu,
        "static_shapes": on_gpu,
    }
    return validate_config({"training": training, "diffusion": {"weight": "uniform"}}, "benchmark")


def fast_side(sizes: DenoiserSizes, config: Config, pairs: Pairs, compute: Compute) -> TrainState:
    """What the trainer runs."""
    torch.manual_seed(0)
    return make_state(config, pairs, Processes(compute), Denoiser(sizes), {})


def plain_step(
    state: dict[str, Any], config: Config, pairs: Pairs, compute: Compute, step: int
) -> float:
    """A straightforward training step; returns the loss, which waits for the device."""
    network, optimizer, averages = state["network"], state["optimizer"], state["averages"]
    batch_size, device = config.training.pairs_a_pass, compute.device
    tokens, vectors = pairs.rows(np.arange(step * batch_size, (step + 1) * batch_size) % len(pairs))
    x0, embedding = torch.from_numpy(tokens), torch.from_numpy(vectors)
    schedule = make_schedule("log-linear", 5.0)
    batch = corrupt_batch(x0, schedule, WEIGHTS["uniform"], MASK, step_generator(0, step))
    batch, x0, embedding = batch.to(device), x0.to(device), embedding.to(device)
    with compute.autocast():
        logits = network(batch.xt, embedding, batch.t)  # [B, L, V]
    losses = F.cross_entropy(logits.float().view(-1, VOCABULARY), x0.view(-1), reduction="none")
    loss = (losses.view_as(x0) * batch.masked).sum() / x0.numel()  # the uniform weight
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=False)
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(averages, network.parameters(), strict=True):
            average.mul_(0.999).add_(parameter, alpha=0.001)
    return float(loss.detach())


def compare_steps(
    size: str, batch: int, rounds: int, device: str, fast_dtype: str, plain_dtype: str
) -> None:
    """Samples a second and share of the machine's rate, both sides."""
    sizes = DenoiserSizes(VOCABULARY, DIMENSION, **SIZES[size])
    compute = choose_compute(device, fast_dtype)
    plain_compute = compute if plain_dtype == "same" else choose_compute(device, plain_dtype)
    config, pairs = config_of(batch, compute.device), synthetic_pairs(batch * 8)
    fast = fast_side(sizes, config, pairs, compute)
    torch.manual_seed(0)
    network = Denoiser(sizes).to(compute.device)
    plain = {
        "network": network,
        "optimizer": torch.optim.AdamW(network.parameters(), lr=1e-3, foreach=False, fused=False),
        "averages": [p.detach().clone() for p in network.parameters()],
    }
    counter = {"fast": 0, "plain": 0}

    def run_fast() -> None:
        for _ in range(STEPS_PER_ROUND):
            loss = train_step(fast, counter["fast"])
            counter["fast"] += 1
        loss.item()  # waits for a GPU

    def run_plain() -> None:
        for _ in range(STEPS_PER_ROUND):
            plain_step(plain, config, pairs, plain_compute, counter["plain"])
            counter["plain"] += 1

    side = 2048 if compute.device.type == "cpu" else 8192
    rate = matmul_rate(compute.dtype, side, device=compute.device)
    seconds = alternate({"plain": run_plain, "fast": run_fast}, rounds)
    rate = max(rate, matmul_rate(compute.dtype, side, device=compute.device))
    masked = mean_mask_ratio(fast.schedule) * batch * LENGTH
    operations = step_operations(sizes, batch, masked) * STEPS_PER_ROUND
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        share = operations / median / rate
        format_ = _name(plain_compute if name == "plain" else compute)
        samples = f"{STEPS_PER_ROUND * batch / median:.1f}"
        rows.append([name, format_, samples, f"{share:.0%}"])
    print(f"\n{size} size, batch {batch}, length {LENGTH}, vocabulary {VOCABULARY}: ", end="")
    print(f"{operations / STEPS_PER_ROUND / 1e9:,.0f} GFLOP a step; ")
    print(f"{compute.describe()}: {rate / 1e9:,.0f} GFLOP/s in a product of {side} x {side}\n")
    print_table(["loop", "format", "samples/s", "share of the measured rate"], rows)
    ratio = median_ratio(seconds["plain"], seconds["fast"])
    print(f"\nfast / plain: {ratio:.2f} x (median of rounds)")


def _name(compute: Compute) -> str:
    return str(compute.dtype).removeprefix("torch.")


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest tensor that any operation inside the block made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.shape = 0, torch.Size()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numbers:
                self.numbers, self.shape = leaf.numel(), leaf.shape
        return result


def report_memory(size: str, vocabulary: int, batch: int, device: str, dtype: str) -> None:
    """Peak memory of a training step, and the largest tensor of its forward and backward pass.

    The peak is the process's own (its resident set; on a GPU what was allocated there), so this
    runs alone, before anything else.
    """
    compute = choose_compute(device, dtype)
    sizes = DenoiserSizes(vocabulary, DIMENSION, **SIZES[size])
    config, pairs = config_of(batch, compute.device), synthetic_pairs(batch + 1, vocabulary)
    this = fast_side(sizes, config, pairs, compute)
    weights = sum(p.nbytes for p in this.denoiser.parameters())
    began = time.perf_counter()
    train_step(this, 0).item()
    seconds, peak = time.perf_counter() - began, _peak_bytes(compute.device)

    masks, embedding = draw_batch(this, 0, step_generator(0, 0))
    with LargestTensor() as largest:
        with compute.autocast():
            loss, _ = diffusion_loss(this.objective, masks, embedding)
        loss.backward()  # type: ignore[no-untyped-call]
    logits = batch * LENGTH * vocabulary
    rows = [
        ["weights, float32", f"{weights / 2**30:.2f}"],
        ["weights, gradients, averages, two moments", f"{5 * weights / 2**30:.2f}"],
        [f"peak in a step ({compute.device.type})", f"{peak / 2**30:.2f}"],
        [f"logits [{batch}, {LENGTH}, {vocabulary}], were they made", f"{logits * 4 / 2**30:.2f}"],
    ]
    print(f"\n{size} size, batch {batch}, vocabulary {vocabulary}, {_name(compute)}; ", end="")
    print(f"one step took {seconds:.0f} s\n")
    print_table(["", "GiB"], rows)
    print(f"\nlargest tensor of the pass: {list(largest.shape)}, {largest.numbers:,} numbers,")
    print(f"{largest.numbers / logits:.1%} of the logits'")
    if largest.numbers >= logits:
        raise SystemExit("a tensor as large as the logits was made")


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def attention_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched products and a softmax, [B, heads, L, H / heads]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mixed: Tensor = scores.softmax(dim=-1) @ v
    return mixed


def compare_attention(rounds: int, compute: Compute) -> None:
    """Two batched products against the fused kernel, forward and forward with backward."""
    shape = (64, LENGTH, 3, 6, 64)  # as the network's joint projection leaves them
    qkv = torch.randn(shape, device=compute.device).to(compute.dtype).requires_grad_()
    rows = []
    for backward in (False, True):

        def run(kernel: Any, backward: bool) -> None:
            for _ in range(5):
                out = kernel(*qkv.permute(2, 0, 3, 1, 4))
                out = out.transpose(1, 2).reshape(64, LENGTH, 384)
                if backward:
                    out.sum().backward()
            out[0, 0, 0].item()  # waits for a GPU

        fused = partial(run, F.scaled_dot_product_attention, backward)
        products = partial(run, attention_products, backward)
        seconds = alternate({"fused": fused, "products": products}, rounds)
        ratio = median_ratio(seconds["fused"], seconds["products"])
        rows.append(["forward and backward" if backward else "forward", f"{ratio:.2f} x"])
    print(f"\nattention {list(shape)}, {_name(compute)}: two batched products against ", end="")
    print("the fused kernel\n")
    print_table(["pass", "speed of the products"], rows)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=["tiny", "small", "reference"], default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--plain-dtype", choices=["same", "float32", "bfloat16"], default="same")
    parser.add_argument("--memory", action="store_true", help="peak memory, nothing else")
    parser.add_argument("--memory-size", choices=["tiny", "small", "reference"])
    parser.add_argument("--vocabulary", type=int, default=262_144, help="of --memory")
    parser.add_argument("--memory-batch", type=int, default=512)
    options = parser.parse_args()
    if options.memory:
        size = options.memory_size or "reference"
        vocabulary, batch = options.vocabulary, options.memory_batch
        report_memory(size, vocabulary, batch, options.device, options.dtype)
        return
    formats = (options.dtype, options.plain_dtype)
    compare_steps(options.size, options.batch, options.rounds, options.device, *formats)
    compare_attention(options.rounds, choose_compute(options.device, options.dtype))


if __name__ == "__main__":
    main()
