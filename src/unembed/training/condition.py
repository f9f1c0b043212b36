"""What is done to the embeddings of a batch before the denoiser sees them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unembed.training.batch import sent


def perturb(
    embedding: Tensor,
    dropout: float,
    noise: float,
    generator: torch.Generator,
    batch: int | None = None,
    own: slice = slice(None),
) -> Tensor:
    """Noisy unit vectors, some of them replaced by the null condition.

    The null condition is the zero vector: what a denoiser trained with it predicts there is its
    unconditional distribution, which classifier-free guidance (Ho and Salimans, 2022, arXiv
    2207.12598) needs.

    Args:
        embedding: Unit vectors [b, D].
        dropout: Probability of the null condition, 0 to 1.
        noise: Length of the Gaussian noise added before vectors are made unit again, as a share of
            theirs: 0.02 is the rounding of an int8 store.
        generator: Source of randomness; nothing is drawn from it where both are 0.
        batch: Size B of the batch these are the rows ``own`` of; it is drawn for all of it, so
            that the draws do not depend on how a batch is shared out.
        own: Which rows these are.

    Returns:
        [b, D].
    """
    batch, width = len(embedding) if batch is None else batch, embedding.shape[1]
    if noise:
        drawn = sent(torch.randn(batch, width, generator=generator)[own], embedding.device)
        embedding = F.normalize(embedding + drawn * (noise / width**0.5), dim=1)
    if dropout:
        kept = torch.rand(batch, 1, generator=generator)[own] >= dropout
        embedding = embedding * sent(kept, embedding.device)
    return embedding
