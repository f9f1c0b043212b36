"""Interface of every strategy, and how its options are declared and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.diffusion import DenoiserFn, Schedule
from unembed.errors import ConfigError
from unembed.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SequenceSpec:
    """The sequence to fill.

    Attributes:
        length: Positions L.
        mask_id: Id of the mask token, which no strategy may leave behind.
        schedule: Turns the share of masked positions into the denoiser's timestep.
        end_id: Id of the token that ends a text; what follows it is never read. None: texts fill
            all L positions.
        pad_id: Id of the token that fills the positions after the end; None where there is no end.
        content: Tokens before the end, from 1 to L - 1, where that number is given; else None.
        feedback: Whether the denoiser takes the embedding of a hypothesis beside the target,
            [B, 2 D].
        prefix: Positions that are enough for texts which end in them; 0: all are always decoded.
    """

    length: int
    mask_id: int
    schedule: Schedule
    end_id: int | None = None
    pad_id: int | None = None
    content: int | None = None
    feedback: bool = False
    prefix: int = 0

    @property
    def has_end(self) -> bool:
        """Whether texts end before L."""
        return self.end_id is not None and self.pad_id is not None

    @property
    def special_ids(self) -> list[int]:
        """Ids of the mask token and, where there are such, of end and padding."""
        return [i for i in (self.mask_id, self.end_id, self.pad_id) if i is not None]

    def masked(self, batch: int, device: torch.device) -> Tensor:
        """Fully masked sequences [B, L]; of a given length, with their end and padding."""
        blank = torch.full((batch, self.length), self.mask_id, device=device)
        if self.content is None:
            return blank
        return self.with_end(blank, torch.full((batch,), self.content, device=device))

    def with_length(self, content: int | None) -> SequenceSpec:
        """The same with a number of content tokens that is given; itself when None.

        Raises:
            ConfigError: More tokens than L - 1, or texts have no end.
        """
        if content is None:
            return self
        if not self.has_end or content >= self.length:
            raise ConfigError(
                f"a length of 1 to {self.length - 1} tokens, what this inverter writes",
                str(content),
                "Correct --length",
            )
        return dataclasses.replace(self, content=content)

    def with_end(self, tokens: Tensor, content: Tensor) -> Tensor:
        """Put end and padding behind so many tokens [B] of each sequence [B, L]."""
        places = torch.arange(self.length, device=tokens.device)
        tokens = torch.where(places == content[:, None], self.end_id or 0, tokens)
        return torch.where(places > content[:, None], self.pad_id or 0, tokens)


@dataclass(frozen=True)
class DecodingStep:
    """The state after one denoiser pass, for live displays; tensors are copies on the CPU.

    A strategy with several hypotheses a text shows the best one of each.

    Attributes:
        index: Passes done, from 1.
        total: Passes planned at most; in the last step it equals ``index``.
        tokens: Ids [B, L]; the mask token where masked.
        confidences: Probability the denoiser gave each unmasked token [B, L]; 0 where masked.
        changed: Positions whose token is another than in the step before [B, L], boolean.
        mask_ratio: Share of masked positions of each sequence [B].
        cosines: Of each text's best hypothesis so far with its embedding [B], where the strategy
            calls the encoder; else None.
        encoder_calls: Texts embedded so far for each vector [B], where the strategy calls the
            encoder; else None.
        guesses: The most probable token of each position that was masked before the pass [B, L],
            where the strategy predicts all of them; else None.
        guess_confidences: Its probability [B, L]; 0 where the position was unmasked before.
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
    """Result of a strategy; nothing in it depends on what else was in the batch.

    Attributes:
        tokens: Ids [B, L], none of them the mask token.
        confidences: Probability the denoiser gave each token when it was unmasked [B, L].
        order: Pass (from 1) in which each position was unmasked for the last time [B, L].
        passes: Denoiser passes spent on each text [B]; a pass over N hypotheses of it counts N.
        encoder_calls: Texts embedded for each vector [B]; zeros for every vector-only strategy.
        cosines: Of each text's embedding with its vector [B], where the strategy calls the
            encoder; else None.
    """

    tokens: Tensor
    confidences: Tensor
    order: Tensor
    passes: Tensor
    encoder_calls: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    cosines: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.encoder_calls):
            object.__setattr__(self, "encoder_calls", torch.zeros_like(self.passes))

    def inversions(self, tokenizer: TextTokenizer) -> list[Inversion]:
        """Read the texts."""
        rows = self.tokens.tolist()
        cosines = [None] * len(rows) if self.cosines is None else self.cosines.tolist()
        inversions = []
        for text, row, probabilities, passes, calls, order, cosine in zip(
            tokenizer.decode(rows),
            rows,
            self.confidences.tolist(),
            self.passes.tolist(),
            self.encoder_calls.tolist(),
            self.order.tolist(),
            cosines,
            strict=True,
        ):
            content = tokenizer.content_positions(row)
            ids, confidences, turns = ([x[i] for i in content] for x in (row, probabilities, order))
            inversions.append(Inversion(text, ids, confidences, passes, calls, turns, cosine))
        return inversions


@dataclass(frozen=True)
class Inversion:
    """One recovered text.

    Attributes:
        text: The text.
        token_ids: Its content tokens, up to the end token.
        confidences: Probability the denoiser gave each of them when it was unmasked, 0 to 1.
        passes: Denoiser passes spent.
        encoder_calls: Texts embedded on the way (0: the vector alone was used).
        order: Pass, from 1, in which each token was unmasked for the last time.
        cosine: Between the vector and that of the text, where it was embedded; else None.
    """

    text: str
    token_ids: list[int]
    confidences: list[float]
    passes: int
    encoder_calls: int
    order: list[int] = field(default_factory=list)
    cosine: float | None = None


