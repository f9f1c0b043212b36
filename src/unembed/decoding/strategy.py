"""What every strategy takes and returns, and how its options are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.diffusion import DenoiserFn, Schedule
from unembed.errors import ConfigError


@dataclass(frozen=True)
class Canvas:
    """The sequence to fill.

    Attributes:
        length: Positions L.
        mask_id: Id of the mask token, which no strategy may leave behind.
        schedule: Turns the share of masked positions into the denoiser's timestep.
        end_id: Id of the token that ends a text; what follows it is never read. None: texts fill
            all L positions.
        pad_id: Id of the token that fills the positions after the end; None where there is no end.
    """

    length: int
    mask_id: int
    schedule: Schedule
    end_id: int | None = None
    pad_id: int | None = None

    def blank(self, batch: int, device: torch.device) -> Tensor:
        """Fully masked sequences [B, L]."""
        return torch.full((batch, self.length), self.mask_id, device=device)


@dataclass(frozen=True)
class DecodingStep:
    """The state after one denoiser pass, for live displays; tensors are copies on the CPU.

    A strategy with several hypotheses a text shows the best one of each.

    Attributes:
        index: Passes done, from 1.
        total: Passes planned at most; in the last step it equals ``index``.
        tokens: Ids [B, L]; the mask token where undecided.
        confidences: Probability the denoiser gave each settled token [B, L]; 0 where undecided.
        changed: Positions whose token is another than in the step before [B, L], boolean.
        mask_ratio: Share of undecided positions of each sequence [B].
        cosines: Of each text's best hypothesis so far with its embedding [B], where the strategy
            calls the encoder; else None.
        encoder_calls: Texts embedded so far for each vector [B], where the strategy calls the
            encoder; else None.
        guesses: The likeliest token of each position that was masked before the pass [B, L], where
            the strategy asks about all of them; else None. On a CPU that of a position far from
            being the surest may be out of date (`unembed.decoding.lazy`).
        guess_confidences: Its probability [B, L]; 0 where the position was settled before.
    """

    index: int
    total: int
    tokens: Tensor
    confidences: Tensor
    changed: Tensor
    mask_ratio: Tensor
    cosines: Tensor | None = None
    encoder_calls: Tensor | None = None
    guesses: Tensor | None = None
    guess_confidences: Tensor | None = None


@dataclass(frozen=True)
class Decoded:
    """What a strategy returns; nothing in it depends on what else was in the batch.

    Attributes:
        tokens: Ids [B, L], none of them the mask token.
        confidences: Probability the denoiser gave each token when it was settled [B, L].
        order: Pass (from 1) in which each position was settled for the last time [B, L].
        passes: Denoiser passes spent on each text [B]; a pass over N hypotheses of it counts N.
        encoder_calls: Texts embedded for each vector [B]; zeros for every vector-only strategy.
    """

    tokens: Tensor
    confidences: Tensor
    order: Tensor
    passes: Tensor
    encoder_calls: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        if not len(self.encoder_calls):
            object.__setattr__(self, "encoder_calls", torch.zeros_like(self.passes))


OnStep = Callable[[DecodingStep], None]


class Scorer(Protocol):
    """The true encoder at a price: how near a hypothesis's embedding is to the target vector.

    Each text it embeds is a call, counted for the vector it was embedded for. A hypothesis that
    reads the same as an earlier one of the same vector is looked up, not embedded, and costs
    nothing; one without any visible text is not embedded either and scores -1.
    """

    def __call__(self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Cosines [N] in float32 on the CPU, -1 to 1.

        Where a vector's calls are used up in the middle of its hypotheses, the remaining ones
        that would need a call score -infinity and are not embedded.

        Args:
            rows: For each hypothesis, the index in the batch of the vector it is for [N].
            token_ids: The hypotheses [N, L] or N rows; read up to the end token.
        """
        ...

    def vectors(
        self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]
    ) -> NDArray[np.float32]:
        """The embeddings themselves [N, D] of hypotheses that were scored; no calls.

        Unit vectors; zeros for a hypothesis that was not embedded.
        """
        ...

    def remaining(self, row: int) -> int:
        """Calls left for one vector of the batch."""
        ...

    @property
    def calls(self) -> Tensor:
        """Calls made for each vector of the batch [B], on the CPU."""
        ...


class Strategy(Protocol):
    """From embeddings to token ids with a budget of denoiser passes.

    A strategy is a frozen dataclass whose fields are its options (int, float, bool or str, each
    with a default), checked when it is made; `unembed.decoding.find_strategy` makes one by name.
    """

    needs_encoder: ClassVar[bool]

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        canvas: Canvas,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        scorer: Scorer | None = None,
    ) -> Decoded:
        """Fill the canvas for each embedding.

        Args:
            denoiser: ``(tokens [B, L], embedding [B, D], t [B], where [B, L]) → logits [M, V]``.
            embedding: Unit vectors [B, D].
            canvas: Length, special tokens and schedule.
            steps: Denoiser passes at most for each hypothesis, from 1.
            generators: One source of randomness per sequence, on the CPU, so that a text depends
                neither on what else is in its batch nor on the device.
            on_step: Called after every pass.
            scorer: The encoder; a strategy that `needs_encoder` is never called without one.
        """
        ...


def require_between(
    option: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Refuse an option's value outside low..high, the ends included (``open_low``: not low).

    An infinite one is outside too.

    Raises:
        ConfigError: Names the option, the value and the range.
    """
    if not low <= value <= high or (open_low and value == low) or value == float("inf"):
        least = f"above {low:g}" if open_low else f"of at least {low:g}"
        most = f" and at most {high:g}" if high != float("inf") else ""
        raise ConfigError(f"{option} {least}{most}", f"{value}", f"Correct the option {option}")


def require_among(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse an option's value that is none of the known ones.

    Raises:
        ConfigError: Names the option, the value and the known values.
    """
    if value not in known:
        raise ConfigError(
            f"{option} among {', '.join(known)}", repr(value), f"Correct the option {option}"
        )
