"""Train Vec2Text's two networks on prepared pairs: the recipe behind docs/peers.md.

    python -m benchmarks.vec2text start PAIRS --out RUN
    unembed train --config minilm --data PAIRS --out DENOISER --set training.start_from=RUN/start …
    python -m benchmarks.vec2text base PAIRS --out RUN
    python -m benchmarks.vec2text hypotheses PAIRS --out RUN --count 38400
    python -m benchmarks.vec2text corrector PAIRS --out RUN

The inverter sees the samples that `unembed train` shows a denoiser with the same batch, seed and
number of held-out pairs, in the same order, from the same start, with the same optimiser, rate and
sample of the vocabulary.
Each stage goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unembed.baselines.left_to_right import LeftToRight, PrefixSizes, write_texts
from unembed.checkpoints import Storage
from unembed.config import TrainingSection, load_config
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import choose_compute
from unembed.diffusion import Candidates
from unembed.encoders.sentence import load_encoder
from unembed.files import atomic
from unembed.inverter import Inverter
from unembed.training.loss import ChunkedCrossEntropy
from unembed.training.step import (
    EMA,
    learning_rate,
    make_optimizer,
    make_sampler,
    step_generator,
    training_rows,
)

_CHUNK = 1024  # hypotheses a file
BASE, CORRECTOR, HYPOTHESES = "base.safetensors", "corrector.safetensors", "hypotheses"


def load_network(path: Path, averaged: bool = True) -> LeftToRight:
    """Read a network that a stage saved: its averaged weights, or the live ones."""
    with safe_open(path, framework="pt") as file:
        network = LeftToRight(PrefixSizes(**json.loads(file.metadata()["sizes"])))
        live = {n: file.get_tensor(f"model.{n}") for n in network.state_dict()}
        network.load_state_dict(live)
        if averaged:
            names = [name for name, _ in network.named_parameters()]
            means = {name: file.get_tensor(f"ema.{k}") for k, name in enumerate(names)}
            network.load_state_dict(means, strict=False)
    return network.eval()


class Run:
    """Network, optimiser and averages of a stage, on disk and in memory."""

    def __init__(self, network: LeftToRight, settings: TrainingSection, path: Path) -> None:
        self.network, self.settings, self.path = network.train(), settings, path
        self.optimizer = make_optimizer(network, settings)
        self.ema = EMA(network, settings.ema_decay)
        self.step, self.seconds, self.cpu = 0, 0.0, 0.0
        if path.is_file():
            self._load()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self) -> None:
        """Write everything that the next start needs, in one step."""
        tensors: dict[str, Tensor] = {
            f"model.{n}": p.detach() for n, p in self.network.state_dict().items()
        }
        tensors |= {f"ema.{k}": mean for k, mean in enumerate(self.ema.averages)}
        for k, parameter in enumerate(self._parameters()):
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{k}"] = self.optimizer.state[parameter][key]
        facts = {
            "sizes": json.dumps(asdict(self.network.sizes)),
            "run": json.dumps({"step": self.step, "seconds": self.seconds, "cpu": self.cpu}),
        }
        with atomic(self.path) as temporary:
            save_file(tensors, temporary, facts)

    def _load(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            facts = json.loads(file.metadata()["run"])
            names = self.network.state_dict()
            self.network.load_state_dict({n: file.get_tensor(f"model.{n}") for n in names})
            for k, mean in enumerate(self.ema.averages):
                mean.copy_(file.get_tensor(f"ema.{k}"))
            for k, parameter in enumerate(self._parameters()):
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(facts["step"])),
                    "exp_avg": file.get_tensor(f"exp_avg.{k}"),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{k}"),
                }
        self.step, self.seconds, self.cpu = facts["step"], facts["seconds"], facts["cpu"]


class Batches:
    """Inputs and targets of a step.

    Args:
        pairs: Held-out ones first.
        settings: Of the run.
        folder: Of the hypotheses of a corrector; None for the inverter.
    """

    def __init__(self, pairs: Pairs, settings: TrainingSection, folder: Path | None) -> None:
        self._pairs, self._settings = pairs, settings
        self._sampler = make_sampler(pairs, settings)
        self._hypotheses = None if folder is None else read_hypotheses(folder)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Candidates | None]:
        """Tokens, vectors, places to score and their targets of a step, and the vocabulary's."""
        settings, pairs = self._settings, self._pairs
        size, held_out = settings.pairs_a_pass, settings.validation_pairs
        first, feedback = step * size, None
        if self._hypotheses is not None:  # gone through again and again
            first %= len(self._hypotheses[0]) // size * size
            feedback = [torch.from_numpy(array[first : first + size]) for array in self._hypotheses]
        rows = training_rows(first, size, len(pairs) - held_out, settings.seed) + held_out
        ids, vectors = pairs.rows(rows)
        x, e = torch.from_numpy(ids), torch.from_numpy(vectors)
        index = (x != pairs.tokenizer.pad_id).flatten().nonzero()[:, 0]
        targets = x.flatten()[index]
        if feedback is not None:
            x, e = (
                torch.cat([feedback[0].long(), x], dim=1),
                torch.cat([e, feedback[1].float()], dim=1),
            )
        candidates = None
        if self._sampler is not None:
            candidates = self._sampler.draw(targets, step_generator(settings.seed, step))
        return x, e, index, targets, candidates


