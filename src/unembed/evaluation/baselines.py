"""What guessing is worth: no embedding, the nearest training text, random tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.data.pairs import Pairs
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer

SHUFFLED, BLIND = "shuffled embedding", "no embedding"
NEAREST, RANDOM = "nearest training text", "random tokens"
CONTROLS = (SHUFFLED, BLIND, NEAREST, RANDOM)
_CHUNK_ROWS = 8192


class _Unconditional:
    """A denoiser that sees the null condition, the zero vector, whatever it is given."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self.sizes = denoiser.sizes

    def __call__(self, tokens: Tensor, embedding: Tensor, *rest: Any) -> Tensor:
        logits: Tensor = self._denoiser(tokens, torch.zeros_like(embedding), *rest)
        return logits


def unconditional(inverter: Inverter) -> Inverter:
    """The same inverter with a denoiser that never sees the embedding: what it writes unprompted.

    No real vector is zero, so `Inverter.invert` refuses one; the denoiser is handed it here. One
    trained without condition dropout has not seen it either, and may write nonsense.
    """
    blind = copy.copy(inverter)
    # Nor may it see through another form of the network
    vars(blind).update(denoiser=_Unconditional(inverter.denoiser))
    return blind


def derangement(count: int) -> NDArray[np.int64]:
    """For each of some neighbouring texts the index of another, half of them further on.

    Neighbours are often of one passage, and so is what they speak of.
    """
    return np.roll(np.arange(count), count // 2)


class RandomTokens:
    """Draws as many tokens as the original has.

    Args:
        tokenizer: Of the inverter.
        counts: How often each token occurs in the training corpus, [V]; alike when None.
        seed: Each text draws from (seed, its index).
    """

    def __init__(
        self, tokenizer: TextTokenizer, counts: NDArray[np.int64] | None, seed: int
    ) -> None:
        shares = np.ones(tokenizer.size) if counts is None else counts.astype(np.float64)
        shares[list(tokenizer.special_ids)] = 0.0
        self._cumulative = np.cumsum(shares) / shares.sum()
        self._seed = seed

    def draw(self, index: int, count: int) -> list[int]:
        """Token ids for the text ``index``."""
        points = np.random.default_rng([self._seed, index]).random(count)
        found: list[int] = np.searchsorted(self._cumulative, points, side="right").tolist()
        return found


def nearest_pairs(
    pairs: Pairs, vectors: NDArray[np.float32], report: Callable[[int], None]
) -> tuple[list[list[int]], list[float]]:
    """Content tokens and cosine of the nearest prepared pair to each vector [N, D].

    Args:
        pairs: Searched from first to last.
        vectors: Unit vectors.
        report: Called with the number of pairs searched.
    """
    best = np.full(len(vectors), -np.inf, dtype=np.float32)
    rows = np.zeros(len(vectors), dtype=np.int64)
    for start in range(0, len(pairs), _CHUNK_ROWS):
        index = np.arange(start, min(start + _CHUNK_ROWS, len(pairs)))
        _, embeddings = pairs.rows(index)
        similarity = vectors @ embeddings.T  # [N, rows]
        winner = similarity.argmax(axis=1)
        value = similarity[np.arange(len(vectors)), winner]
        better = value > best
        best[better], rows[better] = value[better], index[winner[better]]
        report(int(index[-1]) + 1)
    tokens, _ = pairs.rows(rows)
    found = []
    for row in tokens.tolist():
        found.append([row[i] for i in pairs.tokenizer.content_positions(row)])
    return found, [float(value) for value in best]
