"""Training step: draw, corrupt, score, differentiate, update; and what it works on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import Compute, send
from unembed.diffusion import (
    WEIGHTS,
    CorruptedBatch,
    Schedule,
    ScoredPadding,
    corrupt_batch,
    diffusion_loss,
    make_schedule,
    mean_mask_ratio,
)
from unembed.errors import TrainingError
from unembed.training.batch import (
    RowReader,
    add_feedback,
    draw_hypotheses,
    max_masked,
    perturb_embeddings,
    row_reader,
    sample_contexts,
)
from unembed.training.distributed import Processes, full_tensor
from unembed.training.loss import CandidateSampler, ChunkedCrossEntropy, LossGuard

if TYPE_CHECKING:
    from unembed.config import Config, TrainingSection
    from unembed.encoders.base import Encoder

LONG_SHARE = 0.25  # of the steps, where there is a prefix: those of texts that go on behind it

_TABLE = "token_table.weight"


@dataclass
class TrainState:
    """State that a step works on; build it with `make_state`.

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
        encoder: Embeds the hypotheses of ``training.feedback``.
        long_rows: Rows of the texts that go on behind the denoiser's prefix, where it has one.
    """

    config: Config
    pairs: Pairs
    rows: RowReader
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
    encoder: Encoder | None = None
    long_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def compute(self) -> Compute:
        """Device and number format."""
        return self.processes.compute

    @property
    def samples(self) -> int:
        """Pairs an optimiser step sees, over all processes."""
        return self.config.training.pairs_a_pass * self.config.training.accumulate


def make_state(
    config: Config,
    pairs: Pairs,
    processes: Processes,
    denoiser: Denoiser,
    facts: dict[str, Any],
    encoder: Encoder | None = None,
) -> TrainState:
    """Make everything around a denoiser at step 0; it is moved to the device."""
    settings, device = config.training, processes.compute.device
    processes.place(denoiser.train())
    optimizer = make_optimizer(denoiser, settings)  # freezes the table, which wrapping must see
    scorer = ChunkedCrossEntropy(denoiser, settings.compile)
    return TrainState(
        config=config,
        pairs=pairs,
        rows=row_reader(pairs, settings, device),
        processes=processes,
        denoiser=denoiser,
        scorer=scorer,
        objective=processes.wrap(scorer),
        schedule=make_schedule(config.diffusion.schedule, config.diffusion.rate),
        ema=EMA(denoiser, settings.ema_decay),
        optimizer=optimizer,
        guard=LossGuard(settings, device),
        facts=facts,
        sampler=make_sampler(pairs, settings),
        encoder=encoder,
        long_rows=long_rows(pairs, denoiser.sizes.prefix, settings.validation_pairs),
    )


def long_rows(pairs: Pairs, prefix: int, held_out: int) -> NDArray[np.int64]:
    """Find the rows to train on of the texts that go on behind a prefix; none without one.

    Raises:
        TrainingError: There is a prefix, and no such text.
    """
    if not prefix:
        return np.zeros(0, np.int64)
    ends = [shard[:, prefix : prefix + 1] == pairs.tokenizer.pad_id for shard in pairs.tokens]
    rows = np.flatnonzero(~np.concatenate([of_shard.all(axis=1) for of_shard in ends]))
    rows = rows[rows >= held_out]
    if not len(rows):
        raise TrainingError(
            f"pairs of texts of at least denoiser.prefix = {prefix} tokens",
            "none",
            "Prepare longer pieces (data.length), or set denoiser.prefix to 0",
        )
    return rows


def make_sampler(pairs: Pairs, settings: TrainingSection) -> CandidateSampler | None:
    """Make what draws the tokens that a step scores; None where it scores all."""
    if settings.sampled_vocabulary is None:
        return None
    counts = pairs.token_counts.astype(np.float64)
    counts[pairs.tokenizer.pad_id] *= settings.scored_padding
    return CandidateSampler(counts, settings.sampled_vocabulary)


# The step


def train_step(state: TrainState, step: int) -> Tensor:
    """Make one update from ``accumulate`` batches.

    Returns:
        The loss of the whole batch, 0 for a bad step, on the device: the host has not waited for
        it. A bad step leaves weights and moments as they are.
    """
    settings, processes, optimizer = state.config.training, state.processes, state.optimizer
    generator = step_generator(settings.seed, step)

    # Forward and backward
    total = torch.zeros((), device=state.compute.device)
    for micro in range(settings.accumulate):
        first = (step * settings.accumulate + micro) * settings.pairs_a_pass
        batch, embedding = draw_batch(state, first, generator)
        exchange = micro + 1 == settings.accumulate
        with processes.gradients(state.objective, exchange):
            with state.compute.autocast():
                loss, _ = diffusion_loss(state.objective, batch, embedding)
            # Gradients are averaged over processes, and their losses parts of one sum
            loss = loss * (processes.count / settings.accumulate)
            loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach() / processes.count

    # Update, unless the guard says that the step is bad
    parameters = state.denoiser.parameters()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm))
    total = processes.all_reduce(total)
    bad = state.guard.judge(total, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings) * group["share"]
    # As torch.amp.GradScaler does: the fused kernel skips its update where this is 1
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.ema.update(step + 1)
    return torch.where(bad.bool(), 0.0, total)


def draw_batch(
    state: TrainState, first: int, generator: torch.Generator
) -> tuple[CorruptedBatch, Tensor]:
    """Draw this process's part of the batch that starts at sample ``first``, and its embeddings."""
    settings, tokenizer = state.config.training, state.pairs.tokenizer
    size, held_out = settings.pairs_a_pass, settings.validation_pairs
    local = state.processes.local_slice(size)

    # Pairs
    order = training_rows(first, size, len(state.pairs) - held_out, settings.seed) + held_out
    prefix = state.denoiser.sizes.prefix
    is_long = prefix and torch.rand((), generator=generator) < LONG_SHARE
    if is_long:
        choice = torch.randint(len(state.long_rows), (size,), generator=generator)
        order = state.long_rows[choice.numpy()]
    x0, embedding = state.rows(order[local])  # [b, L], [b, D]
    if prefix and not is_long:
        x0 = x0[:, :prefix]

    # Masks: the forward process
    min_count, padding = 0, None
    if settings.static_shapes:
        alone, ratio = state.processes.count == 1, mean_mask_ratio(state.schedule)
        min_count = max_masked(len(x0), x0.shape[1], ratio, alone)
    if settings.scored_padding < 1.0:
        padding = ScoredPadding(tokenizer.pad_id, settings.scored_padding)
    batch = corrupt_batch(
        x0,
        state.schedule,
        WEIGHTS[state.config.diffusion.weight],
        tokenizer.mask_id,
        generator,
        batch=size,
        rows=local,
        padding=padding,
        min_count=min_count,
    )

    # Condition, context, candidates
    dropout, noise = settings.condition_dropout, settings.embedding_noise
    embedding = perturb_embeddings(embedding, dropout, noise, generator, size, local)
    if settings.self_context:
        draws = torch.rand(2, size, x0.shape[1], generator=generator)[:, local]
        draws = send(draws, x0.device)
        positions, uniform = draws[0] < settings.self_context, draws[1]
        timestep = state.schedule.timestep
        with state.compute.autocast():
            batch = sample_contexts(
                state.denoiser, batch, embedding, positions, uniform, tokenizer.mask_id, timestep
            )
    if settings.feedback and state.encoder is not None:
        with state.compute.autocast():
            hypotheses = draw_hypotheses(
                state.denoiser,
                x0,
                embedding,
                state.pairs,
                settings.feedback,
                generator,
                size,
                local,
            )
        batch, embedding = add_feedback(batch, embedding, x0, hypotheses, state.encoder, tokenizer)
    if state.sampler is not None:
        batch = replace(batch, candidates=state.sampler.draw(batch.targets, generator))
    return batch, embedding