OnStep = Callable[[DecodingStep], None]


class Oracle(Protocol):
    """The true encoder at a price: how near a hypothesis's embedding is to the target vector.

    Each text it embeds is a call, counted for the vector it was embedded for. A hypothesis that
    reads the same as an earlier one of the same vector is looked up, not embedded, and costs
    nothing; one without any visible text is not embedded either and scores -1.
    """

    def __call__(self, rows: Sequence[int], token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Score hypotheses: cosines [N] in float32 on the CPU, -1 to 1.

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
        """Look up the embeddings [N, D] of hypotheses that were scored; no calls.

        Unit vectors; zeros for a hypothesis that was not embedded.
        """
        ...

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts that were not written in token ids."""
        ...

    def target(self, row: int) -> NDArray[np.float32]:
        """Look up the target vector [D] of a row, as the encoder's numbers are: on the CPU."""
        ...

    def starts(self, row: int) -> Sequence[Sequence[int]]:
        """Give token ids of texts like that of one vector, nearest first, if a corpus has them."""
        ...

    def token_gains(
        self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float32] | None]:
        """Differentiate: what each token would gain in cosine at each place, to first order.

        It takes the encoder's weights, and each gradient counts as two calls.

        Returns:
            For each hypothesis [n, V] for its n tokens; None where no two calls are left, the
            weights are not open, or its text has other tokens.
        """
        ...

    def remaining(self, row: int) -> int:
        """Count the calls left for one vector of the batch."""
        ...

    @property
    def calls(self) -> Tensor:
        """Calls made for each vector of the batch [B], on the CPU."""
        ...


class Strategy(Protocol):
    """Way from embeddings to token ids with a budget of denoiser passes.

    A strategy is a frozen dataclass whose fields are its options, each declared by `option` and
    checked by `check_options` when it is made; `unembed.decoding.Decoding` makes one by name.
    """

    needs_encoder: ClassVar[bool]

    def __call__(
        self,
        denoiser: DenoiserFn,
        embedding: Tensor,
        spec: SequenceSpec,
        *,
        steps: int,
        generators: Sequence[torch.Generator],
        on_step: OnStep | None = None,
        oracle: Oracle | None = None,
    ) -> Decoded:
        """Fill a sequence for each embedding.

        Args:
            denoiser: ``(tokens [B, L], embedding [B, D], t [B], positions [B, L]) → logits
                [M, V]``.
            embedding: Unit vectors [B, D].
            spec: Length, special tokens and schedule.
            steps: Denoiser passes at most for each hypothesis, from 1.
            generators: One source of randomness per sequence, on the CPU, so that a text depends
                neither on what else is in its batch nor on the device.
            on_step: Called after every pass.
            oracle: The encoder; a strategy that `needs_encoder` is never called without one.
        """
        ...


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declare an option of a strategy: a dataclass field with what it may be.

    Args:
        default: An int, float, bool or str; other values must be of its type.
        help: One sentence for the command line and the demo.
        low: Least value.
        high: Largest value.
        above: A value that it must exceed, in place of ``low``.
        choices: The values a str may have.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata=metadata)


def options_of(strategy: Any) -> dict[str, int | float | bool | str]:
    """The options of a strategy, name → value."""
    return {item.name: getattr(strategy, item.name) for item in dataclasses.fields(strategy)}


def check_options(strategy: Any) -> None:
    """Refuse a dataclass with a field outside of what `option` declares.

    Raises:
        ConfigError: Names the option, what is allowed and what it is.
    """
    for item in dataclasses.fields(strategy):
        value, limits = getattr(strategy, item.name), item.metadata
        name, fix = item.name, f"Correct the option {item.name}"
        if limits.get("choices") and value not in limits["choices"]:
            expected = f"{name} among {', '.join(limits['choices'])}"
            raise ConfigError(expected, repr(value), fix)
        low, high, above = (limits.get(key) for key in ("low", "high", "above"))
        bounds = []
        if above is not None:
            bounds.append(f"above {above:g}")
        elif low is not None:
            bounds.append(f"of at least {low:g}")
        if high is not None:
            bounds.append(f"at most {high:g}" if bounds else f"of at most {high:g}")
        inside = (
            (above is None or value > above)
            and (low is None or value >= low)
            and (high is None or value <= high)
        )
        if bounds and not inside:  # not-a-number is never inside
            raise ConfigError(f"{name} {' and '.join(bounds)}", f"{value}", fix)


def require_oracle(oracle: Oracle | None, strategy: str) -> Oracle:
    """Return the oracle of a strategy that cannot do without.

    Raises:
        ConfigError: There is none.
    """
    if oracle is None:
        raise ConfigError(
            f"an encoder for the strategy {strategy}",
            "none",
            "Pass the encoder and --encoder-calls, or choose a strategy that needs the vector only",
        )
    return oracle


def mix_seeds(draws: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Make the generators' seeds for the vectors of a call.

    Args:
        draws: (seed, index) of each vector, from 0.
        count: How many vectors.

    Raises:
        ConfigError: Others than so many pairs of whole numbers.
    """
    try:
        pairs = [tuple(map(index, draw)) for draw in draws]
    except TypeError:
        pairs = []
    if len(pairs) != count or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):  # noqa: PLR2004
        raise ConfigError(
            f"draws as a pair (seed, index) for each of {count} vectors",
            f"{draws!r:.80}",
            "Correct draws",
        )
    states = (np.random.SeedSequence(pair).generate_state(2).tolist() for pair in pairs)
    return [state[0] << 31 | state[1] >> 1 for state in states]
