"""The whole method on one page: a sentence → its embedding → all masked → eight steps → a text.

    python examples/sample.py "your sentence"

The same tokens as `unembed invert --text "your sentence"`, without its options, batches and speed.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import unembed
from unembed.denoiser import Denoiser, DenoiserSizes

WEIGHTS = Path(unembed.__file__).parent / "pretrained" / "minilm"
STEPS = 8
REPETITION_PENALTY = 2.0  # nats off a token's logit for each time the text has it


@torch.inference_mode()
def sample(embedding: torch.Tensor) -> str:
    """Recover a text from its embedding [1, D] alone: MaskGIT's decoding (arXiv 2202.04200)."""
    config = json.loads((WEIGHTS / "config.json").read_text(encoding="utf-8"))
    ids, rate = config["token_ids"], config["diffusion_process"]["rate"]
    mask_id, end_id, pad_id = ids["mask_id"], ids["end_id"], ids["pad_id"]

    # The denoiser: int8 weights, each row of a matrix with its own scale
    tensors = load_file(WEIGHTS / "model.safetensors")
    whole = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    scales = {name: tensors.pop(f"{name}_scale") for name in whole}
    weights = {
        name: tensor.float() * scales[name][:, None] if name in scales else tensor.float()
        for name, tensor in tensors.items()
    }
    denoiser = Denoiser(DenoiserSizes(**config["denoiser_sizes"])).eval()
    denoiser.load_state_dict(weights)

    # The text: L tokens, all of them masked (t = 1)
    tokens = torch.full((denoiser.sizes.length,), mask_id)  # [L]
    for remaining in range(STEPS, 0, -1):
        masked = tokens == mask_id
        if not masked.any():
            break

        # The timestep t at which the schedule, alpha_t = exp(-rate t), has masked as many
        t = (-torch.log1p(-masked.float().mean()) / rate).clamp(1e-3, 1.0)

        # One pass of the network: p(token | visible tokens, embedding, t) at every position
        logits = denoiser(tokens[None], embedding, t[None])[0]  # [L, V]
        logits[:, mask_id] = -torch.inf

        # The first pass fixes the length: the median of what the denoiser expects
        if remaining == STEPS:
            p = logits.softmax(dim=-1)
            length = int((1 - p[:, end_id] - p[:, pad_id] >= 0.5).sum())  # noqa: PLR2004
            length = min(max(length, 1), len(tokens) - 1)
            tokens[length], tokens[length + 1 :] = end_id, pad_id
            masked = tokens == mask_id
        logits[:, [end_id, pad_id]] = -torch.inf

        # What the text has already is less likely once more
        for token in tokens[~masked & (tokens != end_id) & (tokens != pad_id)]:
            logits[:, token] -= REPETITION_PENALTY
        confidence, prediction = logits.softmax(dim=-1).max(dim=-1)  # [L], [L]

        # Unmask the most confident positions, an equal share in every step left; of positions that
        # predict the same token all but the most confident come last
        confidence[~masked] = -torch.inf
        predicted = set()
        for position in confidence.argsort(descending=True, stable=True)[: masked.sum()].tolist():
            if int(prediction[position]) in predicted:
                confidence[position] -= 1.0
            predicted.add(int(prediction[position]))
        count = math.ceil(int(masked.sum()) / remaining)
        positions = confidence.argsort(descending=True, stable=True)[:count]
        tokens[positions] = prediction[positions]

    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    return str(tokenizer.decode(tokens[:length].tolist())).strip()


if __name__ == "__main__":
    sentence = sys.argv[1] if len(sys.argv) > 1 else "What are the side effects of this drug?"
    encoder = unembed.load_encoder("all-MiniLM-L6-v2")
    print(sample(torch.from_numpy(encoder.encode([sentence]))))
