"""A training run → the folder an `Inverter` loads, and the model card in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from unembed.checkpoints import CURVES, Storage, is_inverter
from unembed.data.pairs import TOKENIZER, Pairs
from unembed.denoiser import Denoiser, DenoiserSizes, parameter_counts
from unembed.diffusion import draw_masks
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint
from unembed.encoders.pipeline import licence_lines, licence_note
from unembed.errors import CheckpointError, ConfigError, DataError, TrainingError
from unembed.files import exists, is_file, is_folder, read_json
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer
from unembed.training.checkpoint import read_state
from unembed.training.curves import draw_curves, read_run

_STATES = re.compile(r"best|latest|milestone-\d+")
# What an export that was cut short may have left, and hidden files
_OURS = re.compile(r"\..*|model.*|tokenizer\.json")
_CARD_METRICS = ("token accuracy", "exact match", "token-set F1", "informative recall", "cosine")
_SHORT = 12  # characters of a digest that are shown
GUIDANCE = 0.4  # strength: more words and nearer; beyond 0.5 fewer words again
_FITTED_AT_ONCE, _RIDGE = 100, 0.1  # pairs; added to the squares
_MINUTES, _HOURS = 120, 7200  # seconds above which a time is given in minutes, in hours


def export_run(
    run: Path,
    out: Path,
    *,
    which: str = "best",
    storage: Storage | None = None,
    card: str | None = None,
    evaluation: Path | None = None,
    pairs: Pairs | None = None,
    guidance: float = GUIDANCE,
) -> list[str]:
    """Write the inverter's folder of a run: averaged weights, tokenizer, card and curves.

    Args:
        run: Folder of `unembed train`.
        out: Folder to write, new or of an earlier export, whose files are replaced.
        which: ``best`` (lowest validation loss), ``latest`` or ``milestone-N``.
        storage: Number format and shard size; float16 if not given.
        card: Model card (Markdown) in place of the one made from the run.
        evaluation: What `unembed evaluate --out` wrote, for the card's table of figures.
        pairs: The run's; guidance is fitted on some of them. None leaves it out.
        guidance: Its strength.

    Returns:
        Notes on what is missing, and why.

    Raises:
        CheckpointError: There is no such state, it is damaged, or its weights do not fit the
            number format.
        DataError: The evaluation is none, or is about another encoder; or ``out`` holds something
            else than an inverter.
    """
    _require_own_folder(out)
    inverter = inverter_from_run(run, which)
    inverter.storage = storage or Storage()
    if pairs is not None:
        fit_guidance(inverter, pairs, guidance)
    figures = None if evaluation is None else read_evaluation(evaluation, inverter.encoder)
    notes: list[str] = []
    try:
        log, notes = read_run(run)
        inverter.curves, _ = draw_curves([log])
    except (TrainingError, ConfigError, DataError) as error:
        notes.append(f"no curves in the card: {error}")
    inverter.card = make_card(inverter, figures) if card is None else card
    inverter.save_pretrained(out)
    if inverter.curves is None:
        (out / CURVES).unlink(missing_ok=True)  # of an earlier export
    return notes


def _require_own_folder(out: Path) -> None:
    """Refuse a folder in which a README.md, a config.json or a tokenizer.json may be another's."""
    names = [path.name for path in out.iterdir()] if is_folder(out) else []
    others = sorted(name for name in names if not _OURS.fullmatch(name))
    if (others and not is_inverter(out)) or (exists(out) and not is_folder(out)):
        raise DataError(
            f"a new folder at {out}, or an inverter's",
            f"other files there, such as {others[0]}" if others else "a file",
            "Choose another OUT",
        )


def inverter_from_run(run: Path, which: str = "best") -> Inverter:
    """Make an inverter from the averaged weights of a run.

    Args:
        run: Folder of `unembed train`.
        which: ``best`` (lowest validation loss), ``latest`` or ``milestone-N``.

    Raises:
        CheckpointError: There is no such state, or it is damaged.
    """
    if not _STATES.fullmatch(which):
        raise CheckpointError(
            "a state named best, latest or milestone-N", repr(which), "Correct --which"
        )
    state = run / f"{which}.safetensors"
    if not is_file(state):
        raise CheckpointError(
            f"a run of `unembed train` at {run}",
            f"no {state.name} there",
            "Correct the folder, or train until the first validation",
        )
    saved = read_state(state)
    facts = saved.facts
    tokenizer = TextTokenizer.load(run / TOKENIZER, facts["tokenizer"])
    if tokenizer.digest != facts["tokenizer_digest"]:
        raise CheckpointError(
            f"the tokenizer of the run in {run / TOKENIZER}", "another one", "Restore the file"
        )
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserSizes.from_dict(facts["sizes"]))
    prefix = "ema."
    averages = {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}
    denoiser.load_state_dict(averages, assign=True)
    diffusion, fingerprint = facts["config"]["diffusion"], facts.get("fingerprint")
    return Inverter(
        denoiser,
        tokenizer,
        EncoderIdentity.from_dict(facts["encoder"]),
        {"schedule": diffusion["schedule"], "rate": diffusion["rate"]},
        trained={
            "config": facts["config"],
            **asdict(saved.progress),
            **({"device": facts["device"]} if "device" in facts else {}),
        },
        fingerprint=None if fingerprint is None else Fingerprint.from_dict(fingerprint),
    )


