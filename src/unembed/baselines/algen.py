"""ALGEN's map from a few leaked pairs, as published (arXiv 2502.11308, section 3).

Its target space here is that of the inverter's encoder, which our decoder reads; the original maps
into the space of flan-t5-small and decodes with that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from unembed.encoders.alignment import Alignment
from unembed.encoders.base import EncoderIdentity


def fit_pseudo_inverse(
    x: NDArray[np.float32], y: NDArray[np.float32], target: EncoderIdentity
) -> Alignment:
    """Fit W = pinv(XᵀX) XᵀY: no means, no penalty.

    Args:
        x: Leaked unit vectors [n, D'].
        y: Unit vectors of the same texts by the inverter's encoder [n, D].
        target: That encoder.
    """
    wide = x.astype(np.float64)
    matrix = (np.linalg.pinv(wide.T @ wide) @ (wide.T @ y)).astype(np.float32)
    means = np.zeros(len(matrix), np.float32), np.zeros(matrix.shape[1], np.float32)
    return Alignment("linear", matrix, means[0], means[1], len(x), None, None, {}, 0.0, target)
