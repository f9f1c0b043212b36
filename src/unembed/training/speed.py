"""How fast a run is, in samples and as a share of what the machine can multiply."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from unembed.denoiser import DenoiserSizes
from unembed.device import Compute

_ROUNDS = 5
_PRODUCT = {"cpu": (768, 1), "cuda": (8192, 4)}  # side of the square matrices, products at once


def step_operations(
    sizes: DenoiserSizes, pairs: int, masked: float, table_is_trained: bool = True
) -> float:
    """Operations of the matrix products of one step, forward and backward.

    Those the model needs, whatever a loop does beside: a multiplication and an addition are two,
    and the backward pass takes twice the forward one.

    Args:
        sizes: Of the denoiser.
        pairs: Pairs of the step.
        masked: Masked positions of the step, the only ones projected onto the vocabulary.
        table_is_trained: Else the gradient of the table is not needed.
    """
    hidden, tokens = sizes.hidden, pairs * sizes.length
    block = 4 * hidden * hidden + 2 * hidden * sizes.feed_forward
    per_token = sizes.layers * (block + 2 * sizes.length * hidden)
    per_text = 1.0 * sizes.layers * 6 * hidden * hidden + 2 * hidden * hidden  # modulations
    per_text += 2 * sizes.embedding_dim * hidden + (1 + 1 + 256 / hidden) * hidden * hidden
    vocabulary = masked * hidden * sizes.vocab_size * (1.0 if table_is_trained else 2 / 3)
    return 3 * 2 * (tokens * per_token + pairs * per_text + vocabulary)


@cache
def product_rate(compute: Compute) -> float:
    """Operations a second of a square matrix product here, the best of a few (milliseconds)."""
    size, together = _PRODUCT.get(compute.device.type, (1024, 1))
    generator = torch.Generator().manual_seed(0)  # zeros and ones take less power, and go faster
    matrix = torch.randn(size, size, generator=generator).to(compute.device, compute.dtype)
    best = float("inf")
    for _ in range(_ROUNDS + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(together):  # launching one takes a GPU a good part of its time
            product = matrix @ matrix
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * together / best


class Clock:
    """Seconds spent over all starts of a run, and speed since the last log.

    Args:
        step: Step the run starts from.
        seconds: Spent before.
        samples: Pairs a step sees.
        operations: Matrix-product operations of a step, over all processes.
        rate: Operations a second that all devices together reach in a plain product.
    """

    def __init__(
        self, step: int, seconds: float, samples: int, operations: float, rate: float
    ) -> None:
        self._began = time.monotonic() - seconds
        self._logged_at, self._logged_step = time.monotonic(), step
        self._samples, self._share = samples, operations / rate

    def total(self) -> float:
        """Seconds over all starts."""
        return time.monotonic() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block (validation, saving) out of the speed."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._logged_at += time.monotonic() - began

    def speed(self, step: int) -> dict[str, float]:
        """Samples a second and share of the peak since the last call."""
        now = time.monotonic()
        rate = (step - self._logged_step) / max(now - self._logged_at, 1e-9)  # steps a second
        self._logged_at, self._logged_step = now, step
        return {"samples_per_second": rate * self._samples, "share_of_peak": rate * self._share}
