"""Uses of a denoiser's logits: processors that change them, and ways to read tokens.

A processor is any callable ``(logits [M, V], inputs) → logits``; `with_processors` puts a list of
them behind a denoiser. Sampling works in float32 logits with cumulative sums and uniform numbers in
float64: low-precision noise silently lowers the temperature (Zheng et al., 2024, arXiv 2409.02908).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unembed.decoding.strategy import SequenceSpec
from unembed.diffusion import DenoiserFn

REPETITION_PENALTY = 2.0  # nats; what F1 and cosine gain most from (docs/results.md)

_TOP = 256  # tokens that nearly always hold the nucleus
_COLD = 1e-4  # temperature below which logits divided by it may overflow
_RUN = 64  # columns whose maximum is taken first


# Processors


@dataclass(frozen=True)
class DenoiserInputs:
    """Inputs that the logits were predicted from.

    Attributes:
        tokens: Ids [B, L].
        embedding: Unit vectors [B, D].
        t: Timesteps [B].
        positions: Positions that were predicted, boolean [B, L], M of them.
    """

    tokens: Tensor
    embedding: Tensor
    t: Tensor
    positions: Tensor

    @property
    def rows(self) -> Tensor:
        """The sequence that each of the M positions belongs to [M]."""
        return self.positions.nonzero()[:, 0]


LogitsProcessor = Callable[[Tensor, DenoiserInputs], Tensor]


def with_processors(denoiser: DenoiserFn, processors: Sequence[LogitsProcessor]) -> DenoiserFn:
    """Put processors behind a denoiser, in order; the result is a denoiser for every strategy."""
    if not processors:
        return denoiser

    def denoise(tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor) -> Tensor:
        inputs = DenoiserInputs(tokens, embedding, t, positions)
        logits = denoiser(tokens, embedding, t, positions).float()
        for process in processors:
            logits = process(logits, inputs)
        return logits

    return denoise


def with_callback(denoiser: DenoiserFn, before_pass: Callable[[], None]) -> DenoiserFn:
    """Call something before every pass of a denoiser; what it raises ends the work."""

    def denoise(tokens: Tensor, embedding: Tensor, t: Tensor, positions: Tensor) -> Tensor:
        before_pass()
        return denoiser(tokens, embedding, t, positions)

    return denoise


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits (1 + w) l(embedding) - w l(nothing), with a varying w.

    Ho and Salimans (2022, arXiv 2207.12598), eq. 6, on logits; nothing is the zero vector, which a
    network trained with condition dropout knows. The strength goes from ``early`` at a fully
    masked sequence to ``late`` at a clean one in proportion to the share of visible tokens,
    w(t) = early + (late - early) alpha_t: little guidance while nothing is unmasked, since early
    mistakes stay. Every pass runs the denoiser twice.

    Attributes:
        denoiser: Predicts the unconditional logits.
        spec: Its schedule turns timesteps into alpha.
        early: w at t = 1, from 0; 0 is the plain denoiser.
        late: w at t = 0, from 0.
    """

    denoiser: DenoiserFn
    spec: SequenceSpec
    early: float
    late: float

    def strength(self, alpha: Tensor) -> Tensor:
        """Compute w at each share alpha of visible tokens."""
        return self.early + (self.late - self.early) * alpha

    def __call__(self, logits: Tensor, inputs: DenoiserInputs) -> Tensor:
        """Push conditional logits [M, V] away from the unconditional ones."""
        nothing = torch.zeros_like(inputs.embedding)
        unconditional = self.denoiser(inputs.tokens, nothing, inputs.t, inputs.positions).float()
        w = self.strength(self.spec.schedule.alpha(inputs.t))[inputs.rows][:, None]  # [M, 1]
        return logits + w * (logits - unconditional)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Takes ``penalty`` nats off a token's logit for each time it stands in the sequence.

    A vector says which words a text has better than where they are. A denoiser that knows so puts
    the most probable word at every place it may have, and takes too little back once it is unmasked
    somewhere. The penalty is that of Keskar et al. (2019, arXiv 1909.05858), subtracted for each
    occurrence, so that a word the denoiser is confident of can stand again.

    Attributes:
        spec: Its special tokens are not penalised.
        penalty: Nats for each occurrence, from 0.
    """

    spec: SequenceSpec
    penalty: float = REPETITION_PENALTY

    def __call__(self, logits: Tensor, inputs: DenoiserInputs) -> Tensor:
        """Lower the logits [M, V] of the tokens around each position, in place."""
        around = inputs.tokens[inputs.rows]  # [M, L]
        ordinary = torch.ones_like(around, dtype=torch.bool)
        for token in self.spec.special_ids:
            ordinary &= around != token
        return logits.scatter_add_(1, around, -self.penalty * ordinary.float())


# Reading tokens


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the probability and the id of the most probable token: float32 [M, V] → [M], [M].

    The logits are spent: what is left in their place are the probabilities.
    """
    best = argmax(logits)
    # In place: on a CPU another tensor of this size costs more than the arithmetic
    return torch.softmax(logits, dim=-1, out=logits).gather(1, best)[:, 0], best[:, 0]


