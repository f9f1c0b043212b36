"""A2: the inverter trained on for some minutes, on vectors that the attacker defended himself."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from unembed.defences.defence import Vectors
from unembed.defences.leak import Progress, array_digest
from unembed.denoiser import Denoiser
from unembed.diffusion import WEIGHTS, ScoredPadding, corrupt_batch, diffusion_loss
from unembed.errors import DataError
from unembed.files import atomic, write_json
from unembed.inverter import Inverter
from unembed.training.loss import ChunkedCrossEntropy
from unembed.training.step import step_generator

_BATCH, _LR, _WARMUP, _CLIP = 64, 1e-4, 20, 1.0
_SAVE_EVERY = 30.0  # seconds
_PADDING = 0.15  # share of the masked padding that is scored, as for the weights that ship


def retrain(
    inverter: Inverter,
    texts: Sequence[str],
    vectors: Callable[[int], Vectors],
    minutes: float,
    *,
    seed: int,
    folder: Path | None,
    name: str,
    progress: Progress,
) -> Inverter:
    """Train a copy of an inverter on defended vectors of the attacker's own texts.

    The state is kept every half minute; the same call goes on from there, with Adam's moments
    begun anew.

    Args:
        inverter: Where it starts; it stays as it is.
        texts: The attacker's; those longer than the inverter writes are left out.
        vectors: Step → what the attacker would feed the inverter for each text, [N, D]: noise is
            drawn anew at every step.
        minutes: Of training in processor time, which a busy machine does not change; resumed ones
            are added.
        seed: Of batches and masks.
        folder: Keeps the state; none is kept when None.
        name: Of the defence, which names the state.
        progress: Called with (stage, seconds done, seconds).

    Raises:
        DataError: No text is short enough.
    """
    rows, x0 = _targets(inverter, texts)
    model = copy.deepcopy(inverter)
    denoiser = model.denoiser.train()
    state = None if folder is None else _place(folder, name, vectors(0), seed)
    seconds, step = _load(state, denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=_LR, weight_decay=0.0)
    scorer, schedule = ChunkedCrossEntropy(denoiser), inverter.spec.schedule
    device, last_save, mask_id = model.compute.device, seconds, inverter.tokenizer.mask_id
    padding = ScoredPadding(inverter.tokenizer.pad_id, _PADDING)
    while seconds < 60.0 * minutes:
        start_time = time.process_time()
        # A batch, its masks, its vectors
        generator = step_generator(seed, step)
        choice = torch.randint(len(rows), (min(_BATCH, len(rows)),), generator=generator)
        batch = corrupt_batch(
            x0[choice].to(device), schedule, WEIGHTS["uniform"], mask_id, generator, padding=padding
        )
        embedding = torch.from_numpy(vectors(step)[rows[choice.numpy()]]).to(device)
        # Update
        loss, _ = diffusion_loss(scorer, batch, embedding)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), _CLIP)
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / _WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds, step = seconds + time.process_time() - start_time, step + 1
        progress(f"A2 against {name}", int(seconds), int(60 * minutes))
        if seconds - last_save > _SAVE_EVERY or seconds >= 60.0 * minutes:
            _save(state, denoiser, seconds, step)
            last_save = seconds
    denoiser.eval()
    return model


def _targets(
    inverter: Inverter, texts: Sequence[str]
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], torch.Tensor]:
    """Index of the texts that fit, and their token sequences [N, L]; of a prefix only its part."""
    contents = inverter.tokenizer.encode(texts)
    rows = np.array([i for i, ids in enumerate(contents) if 0 < len(ids) < inverter.length])
    if not len(rows):
        raise DataError(
            f"texts of at most {inverter.length - 1} tokens, for A2 to train on",
            "longer ones only",
            "Pass a --corpus, or leave A2 out",
        )
    packed = inverter.tokenizer.pack([contents[i] for i in rows], inverter.length)
    return rows, torch.from_numpy(packed.astype(np.int64))[:, : inverter.spec.prefix or None]


def _place(folder: Path, name: str, vectors: Vectors, seed: int) -> Path:
    key = f"{name} {array_digest(vectors)} {seed}"
    (folder / "retrained").mkdir(exist_ok=True)
    return folder / "retrained" / hashlib.sha256(key.encode()).hexdigest()[:24]


def _load(state: Path | None, denoiser: Denoiser) -> tuple[float, int]:
    """Seconds and steps so far; the weights go into the denoiser."""
    if state is None or not state.with_suffix(".json").is_file():
        return 0.0, 0
    facts = json.loads(state.with_suffix(".json").read_text(encoding="utf-8"))
    denoiser.load_state_dict(load_file(state.with_suffix(f".{facts['step']}.safetensors")))
    return float(facts["seconds"]), int(facts["step"])


def _save(state: Path | None, denoiser: Denoiser, seconds: float, step: int) -> None:
    """Weights under a name of their own, then the file that names them."""
    if state is None:
        return
    weights = state.with_suffix(f".{step}.safetensors")
    with atomic(weights) as file:
        save_file({k: v.contiguous() for k, v in denoiser.state_dict().items()}, file)
    write_json(state.with_suffix(".json"), {"seconds": seconds, "step": step})
    for other in state.parent.glob(f"{state.name}.*.safetensors"):
        if other != weights:
            other.unlink()
