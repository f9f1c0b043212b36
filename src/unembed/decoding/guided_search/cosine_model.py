"""A Gaussian process that predicts the encoder's answers from those about the same text so far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.edits import NOTHING, Rows

# Share of words, of pairs of neighbours, and of words at about their place in the likeness of texts
_WORDS, _PAIRS, _PLACES = 1.0, 0.5, 0.2
_NOISE = 0.03
_FIRST, _LATEST, _BEST = 80, 120, 280  # texts learned from; the matrix inverted has this size
_BITS = 21  # of a token's number: more than any vocabulary has


class Features(NamedTuple):
    """What the kernel counts in texts: words, pairs of neighbours, words at about their place.

    Attributes:
        numbers: Of words, pairs and places of each text [M, 3, W], from 1; 0 where there is none.
        norms: Length of the vector of all of a text's counts [M].
    """

    numbers: NDArray[np.int64]
    norms: NDArray[np.float64]

    def after(self, count: int) -> Features:
        """Those of the texts but for the first ones."""
        return Features(self.numbers[count:], self.norms[count:])

    def joined(self, other: Features) -> Features:
        """Those of these texts and others."""
        widths = [one.numbers.shape[2] for one in (self, other)]
        numbers = [
            np.pad(one.numbers, ((0, 0), (0, 0), (0, max(widths) - width)))
            for one, width in zip((self, other), widths, strict=True)
        ]
        return Features(np.concatenate(numbers), np.append(self.norms, other.norms))


class Candidates:
    """Texts that a `CosineModel` predicts again and again; what it has worked out of them stays.

    Args:
        rows: The texts [M, L].
        gains: What each gains in log-likelihood (nats) [M].
        moved: Which come of a span that moved, boolean [M].
    """

    def __init__(self, rows: Rows, gains: NDArray[np.float64], moved: NDArray[np.bool_]) -> None:
        self.rows, self.gains, self.moved, self.hashes = rows, gains, moved, hash_rows(rows)
        self.features = count_features(rows)
        self.kernel = torch.zeros(len(rows), 0)  # with the texts known when last predicted [M, N]


class CosineModel:
    """Predicts embeddings by a Gaussian process over texts, and from them the cosines.

    The equation is 2.25 of Rasmussen and Williams (2006), every component of the embedding a
    function of the text with the same kernel: the cosine of the counts of words, pairs of
    neighbours and words at their place. An embedding that is a mean over tokens is nearly additive
    in these. So what a word was worth in one hypothesis, or by itself, tells what it is worth in
    another, changes that helped apart are predicted to help together, and a word that says what is
    said already is not predicted to help again.
    """

    def __init__(self) -> None:
        self._features: Features  # of the texts known
        self._vectors: NDArray[np.float32]  # [N, D]
        self._cosines = np.zeros(0)  # [N]
        self._kernel = torch.zeros(0, 0)  # of the texts known with each other [N, N]

    def learn(self, rows: Rows, vectors: NDArray[np.float32], cosines: NDArray[np.float64]) -> None:
        """Learn from texts that were embedded.

        Args:
            rows: The texts [K, L].
            vectors: Their embeddings [K, D], of unit length; zeros for an invisible text.
            cosines: Of their embeddings with the target [K].
        """
        if not len(rows):
            return
        new, old = count_features(rows), len(self._kernel)
        self._features = self._features.joined(new) if old else new
        self._vectors = np.concatenate([self._vectors, vectors]) if old else vectors
        self._cosines = np.append(self._cosines, cosines)
        # The kernel grows by the new texts' rows and columns
        across = _kernel(new, self._features)  # [K, N]
        above = torch.cat([self._kernel, across[:, :old].T], dim=1)
        self._kernel = torch.cat([above, across])
        # Weights of the prediction
        self._best = _worth_keeping(self._cosines)
        kernel = self._kernel[self._best][:, self._best].double()
        kernel.diagonal().add_(_NOISE)
        inverse = torch.linalg.inv(kernel)
        embeddings = torch.from_numpy(self._vectors[self._best]).double()
        gram = embeddings @ embeddings.T
        dots = torch.from_numpy(self._cosines[self._best]) * (gram.diagonal() > 0)
        # The predicted embedding is a weighted sum of the known ones: its cosine needs no more than
        # their products with each other and with the target.
        self._weighed_gram = (inverse @ gram @ inverse).float()
        self._weighed_dots = (inverse @ dots).float()

    def predict(self, some: Sequence[Candidates]) -> NDArray[np.float64]:
        """Predict the cosines of all of their texts, one after the other, from one known on."""
        for candidates in some:
            done = candidates.kernel.shape[1]
            if done < len(self._cosines):
                new = _kernel(candidates.features, self._features.after(done))
                candidates.kernel = torch.cat([candidates.kernel, new], dim=1)
        if not some:
            return np.zeros(0)
        kernel = torch.cat([candidates.kernel for candidates in some])
        if len(self._best) < len(self._cosines):
            kernel = kernel[:, self._best]
        squares = ((kernel @ self._weighed_gram) * kernel).sum(dim=1)
        mean = kernel @ self._weighed_dots / squares.clamp_min(1e-12).sqrt()
        return mean.double().numpy()  # type: ignore[no-any-return]


def hash_rows(rows: Rows) -> NDArray[np.int64]:
    """Numbers [M] that tell texts [M, L] apart."""
    return rows @ _factors(rows.shape[1])


@lru_cache
def _factors(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(2**63, size=count) * 2 + 1


def count_features(rows: Rows) -> Features:
    """Number and measure the features of texts [M, L]."""
    rows = rows[:, : max(int((rows != NOTHING).sum(axis=1).max(initial=0)), 1)]
    word = rows + 1  # NOTHING becomes 0
    place = np.arange(rows.shape[1]) // 2
    before = np.concatenate([np.full((len(rows), 1), 1 << _BITS), word[:, :-1]], axis=1)
    pairs = np.where(word > 0, (before << _BITS) + word + (1 << 2 * _BITS + 1), 0)
    places = np.where(word > 0, (place << _BITS) + word + (1 << 2 * _BITS + 2), 0)
    # Equal words, pairs and places of a text [M, W, W], of which the squared counts are made
    same = (word[:, :, None] == word[:, None, :]) & (word > 0)[:, None, :]
    squares = _WORDS * same.sum(axis=(1, 2))
    squares = squares + _PLACES * (same & (place[:, None] == place)).sum(axis=(1, 2))
    squares += _PAIRS * (same[:, 1:, 1:] & same[:, :-1, :-1]).sum(axis=(1, 2))
    squares += _PAIRS * same[:, 0, 0]  # the start of a text and its first word
    return Features(np.stack([word, pairs, places], axis=1), np.sqrt(squares.clip(min=1e-12)))


def _kernel(one: Features, other: Features) -> Tensor:
    """Likeness of texts [M] to others [N]: [M, N]."""
    numbers, column = np.unique(other.numbers, return_inverse=True)
    count = len(other.norms)
    # How much of each feature each of the others has, [features, N]; row 0 of those it never saw
    shares = np.array([[_WORDS], [_PAIRS], [_PLACES]]) * (other.numbers > 0)
    cells = (column.reshape(other.numbers.shape) + 1) * count + np.arange(count)[:, None, None]
    weights = shares / other.norms[:, None, None]
    table = np.bincount(cells.ravel(), weights.ravel(), (len(numbers) + 1) * count)
    spot = np.searchsorted(numbers, one.numbers).clip(max=len(numbers) - 1)
    which = np.where(numbers[spot] == one.numbers, spot + 1, 0).reshape(len(one.norms), -1)
    kernel = torch.nn.functional.embedding_bag(
        torch.from_numpy(which),
        torch.from_numpy(table.astype(np.float32).reshape(-1, count)),
        mode="sum",
    )
    return kernel / torch.from_numpy(one.norms).float()[:, None]


def _worth_keeping(cosines: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the texts to learn from: the first, the latest and the best."""
    n = len(cosines)
    if n <= _FIRST + _LATEST + _BEST:
        return np.arange(n)
    best = np.argsort(-cosines, kind="stable")[:_BEST]
    return np.unique(np.concatenate([np.arange(_FIRST), best, np.arange(n - _LATEST, n)]))
