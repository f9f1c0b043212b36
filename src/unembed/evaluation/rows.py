"""Rows of the tables: attacks and baselines, and how each makes its recoveries."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.data.pairs import CorpusSearch, Pairs, nearest_rows
from unembed.decoding import Decoding
from unembed.decoding.settings import as_decoding
from unembed.decoding.strategy import options_of
from unembed.denoiser import weights_digest
from unembed.encoders.base import Encoder
from unembed.errors import ConfigError, DataError, EncoderError
from unembed.evaluation.cache import settings_digest
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import Sample
from unembed.inverter import Inverter
from unembed.tokenizer import TextTokenizer

BATCH, CHUNK = 64, 1024
_TRIAL = 16  # texts
_PASSES_A_CALL, _PASSES_A_SAMPLE = 1.3, 6.0

ProgressFn = Callable[[str, int, int], None]

# ``all``: every strategy; those that call the encoder are tried on fewer texts, all on the same
ALL = (
    "greedy",
    "greedy:steps=32",
    "greedy:repetition=0",
    "greedy:order=margin",
    "greedy:order=left-to-right",
    "greedy:lengths=3",
    "greedy:guidance=0.5/0.5",
    "entropy-bounded",
    "euler:temperature=0.5",
    "euler:repetition=0",
    "euler-remask:temperature=0.5",
    "euler-remask:temperature=0.5:threshold=0.3:probability=1",
    "two-stage:temperature=0.5",
    "best-of:samples=1:encoder_calls=1:limit=32",
    "best-of:encoder_calls=16:limit=32",
    "residual:encoder_calls=16:limit=32",
    "guided-search:encoder_calls=300:limit=32",
)


@dataclass(frozen=True)
class Attack:
    """A way to decode, and how many texts it is tried on.

    Attributes:
        decoding: How.
        limit: Texts, drawn from those of the evaluation; all when None.
    """

    decoding: Decoding
    limit: int | None = None

    @classmethod
    def parse(cls, text: str, steps: int | None = None) -> Attack:
        """Read what `Decoding.parse` does, with ``limit=N`` among the settings.

        Raises:
            ConfigError: Not of that form.
        """
        settings = text.strip().split(":")
        limits = [setting for setting in settings if setting.startswith("limit=")]
        number = limits[0].partition("=")[2] if limits else "1"
        if len(limits) > 1 or not number.isdecimal() or int(number) < 1:
            raise ConfigError(
                f"one limit of at least 1 in {text!r}", ":".join(limits), "Correct --strategies"
            )
        rest = ":".join(setting for setting in settings if setting not in limits)
        return cls(Decoding.parse(rest, steps), int(number) if limits else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        decoding = self.decoding
        return {
            "decoding": str(decoding),
            "strategy": decoding.name,
            "steps": decoding.steps,
            "encoder_calls": decoding.encoder_calls,
            "options": options_of(decoding.strategy),
            "guidance": decoding.guidance,
            "repetition": decoding.repetition_penalty,
            "length": decoding.length,
            "limit": self.limit,
            "threat_model": decoding.threat_model,
        }

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        limit = "" if self.limit is None else f":limit={self.limit}"
        return f"{self.decoding}{limit}"


Spec = str | Decoding | Attack


def name_attacks(strategy: Spec | Sequence[Spec], steps: int | None) -> dict[str, Attack]:
    """Name the rows of a table: ``inverter`` for one attack, each as it was spelled for several.

    ``all`` stands for `ALL`.

    Raises:
        ConfigError: None, one twice, or not of the right form.
    """
    value: Any = strategy  # from Python anything may come
    specs = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    every = [one for item in specs for one in (ALL if item == "all" else (item,))]
    attacks: dict[str, Attack] = {}
    for item in every:
        attack = item if isinstance(item, (str, Attack)) else Attack(as_decoding(item, {}))
        parsed = Attack.parse(attack, steps) if isinstance(attack, str) else attack
        attacks[str(attack).strip()] = parsed
    if not every or len(attacks) < len(every):
        raise ConfigError("different strategies", repr(every), "Correct --strategies")
    return {"inverter": next(iter(attacks.values()))} if len(attacks) == 1 else attacks


@dataclass
class Part:
    """A chunk of the texts with their vectors, stored ones or made when first asked for."""

    encoder: Encoder | None
    first: int
    samples: list[Sample]
    inverter: Inverter

    @cached_property
    def stored_vectors(self) -> NDArray[np.float32] | None:
        """Stored vectors [N, D'] of the texts, where they came with them."""
        vectors = [sample.vector for sample in self.samples if sample.vector is not None]
        return np.stack(vectors) if vectors else None

    @cached_property
    def vectors(self) -> NDArray[np.float32]:
        """What is inverted: stored vectors as they are, else the embeddings of the texts [N, D]."""
        return self.targets if self.stored_vectors is None else self.stored_vectors

    @cached_property
    def targets(self) -> NDArray[np.float32]:
        """Unit vectors [N, D] with which recovered texts are compared.

        Stored ones, where they are of the inverter's encoder; those of another only stand for
        what the inverter's would be, which is embedded here, or without an encoder mapped.
        """
        if self.stored_vectors is not None and (
            self.inverter.alignment is None or self.encoder is None
        ):
            return self.inverter.map_vectors(self.stored_vectors)
        return require_encoder(self.encoder).encode([sample.text for sample in self.samples])

    def some(self, places: Sequence[int]) -> Part:
        """A part of it: the texts at some places."""
        samples = [self.samples[place] for place in places]
        return Part(self.encoder, self.first, samples, self.inverter)

    @property
    def shuffled(self) -> NDArray[np.float32]:
        """Vectors inverted for another text than theirs."""
        return self.vectors[derangement(len(self.samples))]


def require_no_map(inverter: Inverter) -> None:
    """Refuse an aligned inverter where vectors of its own encoder come; raises DataError."""
    if inverter.alignment is not None:
        need = f"stored vectors of {inverter.alignment.name} with the texts, for the alignment"
        raise DataError(need, "texts alone", "Pass them, or leave the alignment out")


def require_encoder(encoder: Encoder | None) -> Encoder:
    """Return the encoder of texts that come without vectors.

    Raises:
        EncoderError: There is none.
    """
    if encoder is None:
        raise EncoderError(
            "the encoder, or a stored vector with each text",
            "neither",
            "Pass the encoder, or vectors=",
        )
    return encoder


Recover = Callable[[Part, int, int], list[Recovery]]  # part, start and stop within it


@dataclass(frozen=True)
class Bench:
    """Bench on which recoveries are made."""

    inverter: Inverter
    encoder: Encoder | None
    attacks: dict[str, Attack]
    pairs: Pairs | None
    counts: NDArray[np.int64] | None
    seed: int
    report: ProgressFn
    total: int
    corpus: Pairs | None = None

    def corpus_search(self, attack: Attack) -> CorpusSearch | None:
        """What guided search starts from beside the greedy text, where there is a corpus."""
        if self.corpus is None or attack.decoding.name != "guided-search":
            return None
        self.inverter.encoder.require_same(self.corpus.encoder, "the corpus")
        return CorpusSearch(self.corpus, self.inverter.tokenizer)

    def describe(self, attack: Attack) -> dict[str, Any]:
        """Plain data of an attack, a corpus named among what the attacker has."""
        plain = attack.to_dict()
        if self.corpus is not None and attack.decoding.name == "guided-search":
            plain["threat_model"] += " + corpus"
        return plain

    @property
    def guesser(self) -> Attack:
        """The attack of the baselines, from the vector alone: the first such, or greedy."""
        alone = [a for a in self.attacks.values() if not a.decoding.strategy.needs_encoder]
        return replace(alone[0], limit=None) if alone else Attack(Decoding())

    def rows(self) -> Iterator[tuple[str, Recover, int, dict[str, Any]]]:
        """Name, maker, batch size and settings of every row."""
        for name, attack in self.attacks.items():
            yield name, self._decode(self.inverter, attack), BATCH, {"attack": attack.to_dict()}
        settings = {"attack": self.guesser.to_dict()}
        shuffled = self._decode(self.inverter, self.guesser, shuffled=True)
        yield SHUFFLED, shuffled, BATCH, settings
        blind = self._decode(unconditional(self.inverter), self.guesser)
        yield BLIND, blind, BATCH, settings
        if self.pairs is not None:
            searched = {"pairs": settings_digest(self.pairs.manifest)}
            yield NEAREST, self._nearest, CHUNK + 1, searched
        digest = None if self.counts is None else settings_digest(self.counts.tolist())
        drawing = RandomTokens(self.inverter.tokenizer, self.counts, self.seed)
        yield RANDOM, self._drawing(drawing), BATCH, {"counts": digest}

    def show(self, row: str, count: int) -> None:
        """Report how many texts a row has."""
        self.report(row, count, self.total)

    def seconds(self, part: Part, attack: Attack, texts: int) -> float:
        """Estimate the time of an attack and of embedding what it recovers, by a trial.

        Args:
            part: Some texts for the trial: a denoiser pass, an embedding.
            attack: Of which the time is wanted; a search spends about 1.3 passes a call, a choice
                among samples 6 (docs/reports/every-strategy.md).
            texts: How many of them are left.
        """
        decoding, vectors = attack.decoding, part.vectors[:_TRIAL]
        each = self._trial(lambda: self.inverter.invert(vectors, decoding="greedy:steps=1"))
        calls = decoding.encoder_calls if decoding.strategy.needs_encoder else 0
        options = options_of(decoding.strategy)
        passes = (
            decoding.steps
            * max(1, int(options.get("lengths", 1)))
            * (2 if decoding.guidance else 1)
        )
        if calls:
            each_call = _PASSES_A_CALL if decoding.name == "guided-search" else _PASSES_A_SAMPLE
            passes = max(passes, round(calls * each_call))
        embedding = 0.0
        if self.encoder is not None:
            texts_embedded = [sample.text for sample in part.samples[:_TRIAL]]
            embedding = self._trial(partial(self.encoder.encode, texts_embedded))
        count = min(texts, attack.limit or texts)
        return count * (passes * each + (calls + 1) * embedding) / len(vectors)

    @staticmethod
    def _trial(run: Callable[[], Any]) -> float:
        """Seconds of a second run; in the first one things are loaded."""
        run()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def provenance(self) -> dict[str, Any]:
        """Facts that every recovery depends on, beside the texts and the row's settings."""
        inverter, alignment = self.inverter, self.inverter.alignment
        corpus = {} if self.corpus is None else {"corpus": settings_digest(self.corpus.manifest)}
        return corpus | {
            "weights": weights_digest(inverter.denoiser),
            **({} if alignment is None else {"alignment": alignment.digest}),
            "dtypes": [str(c.dtype) for c in (inverter.compute, inverter.search_compute)],
            "diffusion": inverter.diffusion,
            "tokenizer": inverter.tokenizer.digest,
            "encoder": None if self.encoder is None else list(self.encoder.identity.key),
            "unembed": version("unembed"),
        }

    def _decode(self, inverter: Inverter, attack: Attack, shuffled: bool = False) -> Recover:
        def recover(part: Part, start: int, stop: int) -> list[Recovery]:
            embeddings = (part.shuffled if shuffled else part.vectors)[start:stop]
            began = time.perf_counter()
            inversions = inverter.invert(
                embeddings,
                seed=self.seed,
                first_index=part.first + start,
                decoding=attack.decoding,
                encoder=self.encoder if attack.decoding.encoder_calls else None,
                corpus=self.corpus_search(attack),
            )
            each = (time.perf_counter() - began) * 1000 / len(inversions)
            texts = [inversion.text for inversion in inversions]
            cosines = cosines_of(self.encoder, texts, part.targets[start:stop])
            return [
                Recovery(i.text, i.token_ids, i.confidences, i.passes, i.encoder_calls, each, c)
                for i, c in zip(inversions, cosines, strict=True)
            ]

        return recover

    def _nearest(self, part: Part, start: int, stop: int) -> list[Recovery]:
        assert self.pairs is not None
        pairs, total = self.pairs, len(self.pairs)
        tokens, cosines = nearest_pairs(
            pairs,
            part.targets[start:stop],
            lambda count: self.report("searching the training texts", count, total),
        )
        texts = pairs.tokenizer.decode(tokens)
        if self.counts is None:  # of another tokenizer
            tokens = self.inverter.tokenizer.encode(texts)
        return [
            Recovery(text, ids, cosine=cosine)
            for text, ids, cosine in zip(texts, tokens, cosines, strict=True)
        ]

    def _drawing(self, drawing: RandomTokens) -> Recover:
        def recover(part: Part, start: int, stop: int) -> list[Recovery]:
            batch = part.samples[start:stop]
            tokens = [
                drawing.draw(part.first + index, len(sample.token_ids))
                for index, sample in enumerate(batch, start=start)
            ]
            texts = self.inverter.tokenizer.decode(tokens)
            cosines = cosines_of(self.encoder, texts, part.targets[start:stop])
            return [
                Recovery(text, ids, cosine=cosine)
                for text, ids, cosine in zip(texts, tokens, cosines, strict=True)
            ]

        return recover


def cosines_of(
    encoder: Encoder | None, texts: Sequence[str], vectors: NDArray[np.float32]
) -> list[float | None]:
    """Cosine of each re-encoded text with its target; None where there is nothing to encode."""
    result: list[float | None] = [None] * len(texts)
    rows = [index for index, text in enumerate(texts) if text.strip()]
    if rows and encoder is not None:
        again = encoder.encode([texts[row] for row in rows])
        for row, cosine in zip(rows, np.sum(again * vectors[rows], axis=1), strict=True):
            result[row] = float(cosine)
    return result


SHUFFLED, BLIND = "shuffled embedding", "no embedding"
NEAREST, RANDOM = "nearest training text", "random tokens"
BASELINES = (SHUFFLED, BLIND, NEAREST, RANDOM)


class _Unconditional:
    """A denoiser that sees the null condition, the zero vector, whatever it is given."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self.sizes = denoiser.sizes

    def __call__(self, tokens: Tensor, embedding: Tensor, *rest: Any) -> Tensor:
        logits: Tensor = self._denoiser(tokens, torch.zeros_like(embedding), *rest)
        return logits


def unconditional(inverter: Inverter) -> Inverter:
    """The same inverter with a denoiser that never sees the embedding: what it writes unprompted.

    No real vector is zero, so `Inverter.invert` refuses one; the denoiser is handed it here. One
    trained without condition dropout has not seen it either, and may write nonsense.
    """
    blind = copy.copy(inverter)
    # Nor may it see through another form of the network
    vars(blind).update(denoiser=_Unconditional(inverter.denoiser))
    return blind


def derangement(count: int) -> NDArray[np.int64]:
    """Map each of some neighbouring texts to the index of another, half of them further on.

    Neighbours are often of one passage, and so is what they speak of.
    """
    return np.roll(np.arange(count), count // 2)


class RandomTokens:
    """Draws as many tokens as the original has.

    Args:
        tokenizer: Of the inverter.
        counts: How often each token occurs in the training corpus, [V]; alike when None.
        seed: Each text draws from (seed, its index).
    """

    def __init__(
        self, tokenizer: TextTokenizer, counts: NDArray[np.int64] | None, seed: int
    ) -> None:
        shares = np.ones(tokenizer.size) if counts is None else counts.astype(np.float64)
        shares[list(tokenizer.special_ids)] = 0.0
        self._cumulative = np.cumsum(shares) / shares.sum()
        self._seed = seed

    def draw(self, index: int, count: int) -> list[int]:
        """Token ids for the text ``index``."""
        points = np.random.default_rng([self._seed, index]).random(count)
        tokens: list[int] = np.searchsorted(self._cumulative, points, side="right").tolist()
        return tokens


def nearest_pairs(
    pairs: Pairs, vectors: NDArray[np.float32], report: Callable[[int], None]
) -> tuple[list[list[int]], list[float]]:
    """Content tokens and cosine of the nearest prepared pair to each vector [N, D].

    Args:
        pairs: Searched from first to last.
        vectors: Unit vectors.
        report: Called with the number of pairs searched.
    """
    rows, cosines = nearest_rows(pairs, vectors, 1, report)
    tokens, _ = pairs.rows(rows[:, 0])
    content = pairs.tokenizer.content_positions
    texts = [[row[i] for i in content(row)] for row in tokens.tolist()]
    return texts, cosines[:, 0].tolist()
