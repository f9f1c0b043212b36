"""Batches of a step: pairs on the device, conditions and contexts perturbed.

The masks are `diffusion.corrupt_batch`'s. Whatever is drawn here is drawn on the host and for the
whole batch, so that several processes, each with some of its rows, see what one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import free_bytes, send
from unembed.diffusion import CorruptedBatch
from unembed.encoders.base import Encoder
from unembed.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from unembed.config import TrainingSection

RowReader = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]

_SPARE = 6.0  # standard deviations of room: one batch in 10^9 has more masks and is longer
_ROUND = 64
_GUESSED = 0.5  # share of the hypotheses whose errors are the denoiser's own
_LOGITS = 1 << 24  # at a time, where contexts are sampled

# Pairs


def row_reader(pairs: Pairs, settings: TrainingSection, device: torch.device) -> RowReader:
    """Make a function from row numbers to ids [b, L] and unit embeddings [b, D] on the device.

    The pairs are copied there whole where ``training.resident`` says so and they fit into half of
    its free memory; otherwise rows are read from the disk's cache and sent.
    """
    resident = settings.resident == "always"
    if settings.resident == "auto" and device.type == "cuda":
        size = sum(a.nbytes for a in pairs.tokens) + sum(a.nbytes for a in pairs.embeddings)
        resident = size <= free_bytes(device) // 2
    if resident:
        return _resident_reader(pairs, device)

    def read(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        tokens, vectors = pairs.rows(rows)
        return send(torch.from_numpy(tokens), device), send(torch.from_numpy(vectors), device)

    return read


def _resident_reader(pairs: Pairs, device: torch.device) -> RowReader:
    length, dimension = pairs.tokens[0].shape[1], pairs.embeddings[0].shape[1]
    tokens = torch.empty(len(pairs), length, dtype=torch.int32, device=device)
    embeddings = torch.empty(len(pairs), dimension, dtype=torch.float16, device=device)
    for start, ids, vectors in zip(pairs.starts, pairs.tokens, pairs.embeddings, strict=False):
        tokens[start : start + len(ids)] = torch.from_numpy(ids.astype(np.int32))
        embeddings[start : start + len(ids)] = torch.from_numpy(np.array(vectors))

    def gather(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        index = send(torch.from_numpy(rows), device)
        vectors = embeddings[index].float()
        return tokens[index].long(), vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)

    return gather


# Shapes that never change


def max_masked(pairs: int, length: int, ratio: float, stratified: bool) -> int:
    """Bound the masked positions of a batch: a number that it practically never exceeds.

    Args:
        pairs: Pairs b of it.
        length: Positions L of each.
        ratio: Mean share masked.
        stratified: Whether its timesteps are, as those of a whole batch. Those of a process's part
            of one are a random choice, and their sum varies more.
    """
    # Variance of a binomial over L at most L / 4; of L times a ratio in [0, 1] at most L^2 / 12
    variance = pairs * length * (0.25 if stratified else 0.25 + length / 12)
    bound = pairs * length * ratio + _SPARE * math.sqrt(variance)
    return min(pairs * length, math.ceil(bound / _ROUND) * _ROUND)


# Condition


def perturb_embeddings(
    embedding: Tensor,
    dropout: float,
    noise: float,
    generator: torch.Generator,
    batch: int | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Add noise to unit vectors, and replace some of them by the null condition.

    The null condition is the zero vector: what a denoiser trained with it predicts there is its
    unconditional distribution, which classifier-free guidance (Ho and Salimans, 2022, arXiv
    2207.12598) needs.

    Args:
        embedding: Unit vectors [b, D].
        dropout: Probability of the null condition, 0 to 1.
        noise: Length of the Gaussian noise added before vectors are made unit again, as a share of
            theirs: 0.02 is the rounding of an int8 store.
        generator: Source of randomness; nothing is drawn from it where both are 0.
        batch: Size B of the whole batch, for all of which is drawn; that of ``embedding`` when
            not given.
        rows: Which rows of the whole batch ``embedding`` has.

    Returns:
        [b, D].
    """
    batch, width = len(embedding) if batch is None else batch, embedding.shape[1]
    if noise:
        normal = send(torch.randn(batch, width, generator=generator)[rows], embedding.device)
        embedding = F.normalize(embedding + normal * (noise / width**0.5), dim=1)
    if dropout:
        conditional = torch.rand(batch, 1, generator=generator)[rows] >= dropout
        embedding = embedding * send(conditional, embedding.device)
    return embedding


# Context


