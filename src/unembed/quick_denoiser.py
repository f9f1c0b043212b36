"""The denoiser as it decodes quickest: nothing is left in a pass that could be done before it.

On a CPU that is packed weights, the modulations of a lone text for all its timesteps at once and,
where the processor multiplies bfloat16 faster, a vocabulary product at two speeds. It says what the
denoiser says, to rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from unembed.decoding.glance import Glance, TwoSpeeds
from unembed.denoiser import Denoiser
from unembed.device import Compute, choose_compute
from unembed.diffusion import DenoiserFn, Schedule
from unembed.packed_linear import PackedLinear, with_packed_layers

_COLUMNS, _FEW = 4096, 16  # of a coarse product at once, unless it has few rows
_LIKELIEST = 8
_MOST = 512  # rows of a packed product with the vocabulary, which gains more than a layer

# Ids [B, L], embeddings [B, D], timesteps [B] and positions wanted → [M, H]
FeaturesFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def quickest(denoiser: Denoiser, compute: Compute, schedule: Schedule) -> DenoiserFn:
    """The form of a denoiser to decode with.

    On a CPU whose processor multiplies bfloat16 plainly faster (`choose_compute`), or in a coarser
    format anyway, it can be glanced at.

    Args:
        denoiser: With the weights that it has now.
        compute: Where it is, and the format of its products.
        schedule: Says what timesteps a text passes through.
    """
    exact = compute.dtype == torch.float32
    if compute.device.type != "cpu":
        return denoiser if exact else in_format(denoiser, compute.dtype)
    network = with_packed_layers(denoiser) if exact else in_format(denoiser, compute.dtype)
    features = LoneTextFeatures(network, schedule)
    coarse = choose_compute("cpu").dtype if exact else compute.dtype
    vocabulary = Vocabulary(denoiser, coarse)
    if coarse == torch.float32:
        return lambda *given: vocabulary.logits(features(*given))
    return two_speeds(features, vocabulary, exact)


def two_speeds(features: FeaturesFn, vocabulary: Vocabulary, exact: bool = True) -> TwoSpeeds:
    """A denoiser on a CPU that can be glanced at.

    Args:
        features: Of the network.
        vocabulary: With a coarse format.
        exact: Whether all its logits are exact where it is not glanced at, or the likeliest.
    """
    whole = vocabulary.logits if exact else vocabulary.refined

    def glance(*given: Tensor) -> Glance:
        h = features(*given).float()  # [M, H]

        def exactly(rows: Tensor, tokens: Tensor | None) -> Tensor:
            return vocabulary.logits(h[rows]) if tokens is None else vocabulary.of(tokens, h[rows])

        return Glance(lambda rows: vocabulary.coarse(h[rows]), exactly)

    return TwoSpeeds(lambda *given: whole(features(*given).float()), glance)


class Vocabulary:
    """The product with the token table: exact, coarse, or coarse with the likeliest tokens exact.

    Args:
        denoiser: Whose table it is.
        coarse: A format with quicker products, or float32.
    """

    def __init__(self, denoiser: Denoiser, coarse: torch.dtype) -> None:
        self._table = denoiser.token_table.weight.detach()  # [V, H]
        self._bias = denoiser.output_bias.detach()  # [V]
        self._coarse = self._table.to(coarse)
        self._product = PackedLinear(self._table, self._bias, _MOST)

    def logits(self, h: Tensor) -> Tensor:
        """Of all tokens at each h [M, H]: [M, V]."""
        found: Tensor = self._product(h)
        return found

    def coarse(self, h: Tensor) -> Tensor:
        """The same in float32, as exact as the coarse format is."""
        logits, rough = torch.empty(len(h), len(self._bias)), h.to(self._coarse.dtype)
        together = _COLUMNS if len(h) > _FEW else len(self._bias)
        for start in range(0, len(self._bias), together):
            block = slice(start, start + together)
            torch.add(rough @ self._coarse[block].T, self._bias[block], out=logits[:, block])
        return logits

    def of(self, tokens: Tensor, h: Tensor) -> Tensor:
        """Exactly, of K tokens [M, K] at each h [M, H]: [M, K]."""
        with torch.autocast(h.device.type, enabled=False):
            return torch.einsum("mkh,mh->mk", self._table[tokens], h) + self._bias[tokens]

    def refined(self, h: Tensor) -> Tensor:
        """Coarse [M, V], but exact for the likeliest eight of each h [M, H]."""
        logits = self.coarse(h)
        tokens = logits.topk(min(_LIKELIEST, logits.shape[1]), dim=-1).indices  # [M, 8]
        return logits.scatter_(1, tokens, self.of(tokens, h))


class LoneTextFeatures:
    """`Denoiser.features`, with the modulations of a text alone kept for all its timesteps.

    They hang on the embedding and the timestep only. For one text each pass would read their
    weights, half of all in a block, for a single row. Each thread remembers the text that it began
    last.

    Args:
        network: Whose features.
        schedule: Gives the timestep of each share of masked positions.
    """

    def __init__(self, network: Denoiser, schedule: Schedule) -> None:
        self._network = network
        self._length = network.sizes.length
        masked = torch.ones(self._length, self._length).tril()
        self._timesteps = schedule.timestep(masked.mean(dim=1))  # [L]
        self._begun = threading.local()

    def __call__(self, tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
        """[M, H] at the positions wanted."""
        known = self._modulations(embedding, t) if len(t) == 1 else None
        return self._network.features(tokens, embedding, t, where, known)

    def _modulations(self, embedding: Tensor, t: Tensor) -> list[Tensor] | None:
        shares = (self._timesteps == t).nonzero()[:, 0].tolist()
        known: tuple[Tensor, list[Tensor]] | None = getattr(self._begun, "text", None)
        if known is None or not torch.equal(known[0], embedding):
            if self._length - 1 not in shares:  # not all is masked: another text goes on
                return None
            every = embedding.expand(self._length, -1)
            known = embedding.clone(), self._network.modulations(every, self._timesteps)
            self._begun.text = known
        if not shares:  # a strategy with timesteps of its own
            return None
        return [kept[shares[0]][None] for kept in known[1]]


def in_format(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy to use under autocast to a format, in which no linear layer is left to convert."""
    quick = deepcopy(denoiser)
    for module in quick.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return quick
