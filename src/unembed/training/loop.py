"""The training loop, read top to bottom: data, network, steps, validation, saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
from unembed.encoders.base import Encoder, known_as
from unembed.errors import TrainingError
from unembed.training.auto_batch_size import settle_batch_size
from unembed.training.checkpoint import (
    BEST,
    LATEST,
    MILESTONE,
    Progress,
    open_pairs,
    save_state,
    saved_facts,
    start_from,
    start_or_resume,
    written,
)
from unembed.training.distributed import Processes, put_away
from unembed.training.metrics_log import (
    METRICS,
    Clock,
    LogFn,
    MetricsLog,
    product_rate,
    step_operations,
)
from unembed.training.step import TrainingRun, assemble, learning_rate, optimiser_step
from unembed.training.validation import decode_held_out, validate

if TYPE_CHECKING:
    from unembed.config import Config


def train(
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
        encoder: Embeds what is decoded in validation, whose cosine is then logged.
        resume: Go on from ``latest.safetensors`` when there is one.
        on_log: Called with every record that goes into ``metrics.jsonl``.
        should_stop: Asked after every step (of several processes: at every log); true saves the
            state and returns.

    Returns:
        Where the run stands at its end.

    Raises:
        DataError: The pairs cannot be read.
        CheckpointError: The folder holds another run (settings that must stay, other pairs), or a
            run and ``resume`` is false.
        TrainingError: Too few pairs, a bad loss (the last good state is kept), or a full disk.
    """
    this = _set_up(config, data, compute, words, saved_facts(run, resume))
    processes, settings = this.processes, this.config.training
    progress = start_or_resume(run, this)
    with _log(run, this, progress, on_log) as log:
        clock = _clock(this, progress)
        running = torch.zeros((), device=this.compute.device)  # sum of losses since the last log
        logged = this.guard.found().good
        for step in range(progress.step, settings.steps):
            if _out_of_patience(this, progress):
                break
            running += optimiser_step(this, step)
            progress = replace(progress, step=step + 1, seconds=clock.total())
            last = progress.step == settings.steps
            to_log = progress.step % settings.log_every == 0
            stop = last or processes.asked(should_stop, now=to_log)
            to_validate = progress.step % settings.eval_every == 0 or last
            to_save = progress.step % settings.save_every == 0 or stop
            kept = progress.step in settings.milestones
            if not (to_log or to_validate or to_save or kept):
                continue  # the host never waits for the device between these

            found = this.guard.check(progress.step, run / LATEST)
            progress = replace(progress, skipped=found.skipped)
            if (to_log or stop) and found.good > logged:
                loss = running.item() / (found.good - logged)
                _write(log, _record(this, progress, loss, clock))
                running.zero_()
                logged = found.good
            with clock.paused():
                if to_validate:
                    progress = _validate(this, progress, run, log, encoder)
                    stop = stop or _out_of_patience(this, progress)
                if kept:
                    _save(this, progress, run / MILESTONE.format(progress.step))
                if to_save or stop:
                    _save(this, progress, run / LATEST)
            if stop:
                break
    processes.wait()
    return progress


def _set_up(
    config: Config,
    data: Path,
    compute: Compute,
    words: NDArray[np.float32] | None,
    saved: dict[str, Any] | None,
) -> TrainingRun:
    """The run at step 0, on the pairs and with the batch that a saved one began with."""
    processes = Processes(compute, config.training.shard)
    pairs = open_pairs(data, config, saved)
    return _build(_with_batch_size(config, pairs, processes, saved), pairs, processes, words)


def _with_batch_size(
    config: Config, pairs: Pairs, processes: Processes, saved: dict[str, Any] | None
) -> Config:
    """The configuration with ``batch_size: auto`` settled: as the run to resume did, or now."""
    if config.training.batch_size != "auto":
        return config
    if saved is not None:
        size = saved["config"]["training"]["batch_size"]
    else:
        size = settle_batch_size(config, pairs, processes, _network)
    training = config.training.model_copy(update={"batch_size": size})
    return config.model_copy(update={"training": training})


def _network(config: Config, pairs: Pairs) -> Denoiser:
    """The denoiser with its random start."""
    sizes = DenoiserSizes(
        vocab_size=pairs.tokenizer.size,
        embedding_dim=pairs.encoder.dimension,
        length=config.data.length,
        **config.denoiser.model_dump(exclude={"token_table"}),
    )
    torch.manual_seed(config.training.seed)
    return Denoiser(sizes)