def train(run: Run, batches: Batches, log: Path) -> None:
    """Go on to the last step, with a line of the log every ``log_every``."""
    settings, network = run.settings, run.network
    compute = choose_compute("cpu")
    scorer = ChunkedCrossEntropy(network)  # type: ignore[arg-type]
    losses = []
    clock, cpu = time.perf_counter(), time.process_time()
    while run.step < settings.steps:
        x, e, index, targets, candidates = batches.draw(run.step)
        weights = torch.ones(len(targets))
        with compute.autocast():
            total, _ = scorer(x, e, torch.ones(len(x)), index, targets, weights, candidates)
        loss = total / len(targets)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.step, settings) * group["share"]
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.ema.update(run.step)
        losses.append(loss.item())
        now, used = time.perf_counter(), time.process_time()
        run.seconds, run.cpu = run.seconds + now - clock, run.cpu + used - cpu
        clock, cpu = now, used
        last = run.step == settings.steps
        if run.step % settings.log_every == 0 or last:
            samples = run.step * settings.pairs_a_pass
            record: dict[str, float] = {"step": run.step, "samples": samples}
            record |= {"loss": float(np.mean(losses)), "seconds": run.seconds, "cpu": run.cpu}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            losses = []
        if run.step % settings.save_every == 0 or last:
            run.save()


@torch.no_grad()
def validation_loss(network: LeftToRight, pairs: Pairs, settings: TrainingSection) -> float:
    """Nats a token (end token included) of the held-out pairs, each token given those before."""
    total, count = 0.0, 0
    for start in range(0, settings.validation_pairs, 128):
        rows = np.arange(start, min(start + 128, settings.validation_pairs))
        ids, vectors = pairs.rows(rows)
        x = torch.from_numpy(ids)
        h = network.hidden_states(x, torch.from_numpy(vectors))
        keep = x != pairs.tokenizer.pad_id
        logits = nn.functional.linear(h[keep], network.token_table.weight, network.output_bias)
        total += float(nn.functional.cross_entropy(logits, x[keep], reduction="sum"))
        count += int(keep.sum())
    return total / count


# Hypotheses of the inverter, which the corrector learns to correct


def read_hypotheses(folder: Path) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """Tokens [N, L] and embeddings [N, D] of the hypotheses that are there, in order."""
    files = sorted(folder.glob("tokens-*.npy"))
    tokens = [np.load(file, allow_pickle=False) for file in files]
    names = [file.with_name(file.name.replace("tokens", "embeddings")) for file in files]
    embeddings = [np.load(name, allow_pickle=False) for name in names]
    return np.concatenate(tokens), np.concatenate(embeddings)


