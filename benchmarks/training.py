"""Training speed: the trainer's step beside a plain loop, same network, same batch, in one run.

    python -m benchmarks.training [--size small|reference] [--batch 64] [--rounds 5]

The plain loop projects every position onto the vocabulary, uses an unfused AdamW and a Python loop
for the averages, and reads the loss back every step. Operations
are those the model needs (masked positions only), so both shares have the same numerator.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import alternate, matmul_rate, median_ratio, print_table
from unembed.config import Config, validate_config
from unembed.denoiser import Denoiser, DenoiserSizes, preset
from unembed.device import choose_compute
from unembed.diffusion import WEIGHTS, corrupt_batch, make_schedule
from unembed.training.ema import EMA
from unembed.training.loop import TrainingRun, optimiser_step
from unembed.training.optimizer import make_optimizer
from unembed.training.order import step_generator

VOCABULARY, DIMENSION, LENGTH = 30_522, 384, 32
STEPS_PER_ROUND = 2


class SyntheticPairs:
    """Random pairs in memory, in the place of prepared ones."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self.tokens = generator.integers(1000, VOCABULARY, (count, LENGTH))
        vectors = generator.standard_normal((count, DIMENSION)).astype(np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        self.tokenizer = SimpleNamespace(mask_id=103)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Any) -> tuple[Any, Any]:
        """Token ids and vectors of the rows."""
        return self.tokens[indices], self.vectors[indices]


def step_operations(sizes: DenoiserSizes, batch: int, masked: float) -> float:
    """Operations of one step's matrix products, forward and backward, for ``masked`` positions."""
    hidden, tokens = sizes.hidden, batch * sizes.length
    block = 4 * hidden * hidden + 2 * hidden * sizes.feed_forward
    per_token = sizes.layers * (block + 2 * sizes.length * hidden)
    per_text = 1.0 * sizes.layers * 6 * hidden * hidden + 2 * hidden * hidden  # modulations
    per_text += 2 * sizes.embedding_dim * hidden + (1 + 1 + 256 / hidden) * hidden * hidden
    vocabulary = masked * hidden * sizes.vocab_size
    return 3 * 2 * (tokens * per_token + batch * per_text + vocabulary)


def fast_side(sizes: DenoiserSizes, config: Config, pairs: SyntheticPairs) -> TrainingRun:
    """What the trainer runs."""
    torch.manual_seed(0)
    network = Denoiser(sizes)
    compute = choose_compute("cpu")
    optimizer = make_optimizer(network, config.training)
    return TrainingRun(
        config, cast(Any, pairs), compute, network, EMA(network, 0.999), optimizer, {}
    )


def plain_step(state: dict[str, Any], config: Config, pairs: SyntheticPairs, step: int) -> float:
    """A straightforward training step; returns the loss, which waits for the device."""
    network, optimizer, averages = state["network"], state["optimizer"], state["averages"]
    batch_size = config.training.batch_size
    tokens, vectors = pairs.rows(np.arange(step * batch_size, (step + 1) * batch_size) % len(pairs))
    x0, embedding = torch.from_numpy(tokens), torch.from_numpy(vectors)
    schedule = make_schedule("log-linear", 5.0)
    batch = corrupt_batch(x0, schedule, WEIGHTS["uniform"], 103, step_generator(0, step))
    logits = network(batch.xt, embedding, batch.t)  # [B, L, V]
    losses = F.cross_entropy(logits.view(-1, VOCABULARY), x0.view(-1), reduction="none")
    loss = (losses.view_as(x0) * batch.masked).sum() / x0.numel()  # the uniform weight
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=False)
    optimizer.step()
    with torch.no_grad():
        for average, parameter in zip(averages, network.parameters(), strict=True):
            average.mul_(0.999).add_(parameter, alpha=0.001)
    return float(loss.detach())


def compare_steps(size: str, batch: int, rounds: int) -> None:
    """Samples a second and share of the machine's rate, both sides."""
    sizes = preset(size, vocab_size=VOCABULARY, embedding_dim=DIMENSION)
    training = {"batch_size": batch, "steps": 1000, "warmup_steps": 1, "validation_pairs": 1}
    diffusion = {"weight": "uniform"}
    config = validate_config({"training": training, "diffusion": diffusion}, "benchmark")
    pairs = SyntheticPairs(batch * 8)
    fast = fast_side(sizes, config, pairs)
    torch.manual_seed(0)
    network = Denoiser(sizes)
    plain = {
        "network": network,
        "optimizer": torch.optim.AdamW(network.parameters(), lr=1e-3, foreach=False, fused=False),
        "averages": [p.detach().clone() for p in network.parameters()],
    }
    counter = {"fast": 0, "plain": 0}

    def run_fast() -> None:
        for _ in range(STEPS_PER_ROUND):
            optimiser_step(fast, counter["fast"])
            counter["fast"] += 1

    def run_plain() -> None:
        for _ in range(STEPS_PER_ROUND):
            plain_step(plain, config, pairs, counter["plain"])
            counter["plain"] += 1

    rate = matmul_rate()
    seconds = alternate({"plain": run_plain, "fast": run_fast}, rounds)
    rate = max(rate, matmul_rate())
    # Mean mask ratio of the log-linear schedule: 1 - (1 - exp(-5)) / 5
    operations = step_operations(sizes, batch, masked=0.801 * batch * LENGTH) * STEPS_PER_ROUND
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        share = operations / median / rate
        rows.append([name, f"{STEPS_PER_ROUND * batch / median:.1f}", f"{share:.0%}"])
    print(f"\n{size} size, batch {batch}, length {LENGTH}, vocabulary {VOCABULARY}, float32, ")
    print(f"{torch.get_num_threads()} threads; matrix products: {rate / 1e9:.0f} GFLOP/s\n")
    print_table(["loop", "samples/s", "share of the measured rate"], rows)
    ratio = median_ratio(seconds["plain"], seconds["fast"])
    print(f"\nfast / plain: {ratio:.2f} x (median of rounds)")


def attention_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched products and a softmax, [B, heads, L, H / heads]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mixed: Tensor = scores.softmax(dim=-1) @ v
    return mixed


def compare_attention(rounds: int) -> None:
    """Two batched products against the fused kernel, forward and forward with backward."""
    shape = (64, LENGTH, 3, 6, 64)  # as the network's joint projection leaves them
    qkv = torch.randn(shape, requires_grad=True)
    rows = []
    for backward in (False, True):

        def run(kernel: Any, backward: bool) -> None:
            for _ in range(5):
                out = kernel(*qkv.permute(2, 0, 3, 1, 4))
                out = out.transpose(1, 2).reshape(64, LENGTH, 384)
                if backward:
                    out.sum().backward()

        fused = partial(run, F.scaled_dot_product_attention, backward)
        products = partial(run, attention_products, backward)
        seconds = alternate({"fused": fused, "products": products}, rounds)
        ratio = median_ratio(seconds["fused"], seconds["products"])
        rows.append(["forward and backward" if backward else "forward", f"{ratio:.2f} x"])
    print(f"\nattention {list(shape)}: batched products against the fused kernel\n")
    print_table(["pass", "speed of the products"], rows)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=["tiny", "small", "reference"], default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    compare_steps(options.size, options.batch, options.rounds)
    compare_attention(options.rounds)


if __name__ == "__main__":
    main()
