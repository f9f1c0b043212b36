"""The denoiser as a CPU decodes with it quickest: its vocabulary product at two speeds."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unembed.decoding.glance import Glance, TwoSpeeds
from unembed.denoiser import Denoiser, coarse_product, logits_of, vocabulary_product
from unembed.device import Compute, choose_compute
from unembed.diffusion import DenoiserFn


def quickest(denoiser: Denoiser, compute: Compute) -> DenoiserFn:
    """The form of a denoiser to decode with, without a weight left to convert in every pass.

    On a CPU whose processor multiplies bfloat16 plainly faster (`choose_compute`), or in a coarser
    format anyway, it can be glanced at.
    """
    if compute.dtype != torch.float32:
        denoiser = denoiser.in_format(compute.dtype)
    if compute.device.type != "cpu":
        return denoiser
    coarse = denoiser.coarse_table
    if coarse is None:
        quicker = choose_compute("cpu").dtype
        if quicker == torch.float32:
            return denoiser
        coarse = denoiser.token_table.weight.detach().to(quicker)
    return two_speeds(denoiser, coarse)


def two_speeds(denoiser: Denoiser, coarse: Tensor) -> TwoSpeeds:
    """A denoiser on a CPU, to be glanced at with its token table [V, H] in a quicker format."""
    table, bias = denoiser.token_table.weight.detach(), denoiser.output_bias.detach()

    def glance(tokens: Tensor, embedding: Tensor, t: Tensor, where: Tensor) -> Glance:
        h = denoiser.features(tokens, embedding, t, where).float()  # [M, H]
        return Glance(
            lambda rows: coarse_product(h[rows], coarse, bias), partial(_exactly, h, table, bias)
        )

    return TwoSpeeds(denoiser, glance)


def _exactly(h: Tensor, table: Tensor, bias: Tensor, rows: Tensor, tokens: Tensor | None) -> Tensor:
    if tokens is None:
        return vocabulary_product(h[rows], table, bias)
    return logits_of(tokens, h[rows], table, bias)
