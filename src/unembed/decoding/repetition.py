"""A denoiser that is slower to say again what the text says already."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unembed.decoding.base import Canvas, require_between
from unembed.decoding.glance import Glance, TwoSpeeds
from unembed.diffusion import DenoiserFn

DEFAULT = 2.0


@dataclass(frozen=True)
class Repetition:
    """Takes ``penalty`` nats off a token's logit for each time it stands in the sequence.

    A vector says which words a text has better than where they are. A denoiser that knows so puts
    the likeliest word at every place it may have, and takes too little back once it is settled
    somewhere. The penalty is that of Keskar et al. (2019, arXiv 1909.05858), subtracted for each
    occurrence, so that a word the denoiser is sure of can be said again.

    Attributes:
        penalty: Nats for each occurrence, from 0; 0 is the plain denoiser.
    """

    penalty: float = DEFAULT

    def __post_init__(self) -> None:
        require_between("repetition", self.penalty, 0.0)

    def wrap(self, denoiser: DenoiserFn, canvas: Canvas) -> DenoiserFn:
        """The denoiser with the penalty, usable with every strategy; no pass more."""
        if self.penalty == 0.0:
            return denoiser
        special = [i for i in (canvas.mask_id, canvas.end_id, canvas.pad_id) if i is not None]

        def costs(tokens: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
            """The tokens around each position in question and what each costs, [M, L] both."""
            said = tokens != special[0]
            for token in special[1:]:
                said &= tokens != token
            rows = where.nonzero()[:, 0]
            return tokens[rows], (-self.penalty * said.float())[rows]

        def penalised(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Tensor:
            logits = denoiser(tokens, embedding, t, where).float()  # [M, V]
            return logits.scatter_add_(1, *costs(tokens, where))

        if not isinstance(denoiser, TwoSpeeds):
            return penalised
        plain_glance = denoiser.glance

        def glance(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Glance:
            said, cost = costs(tokens, where)
            plain = plain_glance(tokens, embedding, t, where)

            def exactly(rows: Tensor, wanted: Tensor | None) -> Tensor:
                logits = plain.exactly(rows, wanted)
                if wanted is None:
                    return logits.scatter_add_(1, said[rows], cost[rows])
                same = wanted[:, :, None] == said[rows][:, None]  # [R, K, L]
                return logits + (same * cost[rows][:, None]).sum(dim=2)

            def coarse(rows: Tensor) -> Tensor:
                return plain.coarse(rows).scatter_add_(1, said[rows], cost[rows])

            return Glance(coarse, exactly)

        return TwoSpeeds(penalised, glance)
