"""What each number format does to an inverter: ``python -m benchmarks.weights TEXTS.parquet``.

Every format is saved and loaded again; its logits are compared with those of the weights as they
were, on fully masked sequences (where decoding starts) and half masked ones. ``--out`` keeps the
folders, whose decoded figures ``unembed evaluate --checkpoint`` measures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import unembed
from benchmarks.machine import print_table
from unembed.checkpoints import FORMATS, Storage
from unembed.config import DataSection
from unembed.data.pieces import cut_pieces
from unembed.data.readers import read_texts
from unembed.inverter import Inverter

_BATCH = 32


@torch.inference_mode()
def logits(inverter: Inverter, tokens: Tensor, vectors: Tensor, share: float) -> Tensor:
    """float32 [M, V] at the masked positions, about ``share`` of all; the same ones every time."""
    draw = torch.Generator().manual_seed(0)
    masked = torch.rand(tokens.shape, generator=draw) < share
    xt = tokens.masked_fill(masked, inverter.tokenizer.mask_id)
    output: Tensor = inverter.denoiser(xt, vectors, torch.full((len(tokens),), share), masked)
    return output


def main() -> None:
    """Print size and change of the logits for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--count", type=int, default=300, help="pieces")
    parser.add_argument("--out", type=Path, help="keep a folder for each format in this one")
    arguments = parser.parse_args()
    inverter = Inverter.from_pretrained(arguments.checkpoint)
    encoder = unembed.load_encoder(inverter.encoder.name)
    settings = DataSection.model_validate(inverter.trained["config"]["data"])
    texts = list(read_texts(arguments.texts, "text"))
    pieces = cut_pieces(texts, inverter.tokenizer, settings)
    pieces = pieces[:: max(1, len(pieces) // arguments.count)][: arguments.count]
    ids = inverter.tokenizer.pack([piece.token_ids for piece in pieces], inverter.length)
    tokens = torch.from_numpy(ids.astype("int64"))
    vectors = torch.from_numpy(encoder.encode([piece.text for piece in pieces]))
    print(f"{arguments.checkpoint}, {len(pieces)} pieces of {arguments.texts.name}\n")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in FORMATS:
            folder = (arguments.out or Path(temporary)) / name
            inverter.storage = Storage(name)
            inverter.save_pretrained(folder)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            again = Inverter.from_pretrained(folder)
            for share, what in ((1.0, "all masked"), (0.5, "half masked")):
                rows.append([name, f"{size / 1e6:.1f} MB", what])
                rows[-1] += compare(inverter, again, tokens, vectors, share)
    print_table(["weights", "size", "", "largest", "root mean square", "same best token"], rows)


def compare(
    one: Inverter, other: Inverter, tokens: Tensor, vectors: Tensor, share: float
) -> list[str]:
    """Largest and root-mean-square change of a logit, and how often the best token is the same."""
    largest = squares = 0.0
    count = same = positions = 0
    for start in range(0, len(tokens), _BATCH):
        part = slice(start, start + _BATCH)
        before, after = (logits(m, tokens[part], vectors[part], share) for m in (one, other))
        change = (after - before).abs()
        largest = max(largest, float(change.max()))
        squares, count = squares + float(change.square().sum()), count + change.numel()
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        positions += len(before)
    return [f"{largest:.3f}", f"{(squares / count) ** 0.5:.4f}", f"{same / positions:.1%}"]


if __name__ == "__main__":
    main()