# The optimiser and its schedule


def make_optimizer(denoiser: nn.Module, settings: TrainingSection) -> torch.optim.AdamW:
    """Make a fused AdamW; weight decay on matrices only, not on norms, biases or embedding tables.

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
    """Compute the learning rate of a step, counted from 0.

    After a linear warm-up to ``lr``, down to ``final_lr * lr`` at the end: by a cosine over all
    the rest; or, with ``wsd`` (warm-up, stable, decay: Hu et al., 2024, arXiv 2404.06395), over the
    last ``decay_steps`` only, as 1 - sqrt (Hägele et al., 2024, arXiv 2405.18392).
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "wsd":
        decay = settings.decay_steps or max(1, settings.steps // 10)
        progress = max(0.0, (step - settings.steps + decay) / decay)
        share = 1.0 - math.sqrt(progress)
    else:
        progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr + (1.0 - settings.final_lr) * share)


# Averaged weights


class EMA:
    """The exponential moving average of a module's weights.

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
        """Run the module with the averaged weights inside the block."""
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


# The order of the data


def training_rows(first: int, count: int, total: int, seed: int) -> NDArray[np.int64]:
    """Find rows of samples ``first`` to ``first + count`` in the endless order over ``total``."""
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
    """Seed the source of all that a step draws."""
    words = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
