"""A Gaussian process that predicts the encoder's answers from those about the same text so far."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.decoding.guided_search.edits import NOTHING, Rows

# Share of words, of pairs of neighbours, and of words at about their place in the likeness of texts
_WORDS, _PAIRS, _PLACES = 1.0, 0.5, 0.2
_NOISE = 0.03
_NO_WORD = 2**40
_FIRST, _LATEST, _BEST = 80, 120, 280  # texts learned from; the matrix inverted has this size


class CosineModel:
    """Predicts embeddings by a Gaussian process over texts, and from them the cosines.

    The equations are 2.25 and 2.26 of Rasmussen and Williams (2006), every component of the
    embedding a function of the text with the same kernel: the cosine of the counts of words, pairs
    of neighbours and words at their place. An embedding that is a mean over tokens is nearly
    additive in these. So what a word was worth in one hypothesis, or by itself, tells what it is
    worth in another, changes that helped apart are predicted to help together, and a word that
    says what is said already is not predicted to help again.

    Args:
        rows: Texts embedded so far [N, L], N from 1.
        vectors: Their embeddings [N, D], of unit length; zeros for an invisible text.
        cosines: Of their embeddings with the target [N].
    """

    def __init__(
        self, rows: Rows, vectors: NDArray[np.float32], cosines: NDArray[np.float64]
    ) -> None:
        best = _worth_keeping(cosines)
        rows, embeddings = rows[best], vectors[best].astype(np.float64)
        self._gram = embeddings @ embeddings.T  # [N, N]
        self._dots = cosines[best] * (self._gram.diagonal() > 0)  # with the target [N]
        # The words known are numbered from 1; number 0 is any other, the last the start of a text
        self._words = np.unique(np.append(rows[rows != NOTHING], _NO_WORD))
        columns, norms = self._features(rows)
        self._columns = np.zeros(columns.max() + 1, dtype=np.int64)
        known = np.unique(columns[columns > 0])
        self._columns[known] = np.arange(1, len(known) + 1)
        # How much of each feature each text has, [features, N]; row 0 of those it never saw
        table = np.zeros((len(known) + 1, len(rows)), dtype=np.float32)
        shares = np.repeat([_WORDS, _PAIRS, _PLACES], columns.shape[1] // 3)
        texts = np.broadcast_to(np.arange(len(rows))[:, None], columns.shape)
        np.add.at(table, (self._columns[columns], texts), shares / norms[:, None])
        table[0] = 0.0
        self._table = torch.from_numpy(table)
        kernel = self._kernel(columns, norms).double()
        kernel.diagonal().add_(_NOISE)
        self._inverse = torch.linalg.inv(kernel).float()

    def predict(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Predict the cosines of texts [M, L].

        Returns:
            Cosines [M] and standard deviations [M], the latter those of a component in units of
            its spread for a text unlike all known ones.
        """
        columns, norms = self._features(rows)
        kernel = self._kernel(columns, norms)  # [M, N]
        weights = kernel @ self._inverse
        variance = 1.0 - (weights * kernel).sum(dim=1).double().numpy()
        # The predicted embedding is a weighted sum of the known ones: its cosine needs no more than
        # their products with each other and with the target.
        squares = ((weights @ torch.from_numpy(self._gram).float()) * weights).sum(dim=1)
        dots = weights @ torch.from_numpy(self._dots).float()
        mean = (dots / squares.clamp_min(1e-12).sqrt()).double().numpy()
        return mean, np.sqrt(np.maximum(variance, 0.0))

    def _features(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Number the features of texts and measure them.

        Returns:
            Words, pairs and places [M, 3 L], 0 where there is none or it holds a word not known;
            and the length [M] of the vector of all of a text's counts.
        """
        rows = rows[:, : max(int((rows != NOTHING).sum(axis=1).max()), 1)]
        place, size = np.arange(rows.shape[1]) // 2, len(self._words) + 2
        spot = np.searchsorted(self._words, rows)
        word = np.where(self._words[spot] == rows, spot + 1, 0)
        before = np.concatenate([np.full((len(rows), 1), size - 1), word[:, :-1]], axis=1)
        pairs = np.where(before * word > 0, before * size + word, 0)
        places = np.where(word > 0, (size + place) * size + word, 0)
        # Equal words, pairs and places of a text [M, L, L], of which the squared counts are made
        same = rows[:, :, None] == rows[:, None, :]
        same &= (rows != NOTHING)[:, None, :]
        squares = _WORDS * same.sum(axis=(1, 2))
        squares = squares + _PLACES * (same & (place[:, None] == place)).sum(axis=(1, 2))
        squares += _PAIRS * (same[:, 1:, 1:] & same[:, :-1, :-1]).sum(axis=(1, 2))
        squares += _PAIRS * same[:, 0, 0]  # the start of a text and its first word
        return np.concatenate([word, pairs, places], axis=1), np.sqrt(squares.clip(min=1e-12))

    def _kernel(self, columns: NDArray[np.int64], norms: NDArray[np.float64]) -> Tensor:
        """Likeness [M, N] of texts to those known, given their `_features`."""
        columns = np.where(columns < len(self._columns), columns, 0)
        which = torch.from_numpy(self._columns[columns])
        kernel = torch.nn.functional.embedding_bag(which, self._table, mode="sum")
        return kernel / torch.from_numpy(norms).float()[:, None]


def _worth_keeping(cosines: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the texts to learn from: the first, the latest and the best."""
    n = len(cosines)
    if n <= _FIRST + _LATEST + _BEST:
        return np.arange(n)
    best = np.argsort(-cosines, kind="stable")[:_BEST]
    return np.unique(np.concatenate([np.arange(_FIRST), best, np.arange(n - _LATEST, n)]))