def write_hypotheses(
    network: LeftToRight, pairs: Pairs, settings: TrainingSection, folder: Path, count: int
) -> None:
    """Write the inverter's greedy texts of the first samples, and embed them; a chunk a file."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(pairs.encoder.name, compute=choose_compute("cpu"))
    network = network.to(choose_compute("cpu", training=False).dtype)
    ids, held_out = pairs.tokenizer, settings.validation_pairs
    for first in range(0, count, _CHUNK):
        path = folder / f"tokens-{first // _CHUNK:05d}.npy"
        if path.is_file():
            continue
        rows = training_rows(first, _CHUNK, len(pairs) - held_out, settings.seed) + held_out
        vectors = torch.from_numpy(pairs.rows(rows)[1])
        parts = [write_texts(network, ids, part)[0][:, 0] for part in torch.split(vectors, 256)]
        tokens = torch.cat(parts).numpy()
        embeddings = np.zeros((len(tokens), vectors.shape[1]), np.float32)
        texts = ids.decode(tokens.tolist())
        indices = [k for k, text in enumerate(texts) if text.strip()]
        embeddings[indices] = encoder.encode([texts[k] for k in indices])
        for name, array in (("embeddings", embeddings.astype(np.float16)), ("tokens", tokens)):
            kind = array.astype(np.uint16) if name == "tokens" else array
            target = path.with_name(f"{name}-{first // _CHUNK:05d}.npy")
            with atomic(target) as temporary, temporary.open("wb") as file:
                np.save(file, kind, allow_pickle=False)


# Starts


_SHARED = ("token_table.weight", "output_bias", "embedding_shift.weight")


def save_start(folder: Path) -> None:
    """Save what both networks start from: of the shipped weights the words and what e says of them.

    That is the token table with its bias and the direct path from the vector to it; the blocks of
    both are new. The folder is an inverter, for ``training.start_from``.
    """
    inverter = Inverter.from_pretrained("minilm")
    shipped = inverter.denoiser.state_dict()
    inverter.denoiser = Denoiser(inverter.denoiser.sizes)
    inverter.denoiser.load_state_dict({name: shipped[name] for name in _SHARED}, strict=False)
    inverter.storage = Storage("float16")
    inverter.save_pretrained(folder)


def start_base(pairs: Pairs, slots: int, start: Path) -> LeftToRight:
    """Start the inverter from what `save_start` saved."""
    sizes = pairs.tokenizer.size, pairs.encoder.dimension, pairs.tokens[0].shape[1]
    network = LeftToRight(PrefixSizes(*sizes, slots=slots))
    weights = Inverter.from_pretrained(start).denoiser.state_dict()
    network.load_state_dict({name: weights[name] for name in _SHARED}, strict=False)
    return network


def start_corrector(base: LeftToRight, slots: int) -> LeftToRight:
    """Start a corrector from the inverter, where it has the same parts."""
    sizes = PrefixSizes(**{**asdict(base.sizes), "corrector": True, "slots": slots})
    network = LeftToRight(sizes)
    own, source = network.state_dict(), base.state_dict()
    same = {n: v for n, v in source.items() if n in own and own[n].shape == v.shape}
    network.load_state_dict(same, strict=False)
    with torch.no_grad():
        network.hypothesis_positions.copy_(base.positions)
    return network


def training_settings(arguments: argparse.Namespace) -> TrainingSection:
    """Settings of ``minilm.yaml`` with those of this recipe."""
    changes: dict[str, Any] = {
        "steps": arguments.steps,
        "batch_size": arguments.batch,
        "schedule": "wsd",
        "decay_steps": max(1, arguments.steps // 5),
        "lr": arguments.lr,
        "warmup_steps": min(50, arguments.steps // 5),
        "ema_decay": 0.99,
        "final_lr": 0.02,
        "condition_dropout": 0.0,
        "seed": 0,
        "log_every": 25,
        "save_every": 25,
    }
    training = load_config("minilm").training.model_dump() | changes
    return TrainingSection.model_validate(training)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("start", "base", "hypotheses", "corrector", "validate"))
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--slots", type=int, default=8, help="pseudo-tokens of a vector")
    parser.add_argument("--count", type=int, default=38400, help="hypotheses")
    arguments = parser.parse_args()
    settings, pairs, out = training_settings(arguments), Pairs.open(arguments.pairs), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    if arguments.stage == "start":
        save_start(out / "start")
    elif arguments.stage == "base":
        run = Run(start_base(pairs, arguments.slots, out / "start"), settings, out / BASE)
        train(run, Batches(pairs, settings, None), out / "base.jsonl")
    elif arguments.stage == "hypotheses":
        base = load_network(out / BASE)
        write_hypotheses(base, pairs, settings, out / HYPOTHESES, arguments.count)
    elif arguments.stage == "corrector":
        network = start_corrector(load_network(out / BASE), arguments.slots)
        run = Run(network, settings, out / CORRECTOR)
        train(run, Batches(pairs, settings, out / HYPOTHESES), out / "corrector.jsonl")
    else:
        loss = validation_loss(load_network(out / BASE), pairs, settings)
        print(f"{loss:.4f} nats a token of {settings.validation_pairs} held-out pairs")


if __name__ == "__main__":
    main()
