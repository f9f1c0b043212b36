"""The training loop, read top to bottom: processes, data, network, steps, validation, saves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import Compute
from unembed.diffusion import mean_mask_ratio
from unembed.encoders.base import Encoder, recorded_name
from unembed.errors import TrainingError
from unembed.training.auto_batch_size import find_batch_size
from unembed.training.checkpoint import (
    BEST,
    LATEST,
    MILESTONE,
    Progress,
    guard_write,
    locked,
    open_pairs,
    save_state,
    saved_state,
    start_from,
    start_or_resume,
)
from unembed.training.distributed import Processes, reshard
from unembed.training.metrics_log import (
    METRICS,
    Clock,
    LogFn,
    MetricsLog,
    product_rate,
    step_operations,
)
from unembed.training.step import (
    LONG_SHARE,
    TrainState,
    learning_rate,
    make_state,
    train_step,
)
from unembed.training.validation import decode_held_out, validate

if TYPE_CHECKING:
    from unembed.config import Config

_SOLVED_PAIRS = 30_000  # from which the direct path starts


def train(  # noqa: C901, PLR0915 - a loop is read in one piece, under its headings
    config: Config,
    data: Path,
    run: Path,
    compute: Compute,
    *,
    words: NDArray[np.float32] | None = None,
    encoder: Encoder | None = None,
    resume: bool = False,
    on_log: LogFn | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train a denoiser on prepared pairs, in this process or, under a launcher, in several.

    Args:
        config: The run's settings.
        data: Folder of prepared pairs.
        run: Folder for ``latest.safetensors``, ``best.safetensors`` and the log.
        compute: Device and number format; of several processes each has a device of its own.
        words: The encoder's word embeddings [V', H'], from which the token table starts.
        encoder: Embeds what is decoded in validation, whose cosine is then logged, and the
            hypotheses of ``training.feedback``.
        resume: Go on from ``latest.safetensors`` when there is one.
        on_log: Called with every record that goes into ``metrics.jsonl``.
        should_stop: Asked after every step (of several processes: at every log); true saves the
            state and returns.

    Returns:
        Where the run stands at its end.

    Raises:
        DataError: The pairs cannot be read.
        CheckpointError: The folder holds another run (settings that must stay, other pairs), a
            run and ``resume`` is false, or one that is being trained now; or it is damaged.
        TrainingError: Too few pairs, a bad loss (the last good state is kept), or a full disk.
    """
    with ExitStack() as stack:
        # Processes, and a folder of their own
        processes = Processes(compute, config.training.shard)
        stack.enter_context(locked(run, processes))

        # Data and network, at step 0 or where the run stopped
        saved = saved_state(run, resume)
        pairs = open_pairs(data, config, saved)
        config = with_batch_size(config, pairs, processes, None if saved is None else saved.facts)
        settings = config.training
        state = initial_state(config, pairs, processes, words, encoder)
        progress = start_or_resume(run, state, saved)
        has_saved, saved = saved is not None, None  # its tensors are no longer needed

        # The log and the clock
        log: MetricsLog | None = None
        if processes.is_main:
            with guard_write(run / METRICS):
                log = MetricsLog(
                    run / METRICS,
                    progress.step,
                    on_log,
                    samples_per_step=state.samples,
                    tensorboard=settings.tensorboard,
                )
            stack.enter_context(closing(log))
        clock = _clock(state, progress)
        loss_sum = torch.zeros((), device=processes.compute.device)  # since the last log
        logged = state.guard.report().good

        for step in range(progress.step, settings.steps):
            if progress.out_of_patience(settings.patience):
                break

            # One step; see `step.train_step`
            loss_sum += train_step(state, step)
            progress = replace(progress, step=step + 1, seconds=clock.total())

            # What is due now; between these the host never waits for the device
            last = progress.step == settings.steps
            to_log = progress.step % settings.log_every == 0
            # Several processes ask each other, which takes a wait, at a log only
            stop = last or ((to_log or processes.count == 1) and processes.any(should_stop()))
            to_validate = progress.step % settings.eval_every == 0 or last
            to_save = progress.step % settings.save_every == 0 or stop
            # No best state without a latest one beside it
            to_save = to_save or (to_validate and not has_saved)
            milestone = progress.step in settings.milestones
            if not (to_log or to_validate or to_save or milestone):
                continue

            # Check for bad steps, and log
            report = state.guard.check(progress.step, run / LATEST)
            progress = replace(progress, skipped=report.skipped)
            if (to_log or stop) and report.good > logged:
                loss = loss_sum.item() / (report.good - logged)
                _write(log, _record(state, progress, loss, clock))
                loss_sum.zero_()
                logged = report.good

            # Validate and save
            with clock.paused():
                if to_validate:
                    figures = _validate(state, encoder)
                    _write(log, {"step": progress.step, **figures})
                    loss = processes.broadcast(figures.get("validation_loss", 0.0))
                    progress = replace(progress, stale=progress.stale + 1)
                    if loss < progress.best_loss:
                        progress = replace(progress, best_loss=loss, stale=0)
                        save_state(state, progress, run / BEST)
                    stop = stop or progress.out_of_patience(settings.patience)
                if milestone:
                    save_state(state, progress, run / MILESTONE.format(progress.step))
                if to_save or stop:
                    save_state(state, progress, run / LATEST)
                    has_saved = True
            if stop:
                break

        processes.barrier()
    return progress