@torch.no_grad()
def fit_guidance(
    inverter: Inverter, pairs: Pairs, strength: float = GUIDANCE, count: int = 4000, seed: int = 0
) -> None:
    """Fit what `Denoiser.output_states` takes for the hidden states without the embedding.

    Ridge regression from the states with it, and the embedding, to those without: over sequences
    masked by the forward process but for their end and padding, which decoding fixes first. States
    whose embedding was left out stay as they are.

    Args:
        inverter: Trained with condition dropout; gets a denoiser with guidance.
        pairs: The run's, or others of its tokenizer and encoder.
        strength: w in h + w (h - U [h, e]).
        count: Pairs.
        seed: Of the pairs and masks drawn.

    Raises:
        ConfigError: The denoiser was trained without condition dropout, or has guidance already.
    """
    settings = inverter.trained.get("config", {}).get("training", {})
    if not settings.get("condition_dropout") or inverter.denoiser.sizes.guidance:
        raise ConfigError(
            "a run with training.condition_dropout above 0, exported for the first time",
            f"condition_dropout {settings.get('condition_dropout')}, guidance "
            f"{inverter.denoiser.sizes.guidance}",
            "Leave --data out",
        )
    inverter.encoder.require_same(pairs.encoder, "the pairs that guidance is fitted on")
    plain, spec = inverter.denoiser.cpu().eval(), inverter.spec
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows = np.sort(rng.choice(len(pairs), min(count, len(pairs)), replace=False))
    width = plain.sizes.hidden + plain.sizes.embedding_dim + 1
    xx = torch.zeros(width, width, dtype=torch.float64)
    xy = torch.zeros(width, plain.sizes.hidden, dtype=torch.float64)
    for start in range(0, len(rows), _FITTED_AT_ONCE):
        ids, vectors = pairs.rows(rows[start : start + _FITTED_AT_ONCE])
        ids = ids[:, : spec.prefix or spec.length]
        x0 = torch.from_numpy(ids.astype(np.int64))
        e = F.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1)
        # Masks
        ratio = torch.rand(len(x0), generator=generator)
        masked = draw_masks((len(x0), x0.shape[1]), ratio, generator)
        masked &= (x0 != spec.end_id) & (x0 != spec.pad_id)
        xt = torch.where(masked, spec.mask_id, x0)
        t = spec.schedule.timestep(masked.float().mean(dim=1))
        # States with the embedding and without
        h_embedding = plain.hidden_states(xt, e, t, masked)
        h_null = plain.hidden_states(xt, torch.zeros_like(e), t, masked)
        scaled = (e * e.shape[1] ** 0.5)[masked.nonzero()[:, 0]]
        for h, condition in ((h_embedding, scaled), (h_null, torch.zeros_like(scaled))):
            x = torch.cat([h, condition, torch.ones(len(h), 1)], dim=1).double()
            xx += x.T @ x
            xy += x.T @ h_null.double()
    solution = torch.linalg.solve(xx + _RIDGE * torch.eye(width, dtype=xx.dtype), xy).float()
    guided = Denoiser(replace(plain.sizes, guidance=strength))
    weights = {"unconditional.weight": solution[:-1].T, "unconditional.bias": solution[-1]}
    guided.load_state_dict({**plain.state_dict(), **weights})
    inverter.denoiser = guided.eval()


# The model card


def read_evaluation(path: Path, encoder: EncoderIdentity) -> dict[str, Any]:
    """Read what ``unembed evaluate --out`` wrote.

    Args:
        path: The file.
        encoder: The one the figures must be about.

    Raises:
        DataError: It is no such file, or is about another encoder.
    """
    try:
        report = read_json(path)
        theirs = EncoderIdentity.from_dict(report["settings"]["encoder"])
        figures_table(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"figures that `unembed evaluate --out` wrote in {path}",
            f"{type(error).__name__}: {error}",
            "Pass --evaluation such a file, or leave it out",
        ) from error
    if theirs.key != encoder.key:
        raise DataError(
            f"figures about {encoder.describe()}",
            f"{theirs.describe()} in {path}",
            "Evaluate this inverter",
        )
    return dict(report)


def figures_table(report: Mapping[str, Any]) -> str:
    """Format rows times the main metrics of an evaluation as Markdown; a missing figure says so."""
    rows = report["rows"]
    measured = dict.fromkeys(name for figures in rows.values() for name in figures)
    names = [name for name in measured if name in _CARD_METRICS]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, figures in rows.items():
        title = "**unembed, vector only**" if row == "inverter" else row
        cells = [_figure(figures.get(name)) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "not measured"
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**figure)


