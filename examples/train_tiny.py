"""Text → pairs → a trained denoiser → sentences read back from vectors never trained on.

    python examples/train_tiny.py

Two minutes on two cores. The sentences come from a grammar of some forty words, so that a tiny
network learns them; everything else is the method as it is: masked diffusion (MDLM, arXiv
2406.07524) conditioned on an embedding (arXiv 2602.11047), with the package's network.
Letters: B batch, L length, D embedding size, V vocabulary.
"""

import argparse
import random

import torch
import torch.nn.functional as F

import unembed
from unembed.denoiser import Denoiser, DenoiserSizes

LENGTH, BATCH, RATE = 12, 64, 5.0  # RATE of the schedule: alpha_t = exp(-RATE t)
HELD_OUT, PRINTED = 50, 5  # sentences
PAD, MASK, END = 0, 1, 2  # the vocabulary begins with these

GRAMMAR = [
    "the nurse,the judge,a small dog,our neighbour,the old captain,my doctor".split(","),
    "reads,hides,sends,forgets,opens,writes".split(","),
    "a letter,the password,two reports,the key,an unpaid bill,the map".split(","),
    "on Monday,before lunch,every winter,after the storm,at the river,in London".split(","),
]


def make_texts() -> list[str]:
    """Every sentence of the grammar, in random order."""
    texts = [""]
    for phrases in GRAMMAR:
        texts = [f"{text} {phrase}".strip() for text in texts for phrase in phrases]
    random.Random(0).shuffle(texts)
    return texts


def mask_ratio(t: torch.Tensor) -> torch.Tensor:
    """Share of the tokens that is masked at t, 1 - alpha_t."""
    return 1.0 - torch.exp(-RATE * t)


def train(x0: torch.Tensor, vectors: torch.Tensor, denoiser: Denoiser, steps: int) -> None:
    """Teach the denoiser to fill masks, from clean ids [N, L] and unit vectors [N, D]."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1.0 - step / steps)
    )
    for step in range(steps):
        rows = torch.randint(len(x0), (BATCH,))
        # Forward process: each token is masked with probability 1 - alpha_t
        t = torch.rand(BATCH).clamp(min=1e-3)  # [B]
        masked = torch.rand(BATCH, LENGTH) < mask_ratio(t)[:, None]  # [B, L]
        xt = x0[rows].masked_fill(masked, MASK)
        # The clean tokens at the masked positions, every one with the same weight
        logits = denoiser(xt, vectors[rows], t, masked)  # [M, V], M masked positions
        loss = F.cross_entropy(logits, x0[rows][masked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def sample(vector: torch.Tensor, denoiser: Denoiser) -> list[int]:
    """Unmask one position a pass, the most confident; ids before the end, from a vector [D]."""
    tokens = torch.full((LENGTH,), MASK)
    while (masked := tokens == MASK).any():
        t = (-torch.log1p(-masked.float().mean()) / RATE).clamp(1e-3, 1.0)
        logits = denoiser(tokens[None], vector[None], t[None])[0]  # [L, V]
        logits[:, MASK] = -torch.inf
        confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
        position = confidence.masked_fill(~masked, -1.0).argmax()
        tokens[position] = prediction[position]
    ids = tokens.tolist()
    return ids[: ids.index(END)] if END in ids else ids


def main() -> None:
    """Make the pairs, train, and invert sentences that were held out."""
    parser = argparse.ArgumentParser(description="A tiny inverter from nothing, in two minutes.")
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    # Pairs: token ids and embedding of each text; the vocabulary is what the texts need
    texts = make_texts()
    encoder = unembed.load_encoder("all-MiniLM-L6-v2")
    vectors = torch.from_numpy(encoder.encode(texts))  # [N, D]
    contents = encoder.tokenizer.encode(texts)
    vocabulary = [-1, -1, -1, *sorted({token for ids in contents for token in ids})]
    x0 = torch.full((len(texts), LENGTH), PAD)  # [N, L]: content, end, padding
    for row, ids in enumerate(contents):
        content = [*(vocabulary.index(token) for token in ids), END][:LENGTH]
        x0[row, : len(content)] = torch.tensor(content)
    print(f"{len(texts)} pairs, {len(vocabulary)} tokens")

    sizes = DenoiserSizes(
        len(vocabulary), vectors.shape[1], LENGTH, hidden=128, layers=2, heads=4, feed_forward=512
    )
    denoiser = Denoiser(sizes)
    train(x0[HELD_OUT:], vectors[HELD_OUT:], denoiser, steps)

    exact = 0
    for row in range(HELD_OUT):
        ids = sample(vectors[row], denoiser.eval())
        text = encoder.tokenizer.backend.decode([vocabulary[token] for token in ids if token > END])
        exact += text == texts[row].lower()
        if row < PRINTED:
            print(f"original   {texts[row]}\nrecovered  {text}\n")
    print(f"{exact} of {HELD_OUT} held-out sentences recovered exactly")


if __name__ == "__main__":
    main()
