"""Zero2Text: a language model proposes, a map learned from the target's own queries judges.

arXiv 2602.01757, sections 3 and 4.1. Nothing is trained: another encoder embeds every candidate, a
ridge regression from its space into the victim's is fitted to what was asked so far for this very
target, and the victim's encoder is asked about the best candidates only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.baselines.language_model import load_language_model, load_local_embedder
from unembed.decoding.strategy import (
    Decoded,
    OnStep,
    Oracle,
    SequenceSpec,
    check_options,
    option,
    require_oracle,
)
from unembed.device import choose_compute
from unembed.diffusion import DenoiserFn

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]

_FIRST = 3  # times as many queries at the first token, where no map is known
_FIRST_CONFIDENCE = 0.7
_NOT_A_WORD = 5.0  # taken off the logit of a first token that is none
_SURPLUS = 4  # times as many tokens are looked at as are wanted, for different ones


@dataclass(frozen=True)
class Zero2Text:
    """Beam search over a language model's tokens, scored by likelihood and predicted cosine.

    At most 3 a + b Σ max(1, ⌊a dᵗ⌋) calls, t = 1 … tokens - 1, for ``queries`` a, ``decay`` d and
    ``beams`` b: 2,180 as published, 284 with one beam and 40 queries. The inverter's network is not
    used, only its tokens.

    Attributes:
        beams: See below.
        candidates: See below.
        queries: See below.
        decay: See below.
        tokens: See below.
        penalty: See below.
        likeness: See below.
    """

    beams: int = option(10, "Texts that go on from each token.", low=1, high=64)
    candidates: int = option(1000, "Next tokens tried for each of them.", low=1, high=10_000)
    queries: int = option(50, "Texts embedded for each at the second token.", low=1, high=1000)
    decay: float = option(0.8, "Of that number from token to token.", above=0.0, high=1.0)
    tokens: int = option(32, "Tokens of the language model that are written.", low=1, high=256)
    penalty: float = option(0.1, "Of the ridge regression.", above=0.0, high=1e6)
    likeness: float = option(
        0.9, "Cosine of two tokens from which on only the likelier is tried.", low=0.0, high=1.0
    )
    needs_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def calls_at_most(self) -> int:
        """Encoder calls of a text."""
        later = (self.queries_at(place) for place in range(1, self.tokens))
        return _FIRST * self.queries + self.beams * sum(later)

    def queries_at(self, place: int) -> int:
        """Texts embedded for each beam at a place, from 1 on."""
        return max(1, int(self.queries * self.decay**place))

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """See `Strategy`; ``steps`` and ``generators`` have no effect, and no step is shown.

        Raises:
            ConfigError: There is no oracle, or the extra ``lm`` is not installed.
        """
        oracle = require_oracle(oracle, "zero2text")
        dtype = choose_compute("cpu", training=False).dtype
        parts = load_language_model(dtype), load_local_embedder(dtype), oracle
        search = _Search(self, *parts, longest=spec.length - 1)
        rows = [search.recover(row) for row in range(len(embedding))]
        tokens = spec.masked(len(rows), torch.device("cpu")).fill_(spec.pad_id or 0)
        for line, ids in zip(tokens, rows, strict=True):
            line[: len(ids)] = torch.tensor(ids, dtype=torch.long)
            line[len(ids)] = spec.end_id or 0
        cosines = oracle(list(range(len(rows))), tokens)
        ones = torch.ones(tokens.shape)
        passes = torch.full((len(rows),), self.tokens)
        return Decoded(tokens, ones, ones.long(), passes, oracle.calls, cosines)


@dataclass
class _Pool:
    """Sums of what was asked for one target: local vectors against those of the victim."""

    penalty: float
    xx: Floats
    xy: Floats

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
        """Add pairs [n, D'] and [n, D]."""
        self.xx += x.T.astype(np.float64) @ x
        self.xy += x.T.astype(np.float64) @ y

    def fit(self) -> Floats:
        """W = (XᵀX + λ I)⁻¹ Xᵀ Y."""
        ridge = self.xx + self.penalty * np.eye(len(self.xx))
        weights: Floats = np.linalg.solve(ridge, self.xy).astype(np.float64)
        return weights


@dataclass(frozen=True)
class _Search:
    """Search with its parts: the language model proposes, the local embedder is mapped."""

    settings: Zero2Text
    model: Any
    embed: Embed
    oracle: Oracle
    longest: int

    def recover(self, row: int) -> list[int]:
        """Recover one text; the ids of the nearest one that was embedded."""
        settings = self.settings
        beams, cache = torch.zeros(1, 0, dtype=torch.long), self.model.new_cache()
        pool: _Pool | None = None
        weights: Floats | None = None
        confidence = 0.0
        nearest: tuple[float, list[int]] = (-2.0, [])
        for place in range(settings.tokens):
            # Candidates of all beams, their likelihood and local vectors
            extended, likelihood, owners = self.propose(beams, place, cache)
            texts = [text.strip() for text in self.model.tokenizer.batch_decode(extended)]
            ids = [tokens[: self.longest] for tokens in self.oracle.ids_of(texts)]
            local = self.embed([text or "." for text in texts])
            if pool is None:
                pool = _Pool(settings.penalty, np.zeros((local.shape[1],) * 2), np.zeros((0, 0)))
            # The best of each beam are embedded by the victim's encoder
            score = _z(likelihood)
            if weights is not None:
                score = score + confidence * _z(self.cosines(row, _unit(local @ weights)))
            count = _FIRST * settings.queries if place == 0 else settings.queries_at(place)
            picks = _best_of_each(score, owners, count)
            true = self.oracle([row] * len(picks), [ids[k] for k in picks]).numpy()
            valid = np.isfinite(true) & (true > -1.0)
            picks, true = picks[valid], true[valid]
            if not len(picks):
                break
            best = int(true.argmax())
            nearest = max(nearest, (float(true[best]), ids[int(picks[best])]))
            # The map, and how well the one before it predicted
            y = self.oracle.vectors([row] * len(picks), [ids[k] for k in picks])
            if not pool.xy.size:
                pool.xy = np.zeros((local.shape[1], y.shape[1]))
            pool.add(local[picks], y)
            before, weights = weights, pool.fit()
            matrix = weights if before is None else before
            confidence = float((_unit(local[picks] @ matrix) * y).sum(axis=1).mean())
            confidence *= _FIRST_CONFIDENCE if before is None else 1.0
            # Score again: true cosines where they are known
            cosines = self.cosines(row, _unit(local @ weights))
            cosines[picks] = true
            order = np.argsort(-(_z(likelihood) + confidence * _z(cosines)), kind="stable")
            best_of_all = torch.from_numpy(order[: settings.beams].copy())
            beams = extended[best_of_all]
            cache.reorder_cache(torch.from_numpy(owners)[best_of_all])
        return nearest[1]

    def cosines(self, row: int, vectors: Floats) -> Floats:
        """Cosines [N] of vectors in the victim's space with the target."""
        result: Floats = vectors @ self.oracle.target(row).astype(np.float64)
        return result

    def propose(
        self, beams: Tensor, place: int, cache: Any
    ) -> tuple[Tensor, Floats, NDArray[np.int64]]:
        """Extend each beam [b, n] by its likeliest tokens that are unlike one another.

        The cache is that of `LanguageModel.next_logits`.

        Returns:
            Extended texts [N, n + 1], the log-probability of the token [N], the beam of each [N].
        """
        logits = self.model.next_logits(beams, cache) + _plain_text(self.model, place == 0)
        log_p = logits.log_softmax(dim=-1)
        table, count = self.model.token_table, self.settings.candidates
        extended, values, owners = [], [], []
        for owner, line in enumerate(log_p):
            top = line.topk(min(_SURPLUS * count, int(line.isfinite().sum())))
            places = _unlike(table[top.indices], self.settings.likeness, count)
            tokens = top.indices[places]
            extended.append(torch.cat([beams[owner].expand(len(tokens), -1), tokens[:, None]], 1))
            values.append(top.values[places])
            owners += [owner] * len(tokens)
        return torch.cat(extended), torch.cat(values).double().numpy(), np.array(owners)


def _unlike(vectors: Tensor, likeness: float, count: int) -> list[int]:
    """Places of the first vectors [N, H] that are not like an earlier one among them."""
    like = (vectors @ vectors.T >= likeness).numpy()
    places: list[int] = []
    for place in range(len(like)):
        if not like[place, places].any():
            places.append(place)
            if len(places) == count:
                break
    return places


_plain: dict[int, tuple[Tensor, Tensor]] = {}  # of a language model, worked out once


def _plain_text(model: Any, first: bool) -> Tensor:
    """What is added to the logits [V]: -infinity unless ASCII; less for a first sign."""
    key = id(model.network)
    if key not in _plain:
        special = set(model.tokenizer.all_special_ids)
        size = model.network.get_output_embeddings().weight.shape[0]
        texts = model.tokenizer.batch_decode([[token] for token in range(size)])
        plain = [t.isascii() and t.strip().isprintable() and bool(t.strip()) for t in texts]
        allowed = torch.tensor([good and k not in special for k, good in enumerate(plain)])
        words = torch.tensor([text.strip().isalpha() for text in texts])
        never = torch.zeros(size).masked_fill(~allowed, -torch.inf)
        _plain[key] = never, never - _NOT_A_WORD * (~words).float()
    return _plain[key][int(first)]


def _best_of_each(score: Floats, owners: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Places of the ``count`` highest scores of each beam."""
    order = np.argsort(-score, kind="stable")
    parts = [order[owners[order] == owner][:count] for owner in np.unique(owners)]
    return np.concatenate(parts)


def _z(values: Floats) -> Floats:
    """Standardise over the candidates of a step."""
    deviation = float(values.std())
    result: Floats = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    return result


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Floats = vectors / np.maximum(length, 1e-12)
    return result
