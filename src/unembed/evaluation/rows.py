"""What makes the recoveries of each row of the tables: attacks and baselines."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unembed.data.pairs import Pairs
from unembed.encoders.base import Encoder
from unembed.evaluation import baselines
from unembed.evaluation.attacks import Attack
from unembed.evaluation.cache import settings_digest
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import Sample
from unembed.inverter import Inverter

BATCH, CHUNK = 64, 1024

ProgressFn = Callable[[str, int, int], None]


@dataclass
class Part:
    """A chunk of the texts with their vectors, made when first asked for."""

    encoder: Encoder
    first: int
    samples: list[Sample]

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """Embeddings [N, D] of the texts."""
        return self.encoder.encode([sample.text for sample in self.samples])

    def some(self, places: Sequence[int]) -> Part:
        """A part of it: the texts at some places."""
        return Part(self.encoder, self.first, [self.samples[place] for place in places])

    @property
    def shuffled(self) -> NDArray[np.float32]:
        """For each text the embedding of another."""
        return self.vectors[baselines.another_text(len(self.samples))]


Recover = Callable[[Part, int, int], list[Recovery]]  # part, start and stop within it


@dataclass(frozen=True)
class Bench:
    """Everything that makes recoveries."""

    inverter: Inverter
    encoder: Encoder
    attacks: dict[str, Attack]
    pairs: Pairs | None
    counts: NDArray[np.int64] | None
    seed: int
    report: ProgressFn
    total: int

    @property
    def guesser(self) -> Attack:
        """The attack of the controls, which must not ask the encoder: the first such, or greedy."""
        alone = [attack for attack in self.attacks.values() if not attack.encoder_calls]
        return alone[0] if alone else Attack("greedy")

    def rows(self) -> Iterator[tuple[str, Recover, int, dict[str, Any]]]:
        """Name, maker, batch size and settings of every row."""
        for name, attack in self.attacks.items():
            yield name, self._attacking(self.inverter, attack), BATCH, {"attack": asdict(attack)}
        settings = {"attack": asdict(self.guesser)}
        shuffled = self._attacking(self.inverter, self.guesser, shuffled=True)
        yield baselines.SHUFFLED, shuffled, BATCH, settings
        blind = self._attacking(baselines.blindfold(self.inverter), self.guesser)
        yield baselines.BLIND, blind, BATCH, settings
        if self.pairs is not None:
            yield (
                baselines.NEAREST,
                self._nearest,
                CHUNK + 1,
                {"pairs": settings_digest(self.pairs.manifest)},
            )
        known = None if self.counts is None else settings_digest(self.counts.tolist())
        drawing = baselines.RandomTokens(self.inverter.tokenizer, self.counts, self.seed)
        yield baselines.RANDOM, self._drawing(drawing), BATCH, {"counts": known}

    def show(self, row: str, done: int) -> None:
        """Report how many texts a row has."""
        self.report(row, done, self.total)

    def provenance(self) -> dict[str, Any]:
        """What every recovery depends on, beside the texts and the row's settings."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.inverter.denoiser.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return {
            "weights": digest.hexdigest(),
            "dtype": str(self.inverter.compute.dtype).removeprefix("torch."),
            "diffusion": self.inverter.diffusion,
            "tokenizer": self.inverter.tokenizer.digest,
            "encoder": list(self.encoder.identity.key),
            "unembed": version("unembed"),
        }

    def _attacking(self, inverter: Inverter, attack: Attack, shuffled: bool = False) -> Recover:
        def recover(part: Part, start: int, stop: int) -> list[Recovery]:
            given = (part.shuffled if shuffled else part.vectors)[start:stop]
            began = time.perf_counter()
            found = inverter.invert(
                given,
                seed=self.seed,
                first_index=part.first + start,
                **attack.arguments(self.encoder),
            )
            each = (time.perf_counter() - began) * 1000 / len(found)
            cosines = _cosines(self.encoder, [i.text for i in found], part.vectors[start:stop])
            return [
                Recovery(i.text, i.token_ids, i.confidences, i.passes, i.encoder_calls, each, c)
                for i, c in zip(found, cosines, strict=True)
            ]

        return recover

    def _nearest(self, part: Part, start: int, stop: int) -> list[Recovery]:
        assert self.pairs is not None
        pairs, total = self.pairs, len(self.pairs)
        tokens, cosines = baselines.nearest_pairs(
            pairs,
            part.vectors[start:stop],
            lambda done: self.report("searching the training texts", done, total),
        )
        texts = pairs.tokenizer.decode(tokens)
        if self.counts is None:  # of another tokenizer
            tokens = self.inverter.tokenizer.encode(texts)
        return [
            Recovery(text, ids, cosine=cosine)
            for text, ids, cosine in zip(texts, tokens, cosines, strict=True)
        ]

    def _drawing(self, drawing: baselines.RandomTokens) -> Recover:
        def recover(part: Part, start: int, stop: int) -> list[Recovery]:
            chosen = part.samples[start:stop]
            tokens = [
                drawing.draw(part.first + index, len(sample.token_ids))
                for index, sample in enumerate(chosen, start=start)
            ]
            texts = self.inverter.tokenizer.decode(tokens)
            cosines = _cosines(self.encoder, texts, part.vectors[start:stop])
            return [
                Recovery(text, ids, cosine=cosine)
                for text, ids, cosine in zip(texts, tokens, cosines, strict=True)
            ]

        return recover


def _cosines(
    encoder: Encoder, texts: Sequence[str], vectors: NDArray[np.float32]
) -> list[float | None]:
    """Cosine of each re-encoded text with its target; None where there is no text to encode."""
    result: list[float | None] = [None] * len(texts)
    rows = [index for index, text in enumerate(texts) if text.strip()]
    if rows:
        again = encoder.encode([texts[row] for row in rows])
        for row, cosine in zip(rows, np.sum(again * vectors[rows], axis=1), strict=True):
            result[row] = float(cosine)
    return result
