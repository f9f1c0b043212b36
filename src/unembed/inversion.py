"""Inverting a text or a file of vectors: what the command and the demo do with an `Inverter`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from unembed.encoders.base import Encoder
from unembed.errors import EmbeddingError
from unembed.inverter import Inversion, Inverter


@dataclass(frozen=True)
class RoundTrip:
    """A text, what its embedding gave away, and how close that is.

    Attributes:
        original: The text.
        inversion: What was recovered from the vector.
        cosine: Between the vectors of the original and of the recovered text; None when nothing
            was recovered.
        token_recall: Share of the original's distinct tokens that came back.
        exact: The token sequences are the same.
        seconds: Decoding time, without loading and encoding.
    """

    original: str
    inversion: Inversion
    cosine: float | None
    token_recall: float
    exact: bool
    seconds: float


def invert_text(inverter: Inverter, encoder: Encoder, text: str, **options: Any) -> RoundTrip:
    """Encode a text, invert the vector, encode the recovery and compare.

    Args:
        inverter: Trained for this encoder.
        encoder: Makes the vectors.
        text: At least one visible character.
        **options: Of `Inverter.invert`.

    Raises:
        EncoderError: The inverter belongs to another encoder.
        EmbeddingError: The text is empty.
    """
    inverter.require_encoder(encoder)
    vector = encoder.encode([text])
    began = time.perf_counter()
    inversion = inverter.invert(vector, **options)[0]
    seconds = time.perf_counter() - began
    cosine = None
    if inversion.text:
        cosine = float((encoder.encode([inversion.text]) @ vector[0])[0])
    original = inverter.tokenizer.encode([text])[0]
    wanted = set(original)
    return RoundTrip(
        original=text,
        inversion=inversion,
        cosine=cosine,
        token_recall=len(wanted & set(inversion.token_ids)) / max(len(wanted), 1),
        exact=original == inversion.token_ids,
        seconds=seconds,
    )


def invert_file(inverter: Inverter, path: Path, **options: Any) -> list[Inversion]:
    """Invert the vectors of a ``.npy`` file.

    Args:
        inverter: Trained for the encoder that made them.
        path: A NumPy array, one vector [D] or many [N, D].
        **options: Of `Inverter.invert`.

    Raises:
        EmbeddingError: The file cannot be read or its vectors cannot be inverted.
    """
    try:
        with path.open("rb") as file:
            vectors = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise EmbeddingError(
            f"a NumPy array at {path}", str(error), "Save the vectors with numpy.save"
        ) from error
    return inverter.invert(vectors, **options)