def make_card(inverter: Inverter, evaluation: Mapping[str, Any] | None = None) -> str:
    """Write a model card, Markdown with the Hub's front matter.

    Args:
        inverter: Made from a run: its ``trained`` has the facts, its ``curves`` the picture.
        evaluation: Figures from `read_evaluation`.
    """
    parts = [
        _front(inverter),
        "" if inverter.curves is None else f"## Curves\n\n![Training and validation]({CURVES})\n",
        _figures(inverter, evaluation),
        _network(inverter),
        _training(inverter),
        _USE.format(encoder=inverter.encoder.name),
        _RESPONSIBLE,
    ]
    return "\n".join(part for part in parts if part)


def _front(inverter: Inverter) -> str:
    encoder = inverter.encoder
    tokens = inverter.length - 1
    prompt = f", with the prompt {encoder.prompt!r}" if encoder.prompt else ""
    digest = encoder.weights_digest[:_SHORT]
    weights = f"weights SHA-256 `{digest}…`" if digest else "behind an API"
    return (
        f"---\nlibrary_name: unembed\n{licence_lines(encoder.name)}\n"
        "tags: [embedding-inversion, masked-diffusion, security]\n---\n\n"
        f"# Inverter for {encoder.name}, texts of up to {tokens} tokens\n\n"
        f"Recovers text from {encoder.dimension}-dimensional embeddings of `{encoder.name}` "
        f"({weights}{prompt}) with a conditional "
        "masked diffusion language model, from the vector alone. Vectors of other dimensions are "
        "refused; others that cannot be this encoder's are noted, and their texts mean nothing.\n\n"
        f"{licence_note(encoder.name)}\n"
    )


def _figures(inverter: Inverter, evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return (
            "## Figures\n\nNot measured. `unembed evaluate --texts held-out.parquet` measures what "
            "comes back of texts that were never trained on.\n"
        )
    settings = evaluation["settings"]
    conditions = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if isinstance(value, (str, int, float))
    )
    notes = "".join(f" Note: {note}." for note in evaluation.get("notes", []))
    return (
        f"## Figures\n\n{figures_table(evaluation)}\n\nMean [95% bootstrap interval], decoded from "
        f"a fully masked sequence on held-out texts: {conditions}.{notes} "
        "Made by `unembed evaluate`.\n"
    )


def _network(inverter: Inverter) -> str:
    sizes = inverter.denoiser.sizes
    beside, vocabulary = parameter_counts(inverter.denoiser)
    guidance = f", and guidance of strength {sizes.guidance:g}" if sizes.guidance else ""
    return (
        f"## Network\n\n{sizes.layers} blocks, hidden size {sizes.hidden}, {sizes.heads} heads, "
        f"feed-forward {sizes.feed_forward}, length {sizes.length}, {sizes.vocab_size:,} tokens "
        f"with one table for input and output: {beside / 1e6:.3g} M parameters beside the "
        f"vocabulary, {vocabulary / 1e6:.3g} M of it{guidance}. Weights stored as "
        f"{inverter.storage.number_format}, averaged over training.\n"
    )


def _training(inverter: Inverter) -> str:
    facts = inverter.trained
    config = facts["config"]
    training = config["training"]
    samples = facts["step"] * training["batch_size"] * training["accumulate"]
    device = f" on {facts['device']}" if facts.get("device") else ""
    epochs = f", {samples / facts['pairs']:.2g} epochs" if facts["pairs"] else ""
    best = facts["best_loss"]
    loss = "" if best == float("inf") else f" Lowest validation loss: {best:.4f}."
    settings = yaml.safe_dump(config, sort_keys=False)
    return (
        f"## Training\n\n{facts['step']:,} steps of "
        f"{training['batch_size'] * training['accumulate']:,} pairs ({samples:,} samples{epochs}) "
        f"over {facts['pairs']:,} pairs, in {_time(facts['seconds'])}{device}.{loss} Made by "
        "`unembed train` with\n\n"
        f"```yaml\n{settings}```\n"
    )


def _time(seconds: float) -> str:
    if seconds > _HOURS:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds > _MINUTES else f"{seconds:.0f} seconds"


_USE = """\
## Use

```python
import unembed

inverter = unembed.Inverter.from_pretrained("path/of/this/folder")
encoder = unembed.load_encoder("{encoder}")
vectors = encoder.encode(["Embeddings are not anonymous."])  # or vectors of your own, [N, D]
print(inverter.invert(vectors)[0].text)
```

On the command line: `unembed invert --checkpoint path/of/this/folder --embedding vectors.npy`.
"""

_RESPONSIBLE = """\
## Intended use

To measure what a store of such vectors gives away, to study embedding inversion, and to check
defences. Invert only vectors that you own or are authorised to test, and treat embeddings as the
text they were made from: same access control, same retention, same breach duties.

A recovered text is a guess: it can name people and things that were not in the original, and must
not be taken as evidence of what a text said. The figures are a lower bound on what the vectors
leak: more training, a larger network, or an attacker who may call the encoder recover more.
"""
