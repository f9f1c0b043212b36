"""``batch_size: auto``: the largest power of two that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import free_bytes
from unembed.diffusion import diffusion_loss
from unembed.errors import TrainingError
from unembed.training.distributed import Processes
from unembed.training.step import TrainState, draw_batch, make_state, step_generator, train_step

if TYPE_CHECKING:
    from unembed.config import Config

NetworkFn = Callable[["Config", Pairs], Denoiser]

MAX_BATCH = 4096  # a process; beyond it a larger batch buys little
_BUDGET = 0.5  # of the free memory of a machine, which other work shares
_PROBE = 8
_BOTH_WAYS = 2.0  # the backward pass makes as much again, at most


def find_batch_size(config: Config, pairs: Pairs, processes: Processes, network: NetworkFn) -> int:
    """Find how many pairs a batch may have, over all processes.

    On a GPU steps of 8, 16, 32 … pairs are made until one does not fit. A CPU has no such end: it
    swaps, or the system kills. There the bytes that a small step keeps for its backward pass are
    counted, and the batch is what half of the free memory holds, beside weights and optimiser.

    Args:
        config: The run's settings.
        pairs: Of the run.
        processes: Of the run; the smallest of their sizes counts.
        network: Makes the denoiser.

    Raises:
        TrainingError: Not even the smallest batch fits, or there are too few pairs for it.
    """
    available = (len(pairs) - config.training.validation_pairs) // processes.count
    most = min(MAX_BATCH, available)
    on_cpu = processes.compute.device.type == "cpu"
    search = _count_bytes if on_cpu else _try_steps
    size = processes.min(search(config, pairs, processes.alone(), network, most))
    if size < 1:
        raise TrainingError(
            f"memory for a batch of {_PROBE} and {2 * _PROBE} pairs a process",
            f"{free_bytes(processes.compute.device)} bytes free, {available} pairs a process",
            "Prepare more pairs, choose a smaller denoiser or set training.batch_size",
        )
    return size * processes.count


def _trial_state(
    config: Config, size: int, pairs: Pairs, processes: Processes, network: NetworkFn
) -> TrainState:
    """Make a state to try a step with."""
    # Compiled for every size tried, the real step would get what suits none of them
    training = config.training.model_copy(update={"batch_size": size, "compile": False})
    config = config.model_copy(update={"training": training})
    return make_state(config, pairs, processes, network(config, pairs), {})


def _try_steps(
    config: Config, pairs: Pairs, processes: Processes, network: NetworkFn, most: int
) -> int:
    """Double the batch until a step, optimiser included, runs out of memory."""
    fits, size = 0, _PROBE
    while size <= most:
        try:
            train_step(_trial_state(config, size, pairs, processes, network), 0).item()
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            _release_memory(processes.compute.device)
        fits, size = size, size * 2
    return fits


def _release_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _count_bytes(
    config: Config, pairs: Pairs, processes: Processes, network: NetworkFn, most: int
) -> int:
    """Find what half of the free memory holds, by the bytes that a small step saves."""
    if most < 2 * _PROBE:
        return 0
    state = _trial_state(config, 2 * _PROBE, pairs, processes, network)
    small, large = (_saved_bytes(state, size) for size in (_PROBE, 2 * _PROBE))
    # Weights, gradients, averages, two moments; the weights are in memory already
    fixed = 4 * sum(p.nbytes for p in state.denoiser.parameters())
    budget = _BUDGET * free_bytes(state.compute.device) - fixed
    size = int(budget / (_BOTH_WAYS * (large - small) / _PROBE))
    fitting = [_PROBE << power for power in range(10) if _PROBE << power <= min(size, most)]
    return fitting[-1] if fitting else 0


def _saved_bytes(state: TrainState, size: int) -> int:
    """Count the bytes that a forward pass of so many pairs saves for the backward one."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    training = state.config.training.model_copy(update={"batch_size": size})
    state = replace(state, config=state.config.model_copy(update={"training": training}))
    batch, embedding = draw_batch(state, 0, step_generator(training.seed, 0))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with state.compute.autocast():
            loss, _ = diffusion_loss(state.objective, batch, embedding)
        del loss
    return sum(saved.values())
