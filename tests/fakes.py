"""Stand-ins for tests: small networks, denoisers with known answers, an oracle, an inverter."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from unembed.decoding.strategy import Inversion, SequenceSpec
from unembed.denoiser import DenoiserSizes
from unembed.device import choose_compute
from unembed.diffusion import LogLinear
from unembed.encoders.vectors import as_unit_vectors
from unembed.vectors.words import WordProbe

WORD_MASK = 10  # of `WordDenoiser`, whose vocabulary ends with it

_SIZES = {
    "tiny": DenoiserSizes(30_522, 384, hidden=64, layers=2, heads=2, feed_forward=128),
    "small": DenoiserSizes(30_522, 384, hidden=384, layers=4, heads=6, feed_forward=1536),
    "reference": DenoiserSizes(30_522, 384),
}


def preset(name: str, **changes: int) -> DenoiserSizes:
    """Return named sizes with some fields changed (at least the vocabulary, usually)."""
    return replace(_SIZES[name], **changes)


class WordDenoiser:
    """Likes token (the row's own number + position) at each position, the middle most of all.

    What it says depends on a row's own tokens and vector only, as that of a real one does; the
    mask token is what it likes best, so that a strategy that forgets to rule it out is found out.
    """

    def __init__(self, length: int, sharpness: float = 2.0) -> None:
        self.length, self.sharpness = length, sharpness
        self.seen: list[SimpleNamespace] = []

    def __call__(self, tokens, embedding, t, where):
        self.seen.append(SimpleNamespace(tokens=tokens.clone(), t=t, where=where.clone()))
        assert tokens.shape == where.shape == (len(embedding), self.length)
        assert len(t) == len(embedding)
        first = (embedding[:, 0] * 100).round().long()
        shift = (tokens == WORD_MASK).sum(dim=1)[:, None]
        wanted = (first[:, None] + torch.arange(self.length) + shift) % WORD_MASK
        logits = torch.sin(torch.arange(WORD_MASK + 1) * 1.7 + embedding[:, :1, None] * 9)
        logits = logits.expand(-1, self.length, -1).clone()
        sureness = self.sharpness - (torch.arange(self.length) - self.length // 2).abs() * 0.1
        logits.scatter_add_(2, wanted[..., None], sureness.expand_as(wanted)[..., None].clone())
        logits[..., WORD_MASK] = 50.0
        return logits[where]


class ConstantDenoiser:
    """Says the same logits [L, V] about every sequence, whatever its tokens are."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.seen = table, []

    def __call__(self, tokens, embedding, t, where):
        self.seen.append((tokens.clone(), t.clone()))
        return self.table.expand(len(tokens), -1, -1)[where].clone()


class TableDenoiser:
    """Logits that depend on the visible tokens, the embedding and t through fixed random tables."""

    def __init__(self, vocabulary: int) -> None:
        g = torch.Generator().manual_seed(7)
        self.by_token = torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64)
        self.by_embedding = torch.randn(3, vocabulary, generator=g, dtype=torch.float64)

    def __call__(self, tokens, embedding, t, where):
        seen = self.by_token[tokens].sum(dim=1, keepdim=True)  # [B, 1, V]
        own = self.by_token[tokens]
        extra = embedding.double() @ self.by_embedding * (1.0 + t.double())[:, None]
        return (seen + own + extra[:, None]).flatten(0, 1)[where.flatten()]


class FakeOracle:
    """An oracle without an encoder: the share of even tokens is the cosine."""

    def __init__(self, batch: int, budget: int = 20) -> None:
        self.known: list[dict[tuple[int, ...], float]] = [{} for _ in range(batch)]
        self.budget = budget

    def __call__(self, rows: Sequence[int], token_ids) -> torch.Tensor:
        cosines = []
        for row, ids in zip(rows, torch.as_tensor(token_ids).tolist(), strict=True):
            key = tuple(ids)
            if key not in self.known[row] and self.remaining(row) > 0:
                self.known[row][key] = sum(token % 2 == 0 for token in ids) / len(ids)
            cosines.append(self.known[row].get(key, float("-inf")))
        return torch.tensor(cosines)

    def vectors(self, rows: Sequence[int], token_ids):
        cosines = self(rows, token_ids).clamp(-1.0, 1.0)
        parts = [cosines, (1.0 - cosines**2).sqrt(), torch.zeros_like(cosines)]
        return torch.stack(parts, dim=1).numpy()

    def starts(self, row: int):
        return []

    def token_gains(self, rows: Sequence[int], token_ids):
        return [None] * len(rows)

    def remaining(self, row: int) -> int:
        return self.budget - len(self.known[row])

    @property
    def calls(self) -> torch.Tensor:
        return torch.tensor([len(known) for known in self.known])


class LookupInverter:
    """Recovers every text it knows, perfectly; what it does not know comes back empty.

    Blindfolded it says "the".
    """

    def __init__(self, encoder, config, texts):
        self.encoder, self.alignment = encoder.identity, None
        self.tokenizer = encoder.tokenizer
        self.length, ids = config.data.length, self.tokenizer
        self.spec = SequenceSpec(self.length, ids.mask_id, LogLinear(), ids.end_id, ids.pad_id)
        self.compute = self.search_compute = choose_compute("cpu", "float32")
        self.diffusion = {"schedule": "log-linear", "rate": 5.0}
        self.trained = {"config": config.model_dump()}
        self.known = {encoder.encode([text])[0].tobytes(): text for text in texts}
        self.calls = []
        self.stop_after = None  # calls, then as if by Ctrl-C
        self.denoiser = self.eyes = SimpleNamespace(sizes=None, state_dict=dict)

    @property
    def dimension(self):
        return self.encoder.dimension

    def map_vectors(self, vectors):
        return as_unit_vectors(vectors, self.dimension)

    def require_encoder(self, encoder):
        self.encoder.require_same(encoder.identity, "vectors")

    def invert(self, vectors, **options):
        if not len(vectors):
            return []  # the settings are looked at, nothing is decoded
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((len(vectors), options))
        texts = [self.known.get(vector.tobytes(), "") for vector in vectors]
        if self.denoiser is not self.eyes:
            texts = ["the"] * len(vectors)
        return [
            Inversion(text, ids, [1.0] * len(ids), passes=1, encoder_calls=0)
            for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True)
        ]


def word_probe(encoder) -> WordProbe:
    """Make a probe of the fake encoder: the nearer a word's own vector, the more probable."""
    words = "the bank doctor river password dog nurse cat".split()
    rates = np.array([0.9, *np.linspace(0.09, 0.01, len(words) - 1)], dtype=np.float32)
    weight = 12.0 * encoder.encode(words)
    bias = np.log(rates / (1 - rates)).astype(np.float32)
    return WordProbe(encoder.identity, words, {3: "River"}, weight, bias, rates)