def argmax(logits: Tensor) -> Tensor:
    """Find where the largest logit of each row is, the first of equals: [M, V] → [M, 1].

    What `torch.argmax` gives, by the maxima of runs of columns, which a CPU finds sooner.
    """
    runs = logits.shape[1] // _RUN
    columns = runs * _RUN
    if columns == 0:
        return logits.argmax(dim=1, keepdim=True)
    maxima = logits[:, :columns].view(len(logits), runs, _RUN).amax(dim=2)  # [M, V / 64]
    best_run = maxima.argmax(dim=1, keepdim=True)
    within = best_run * _RUN + torch.arange(_RUN, device=logits.device)
    best, at = logits.gather(1, within).max(dim=1, keepdim=True)
    places = within.gather(1, at)
    if columns < logits.shape[1]:
        rest, at = logits[:, columns:].max(dim=1, keepdim=True)
        return torch.where(rest > best, columns + at, places)
    return places


def margins(logits: Tensor) -> Tensor:
    """Probability of the most probable token less that of the second: float32 [M, V] → [M]."""
    top = logits.topk(2, dim=-1).values
    pair = (top - logits.logsumexp(dim=-1, keepdim=True)).exp()  # [M, 2]
    return pair[:, 0] - pair[:, 1]


def entropies(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of each distribution: float32 [M, V], some -infinity → [M]."""
    log_p = logits.log_softmax(dim=-1)
    entropy: Tensor = torch.special.entr(log_p.exp()).sum(dim=-1)
    return entropy


# Sampling


def uniforms(generators: Sequence[torch.Generator], shape: tuple[int, ...], to: Tensor) -> Tensor:
    """Draw numbers in [0, 1) from each sequence's own generator [B, *shape].

    Each position has its own number, drawn whether or not it is used, so that a sequence's
    randomness depends on its generator and the step alone. They go to the device of ``to``.
    """
    draws = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
    return torch.stack(draws).to(to.device, _precise(to.device))


def sample(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw a token at each position by inverting the cumulative distribution.

    Args:
        logits: Float32 [M, V]; -infinity where a token must not be drawn.
        u: Uniform numbers in [0, 1) [M].
        temperature: Divides the logits; 0, or next to it, takes the most probable token.
        top_p: Probability of the most probable tokens to draw from; 1 is all of them.

    Returns:
        The tokens [M], and the probability [M] that the denoiser itself gave each, whatever the
        temperature.
    """
    if temperature < _COLD:
        tokens = logits.argmax(dim=-1)
    else:
        p = (logits / temperature).softmax(dim=-1)
        if top_p < 1.0:
            p = p.masked_fill(p < nucleus_floor(p, top_p)[:, None], 0.0)
        cumulative = p.cumsum(dim=-1, dtype=_precise(p.device))  # [M, V]
        below_one = 1.0 - torch.finfo(cumulative.dtype).eps
        target = u.to(cumulative.dtype)[:, None] * below_one * cumulative[:, -1:]
        # The first token whose sum exceeds the target, which is never one of probability zero
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    token_logits = logits.gather(1, tokens[:, None])[:, 0]
    return tokens, (token_logits - logits.logsumexp(dim=-1)).exp()


def nucleus_floor(p: Tensor, top_p: float) -> Tensor:
    """Find the probability of the least probable token of each nucleus: [M, V] → [M].

    The nucleus is the fewest most probable tokens with at least ``top_p`` together (Holtzman et
    al., 2020, arXiv 1904.09751).
    """
    top = p.topk(min(_TOP, p.shape[1]), dim=-1).values  # [M, 256], falling
    floor = _floor_of(top, top_p)
    wide = top.sum(dim=-1) < top_p
    if wide.any():
        floor[wide] = _floor_of(p[wide].sort(dim=-1, descending=True).values, top_p)
    return floor


def _floor_of(falling: Tensor, top_p: float) -> Tensor:
    before = falling.cumsum(dim=-1) - falling
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    last = last.clamp_min(0)  # a top_p that float32 rounds to 0 still has the first token
    return falling.gather(1, last)[:, 0]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which knows no float64