# Set-up


def with_batch_size(
    config: Config, pairs: Pairs, processes: Processes, facts: dict[str, Any] | None
) -> Config:
    """Choose ``batch_size: auto``: as the run to resume did, or now."""
    if config.training.batch_size != "auto":
        return config
    if facts is not None:
        size = facts["config"]["training"]["batch_size"]
    else:
        size = find_batch_size(config, pairs, processes, make_denoiser)
    training = config.training.model_copy(update={"batch_size": size})
    return config.model_copy(update={"training": training})


def make_denoiser(config: Config, pairs: Pairs) -> Denoiser:
    """Make the denoiser with its random start."""
    sizes = DenoiserSizes(
        vocab_size=pairs.tokenizer.size,
        embedding_dim=pairs.encoder.dimension,
        length=config.data.length,
        **config.denoiser.model_dump(exclude={"token_table"}),
        feedback=config.training.feedback > 0,
    )
    torch.manual_seed(config.training.seed)
    return Denoiser(sizes)


def initial_state(
    config: Config,
    pairs: Pairs,
    processes: Processes,
    words: NDArray[np.float32] | None,
    encoder: Encoder | None = None,
) -> TrainState:
    """Make network, average and optimiser at step 0.

    Raises:
        TrainingError: There are too few pairs, or fewer in a batch than processes; or feedback is
            wanted without an encoder.
    """
    settings = config.training
    if settings.feedback and encoder is None:
        raise TrainingError(
            "the encoder, which embeds the hypotheses of training.feedback",
            "none",
            "Pass encoder, or set training.feedback to 0",
        )
    least = settings.validation_pairs + settings.pairs_a_pass
    if len(pairs) < least:
        raise TrainingError(
            f"at least validation_pairs + batch_size = {least} prepared pairs",
            str(len(pairs)),
            "Prepare more text, or lower training.validation_pairs or training.batch_size",
        )
    if settings.pairs_a_pass < processes.count:
        raise TrainingError(
            f"a training.batch_size of at least {processes.count}, one pair a process",
            str(settings.pairs_a_pass),
            "Raise it or start fewer processes",
        )

    # The table starts from an inverter's, from the encoder's words and then the direct path from
    # pairs, or at random
    denoiser = make_denoiser(config, pairs)
    denoiser.start_from_frequencies(torch.from_numpy(pairs.token_counts))
    if settings.start_from is not None:
        start_from(settings.start_from, denoiser, pairs)
    elif words is not None:
        denoiser.start_from_words(torch.from_numpy(pairs.tokenizer.rows_of(words)))
        last = min(len(pairs), settings.validation_pairs + _SOLVED_PAIRS)
        x0, e = map(torch.from_numpy, pairs.rows(np.arange(settings.validation_pairs, last)))
        denoiser.start_from_pairs(x0, e, pairs.tokenizer.pad_id)

    facts = {
        "config": _portable(config),
        "sizes": denoiser.sizes.to_dict(),
        "encoder": pairs.encoder.to_dict(),
        "tokenizer": pairs.tokenizer.ids_to_dict(),
        "tokenizer_digest": pairs.tokenizer.digest,
        "fingerprint": pairs.describe_encoder(),
        "shards": len(pairs.tokens),
        "pairs_digest": pairs.digest,
        "device": processes.compute.describe(),
    }
    return make_state(config, pairs, processes, denoiser, facts, encoder)


