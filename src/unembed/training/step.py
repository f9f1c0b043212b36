"""One optimiser step: draw, corrupt, score, differentiate, update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unembed.config import TrainingSection
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import Corrupted, Schedule, diffusion_loss, make_schedule, mean_mask_ratio
from unembed.training.batch import (
    RowsFn,
    ScoredPadding,
    masked_batch,
    most_masked,
    perturb,
    rows_of,
    sent,
    with_own_samples,
)
from unembed.training.distributed import Processes, whole
from unembed.training.loss import CandidateSampler, ChunkedCrossEntropy
from unembed.training.nan_guard import LossGuard

if TYPE_CHECKING:
    from unembed.config import Config, TrainingSection


@dataclass
class TrainingRun:
    """What a step works on; build it with `assemble`.

    Attributes:
        config: The run's settings, ``batch_size`` a number.
        pairs: All of them, held-out ones first.
        rows: Pairs on the device by row number.
        processes: Who shares the batches, and on what device.
        denoiser: The network, whose weights are trained.
        scorer: What gives the loss and its gradient: around the denoiser.
        objective: The same over all processes.
        schedule: Of the forward process.
        ema: Averaged weights.
        optimizer: Of the denoiser's parameters.
        guard: Tells bad steps from good ones.
        facts: What must match when a saved state is loaded.
        sampler: Draws the tokens that a step scores; all of them when None.
    """

    config: Config
    pairs: Pairs
    rows: RowsFn
    processes: Processes
    denoiser: Denoiser
    scorer: ChunkedCrossEntropy
    objective: nn.Module
    schedule: Schedule
    ema: EMA
    optimizer: torch.optim.Optimizer
    guard: LossGuard
    facts: dict[str, Any]
    sampler: CandidateSampler | None = None

    @property
    def compute(self) -> Compute:
        """Device and number format."""
        return self.processes.compute

    @property
    def samples(self) -> int:
        """Pairs an optimiser step sees, over all processes."""
        return self.config.training.pairs_a_pass * self.config.training.accumulate


def assemble(
    config: Config, pairs: Pairs, processes: Processes, denoiser: Denoiser, facts: dict[str, Any]
) -> TrainingRun:
    """Everything around a denoiser at step 0; it is moved to the device."""
    settings, device = config.training, processes.compute.device
    processes.spread(denoiser.train())
    optimizer = make_optimizer(denoiser, settings)  # freezes the table, which wrapping must see
    scorer = ChunkedCrossEntropy(denoiser, settings.compile)
    return TrainingRun(
        config=config,
        pairs=pairs,
        rows=rows_of(pairs, settings, device),
        processes=processes,
        denoiser=denoiser,
        scorer=scorer,
        objective=processes.wrap(scorer),
        schedule=make_schedule(config.diffusion.schedule, config.diffusion.rate),
        ema=EMA(denoiser, settings.ema_decay),
        optimizer=optimizer,
        guard=LossGuard(settings, device),
        facts=facts,
        sampler=_sampler(pairs, settings),
    )


def _sampler(pairs: Pairs, settings: TrainingSection) -> CandidateSampler | None:
    if settings.sampled_vocabulary is None:
        return None
    targets = pairs.token_counts.astype(np.float64)
    targets[pairs.tokenizer.pad_id] *= settings.scored_padding
    return CandidateSampler(targets, settings.sampled_vocabulary)


def optimiser_step(this: TrainingRun, step: int) -> Tensor:
    """One update from ``accumulate`` batches; returns the loss, 0 for a bad step.

    The loss is that of the whole batch, on the device: the host has not waited for it. A bad step
    leaves weights and moments as they are.
    """
    settings, processes = this.config.training, this.processes
    generator = step_generator(settings.seed, step)
    total = torch.zeros((), device=this.compute.device)
    for micro in range(settings.accumulate):
        first = (step * settings.accumulate + micro) * settings.pairs_a_pass
        batch, embedding = draw_batch(this, first, generator)
        exchange = micro + 1 == settings.accumulate
        with processes.gradients(this.objective, exchange):
            with this.compute.autocast():
                loss, _ = diffusion_loss(this.objective, batch, embedding)
            # Gradients are averaged over processes, and their losses parts of one sum
            loss = loss * (processes.count / settings.accumulate)
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / processes.count
    norm = whole(torch.nn.utils.clip_grad_norm_(this.denoiser.parameters(), settings.clip_norm))
    for group in this.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings) * group["share"]
    total = processes.total(total)
    bad = this.guard.judge(total, norm)
    # As torch.amp.GradScaler does: the fused kernel skips its update where this is 1
    this.optimizer.found_inf = bad  # type: ignore[attr-defined]
    this.optimizer.step()
    this.optimizer.zero_grad(set_to_none=True)
    this.ema.update(step + 1)
    return torch.where(bad.bool(), 0.0, total)


def draw_batch(
    this: TrainingRun, first: int, generator: torch.Generator
) -> tuple[Corrupted, Tensor]:
    """This process's part of the batch that starts at sample ``first``, and its embeddings.

    All draws are for the whole batch, so that several processes see what one would.
    """
    settings, held_out = this.config.training, this.config.training.validation_pairs
    mask_id, size = this.pairs.tokenizer.mask_id, settings.pairs_a_pass
    own = this.processes.share(size)
    rows = training_rows(first, size, len(this.pairs) - held_out, settings.seed)[own]
    x0, embedding = this.rows(rows + held_out)
    count = 0
    if settings.static_shapes:
        ratio = mean_mask_ratio(this.schedule)
        count = most_masked(len(x0), x0.shape[1], ratio, this.processes.count == 1)
    padding = None
    if settings.scored_padding < 1.0:
        padding = ScoredPadding(this.pairs.tokenizer.pad_id, settings.scored_padding)
    batch = masked_batch(
        x0, own, size, this.config.diffusion, this.schedule, mask_id, generator, count, padding
    )
    embedding = perturb(
        embedding, settings.condition_dropout, settings.embedding_noise, generator, size, own
    )
    if settings.self_context:
        draws = sent(torch.rand(2, size, x0.shape[1], generator=generator)[:, own], x0.device)
        chosen = draws[0] < settings.self_context
        with this.compute.autocast():
            batch = with_own_samples(
                this.denoiser, batch, embedding, chosen, draws[1], mask_id, this.schedule.timestep
            )
    if this.sampler is not None:
        batch = replace(batch, candidates=this.sampler.draw(batch.targets, generator))
    return batch, embedding


_TABLE = "token_table.weight"


def make_optimizer(denoiser: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, not on norms, biases or embedding tables.

    The token table has a learning rate of its own: Adam moves the rows of rare tokens as far as
    those of frequent ones, away from what the encoder's word embeddings say about them.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in denoiser.named_parameters():
        if name != _TABLE:
            matrix = parameter.ndim > 1 and name != "positions"
            (decayed if matrix else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay, "share": 1.0},
        {"params": plain, "weight_decay": 0.0, "share": 1.0},
    ]
    table = denoiser.get_parameter(_TABLE)
    table.requires_grad_(settings.table_lr > 0)
    if settings.table_lr > 0:
        groups.append({"params": [table], "weight_decay": 0.0, "share": settings.table_lr})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def learning_rate(step: int, settings: TrainingSection) -> float:
    """Linear warm-up to ``lr``, then a cosine down to ``final_lr * lr``; step counts from 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.lr * (settings.final_lr + (1.0 - settings.final_lr) * cosine)


class EMA:
    """The averaged weights of a module.

    Args:
        module: Its parameters are averaged.
        decay: Weight of the past at each step. Early on it is (1 + step) / (10 + step) when that
            is smaller, so that the random start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        self._live = list(module.parameters())
        self.averages = [p.detach().float().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the live weights after optimiser step ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, [p.detach().float() for p in self._live], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module runs with the averaged weights."""
        live = [p.detach().clone() for p in self._live]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(live)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)


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