@torch.no_grad()
def sample_contexts(
    denoiser: Denoiser,
    batch: CorruptedBatch,
    embedding: Tensor,
    positions: Tensor,
    uniform: Tensor,
    mask_id: int,
    timestep: Callable[[Tensor], Tensor],
) -> CorruptedBatch:
    """Replace some visible tokens of a batch by samples of p(x0 | z_t', embedding).

    z_t' is z_t with these positions masked as well, and t' the timestep of its mask ratio. The
    targets stay what they were: the loss is over the masked positions of z_t only.

    Args:
        denoiser: Samples, without gradient.
        batch: z_t.
        embedding: [B, D].
        positions: Positions to replace, boolean [B, L]; masked ones among them are left alone.
        uniform: A draw in [0, 1) for each position [B, L]: samples come from the inverse of the
            distribution function, so the host's generator decides on every device.
        mask_id: The token that must not be sampled.
        timestep: The schedule's mask ratio → t.
    """
    positions = positions & ~batch.masked
    hidden = torch.where(positions, mask_id, batch.xt)
    ratio = (positions | batch.masked).float().mean(dim=1)
    index = positions.flatten().nonzero()[:, 0]  # may be none; the pass takes all processes
    h = denoiser.hidden_states(hidden, embedding, timestep(ratio)).flatten(0, 1)[index]
    table, bias = denoiser.token_table.weight, denoiser.output_bias
    rows = max(1, _LOGITS // len(table))
    draws = uniform.flatten()[index].clamp(1e-6, 1.0 - 1e-6)
    samples = [
        _sample(F.linear(part.to(table), table, bias), draw, mask_id)
        for part, draw in zip(torch.split(h, rows), torch.split(draws, rows), strict=True)
    ]
    xt = batch.xt.flatten().scatter(0, index, torch.cat(samples)).view_as(batch.xt)
    return replace(batch, xt=xt)


def _sample(logits: Tensor, uniform: Tensor, mask_id: int) -> Tensor:
    """Sample a token for each row of logits [R, V], by a uniform draw [R]."""
    logits[:, mask_id] = -torch.inf
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    quantile = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, quantile)[:, 0]


# Feedback


@torch.no_grad()
def draw_hypotheses(
    denoiser: Denoiser,
    x0: Tensor,
    embedding: Tensor,
    pairs: Pairs,
    share: float,
    generator: torch.Generator,
    batch: int | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Damage some of the texts x0, from one token to all of them; few more often than many.

    What stands in the place of a token is what the denoiser guesses from the embedding alone, as
    decoding starts; in every other text a token at random, as often as it occurs in the pairs.

    Args:
        denoiser: Guesses, without gradient.
        x0: Clean ids [b, L].
        embedding: Unit vectors [b, D].
        pairs: Their tokenizer tells content from end and padding, which stay.
        share: Share of the texts that are damaged.
        generator: Source of randomness, on the host.
        batch: Texts B of the whole batch, for all of which is drawn; those of ``x0`` if None.
        rows: Which rows of the whole batch ``x0`` has.

    Returns:
        The hypotheses [b, L]; x0 itself where a text is left alone.
    """
    batch, length, device = len(x0) if batch is None else batch, x0.shape[1], x0.device
    draws = torch.rand(3, batch, 1, generator=generator)[:, rows]
    pick, guess, damage = send(draws, device)  # [b, 1] each
    order, other = send(torch.rand(2, batch, length, generator=generator)[:, rows], device)
    # The first tokens of a random order are wrong
    special = sorted(pairs.tokenizer.special_ids)
    content = ~torch.isin(x0, torch.tensor(special, device=device))
    count = (damage**2 * content.sum(dim=1, keepdim=True)).ceil()
    rank = order.masked_fill(~content, torch.inf).argsort(dim=1).argsort(dim=1)
    wrong = content & (rank < count) & (pick < share)
    # What stands there
    counts = torch.from_numpy(pairs.token_counts).double()
    counts[special] = 0.0
    cumulative = counts.cumsum(0).to(device)
    words = torch.searchsorted(cumulative, other * cumulative[-1], right=True)
    hypotheses = torch.where(wrong, words, x0)
    wrong &= guess < _GUESSED
    blank = torch.where(content, pairs.tokenizer.mask_id, x0)
    logits = denoiser(blank, embedding, torch.ones(len(x0), device=device), wrong)
    logits[:, special] = -torch.inf
    hypotheses[wrong] = logits.argmax(dim=1)
    return hypotheses


def add_feedback(
    batch: CorruptedBatch,
    embedding: Tensor,
    x0: Tensor,
    hypotheses: Tensor,
    encoder: Encoder,
    tokenizer: TextTokenizer,
) -> tuple[CorruptedBatch, Tensor]:
    """Show a batch's hypotheses where nothing is masked, and their embeddings as a condition.

    The targets stay what they were: what is masked is to be predicted beside wrong words, which is
    what guided search asks of a denoiser.

    Returns:
        The batch, and its conditions [b, 2 D]: zeros in the second half where a text is right, so
        that the denoiser goes on knowing what to do without a hypothesis.
    """
    wrong = (hypotheses != x0).any(dim=1).nonzero()[:, 0]
    texts = tokenizer.decode(hypotheses[wrong].tolist())
    indices = [k for k, text in enumerate(texts) if text.strip()]
    feedback = torch.zeros_like(embedding)
    if indices:
        vectors = torch.from_numpy(encoder.encode([texts[k] for k in indices]))
        feedback[wrong[indices]] = vectors.to(feedback)
    feedback *= embedding.any(dim=1, keepdim=True)  # nothing is told with the null condition
    xt = torch.where(batch.masked | (hypotheses == x0), batch.xt, hypotheses)
    return replace(batch, xt=xt), torch.cat([embedding, feedback], dim=1)
