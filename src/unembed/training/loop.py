"""The training loop, read top to bottom: data, network, optimiser, steps, validation, saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.config import Config
from unembed.data.encode import TOKENIZER
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import Compute
from unembed.diffusion import WEIGHTS, corrupt_batch, diffusion_loss, make_schedule
from unembed.errors import CheckpointError, TrainingError
from unembed.training.checkpoint import BEST, LATEST, Progress, read_state, restore, save_state
from unembed.training.ema import EMA
from unembed.training.linear_cross_entropy import chunked_cross_entropy_of
from unembed.training.log import LogFn, MetricsLog
from unembed.training.optimizer import learning_rate, make_optimizer
from unembed.training.order import step_generator, training_rows
from unembed.training.validation import validate

METRICS = "metrics.jsonl"


@dataclass
class TrainingRun:
    """What a step works on."""

    config: Config
    pairs: Pairs
    compute: Compute
    denoiser: Denoiser
    ema: EMA
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]


def train(
    config: Config,
    data: Path,
    run: Path,
    compute: Compute,
    *,
    words: NDArray[np.float32] | None = None,
    resume: bool = False,
    on_log: LogFn | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train a denoiser on prepared pairs.

    Args:
        config: The run's settings.
        data: Folder of prepared pairs.
        run: Folder for ``latest.safetensors``, ``best.safetensors`` and ``metrics.jsonl``.
        compute: Device and number format.
        words: The encoder's word embeddings [V', H'], from which the token table starts.
        resume: Go on from ``latest.safetensors`` when there is one.
        on_log: Called with every record that goes into ``metrics.jsonl``.
        should_stop: Asked after every step; true saves the state and returns.

    Returns:
        Where the run stands at its end.

    Raises:
        DataError: The pairs cannot be read.
        CheckpointError: The folder holds another run, or a run and ``resume`` is false.
        TrainingError: Too few pairs, a loss that is not finite (the last good state is kept), or a
            full disk.
    """
    settings = config.training
    this = _build(config, Pairs.open(data), compute, words)
    progress = _start_or_resume(run, this, resume)
    log = MetricsLog(run / METRICS, progress.step, on_log)
    clock = _Clock(progress)
    running = torch.zeros((), device=compute.device)  # sum of losses since the last log
    for step in range(progress.step, settings.steps):
        loss, norm = optimiser_step(this, step)
        running += loss
        progress = replace(progress, step=step + 1, seconds=clock.total())
        last = step + 1 == settings.steps
        stop = last or should_stop()

        if progress.step % settings.log_every == 0 or stop:
            # Between logs the host never waits for the device
            record = clock.record(progress, running.item(), norm.item(), this.config)
            if not math.isfinite(record["loss"] + record["gradient_norm"]):
                raise TrainingError(
                    "a finite loss",
                    f"loss {record['loss']}, gradient norm {record['gradient_norm']} by step "
                    f"{progress.step}",
                    f"The last good state is in {run / LATEST}; lower training.lr and resume",
                )
            log.write(record)
            running.zero_()
        if progress.step % settings.eval_every == 0 or last:
            with this.ema.applied(), clock.paused():
                figures = validate(this.denoiser, this.pairs, config, compute)
            log.write({"step": progress.step, **figures})
            if figures["validation_loss"] < progress.best_loss:
                progress = replace(progress, best_loss=figures["validation_loss"])
                save_state(run / BEST, this.denoiser, this.ema, None, progress, this.facts)
        if progress.step % settings.save_every == 0 or stop:
            with clock.paused():
                save_state(
                    run / LATEST, this.denoiser, this.ema, this.optimizer, progress, this.facts
                )
        if stop:
            break
    return progress


def optimiser_step(this: TrainingRun, step: int) -> tuple[Tensor, Tensor]:
    """One update from ``accumulate`` batches; returns loss and gradient norm, on the device."""
    settings, process, device = this.config.training, this.config.diffusion, this.compute.device
    schedule = make_schedule(process.schedule, process.rate)
    generator = step_generator(settings.seed, step)
    cross_entropy = chunked_cross_entropy_of(this.denoiser)
    held_out = settings.validation_pairs
    total = torch.zeros((), device=device)
    for micro in range(settings.accumulate):
        first = (step * settings.accumulate + micro) * settings.batch_size
        rows = training_rows(first, settings.batch_size, len(this.pairs) - held_out, settings.seed)
        tokens, vectors = this.pairs.rows(rows + held_out)
        x0, embedding = torch.from_numpy(tokens), torch.from_numpy(vectors).to(device)
        weight = WEIGHTS[process.weight]
        batch = corrupt_batch(x0, schedule, weight, this.pairs.tokenizer.mask_id, generator)
        with this.compute.autocast():
            loss, _ = diffusion_loss(cross_entropy, batch.to(device), embedding)
        loss = loss / settings.accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(this.denoiser.parameters(), settings.clip_norm)
    for group in this.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings) * group["share"]
    this.optimizer.step()
    this.optimizer.zero_grad(set_to_none=True)
    this.ema.update(step + 1)
    return total, norm