def _build(
    config: Config, pairs: Pairs, processes: Processes, words: NDArray[np.float32] | None
) -> TrainingRun:
    """Network, average and optimiser at step 0."""
    settings = config.training
    needed = settings.validation_pairs + settings.pairs_a_pass
    if len(pairs) < needed:
        raise TrainingError(
            f"at least validation_pairs + batch_size = {needed} prepared pairs",
            str(len(pairs)),
            "Prepare more text, or lower training.validation_pairs or training.batch_size",
        )
    if settings.pairs_a_pass < processes.count:
        raise TrainingError(
            f"a training.batch_size of at least {processes.count}, one pair a process",
            str(settings.pairs_a_pass),
            "Raise it or start fewer processes",
        )
    denoiser = _network(config, pairs)
    denoiser.start_from_frequencies(torch.from_numpy(pairs.token_counts))
    if settings.start_from is not None:
        start_from(settings.start_from, denoiser, pairs)
    elif words is not None:
        denoiser.start_from_words(torch.from_numpy(pairs.tokenizer.rows_of(words)))
    facts = {
        "config": _recorded(config),
        "sizes": denoiser.sizes.to_dict(),
        "encoder": pairs.encoder.to_dict(),
        "tokenizer": pairs.tokenizer.ids_to_dict(),
        "tokenizer_digest": pairs.tokenizer.digest,
        "fingerprint": pairs.describe_encoder(),
        "shards": len(pairs.tokens),
        "pairs_digest": pairs.digest,
        "device": processes.compute.describe(),
    }
    return assemble(config, pairs, processes, denoiser, facts)


def _recorded(config: Config) -> dict[str, Any]:
    """The settings as they go into every file made from the run, without absolute paths."""
    settings = config.model_dump()
    for section, key in (
        (settings["encoder"], "name"),
        (settings["data"]["vocabulary"], "tokenizer"),
        (settings["training"], "start_from"),
    ):
        if section[key] is not None:
            section[key] = known_as(section[key])
    return settings


@contextmanager
def _log(
    run: Path, this: TrainingRun, progress: Progress, on_log: LogFn | None
) -> Iterator[MetricsLog | None]:
    """The log, in the first process; closed at the end, whatever that is."""
    if not this.processes.first:
        yield None
        return
    with written(run / METRICS):
        log = MetricsLog(
            run / METRICS,
            progress.step,
            on_log,
            samples_per_step=this.samples,
            tensorboard=this.config.training.tensorboard,
        )
    with closing(log):
        yield log


def _write(log: MetricsLog | None, record: dict[str, float]) -> None:
    """Add to the log, in the first process."""
    if log is not None:
        with written(log.path):
            log.write(record)


def _clock(this: TrainingRun, progress: Progress) -> Clock:
    """A clock that knows what a step takes and what this machine can do."""
    sizes, settings = this.denoiser.sizes, this.config.training
    masked = this.samples * sizes.length * mean_mask_ratio(this.schedule)
    counts = this.pairs.token_counts
    padding = float(counts[this.pairs.tokenizer.pad_id] / counts.sum())
    masked *= 1.0 - padding * (1.0 - settings.scored_padding)
    if settings.sampled_vocabulary is not None:
        sizes = replace(sizes, vocab_size=min(sizes.vocab_size, settings.sampled_vocabulary))
    operations = step_operations(sizes, this.samples, masked, settings.table_lr > 0)
    rate = product_rate(this.compute) * this.processes.count
    return Clock(progress.step, progress.seconds, this.samples, operations, rate)


def _record(this: TrainingRun, progress: Progress, loss: float, clock: Clock) -> dict[str, float]:
    """A line of the log; the loss is the mean over the good steps since the last one."""
    settings = this.config.training
    record = {
        "step": progress.step,
        "loss": loss,
        **_masked_accuracy(this),
        "lr": learning_rate(progress.step - 1, settings),
        "gradient_norm": this.guard.norm.item(),
        **clock.speed(progress.step),
        "seconds": progress.seconds,
    }
    if settings.on_bad_loss == "skip":
        record["skipped_steps"] = progress.skipped
    return record


def _masked_accuracy(this: TrainingRun) -> dict[str, float]:
    """Since the last call, over all processes; nothing where nothing was scored."""
    tally = this.scorer.tally
    scored, hits = this.processes.total(tally.clone()).tolist()
    tally.zero_()
    return {"masked_accuracy": hits / scored} if scored else {}


def _validate(
    this: TrainingRun,
    progress: Progress,
    run: Path,
    log: MetricsLog | None,
    encoder: Encoder | None,
) -> Progress:
    """Measure the averaged weights in the first process, tell the others, keep the best.

    Where each holds a share of the weights all measure, since every pass takes all of them.
    """
    figures: dict[str, float] = {}
    first = this.processes.first
    if first or this.processes.sharded:
        with this.ema.applied():
            figures = validate(this.denoiser, this.pairs, this.config, this.compute)
            figures |= decode_held_out(
                this.denoiser, this.pairs, this.config, this.compute, encoder if first else None
            )
        put_away(this.denoiser)
        _write(log, {"step": progress.step, **figures})
    loss = this.processes.agreed(figures.get("validation_loss", 0.0))
    if not loss < progress.best_loss:
        return replace(progress, stale=progress.stale + 1)
    progress = replace(progress, best_loss=loss, stale=0)
    _save(this, progress, run / BEST)
    return progress


def _out_of_patience(this: TrainingRun, progress: Progress) -> bool:
    patience = this.config.training.patience
    return patience is not None and progress.stale >= patience


def _save(this: TrainingRun, progress: Progress, path: Path) -> None:
    """Write a state, in the first process: all of it as the latest, else the averages."""
    first = this.processes.first
    if not (first or this.processes.sharded):
        return
    whole = path.name == LATEST
    save_state(
        path if first else None,
        this.denoiser,
        this.ema,
        this.optimizer if whole else None,
        progress,
        this.facts,
        this.guard.state if whole else None,
    )