def _portable(config: Config) -> dict[str, Any]:
    """List the settings as every file made from the run has them, without absolute paths."""
    settings = config.model_dump()
    for section, key in (
        (settings["encoder"], "name"),
        (settings["data"]["vocabulary"], "tokenizer"),
        (settings["training"], "start_from"),
    ):
        if section[key] is not None:
            section[key] = recorded_name(section[key])
    return settings


# Logging and validation


def _write(log: MetricsLog | None, record: dict[str, float]) -> None:
    """Add to the log, in the main process."""
    if log is not None:
        with guard_write(log.path):
            log.write(record)


def _clock(state: TrainState, progress: Progress) -> Clock:
    """Make a clock that knows what a step takes and what this machine can do."""
    sizes, settings = state.denoiser.sizes, state.config.training
    if sizes.prefix:
        mean = sizes.prefix + LONG_SHARE * (sizes.length - sizes.prefix)
        sizes = replace(sizes, length=round(mean))
    masked = state.samples * sizes.length * mean_mask_ratio(state.schedule)
    counts = state.pairs.token_counts
    padding = float(counts[state.pairs.tokenizer.pad_id] / counts.sum())
    masked *= 1.0 - padding * (1.0 - settings.scored_padding)
    if settings.sampled_vocabulary is not None:
        sizes = replace(sizes, vocab_size=min(sizes.vocab_size, settings.sampled_vocabulary))
    operations = step_operations(sizes, state.samples, masked, settings.table_lr > 0)
    rate = product_rate(state.compute) * state.processes.count
    return Clock(progress.step, progress.seconds, state.samples, operations, rate)


def _record(state: TrainState, progress: Progress, loss: float, clock: Clock) -> dict[str, float]:
    """Make a line of the log; the loss is the mean over the good steps since the last one."""
    settings, tally = state.config.training, state.scorer.tally
    scored, hits = state.processes.all_reduce(tally.clone()).tolist()
    tally.zero_()
    record = {
        "step": progress.step,
        "loss": loss,
        **({"masked_accuracy": hits / scored} if scored else {}),
        "lr": learning_rate(progress.step - 1, settings),
        "gradient_norm": state.guard.norm.item(),
        **clock.speed(progress.step),
        "seconds": progress.seconds,
    }
    if settings.on_bad_loss == "skip":
        record["skipped_steps"] = progress.skipped
    return record


def _validate(state: TrainState, encoder: Encoder | None) -> dict[str, float]:
    """Measure the averaged weights in the main process; the others get nothing.

    Where each holds a share of the weights all measure, since every pass takes all of them.
    """
    processes = state.processes
    if not (processes.is_main or processes.sharded):
        return {}
    inputs = (state.denoiser, state.pairs, state.config, state.compute)
    with state.ema.applied():
        figures = validate(*inputs)
        figures |= decode_held_out(*inputs, encoder if processes.is_main else None)
    reshard(state.denoiser)
    return figures
