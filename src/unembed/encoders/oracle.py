"""What an attacker asks the true encoder: embeddings, and gradients where its weights are open.

Calls are counted and limited; a gradient counts as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unembed.encoders.base import Encoder
from unembed.encoders.sentence import SentenceEncoder
from unembed.errors import EncoderError
from unembed.tokenizer import TextTokenizer

_INVISIBLE, _UNPAID = -1.0, -np.inf

_GRADIENT = 2  # calls that a backward pass counts as

# Unit vectors [B, D] → for each the token ids of texts like its own, nearest first
Corpus = Callable[[NDArray[np.float32]], Sequence[Sequence[Sequence[int]]]]
# Index of the vector, token ids of the text that was embedded, its cosine, calls of the row so far
OnCall = Callable[[int, Sequence[int], float, int], None]


class EncoderOracle:
    """Cosines of hypotheses with the vectors they are for; see `unembed.decoding.Oracle`.

    Args:
        encoder: The one that made the vectors.
        tokenizer: Turns token ids into the text to embed.
        targets: Unit vectors [B, D].
        budget: Calls allowed for each vector.
        on_call: Called after every text that was embedded, in their order.
        corpus: Gives what `starts` says.
        indices: Of the vectors, for ``on_call``; 0 to B - 1 when not given.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: TextTokenizer,
        targets: NDArray[np.float32],
        budget: int,
        on_call: OnCall | None = None,
        corpus: Corpus | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        self._encoder, self._tokenizer, self._targets = encoder, tokenizer, targets
        self._budget, self._on_call = budget, on_call
        self._indices = range(len(targets)) if indices is None else indices
        self._starts = [[] for _ in targets] if corpus is None else corpus(targets)
        self._gradients = [0] * len(targets)
        self._cosines: list[dict[str, float]] = [{} for _ in targets]
        self._vectors: list[dict[str, NDArray[np.float32]]] = [{} for _ in targets]

    @property
    def calls(self) -> Tensor:
        """Calls made for each vector [B]."""
        return torch.tensor([self._spent(row) for row in range(len(self._cosines))])

    def _spent(self, row: int) -> int:
        return len(self._cosines[row]) + _GRADIENT * self._gradients[row]

    def remaining(self, row: int) -> int:
        """Calls left for one vector."""
        return self._budget - self._spent(row)

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """See `unembed.decoding.Oracle`."""
        return self._tokenizer.encode(texts)

    def target(self, row: int) -> NDArray[np.float32]:
        """See `unembed.decoding.Oracle`."""
        target: NDArray[np.float32] = self._targets[row]
        return target

    def starts(self, row: int) -> Sequence[Sequence[int]]:
        """See `unembed.decoding.Oracle`."""
        return self._starts[row]

    def token_gains(
        self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32] | None]:
        """See `unembed.decoding.Oracle`.

        Raises:
            EncoderError: The encoder's weights are not open, or its tokens are not the inverter's.
        """
        texts = self._tokenizer.decode(token_ids)
        content = [
            [ids[k] for k in self._tokenizer.content_positions(ids)] for ids in map(list, token_ids)
        ]
        same = [
            again == ids for again, ids in zip(self._tokenizer.encode(texts), content, strict=True)
        ]
        gains: list[NDArray[np.float32] | None] = [None] * len(texts)
        places = []
        for place, row in enumerate(rows):
            if content[place] and same[place] and self.remaining(row) >= _GRADIENT:
                self._gradients[row] += 1
                places.append(place)
        if places:
            targets = self._targets[[rows[place] for place in places]]
            some = [texts[place] for place in places]
            for place, of_text in zip(
                places, token_gains(self._encoder, some, targets), strict=True
            ):
                gains[place] = self._tokenizer.rows_of(of_text.T).T  # [n, V]
        return gains

    def __call__(self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """See `unembed.decoding.Oracle`."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        queries = list(zip(rows, self._tokenizer.decode(ids), strict=True))
        new = self._affordable(queries)
        before = {row: self._spent(row) for row, _ in new}
        self._embed(list(new))
        for (row, text), place in new.items():
            before[row] += 1
            if self._on_call is not None:
                self._on_call(self._indices[row], ids[place], self._cosines[row][text], before[row])
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

    def _affordable(self, queries: Sequence[tuple[int, str]]) -> dict[tuple[int, str], int]:
        """The (row, text) that are new and where, each once, as far as each row's budget goes."""
        new: dict[tuple[int, str], int] = {}
        budgets = {row: self.remaining(row) for row, _ in queries}
        for place, (row, text) in enumerate(queries):
            if (
                text
                and text not in self._cosines[row]
                and (row, text) not in new
                and budgets[row] > 0
            ):
                new[row, text] = place
                budgets[row] -= 1
        return new

    def _embed(self, pairs: Sequence[tuple[int, str]]) -> None:
        if not pairs:
            return
        texts = list(dict.fromkeys(text for _, text in pairs))
        vectors = dict(zip(texts, self._encoder.encode(texts), strict=True))
        for row, text in pairs:
            self._cosines[row][text] = float(vectors[text] @ self._targets[row])
            self._vectors[row][text] = vectors[text]


def token_gains(
    encoder: Encoder, texts: Sequence[str], targets: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    """Find what writing each token at each place would gain in cosine, to first order.

    The gain of token v in place of w at a place with input embedding x is the inner product of
    the cosine's gradient in x with E_v - E_w, E the token table (Ebrahimi et al., 2018, HotFlip,
    arXiv 1712.06751). One backward pass for all texts.

    Args:
        encoder: With open weights.
        texts: N texts to differentiate at.
        targets: Unit vectors [N, D].

    Returns:
        For each text [n, V'] for its n content tokens, in the encoder's token ids.

    Raises:
        EncoderError: The encoder is none of `load_encoder`, or has no token table.
    """
    if not isinstance(encoder, SentenceEncoder) or encoder.identity.prompt:
        raise EncoderError(
            "an encoder of load_encoder without a prompt, whose weights can be differentiated",
            type(encoder).__name__,
            "Leave the option open_weights out",
        )
    model: Any = encoder.differentiable
    table: Any = model[0].auto_model.get_input_embeddings()
    inputs: list[Tensor] = []

    def watch(_: Any, __: Any, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_(True))
        return inputs[-1]

    own_format = torch.autocast(model.device.type, enabled=False)  # not that of the denoiser
    handle = table.register_forward_hook(watch)
    try:
        with torch.inference_mode(False), torch.enable_grad(), own_format:
            features = model.preprocess(list(texts))
            features = {
                name: x.to(model.device) if isinstance(x, Tensor) else x
                for name, x in features.items()
            }
            vectors = F.normalize(model(features)["sentence_embedding"].float(), dim=1)
            cosines = (vectors * torch.from_numpy(targets).to(vectors)).sum(dim=1)
            (gradients,) = torch.autograd.grad(cosines.sum(), inputs[:1])  # [N, T, H]
    finally:
        handle.remove()
    gains = []
    ids, mask = features["input_ids"], features["attention_mask"].bool()
    special = torch.tensor(model.tokenizer.all_special_ids, device=ids.device)
    with torch.inference_mode(), own_format:
        for row in range(len(texts)):
            content = mask[row] & ~torch.isin(ids[row], special)
            slope = gradients[row][content].float()  # [n, H]
            of_tokens = slope @ table.weight.float().T  # [n, V']
            own = of_tokens.gather(1, ids[row][content][:, None])
            gains.append((of_tokens - own).cpu().numpy())
    return gains
