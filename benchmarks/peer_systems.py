"""What `benchmarks.peers` puts side by side: how each system recovers a batch of texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.vec2text import BASE, CORRECTOR, load_network
from unembed.baselines.algen import fit_pseudo_inverse
from unembed.baselines.language_model import load_local_embedder
from unembed.baselines.left_to_right import LeftToRight, write_texts
from unembed.baselines.vec2text import Vec2Text, calls_at_most
from unembed.baselines.zero2text import Zero2Text
from unembed.data.pairs import Pairs
from unembed.decoding import Decoding
from unembed.denoiser import weights_digest
from unembed.device import choose_compute
from unembed.encoders.alignment import PairSums, fit_alignment
from unembed.encoders.base import Encoder
from unembed.encoders.sentence import load_encoder
from unembed.evaluation.frontier import PER_LENGTH, draw_by_length
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.rows import cosines_of, derangement, nearest_pairs, unconditional
from unembed.evaluation.samples import PassageFile, Sample, Samples, cutting
from unembed.inverter import Inverter
from unembed.training.export import inverter_from_run

ByCalls = dict[int, Recovery]  # encoder calls at most → what came back
RecoverFn = Callable[[int, list[Sample]], list[ByCalls]]  # index of the first, texts


class Systems:
    """Loads what the plans share, when it is first needed."""

    def __init__(self, texts: Path, pairs: Path, work: Path, dtype: str) -> None:
        self.texts, self.pairs_folder, self.work, self.dtype = texts, pairs, work, dtype
        self.encoder: Encoder = load_encoder(compute=choose_compute("cpu", "float32"))
        self.shipped = Inverter.from_pretrained("minilm").to("cpu", dtype)
        settings = cutting(self.shipped)
        samples = Samples(PassageFile(texts), self.shipped.tokenizer, settings)
        buckets, self.shares = draw_by_length(samples, settings.length, PER_LENGTH, 0)
        turns = zip(*buckets.values(), strict=True)  # the first 64 are 16 of each length
        self.samples = [sample for turn in turns for sample in turn]
        self.buckets = [name for _ in range(PER_LENGTH) for name in buckets]

    def vectors(self, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Unit vectors [N, D] of some texts."""
        return self.encoder.encode([sample.text for sample in samples])

    @cached_property
    def equal(self) -> Inverter:
        """The denoiser of as many samples as Vec2Text's inverter."""
        return inverter_from_run(self.work / "denoiser", "latest").to("cpu", self.dtype)

    def network(self, name: str) -> LeftToRight:
        """One of Vec2Text's networks, in the format of the products."""
        return load_network(self.work / "vec2text" / name).to(self.shipped.search_compute.dtype)

    @cached_property
    def vec2text(self) -> Vec2Text:
        """Vec2Text."""
        networks = self.network(BASE), self.network(CORRECTOR)
        return Vec2Text(*networks, self.shipped.tokenizer, self.encoder)

    @cached_property
    def pairs(self) -> Pairs:
        """Training pairs."""
        return Pairs.open(self.pairs_folder)

    # How each system recovers a batch

    def invert(self, which: str, decoding: str, marks: Sequence[int] = ()) -> RecoverFn:
        """Ours; with marks the nearest text after so many calls each."""

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            inverter, vectors = getattr(self, which), self.vectors(samples)
            parsed = Decoding.parse(decoding)
            if marks:
                parsed = replace(parsed, encoder_calls=max(marks))
            history: list[list[tuple[int, float, list[int]]]] = [[] for _ in samples]
            began = time.process_time()
            results = inverter.invert(
                vectors,
                decoding=parsed,
                encoder=self.encoder if parsed.encoder_calls else None,
                first_index=first,
                on_call=lambda row, ids, cosine, spent: history[row].append(
                    (spent, cosine, [*ids])
                ),
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            if not marks:
                texts = [result.text for result in results]
                cosines = cosines_of(self.encoder, texts, vectors)
                return [
                    {0: Recovery(r.text, r.token_ids, None, r.passes, 0, each, c)}
                    for r, c in zip(results, cosines, strict=True)
                ]
            return [
                {
                    mark: self._nearest(calls, mark, r.passes if mark == max(marks) else None, each)
                    for mark in marks
                }
                for r, calls in zip(results, history, strict=True)
            ]

        return recover

    def _nearest(
        self, calls: list[tuple[int, float, list[int]]], mark: int, passes: int | None, each: float
    ) -> Recovery:
        """The nearest text embedded with so many calls; time and passes of the last mark only."""
        affordable = [call for call in calls if call[0] <= mark]
        _, cosine, ids = max(affordable, key=lambda call: call[1])
        content = [ids[k] for k in self.shipped.tokenizer.content_positions(ids)]
        (text,) = self.shipped.tokenizer.decode([ids])
        spent = affordable[-1][0]
        return Recovery(text, content, None, passes, spent, each if passes else None, cosine)

    def searched(self, folder: Path) -> RecoverFn:
        """Ours, as ``unembed evaluate --frontier --out FOLDER`` has recovered the same texts."""
        recoveries: dict[str, ByCalls] = {}
        for path in sorted((folder / "decoded").glob("frontier-guided-search-*.jsonl")):
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            settings = json.loads(first)["settings"]
            if settings["weights"] != weights_digest(self.shipped.denoiser):
                raise SystemExit(f"{path} was made with other weights")
            for k, line in enumerate(map(json.loads, lines)):
                mark = settings["marks"][k % len(settings["marks"])]
                text = line.pop("original")
                recoveries.setdefault(text, {})[mark] = Recovery(**line)
        return lambda first, samples: [
            {mark: one for mark, one in recoveries[sample.text].items() if mark}
            for sample in samples
        ]

    def left_to_right(self, beams: int) -> RecoverFn:
        """Vec2Text's inverter alone."""

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            vectors, network = self.vectors(samples), self.network(BASE)
            began = time.process_time()
            tokens, _ = write_texts(
                network, self.shipped.tokenizer, torch.from_numpy(vectors), beams=beams
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            return self._recoveries(tokens[:, 0].tolist(), vectors, 0, each)

        return recover

    def corrected(self, beams: int, steps: dict[int, int]) -> RecoverFn:
        """Vec2Text with its corrector; steps by the calls at most that they take."""
        assert all(calls_at_most(s, beams) == calls for calls, s in steps.items())

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            vectors, ids = self.vectors(samples), self.shipped.tokenizer
            began = time.process_time()
            rounds = self.vec2text.correct(vectors, max(steps.values()), beams)
            each = (time.process_time() - began) * 1000 / len(samples)
            recoveries: list[ByCalls] = [{} for _ in samples]
            for calls, step in steps.items():
                result, last = rounds[step], step == max(steps.values())
                rows = result.tokens.tolist()
                for k, (row, text) in enumerate(zip(rows, ids.decode(rows), strict=True)):
                    content = [row[place] for place in ids.content_positions(row)]
                    spent, cosine = int(result.calls[k]), float(result.cosines[k])
                    passes = result.passes if last else None
                    time_spent = each if last else None
                    recoveries[k][calls] = Recovery(
                        text, content, None, passes, spent, time_spent, cosine
                    )
            return recoveries

        return recover

    def zero2text(self, settings: Zero2Text) -> RecoverFn:
        """Zero2Text."""

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            vectors = self.vectors(samples)
            calls = settings.calls_at_most
            began = time.process_time()
            results = self.shipped.invert(
                vectors,
                decoding=Decoding(settings, encoder_calls=calls),
                encoder=self.encoder,
            )
            each = (time.process_time() - began) * 1000 / len(samples)
            recoveries: list[ByCalls] = []
            for r in results:
                facts = r.passes, r.encoder_calls, each, r.cosine
                recoveries.append({calls: Recovery(r.text, r.token_ids, None, *facts)})
            return recoveries

        return recover

    def leaked(self, count: int, published: bool) -> RecoverFn:
        """Vectors of paraphrase-MiniLM-L3-v2 through a map from leaked pairs, then our decoder."""

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            embed = load_local_embedder()
            ids, y = self.pairs.rows(np.arange(count))
            x = embed(self.pairs.tokenizer.decode(ids.tolist()))
            target = self.shipped.encoder
            sums = PairSums(0)
            sums.add(x, y)
            alignment = (
                fit_pseudo_inverse(x, y, target) if published else fit_alignment(sums, target)
            )
            vectors = alignment(embed([sample.text for sample in samples]))
            began = time.process_time()
            results = self.shipped.invert(vectors)
            each = (time.process_time() - began) * 1000 / len(samples)
            texts = [result.text for result in results]
            cosines = cosines_of(self.encoder, texts, self.vectors(samples))
            return [
                {0: Recovery(r.text, r.token_ids, None, r.passes, 0, each, c)}
                for r, c in zip(results, cosines, strict=True)
            ]

        return recover

    def floor(self, kind: str) -> RecoverFn:
        """What guessing gives: another text's vector, none, the nearest text, the mean vector."""

        def recover(first: int, samples: list[Sample]) -> list[ByCalls]:
            vectors = self.vectors(samples)
            inverter, inputs = self.shipped, vectors
            if kind == "nearest":
                rows, _ = nearest_pairs(self.pairs, vectors, lambda done: None)
                return self._recoveries(rows, vectors, None, None)
            if kind == "shuffled":
                inputs = vectors[derangement(len(samples))]
            elif kind == "unconditional":
                inverter = unconditional(inverter)
            else:
                mean = self.pairs.rows(np.arange(4096))[1].mean(axis=0)
                inputs = np.tile(mean, (len(samples), 1))
            rows = [result.token_ids for result in inverter.invert(inputs)]
            return self._recoveries(rows, vectors, None, None)

        return recover

    def _recoveries(
        self,
        rows: Sequence[list[int]],
        vectors: NDArray[np.float32],
        passes: int | None,
        each: float | None,
    ) -> list[ByCalls]:
        """Texts of token ids, without a call; as many passes as tokens where they are 0."""
        ids = self.shipped.tokenizer
        texts = ids.decode(rows)
        cosines = cosines_of(self.encoder, texts, vectors)
        recoveries: list[ByCalls] = []
        for row, text, cosine in zip(rows, texts, cosines, strict=True):
            content = [row[place] for place in ids.content_positions(row)]
            count = len(content) + 1 if passes == 0 and each is not None else passes
            recoveries.append({0: Recovery(text, content, None, count, 0, each, cosine)})
        return recoveries
