"""Re-embedding hypotheses with the true encoder, with the calls counted and limited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.encoders.base import Encoder
from unembed.tokenizer import TextTokenizer

_INVISIBLE, _UNPAID = -1.0, -np.inf


class EncoderOracle:
    """Cosines of hypotheses with the vectors they are for; see `unembed.decoding.Oracle`.

    Args:
        encoder: The one that made the vectors.
        tokenizer: Turns token ids into the text to embed.
        targets: Unit vectors [B, D].
        budget: Calls allowed for each vector.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: TextTokenizer,
        targets: NDArray[np.float32],
        budget: int,
    ) -> None:
        self._encoder, self._tokenizer, self._targets = encoder, tokenizer, targets
        self._budget = budget
        self._cosines: list[dict[str, float]] = [{} for _ in targets]
        self._vectors: list[dict[str, NDArray[np.float32]]] = [{} for _ in targets]

    @property
    def calls(self) -> Tensor:
        """Calls made for each vector [B]."""
        return torch.tensor([len(cosines) for cosines in self._cosines])

    def remaining(self, row: int) -> int:
        """Calls left for one vector."""
        return self._budget - len(self._cosines[row])

    def __call__(self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """See `unembed.decoding.Oracle`."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        queries = list(zip(rows, self._tokenizer.decode(ids), strict=True))
        self._embed(self._affordable(queries))
        cosines = [
            self._cosines[row].get(text, _UNPAID) if text else _INVISIBLE for row, text in queries
        ]
        return torch.tensor(cosines, dtype=torch.float32)

    def vectors(
        self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """See `unembed.decoding.Oracle`."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        nothing = np.zeros(self._targets.shape[1], dtype=np.float32)
        texts = self._tokenizer.decode(ids)
        embeddings = [
            self._vectors[row].get(text, nothing) for row, text in zip(rows, texts, strict=True)
        ]
        return np.stack(embeddings) if embeddings else nothing[None][:0]

    def _affordable(self, queries: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """The (row, text) that are new, each once, as far as each row's budget goes."""
        new: dict[tuple[int, str], None] = {}
        budgets = {row: self.remaining(row) for row, _ in queries}
        for row, text in queries:
            if (
                text
                and text not in self._cosines[row]
                and (row, text) not in new
                and budgets[row] > 0
            ):
                new[row, text] = None
                budgets[row] -= 1
        return list(new)

    def _embed(self, pairs: Sequence[tuple[int, str]]) -> None:
        if not pairs:
            return
        texts = list(dict.fromkeys(text for _, text in pairs))
        vectors = dict(zip(texts, self._encoder.encode(texts), strict=True))
        for row, text in pairs:
            self._cosines[row][text] = float(vectors[text] @ self._targets[row])
            self._vectors[row][text] = vectors[text]
