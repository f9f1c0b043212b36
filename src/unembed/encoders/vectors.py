"""Vectors as an encoder makes them: numbers of a kind that can be one, scaled to unit length."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.errors import EmbeddingError

_MATRIX = 2


def as_unit_vectors(embeddings: Any, dimension: int) -> NDArray[np.float32]:
    """Convert whatever a user calls an embedding to unit vectors float32 [N, D].

    Args:
        embeddings: One vector [D] or many [N, D]: NumPy, torch, nested lists, or a pandas Series
            of vectors.
        dimension: Their size D.

    Raises:
        EmbeddingError: Not numbers, numbers of a kind no encoder writes (truth values, unsigned,
            complex), not [D] or [N, D], or a vector is zero or not finite.
    """
    vectors = _as_floats(embeddings, dimension)
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != _MATRIX or vectors.shape[1] != dimension:
        raise EmbeddingError(
            f"embeddings of {dimension} dimensions, [{dimension}] or [N, {dimension}]",
            f"shape {list(np.shape(embeddings))}",
            "Use vectors of the encoder the inverter was trained for",
        )
    peaks = row_peaks(vectors)
    for bad, what in ((~np.isfinite(peaks), "NaN or infinity"), (peaks == 0, "only zeros")):
        if bad.any():
            raise EmbeddingError(
                "finite, non-zero vectors", f"{what} in vector {int(bad.argmax())}", "Leave it out"
            )
    return to_unit_length(vectors, peaks)


def row_peaks(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest magnitude in each row of [N, D]; NaN or infinity where it holds one."""
    peaks: NDArray[np.float64] = np.abs(vectors).max(axis=1, initial=0.0)
    return peaks


def to_unit_length(vectors: NDArray[np.float64], peaks: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scale finite, non-zero rows [N, D] to length 1, of 1e-320 and 1e308 as well."""
    scaled = vectors / peaks[:, None]  # a square neither overflows nor vanishes
    unit: NDArray[np.float32] = (scaled / np.linalg.norm(scaled, axis=1, keepdims=True)).astype(
        np.float32
    )
    return unit


def _as_floats(embeddings: Any, dimension: int) -> NDArray[np.float64]:
    expected = f"numbers, [{dimension}] or [N, {dimension}]"
    try:
        if hasattr(embeddings, "detach"):  # torch; NumPy has no bfloat16
            tensor = embeddings.detach().cpu()
            embeddings = tensor.float() if "bfloat16" in str(tensor.dtype) else tensor.numpy()
        array = np.asarray(embeddings)
        if array.dtype == object:  # a Series of arrays, whole numbers above 2^64
            array = np.asarray([np.asarray(row, dtype=np.float64) for row in array])
        if array.dtype.name != "bfloat16" and array.dtype.kind not in "fi":
            raise EmbeddingError(
                f"{expected}, as floats",
                f"{array.dtype}, which is no kind of number an encoder writes",
                "Undo the quantisation first: floats, or whole numbers with a sign",
            )
        vectors: NDArray[np.float64] = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise EmbeddingError(expected, str(error), "Correct the embeddings") from error
    return vectors
