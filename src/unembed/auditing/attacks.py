"""How an attacker would read the vectors: each attack with the access that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unembed.decoding import Decoding
from unembed.encoders.alignment import PairSums, fit_alignment
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.vectors import as_unit_vectors
from unembed.evaluation.cache import RowCache
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import corpus_texts
from unembed.inverter import Inverter
from unembed.vectors.words import WordProbe

Vectors = NDArray[np.float32]
Progress = Callable[[str, int, int], None]

_BATCH = 64
_LIKELY = 0.5  # probability from which a word is named

VECTOR_ONLY = "the vectors, and knowledge of which encoder made them"
WITH_PROBE = f"{VECTOR_ONLY}: a linear map names likely words, in no order"
WITH_PAIRS = "the vectors, and {n} of the store's texts with their vectors"
WITH_MAP = "the vectors, and a map made from known pairs"
WITH_CORPUS = "the vectors, the encoder, and a corpus with texts of the same kind"
WITH_CALLS = "the vectors, and up to {n} calls of the encoder for each"
LOOKUP = "lookup in the corpus"
WORDS = "words of long texts"


class Align(Protocol):
    """A map of another encoder's vectors into the space of an inverter's encoder."""

    def __call__(self, vectors: Any) -> Vectors:
        """Map vectors [N, D'] to unit vectors [N, D]."""
        ...

    def describe(self) -> str:
        """One line: what it was made from, how well it predicts."""
        ...


FitAlign = Callable[[Vectors, Vectors], Align]  # vectors [n, D'], those of their texts [n, D]


@dataclass(frozen=True)
class Attack:
    """A way to read vectors.

    Attributes:
        name: For tables.
        access: What the attacker has.
        recover: Unit vectors [n, D'] and index of the first → recoveries.
        settings: What the recoveries depend on, plain data.
        rows: Records it is tried on; all when None.
    """

    name: str
    access: str
    recover: Callable[[Vectors, int], list[Recovery]]
    settings: dict[str, Any]
    rows: tuple[int, ...] | None = None


def inversion(
    inverter: Inverter,
    decoding: Decoding,
    seed: int,
    *,
    encoder: Encoder | None = None,
    align: Align | None = None,
    access: str = VECTOR_ONLY,
    name: str = "inverter",
) -> Attack:
    """Decode each vector with the inverter, through a map where there is one.

    Args:
        inverter: Trained for the encoder of the vectors, or of the space the map leads to.
        decoding: How.
        seed: Of what is drawn.
        encoder: For the cosine of what comes back, and for strategies that call it.
        align: From the store's space into the inverter's.
        access: What the attacker has.
        name: For tables.
    """

    def recover(vectors: Vectors, first: int) -> list[Recovery]:
        targets = vectors if align is None else align(vectors)
        inversions = inverter.invert(
            targets,
            decoding=decoding,
            seed=seed,
            first_index=first,
            encoder=encoder if decoding.encoder_calls else None,
        )
        cosines: list[float | None] = [None] * len(inversions)
        rows = [row for row, item in enumerate(inversions) if item.text.strip()]
        if encoder is not None and rows:
            again = encoder.encode([inversions[row].text for row in rows])
            for row, cosine in zip(rows, (again * targets[rows]).sum(axis=1), strict=True):
                cosines[row] = round(float(cosine), 6)
        return [
            Recovery(i.text, i.token_ids, i.confidences, i.passes, i.encoder_calls, None, cosine)
            for i, cosine in zip(inversions, cosines, strict=True)
        ]

    settings = {
        "decoding": str(decoding),
        "seed": seed,
        "align": None if align is None else align.describe(),
    }
    return Attack(name, access, recover, settings)


def word_probe(inverter: Inverter, probe: WordProbe, rows: Sequence[int]) -> Attack:
    """Name the words that are likelier in the text than not, for texts an inverter cannot write.

    Args:
        inverter: Whose tokens the words are counted in.
        probe: Of the same encoder.
        rows: Records that are longer.
    """

    def recover(vectors: Vectors, first: int) -> list[Recovery]:
        texts = [
            " ".join(word.word for word in words if word.probability >= _LIKELY)
            for words in probe.most_probable(vectors, len(probe.words), common=True)
        ]
        pairs = zip(texts, inverter.tokenizer.encode(texts), strict=True)
        return [Recovery(text, ids) for text, ids in pairs]

    settings = {"words": len(probe.words), "least_probability": _LIKELY}
    return Attack(WORDS, WITH_PROBE, recover, settings, tuple(rows))


def lookup(inverter: Inverter, corpus: Corpus, name: str = LOOKUP) -> Attack:
    """Answer each vector with the nearest text of a corpus of the auditor's."""

    def recover(vectors: Vectors, first: int) -> list[Recovery]:
        return corpus.answers(vectors, inverter)

    return Attack(name, WITH_CORPUS, recover, {"corpus": corpus.name, "texts": len(corpus.texts)})


@dataclass(frozen=True)
class Corpus:
    """Texts of the auditor's, embedded; at most 200,000, the first of the file.

    Attributes:
        name: Of the file.
        texts: The texts.
        vectors: Unit vectors [N, D].
    """

    name: str
    texts: list[str]
    vectors: Vectors

    @classmethod
    def read(cls, path: Path, column: str, encoder: Encoder, progress: Progress) -> Corpus:
        """Read and embed the texts of a file, as `corpus_texts` reads them.

        Raises:
            DataError: The file cannot be read.
        """
        texts = corpus_texts(path, column)
        done = 0
        parts = []
        for start in range(0, len(texts), 1024):
            parts.append(encoder.encode(texts[start : start + 1024]))
            done += len(parts[-1])
            progress("embedding the corpus", done, len(texts))
        return cls(path.name, texts, np.concatenate(parts))

    def nearest(
        self, vectors: Vectors, own: Sequence[str] | None = None
    ) -> tuple[list[int], list[float]]:
        """Index of the nearest text to each vector [n, D], and its cosine.

        Args:
            vectors: Unit vectors.
            own: The text of each, which does not count as the nearest.
        """
        places: dict[str, list[int]] = {}
        for place, text in enumerate(self.texts if own is not None else ()):
            places.setdefault(text.strip(), []).append(place)
        rows: list[int] = []
        cosines: list[float] = []
        for start in range(0, len(vectors), _BATCH):
            similarity = vectors[start : start + _BATCH] @ self.vectors.T
            for row, text in enumerate((own or [])[start : start + _BATCH]):
                similarity[row, places.get(text.strip(), [])] = -1.0
            rows += similarity.argmax(axis=1).tolist()
            cosines += similarity.max(axis=1).tolist()
        return rows, cosines

    def answers(
        self, vectors: Vectors, inverter: Inverter, own: Sequence[str] | None = None
    ) -> list[Recovery]:
        """The nearest text to each vector as a recovery, in the inverter's tokens."""
        rows, cosines = self.nearest(vectors, own)
        texts = [self.texts[row] for row in rows]
        return [
            Recovery(text, ids, cosine=round(float(cosine), 6))
            for text, ids, cosine in zip(
                texts, inverter.tokenizer.encode(texts), cosines, strict=True
            )
        ]


def fit_pairs(target: EncoderIdentity, seed: int) -> FitAlign:
    """What makes a map of vectors and those of their texts, as `unembed align` does.

    Args:
        target: The encoder of the inverter's space.
        seed: Of the pairs that maps are compared on.
    """

    def fit(vectors: Vectors, targets: Vectors) -> Align:
        sums = PairSums(seed)
        sums.add(as_unit_vectors(vectors, vectors.shape[1]), targets)
        return fit_alignment(sums, target)

    return fit


def split_pairs(count: int, pairs: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows to make a map from and rows to score it on, none in both; at least half are scored.

    Args:
        count: Rows with a text.
        pairs: Rows asked for.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(count).tolist()
    cut = min(pairs, count // 2)
    return sorted(order[:cut]), sorted(order[cut:])


def run_attack(
    attack: Attack,
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    folder: Path | None,
    progress: Progress,
) -> dict[int, Recovery]:
    """What an attack recovers from some records, by their index; goes on after an interruption.

    Args:
        attack: The attack.
        ids: Of the records; what the cache on the disk knows them by.
        vectors: [N, D'].
        folder: For the cache; none is kept when None.
        progress: Called with (attack, records done, records in all).
    """
    rows = list(range(len(ids))) if attack.rows is None else list(attack.rows)
    unit = as_unit_vectors(vectors, vectors.shape[1])
    recoveries: dict[int, Recovery] = {}
    with RowCache(folder, attack.name, attack.settings) as cache:
        for part in _parts(rows):

            def recover(done: int, part: list[int] = part) -> list[Recovery]:
                return attack.recover(unit[part[done:]], part[done])

            items = cache.complete([ids[row] for row in part], recover)
            recoveries |= dict(zip(part, items, strict=True))
            progress(attack.name, len(recoveries), len(rows))
    return recoveries


def _parts(rows: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring rows, at most a batch: a vector draws from (seed, its row)."""
    part: list[int] = []
    for row in rows:
        if part and (len(part) == _BATCH or row != part[-1] + 1):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def constant(recoveries: Mapping[int, Recovery], inverter: Inverter, vectors: Vectors) -> Recovery:
    """The best text that knows nothing of the vector: what the inverter makes of their mean."""
    mean = as_unit_vectors(vectors, vectors.shape[1]).mean(axis=0)
    (item,) = inverter.invert(mean / max(float(np.linalg.norm(mean)), 1e-9))
    first = next(iter(recoveries.values()))
    return replace(first, text=item.text, token_ids=item.token_ids, confidences=None, cosine=None)