def _build(
    config: Config, pairs: Pairs, compute: Compute, words: NDArray[np.float32] | None
) -> TrainingRun:
    """Network, average and optimiser at step 0."""
    settings = config.training
    needed = settings.validation_pairs + settings.batch_size
    if len(pairs) < needed:
        raise TrainingError(
            f"at least validation_pairs + batch_size = {needed} prepared pairs",
            str(len(pairs)),
            "Prepare more text, or lower training.validation_pairs or training.batch_size",
        )
    sizes = DenoiserSizes(
        vocab_size=pairs.tokenizer.size,
        embedding_dim=pairs.encoder.dimension,
        length=int(pairs.manifest["pieces"]["length"]),
        **config.denoiser.model_dump(exclude={"token_table"}),
    )
    torch.manual_seed(settings.seed)
    denoiser = Denoiser(sizes)
    denoiser.start_from_frequencies(torch.from_numpy(pairs.token_counts()))
    if words is not None:
        denoiser.start_from_words(torch.from_numpy(pairs.tokenizer.rows_of(words)))
    denoiser.to(compute.device).train()
    facts = {
        "config": config.model_dump(),
        "sizes": sizes.to_dict(),
        "encoder": pairs.encoder.to_dict(),
        "tokenizer": pairs.tokenizer.ids_to_dict(),
        "tokenizer_digest": pairs.tokenizer.digest,
        "fingerprint": pairs.manifest.get("fingerprint"),
    }
    ema = EMA(denoiser, settings.ema_decay)
    return TrainingRun(
        config, pairs, compute, denoiser, ema, make_optimizer(denoiser, settings), facts
    )


def _start_or_resume(run: Path, this: TrainingRun, resume: bool) -> Progress:
    """Load the latest state when asked to and there is one; refuse to overwrite a run."""
    run.mkdir(parents=True, exist_ok=True)
    latest = run / LATEST
    pairs = len(this.pairs) - this.config.training.validation_pairs
    if not latest.exists():
        this.pairs.tokenizer.save(run / TOKENIZER)
        return Progress(pairs=pairs)
    if not resume:
        raise CheckpointError(
            f"an empty run folder at {run}", "a training state", "Pass --resume or another --out"
        )
    tensors, progress, saved = read_state(latest)
    for key in ("sizes", "encoder", "tokenizer_digest"):
        if saved.get(key) != this.facts[key]:
            raise CheckpointError(
                f"a run with {key} {this.facts[key]}",
                f"{saved.get(key)} in {latest}",
                "Use the data and configuration of that run, or another --out",
            )
    restore(tensors, this.denoiser, this.ema, this.optimizer, progress.step)
    return replace(progress, pairs=pairs)


class _Clock:
    """Seconds spent over all starts of a run, and speed since the last log."""

    def __init__(self, progress: Progress) -> None:
        self._began = time.monotonic() - progress.seconds
        self._logged_at, self._logged_step = time.monotonic(), progress.step

    def total(self) -> float:
        return time.monotonic() - self._began

    def paused(self) -> _Pause:
        return _Pause(self)

    def skip(self, seconds: float) -> None:
        """Leave validation and saving out of the speed."""
        self._logged_at += seconds

    def record(
        self, progress: Progress, losses: float, norm: float, config: Config
    ) -> dict[str, float]:
        settings = config.training
        steps = progress.step - self._logged_step
        seconds = time.monotonic() - self._logged_at
        self._logged_at, self._logged_step = time.monotonic(), progress.step
        return {
            "step": progress.step,
            "loss": losses / steps,
            "lr": learning_rate(progress.step - 1, settings),
            "gradient_norm": norm,
            "samples_per_second": steps * settings.batch_size * settings.accumulate / seconds,
            "seconds": progress.seconds,
        }


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._clock.skip(time.monotonic() - self._began)
