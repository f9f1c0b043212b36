"""Which words a vector says are in its text: one calibrated logistic regression for each word.

What a linear map finds is a lower bound; docs/words.md has commands and figures.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from unembed.encoders.base import EncoderIdentity
from unembed.encoders.vectors import VectorStatistics, as_unit_vectors
from unembed.errors import CheckpointError, DataError, EncoderError, require_switch, require_whole
from unembed.files import as_path, atomic, read_json, require_weights

FORMAT = 1
WORDS, WEIGHTS = "words.json", "words.safetensors"
COMMON = 0.1  # base rate from which on a word says little about a text
TEXTS_PER_PAIR = 4  # texts in which words are counted for each one that is embedded
_MOST_WORDS = 18_000
_LEAST_TEXTS = 8  # that a word must be in to be learned
_LEAST_PAIRS = 200
_CALIBRATION = 0.1  # share of the pairs that the regressions do not see
_PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0)  # of squared weights on features of unit variance
_TRIAL_WORDS = 600
_ROUNDS = 12
_TOGETHER = 1024  # words fitted at once: [N, 1024] logits
_LARGEST = 127  # of int8, symmetric

_WORD = re.compile(r"[^\W\d_][\w'’-]*")
_SENTENCE_START = re.compile(r"(?:^|[.!?…:\n])[\s\"'“”‘’«»(\[\-–—•*]*$")  # noqa: RUF001 - quotes
_POSSESSIVE = re.compile(r"['’]s?$")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Word:
    """A word and how probable it is.

    Attributes:
        word: Case-folded; a name as it is mostly written.
        probability: That it occurs in the text behind the vector, 0 to 1, calibrated.
        base_rate: Share of the training texts that have it.
        is_name: It is mostly written with a capital inside sentences.
    """

    word: str
    probability: float
    base_rate: float
    is_name: bool


@dataclass(eq=False)
class WordProbe:
    """P(word w occurs | vector v) = σ(weight_w · v + bias_w), of unit vectors of one encoder.

    Attributes:
        encoder: Whose vectors it reads.
        words: Case-folded, the most frequent first, W of them.
        names: Index of a word that is a name → how it is mostly written.
        weight: float32 [W, D].
        bias: float32 [W].
        base_rates: Share of the training texts that have each word [W].
        trained: Facts about the training, for the record.
        statistics: What vectors of the encoder have in common, where enough of them were seen.
    """

    encoder: EncoderIdentity
    words: list[str]
    names: dict[int, str]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    base_rates: NDArray[np.float32]
    trained: dict[str, Any] = field(default_factory=dict, repr=False)
    statistics: VectorStatistics | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"WordProbe({self.encoder.describe()}, {len(self.words)} words)"

    def probabilities(self, embeddings: Any) -> NDArray[np.float32]:
        """Compute the probability of every word, [N, W].

        Args:
            embeddings: One vector [D] or many [N, D]; see `Inverter.invert`.

        Raises:
            EmbeddingError: Not numbers, another dimension, or a vector is zero or not finite.
        """
        vectors = as_unit_vectors(embeddings, self.encoder.dimension)
        logits = vectors @ self.weight.T + self.bias
        probabilities: NDArray[np.float32] = (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(
            np.float32
        )
        return probabilities

    def most_probable(
        self, embeddings: Any, top: int = 50, *, common: bool = False, names: bool = False
    ) -> list[list[Word]]:
        """Find the most probable words of the text behind each vector.

        Args:
            embeddings: See `probabilities`.
            top: Words for each vector, from 1.
            common: Also the words that one text in ten has.
            names: Names alone.

        Raises:
            EmbeddingError, ConfigError: See `probabilities`; ``top`` is below 1.
        """
        require_whole(top=(top, 1))
        require_switch(common=common, names=names)
        mask = np.ones(len(self.words), dtype=bool) if common else self.base_rates < COMMON
        if names:
            mask &= np.isin(np.arange(len(self.words)), list(self.names))
        places = np.flatnonzero(mask)
        rows = []
        for probabilities in self.probabilities(embeddings):
            best = places[np.argsort(-probabilities[places], kind="stable")[:top]]
            rows.append([self._word(i, float(probabilities[i])) for i in best.tolist()])
        return rows

    def _word(self, index: int, probability: float) -> Word:
        spelling = self.names.get(index, self.words[index])
        return Word(spelling, probability, float(self.base_rates[index]), index in self.names)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "minilm") -> WordProbe:
        """Load a probe.

        Args:
            name_or_path: ``minilm`` (ships with the package), or a folder that `save` wrote.

        Raises:
            CheckpointError: Nothing there, or the files are damaged or do not fit together.
        """
        shipped, where = shipped_probes(), str(name_or_path)
        folder = shipped.get(where, Path(where))
        try:
            data = read_json(folder / WORDS)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']}")
            statistics = data.get("statistics")
            tensors = load_file(require_weights(folder / WEIGHTS))
            probe = cls(
                EncoderIdentity.from_dict(data["encoder"]),
                [str(word) for word in data["words"]],
                {int(index): str(name) for index, name in data["names"].items()},
                tensors["weight"].astype(np.float32) * tensors["scale"][:, None],
                tensors["bias"],
                tensors["base_rates"],
                data["trained"],
                None if statistics is None else VectorStatistics.from_dict(statistics),
            )
            count, dimension = len(probe.words), probe.encoder.dimension
            shapes = [probe.weight.shape, probe.bias.shape, probe.base_rates.shape]
            finite = all(np.isfinite(x).all() for x in (probe.weight, probe.bias, probe.base_rates))
            inside = all(0 <= index < count for index in probe.names)
            if probe.statistics is not None:
                inside &= probe.statistics.directions.shape[1] == dimension
            if shapes != [(count, dimension), (count,), (count,)] or not finite or not inside:
                raise ValueError(f"{count} words, tensors {shapes}, finite: {finite}")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError,
                AttributeError, RecursionError, EncoderError) as error:  # fmt: skip
            raise CheckpointError(
                f"a word probe: a shipped one ({', '.join(shipped) or 'none'}) or a folder with "
                f"{WORDS} and {WEIGHTS}",
                f"{name_or_path} ({type(error).__name__}: {str(error)[:200]})",
                "Make one with `unembed words --fit`, or correct --probe",
            ) from error
        return probe

    def save(self, folder: str | Path) -> None:
        """Write the probe into a folder: weights in int8 with a scale for each word, and JSON.

        Raises:
            CheckpointError: The disk refused.
        """
        folder = as_path(folder)
        scale = np.abs(self.weight).max(axis=1) / _LARGEST
        scale[scale == 0] = 1.0
        tensors = {
            "weight": np.rint(self.weight / scale[:, None]).astype(np.int8),
            "scale": scale.astype(np.float32),
            "bias": self.bias,
            "base_rates": self.base_rates,
        }
        data = {
            "format": FORMAT,
            "encoder": self.encoder.to_dict(),
            **({} if self.statistics is None else {"statistics": self.statistics.to_dict()}),
            "trained": self.trained,
            "words": self.words,
            "names": self.names,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic(folder / WEIGHTS) as weights, atomic(folder / WORDS) as words:
                weights.write_bytes(save(tensors))  # `save_file` would keep it to its owner
                words.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"room to save {folder}", str(error), "Free some space, or choose another --out"
            ) from error


def shipped_probes() -> dict[str, Path]:
    """The probes that come with the package, name → folder."""
    folder = Path(str(resources.files("unembed") / "pretrained"))
    files = sorted(folder.glob(f"*/{WORDS}"))
    return {path.parent.name.removesuffix("-words"): path.parent for path in files}


# Words of a text


def words_of(text: str) -> set[str]:
    """Find the distinct words of a text, case-folded, without the possessive s."""
    return {word for word, _, _ in _find_words(text)}


def _find_words(text: str) -> list[tuple[str, str, bool]]:
    """Each word of a text: case-folded, as written, and whether it stands inside a sentence."""
    words = []
    for match in _WORD.finditer(text):
        spelling = _POSSESSIVE.sub("", match.group().rstrip("-")).replace("’", "'")
        if spelling:
            before = text[max(0, match.start() - 8) : match.start()]
            inside = bool(before) and not _SENTENCE_START.search(before)
            words.append((spelling.casefold(), spelling, inside))
    return words


# Fitting


def fit_words(
    encoder: EncoderIdentity,
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    encode: Callable[[Sequence[str]], NDArray[np.float32]] | None = None,
    corpus: Sequence[str] = (),
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> WordProbe:
    """Learn which words a vector says are in its text.

    Each word gets a logistic regression whose weights are drawn towards a multiple of the word's
    own embedding, the same for all words, or towards 0 without an encoder; so rare words are known
    too. The penalty is that of the least log loss on a tenth of the pairs, which then also
    calibrate: logit' = a · logit + b · log-odds of the base rate + c (Platt scaling with the base
    rate as a second feature), the same for all words.

    Args:
        encoder: What made the vectors.
        texts: As they were embedded.
        vectors: Unit vectors [N, D].
        encode: Embeds the words alone, unit vectors [W, D].
        corpus: Further texts, without vectors, to count words in.
        seed: Of the split.
        progress: Called with (stage, words done, words).

    Raises:
        DataError: Fewer than 200 pairs, or no word that eight texts have.
    """
    _require_pairs(encoder, texts, len(vectors))
    order = np.random.default_rng(seed).permutation(len(texts))
    held_out, training = np.split(order, [round(_CALIBRATION * len(texts))])
    passages = [*(texts[i] for i in training), *corpus]
    words, names, counts = _vocabulary(passages)
    mean = vectors[training].mean(axis=0)
    scale = np.float32(vectors.shape[1] ** 0.5)  # to features of about unit variance

    def part(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        y = occurrences([texts[i] for i in rows], words)
        return torch.from_numpy((vectors[rows] - mean) * scale), torch.from_numpy(y)

    # Where the weights are drawn to; the penalty, on some of the words
    (x, y), (held_x, held_y) = part(training), part(held_out)
    rates = (torch.from_numpy(counts) / len(passages)).clamp_max(1.0 - 0.5 / len(passages)).float()
    prior, factor = torch.zeros(len(words), x.shape[1]), 0.0
    if encode is not None:
        own = torch.from_numpy((encode(words) - mean) / scale)  # so that x · own is a cosine
        factor = _calibrate(x @ own.T, rates, y)[0]
        prior = factor * own
    some = torch.linspace(0, len(words) - 1, min(_TRIAL_WORDS, len(words))).long()
    losses = {}
    for trial in _PENALTIES:
        weight, bias = _regress(x, y[:, some], prior[some], rates[some], trial)
        losses[trial] = float(_log_loss(held_x @ weight.T + bias, held_y[:, some].float()).mean())
    penalty = min(losses, key=losses.__getitem__)

    # All words, some at a time; calibration
    blocks = []
    for start in range(0, len(words), _TOGETHER):
        here = slice(start, start + _TOGETHER)
        blocks.append(_regress(x, y[:, here], prior[here], rates[here], penalty))
        progress("words", min(start + _TOGETHER, len(words)), len(words))
    weight, bias = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    slope, lift, offset = _calibrate(held_x @ weight.T + bias, rates, held_y)
    weight, bias = slope * weight, slope * bias + lift * rates.logit() + offset
    weight *= float(scale)  # as if vectors were neither centred nor scaled
    bias -= weight @ torch.from_numpy(mean)
    statistics = VectorStatistics.measure(vectors)
    facts = {
        "pairs": len(texts),
        "texts_counted": len(passages),
        "own_embedding": factor,
        "penalty": penalty,
        "seed": seed,
        "held_out_log_loss": {str(key): loss for key, loss in losses.items()},
        "calibration": {"slope": slope, "base_rate": lift, "offset": offset},
    }
    tensors = weight.numpy(), bias.numpy(), rates.numpy()
    return WordProbe(encoder, words, names, *tensors, facts, statistics)


def _require_pairs(encoder: Any, texts: Sequence[Any], vectors: int) -> None:
    if not isinstance(encoder, EncoderIdentity):
        raise DataError("the identity of an encoder", f"{encoder!r:.80}", "Pass encoder.identity")
    if len(texts) < _LEAST_PAIRS or len(texts) != vectors:
        actual = f"{len(texts)} texts and {vectors} vectors"
        raise DataError(f"at least {_LEAST_PAIRS} texts with a vector each", actual, "Add some")
    kinds = {type(text).__name__ for text in texts if not isinstance(text, str)}
    if kinds:
        raise DataError("texts", ", ".join(sorted(kinds)), "Leave them out, or make them strings")


def occurrences(texts: Sequence[str], words: Sequence[str]) -> NDArray[np.bool_]:
    """Tell which of the words [W] each text has, [N, W]."""
    index = {word: place for place, word in enumerate(words)}
    there = np.zeros((len(texts), len(words)), dtype=np.bool_)
    for row, text in enumerate(texts):
        there[row, [index[word] for word in words_of(text) if word in index]] = True
    return there


def _vocabulary(texts: Sequence[str]) -> tuple[list[str], dict[int, str], NDArray[np.int64]]:
    """The words to learn, the names among them, and how many texts have each."""
    texts_with, inside, capitals = Counter[str](), Counter[str](), Counter[str]()
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        matches = _find_words(text)
        texts_with.update({word for word, _, _ in matches})
        for word, spelling, within in matches:
            inside[word] += within
            if within and spelling[0].isupper():
                capitals[word] += 1
                spellings.setdefault(word, Counter())[spelling] += 1
    vocabulary = [(w, n) for w, n in texts_with.most_common(_MOST_WORDS) if n >= _LEAST_TEXTS]
    if not vocabulary:
        raise DataError(f"words that {_LEAST_TEXTS} texts have", "none", "Use more texts")
    words = [word for word, _ in vocabulary]
    names = {
        place: spellings[word].most_common(1)[0][0]
        for place, word in enumerate(words)
        if 2 * capitals[word] > inside[word] and not re.match(r"i(?:'|$)", word)
    }
    return words, names, np.array([count for _, count in vocabulary])


def _regress(
    x: Tensor, y: Tensor, prior: Tensor, rates: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Fit logistic regressions of y [N, W] on x [N, D].

    Weights [W, D] are drawn to ``prior``, biases [W] a little to the log-odds of the base rates, so
    that a word which none of the N texts has is as rare as in the others.

    Newton steps with the Hessian taken as mean p(1 - p) · X^T X + penalty, whose inverse all words
    share but for a factor; a word whose loss rises takes its step back and shorter ones.
    """
    targets = y.float()
    values, basis = torch.linalg.eigh(x.T @ x)
    usual = rates.logit()
    weight, bias = prior.clone(), usual.clone()
    length, best = torch.ones(y.shape[1]), torch.full((y.shape[1],), torch.inf)
    saved, step = (weight, bias), (torch.zeros_like(weight), torch.zeros_like(bias))
    for _ in range(_ROUNDS):
        logits = x @ weight.T + bias  # [N, W]
        distance = penalty * (weight - prior).square().sum(dim=1) + (bias - usual).square()
        loss = _log_loss(logits, targets).sum(dim=0) + 0.5 * distance
        worse = loss > best
        length = torch.where(worse, 0.5 * length, length)
        saved = tuple(  # type: ignore[assignment]
            torch.where(worse.view(-1, *[1] * (new.ndim - 1)), old, new)
            for old, new in zip(saved, (weight, bias), strict=True)
        )
        best = torch.minimum(best, loss)
        p = logits.sigmoid()
        error, spread = p - targets, (p * (1.0 - p)).mean(dim=0).clamp_min(1e-9)
        gradient = error.T @ x + penalty * (weight - prior)  # [W, D]
        newton = (gradient @ basis) / (spread[:, None] * values + penalty) @ basis.T
        shift = (error.sum(dim=0) + bias - usual) / (spread * len(x) + 1.0)
        step = (torch.where(worse[:, None], step[0], newton), torch.where(worse, step[1], shift))
        weight = saved[0] - length[:, None] * step[0]
        bias = saved[1] - length * step[1]
    return saved


def _log_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logits) - targets * logits


def _calibrate(logits: Tensor, rates: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Fit P(y) = σ(a · logit + b · log-odds of the rate + c) to pairs that were held out."""
    every = max(1, logits.numel() // 4_000_000)
    places = torch.arange(0, logits.numel(), every)
    some, usual = logits.flatten()[places], rates.logit()[places % logits.shape[1]]
    features = torch.stack([some, usual, torch.ones(len(places))]).double()  # [3, M]
    targets = y.flatten()[places].double()
    starts = torch.eye(3, dtype=torch.float64)[:2]  # the logits as they are, the base rates
    factors = min(starts, key=lambda start: float(_log_loss(start @ features, targets).sum()))
    for _ in range(25):
        p = (factors @ features).sigmoid()
        hessian = (features * (p * (1.0 - p))) @ features.T + 1e-6 * torch.eye(3)
        factors = factors - torch.linalg.solve(hessian, features @ (p - targets))
    slope, lift, offset = factors.tolist()
    return slope, lift, offset
