"""The denoiser as it decodes quickest: nothing is left in a pass that could be done before it.

On a CPU that is packed weights, the modulations of a lone text for all its timesteps at once, and
a vocabulary product that need not be made for every position. It says what the denoiser says, to
rounding.
"""

from __future__ import annotations

import threading
import warnings
from copy import deepcopy
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unembed.decoding.lazy import LazyDenoiser
from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import DenoiserFn, Schedule

_COLUMNS, _FEW = 4096, 16  # of a coarse product at once, unless it has few rows
_LIKELIEST = 8
_MOST_LOGITS = 512  # rows of a packed product with the vocabulary, which gains more than a layer
_BALL_STEPS = 10


def quickest(denoiser: Denoiser, compute: Compute, schedule: Schedule) -> DenoiserFn:
    """The form of a denoiser to decode with.

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
    return LazyDenoiser(features, Vocabulary(denoiser, compute.dtype))


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
        self._product = PackedLinear(self._table, self._bias, _MOST_LOGITS)
        # PyTorch warns of its sparse tensors once, at the first
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.of(torch.zeros(1, 1, dtype=torch.long), self._table[:1].float())

    @property
    def size(self) -> int:
        """V."""
        return len(self._bias)

    @cached_property
    def ball(self) -> tuple[Tensor, float]:
        """Centre [H] and radius of a small ball that holds every row of the table.

        From their mean, the centre steps towards the row that is farthest from it (Badoiu and
        Clarkson, 2003, "Smaller core-sets for balls"). When first asked for.
        """
        table = self._table.float()
        centre, squares = table.mean(dim=0), table.square().sum(dim=1)
        for step in range(_BALL_STEPS):
            farthest = (squares - 2 * (table @ centre)).argmax()
            centre = centre + (table[farthest] - centre) / (step + 2)
        return centre, float((table - centre).norm(dim=1).max())

    def __call__(self, h: Tensor) -> Tensor:
        """Exact in float32, else refined: [M, V]."""
        return self.logits(h) if self._coarse.dtype == torch.float32 else self.refined(h)

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
        rows, count = tokens.shape
        starts = torch.arange(0, rows * count + 1, count)
        # As a sparse matrix [M, V], whose products are made without gathering rows of the table
        wanted = torch.sparse_csr_tensor(
            starts,
            tokens.reshape(-1),
            self._bias[tokens].reshape(-1),
            (rows, len(self._bias)),
            check_invariants=False,
        )
        found: Tensor = torch.sparse.sampled_addmm(wanted, h, self._table.T).values()
        return found.view(rows, count)

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


_TEXT = 32  # rows that the packing is told of; it serves any number about as well
_MOST = 128  # rows from which on a layer gains little
_Network = TypeVar("_Network", bound=nn.Module)


class PackedLinear(nn.Module):
    """x [..., I] → x W^T + b [..., O] in float32, without gradients.

    Packed weights are 1.2 to 2.7 times as fast as `F.linear` at the few rows of one text
    (docs/results.md), and a row comes out the same whatever stands beside it (seen with AVX2). The
    operators are those of PyTorch's compiler for frozen linear layers; where a build lacks them,
    this is `F.linear`, and so it is for many rows. oneDNN keeps a kernel of about a megabyte for
    each number of rows, so few numbers are used: rows are added up to the next one.

    Args:
        weight: W [O, I], shared and not copied beside its packed form.
        bias: b [O].
        most: Rows up to which it is packed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, most: int = _MOST) -> None:
        super().__init__()
        self.most = most
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed: Tensor | None = None
        if can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, _TEXT)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] → [..., O]."""
        rows = x.numel() // x.shape[-1]
        if self.packed is None or not 0 < rows <= self.most:
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.float(), self.weight, self.bias)
        flat, every = x.float().reshape(rows, -1), 4 if rows <= 2 * _TEXT else 16
        padded = F.pad(flat, (0, 0, 0, -rows % every)) if rows % every else flat
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            padded, self.packed, self.bias, "none", [], ""
        )
        return found[:rows].view(*x.shape[:-1], -1)


def can_pack(weight: Tensor) -> bool:
    """Whether this build of PyTorch packs such a weight."""
    there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and weight.device.type == "cpu" and weight.dtype == torch.float32


def with_packed_layers(network: _Network) -> _Network:
    """A copy that shares the parameters, with every linear layer packed."""
    copy = deepcopy(network, {id(p): p for p in network.parameters()})
    for module in list(copy.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    return copy
