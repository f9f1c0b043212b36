"""Which pairs a step sees: an endless order, shuffled anew each epoch, addressable at any point.

Because a step's rows and its randomness depend only on the seed and the step, a resumed run needs
no saved random state to equal an uninterrupted one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray


def training_rows(first: int, count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Rows of samples ``first`` to ``first + count`` in the endless order over ``total`` rows."""
    parts: list[NDArray[np.int64]] = []
    while count > 0:
        epoch, offset = divmod(first, total)
        part = _epoch_order(epoch, total, seed)[offset : offset + count]
        parts.append(part)
        first += len(part)
        count -= len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=1)
def _epoch_order(epoch: int, total: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(total)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of a step's timesteps and masks."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
