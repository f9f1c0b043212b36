"""Vectors → texts: the denoiser, its tokenizer and a decoding strategy, ready to use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray

from unembed.backends.cpu import quickest
from unembed.backends.onnx import FILE, OnnxDenoiser, export_onnx, onnx_is_here
from unembed.checkpoints import INDEX, Storage, load_weights, save_weights, stored_as
from unembed.decoding import Canvas, Decoded, find_strategy
from unembed.decoding.guidance import Guidance
from unembed.decoding.repetition import DEFAULT as REPETITION
from unembed.decoding.repetition import Repetition
from unembed.decoding.strategy import OnStep
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import Compute, choose_compute
from unembed.diffusion import DenoiserFn, make_schedule
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint
from unembed.encoders.oracle import EncoderOracle
from unembed.errors import CheckpointError, ConfigError, EmbeddingError
from unembed.tokenizer import TextTokenizer

FORMAT, SCALED_OR_SHARDED = 1, 2  # a folder gets the lower number that can read it
DEFAULT = "minilm"
CURVES = "curves.png"
_CONFIG, _TOKENIZER, _CARD = "config.json", "tokenizer.json", "README.md"


@dataclass(frozen=True)
class Inversion:
    """One recovered text.

    Attributes:
        text: The text.
        token_ids: Its content tokens, up to the end token.
        confidences: Probability the denoiser gave each of them when it was settled, 0 to 1.
        passes: Denoiser passes spent.
        encoder_calls: Texts embedded on the way (0: the vector alone was used).
        order: Pass, from 1, in which each token was settled for the last time.
    """

    text: str
    token_ids: list[int]
    confidences: list[float]
    passes: int
    encoder_calls: int
    order: list[int] = field(default_factory=list)


class Inverter(
    ModelHubMixin,
    library_name="unembed",
    license="apache-2.0",
    tags=["embedding-inversion", "masked-diffusion", "security"],
):
    """Recovers text from embeddings of the one encoder it was trained for.

    Args:
        denoiser: The trained network.
        tokenizer: Of the denoiser's vocabulary.
        encoder: The encoder whose vectors it inverts.
        diffusion: ``{"schedule": ..., "rate": ...}`` of its training.
        trained: Facts about the training, kept in ``config.json`` for the record.
        card: Model card, Markdown.
        fingerprint: The encoder's vectors of the probe texts, where they are known.

    Attributes:
        storage: Number format and shard size in which `save_pretrained` and `push_to_hub` write
            the weights; float16 if not set, or the format they were loaded from.
        curves: Picture of the training (PNG) that is saved beside the card, where there is one.

    A folder that holds ``denoiser.onnx`` is decoded with ONNX Runtime on a CPU, where that is
    installed: the same tokens, faster on some processors (docs/decoding.md; docs/results.md says
    what was measured).

    Example:
        >>> inverter = Inverter.from_pretrained("minilm")
        >>> inverter.encoder.dimension
        384
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: TextTokenizer,
        encoder: EncoderIdentity,
        diffusion: dict[str, Any],
        trained: dict[str, Any] | None = None,
        card: str | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.denoiser = denoiser.eval()
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.diffusion = diffusion
        self.trained = trained or {}
        self.card = card
        self.fingerprint = fingerprint
        self.onnx: OnnxDenoiser | None = None
        self.storage = Storage()
        self.curves: bytes | None = None
        self._proved: Encoder | None = None
        self._quick: tuple[Any, DenoiserFn] | None = None
        self.compute = choose_compute("cpu", "float32")

    @property
    def length(self) -> int:
        """Positions L: the longest text it writes is L - 1 tokens."""
        return self.denoiser.sizes.length

    @property
    def canvas(self) -> Canvas:
        """What a strategy fills: length, special tokens, schedule."""
        ids = self.tokenizer
        schedule = make_schedule(self.diffusion["schedule"], self.diffusion["rate"])
        return Canvas(self.length, ids.mask_id, schedule, ids.end_id, ids.pad_id)

    def to(self, device: Compute | str, dtype: str | None = None) -> Inverter:
        """Move to a device (``"cuda"``, ``"cpu"``, ``"auto"``); returns itself.

        Args:
            device: Its name, or a device and a format.
            dtype: Format of the matrix products: ``float32``, ``bfloat16``, ``float16`` or ``auto``
                (what is quickest there). When not given that is float32 on a CPU, so that every
                processor gives the same text, and ``auto`` elsewhere.

        Raises:
            ConfigError: The device or the format does not exist here.
        """
        if isinstance(device, Compute):
            compute = device
        else:
            compute = choose_compute(device, dtype or "auto", training=False)
            if dtype is None and compute.device.type == "cpu":
                compute = Compute(compute.device, torch.float32)
        self.denoiser.to(compute.device)
        self.compute = compute
        return self

    def require_encoder(self, encoder: Encoder) -> None:
        """Refuse an encoder that is not the one the inverter was trained for.

        Raises:
            EncoderError: Its weights or prompt differ, or it embeds the probe texts elsewhere.
        """
        self.encoder.require_same(encoder.identity, "vectors")
        if self.fingerprint is not None and self._proved is not encoder:
            self.fingerprint.require_same(encoder, "vectors")
            self._proved = encoder  # the probe texts are embedded once

    @torch.inference_mode()
    def invert(  # noqa: PLR0913 - the front door; everything but the vectors has a default
        self,
        embeddings: Any,
        *,
        strategy: str = "greedy",
        options: Mapping[str, Any] | None = None,
        guidance: tuple[float, float] | None = None,
        repetition: float = REPETITION,
        encoder: Encoder | None = None,
        encoder_calls: int = 0,
        steps: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        first_index: int = 0,
        draws: Sequence[tuple[int, int]] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Inversion]:
        """Recover the text behind each vector, from the vector alone unless an encoder is given.

        Args:
            embeddings: One vector [D] or many [N, D]: NumPy, torch or nested lists. They are
                normalised to unit length.
            strategy: A name of `unembed.decoding.STRATEGIES`.
            options: Of the strategy, by name (docs/decoding.md).
            guidance: Strength of classifier-free guidance at the first and at the last pass, say
                (0, 1); none when not given. Each pass then runs the denoiser twice.
            repetition: Nats taken off a token's logit for each time the text has it already; 0 is
                the denoiser's own distribution.
            encoder: The encoder that made the vectors, for a strategy that calls it.
            encoder_calls: Texts that may be embedded for each vector.
            steps: Denoiser passes per text; one per position when not given.
            batch_size: Vectors decoded together; changes the speed, not the texts.
            seed: Of the strategies that sample; each vector draws from (seed, its index).
            first_index: Index of the first vector, for callers that hand over a part at a time.
            draws: For each vector the (seed, index) it draws from, in place of the two above: for
                callers that put vectors of several calls together.
            on_step: Called after every pass of every batch.

        Returns:
            One result per vector, in order.

        Raises:
            EmbeddingError: Not numbers, another dimension than the encoder's, or a vector that is
                zero or not finite.
            EncoderError: The encoder is not the one the inverter was trained for.
            ConfigError: An unknown strategy or option, a number out of range, or a strategy that
                calls the encoder without an encoder or without calls.
        """
        vectors = as_unit_vectors(embeddings, self.encoder.dimension)
        decode = find_strategy(strategy, **(options or {}))
        steps = self.length if steps is None else steps
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} of at least 1", str(value), f"Correct {name}")
        denoiser = self._prepared(guidance, repetition)
        if decode.needs_encoder:
            self._require_calls(strategy, encoder, encoder_calls)
        if draws is None:
            draws = [(seed, first_index + row) for row in range(len(vectors))]
        results: list[Inversion] = []
        for start in range(0, len(vectors), batch_size):
            part = vectors[start : start + batch_size]
            seeds = [_mix(*draw) for draw in draws[start : start + batch_size]]
            scorer = None
            if decode.needs_encoder and encoder is not None:
                scorer = EncoderOracle(encoder, self.tokenizer, part, encoder_calls)
            with self.compute.autocast():
                decoded = decode(
                    denoiser,
                    torch.from_numpy(part).to(self.compute.device),
                    self.canvas,
                    steps=steps,
                    generators=[torch.Generator().manual_seed(k) for k in seeds],
                    on_step=on_step,
                    scorer=scorer,
                )
            if guidance is not None:
                decoded = replace(decoded, passes=2 * decoded.passes)
            results.extend(self._inversions(decoded))
        return results

    def _require_calls(self, strategy: str, encoder: Encoder | None, calls: int) -> None:
        found = "no encoder" if encoder is None else f"{calls} encoder calls"
        if encoder is None or calls < 1:
            raise ConfigError(
                f"an encoder and at least 1 encoder call for the strategy {strategy}",
                found,
                "Allow calls (--encoder-calls), or choose a strategy that needs the vector only",
            )
        self.require_encoder(encoder)

    def _prepared(self, guidance: tuple[float, float] | None, repetition: float) -> DenoiserFn:
        """The network in its quickest form here, guided and kept from repeating itself."""
        denoiser = self._quickest()
        if guidance is not None:
            denoiser = Guidance(*guidance).wrap(denoiser, self.canvas.schedule)
        return Repetition(repetition).wrap(denoiser, self.canvas)

    def _quickest(self) -> DenoiserFn:
        """The network as it decodes quickest; made again when it or its weights are others."""
        denoiser: Any = self.denoiser
        if self.onnx is not None and self.compute == choose_compute("cpu", "float32"):
            return self.onnx
        if not isinstance(denoiser, Denoiser):  # whatever else was put in its place
            stand_in: DenoiserFn = denoiser
            return stand_in
        weights = [(p.data_ptr(), p._version) for p in denoiser.parameters()]
        made_of = (denoiser, self.compute, weights)
        if self._quick is None or self._quick[0] != made_of:
            self._quick = made_of, quickest(denoiser, self.compute, self.canvas.schedule)
        return self._quick[1]

    def _inversions(self, decoded: Decoded) -> list[Inversion]:
        rows = decoded.tokens.tolist()
        found = []
        for text, row, sure, passes, calls, order in zip(
            self.tokenizer.decode(rows),
            rows,
            decoded.confidences.tolist(),
            decoded.passes.tolist(),
            decoded.encoder_calls.tolist(),
            decoded.order.tolist(),
            strict=True,
        ):
            kept = self.tokenizer.content_positions(row)
            ids, confidences, turns = ([x[i] for i in kept] for x in (row, sure, order))
            found.append(Inversion(text, ids, confidences, passes, calls, turns))
        return found

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = DEFAULT, **kwargs: Any
    ) -> Inverter:
        """Load an inverter.

        Args:
            pretrained_model_name_or_path: ``minilm`` (ships with the package), a folder, or a Hub
                repository.
            **kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download`` of `huggingface_hub`.

        Raises:
            CheckpointError: Nothing there, or the files are damaged or do not fit together.
        """
        where, shipped = str(pretrained_model_name_or_path), shipped_inverters()
        if not Path(where).is_dir() and where in shipped:
            where = str(shipped[where])
        expected = (
            f"an inverter: a shipped one ({', '.join(shipped) or 'none'}), a folder or a Hub "
            "repository (owner/name)"
        )
        if Path(where).is_dir():
            return _load(Path(where))
        if "/" not in where or Path(where).exists():  # a file's path is not sent to the Hub
            found = f"the file {where}" if Path(where).exists() else repr(where)
            raise CheckpointError(
                expected, found, "Train one with `unembed train`, or pass --checkpoint"
            )
        try:
            return super().from_pretrained(where, **kwargs)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
            raise CheckpointError(
                expected,
                f"{where} ({' '.join(str(error).split())[:200]})",
                "Correct the name, or copy the folder again",
            ) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Inverter:
        return _load(Path(snapshot_download(model_id, **kwargs)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights, tokenizer, card, and last the configuration, without which nothing loads."""
        save_weights(self.denoiser.state_dict(), save_directory, self.storage)
        plain = self.storage.number_format != "int8" and not (save_directory / INDEX).exists()
        config = {
            "format": FORMAT if plain else SCALED_OR_SHARDED,
            "denoiser_sizes": self.denoiser.sizes.to_dict(),
            "encoder_identity": self.encoder.to_dict(),
            "token_ids": self.tokenizer.ids_to_dict(),
            "diffusion_process": self.diffusion,
            "training": self.trained,
        }
        if self.fingerprint is not None:
            config["encoder_fingerprint"] = self.fingerprint.to_dict()
        self.tokenizer.save(save_directory / _TOKENIZER)
        if self.card is not None:
            (save_directory / _CARD).write_text(self.card, encoding="utf-8")
        if self.curves is not None:
            (save_directory / CURVES).write_bytes(self.curves)
        text = json.dumps(config, indent=2) + "\n"
        (save_directory / _CONFIG).write_text(text, encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card given at construction, or a short one from the facts at hand."""
        if self.card is not None:
            return ModelCard(self.card)
        return ModelCard(
            "---\nlibrary_name: unembed\nlicense: apache-2.0\n---\n"
            f"# Inverter for {self.encoder.name}\n\nRecovers text from embeddings of "
            f"{self.encoder.describe()}, at most {self.length - 1} tokens.\n"
        )


def export_folder(folder: Path, out: Path) -> None:
    """Write the denoiser of an inverter's folder as ONNX (`unembed.backends.onnx.export_onnx`).

    Args:
        folder: From `Inverter.save_pretrained`.
        out: File to write. ``denoiser.onnx`` in the folder itself is what a CPU then decodes with.

    Raises:
        CheckpointError: Not an inverter's folder, or the file cannot be written.
        ConfigError: The extra is not installed.
    """
    export_onnx(_load(folder).denoiser, folder, out)


def shipped_inverters() -> dict[str, Path]:
    """The weights that come with the package, name → folder."""
    folder = Path(str(resources.files("unembed") / "pretrained"))
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_CONFIG}"))}


def is_inverter(folder: Path) -> bool:
    """Whether a folder has the configuration of an inverter, whatever else is in it."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "denoiser_sizes" in config


def as_unit_vectors(embeddings: Any, dimension: int) -> NDArray[np.float32]:
    """Whatever a user calls an embedding → unit vectors float32 [N, D].

    Raises:
        EmbeddingError: Not numeric, not [D] or [N, D], or a vector is zero or not finite.
    """
    if isinstance(embeddings, torch.Tensor):
        embeddings = embeddings.detach().float().cpu().numpy()
    try:
        vectors = np.asarray(embeddings, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EmbeddingError(
            f"numbers, [{dimension}] or [N, {dimension}]", str(error), "Correct the embeddings"
        ) from error
    if vectors.ndim == 1:
        vectors = vectors[None]
    if vectors.ndim != 2 or vectors.shape[1] != dimension:  # noqa: PLR2004 - [N, D]
        raise EmbeddingError(
            f"embeddings of {dimension} dimensions, [{dimension}] or [N, {dimension}]",
            f"shape {list(np.shape(embeddings))}",
            "Use vectors of the encoder the inverter was trained for",
        )
    norms = np.linalg.norm(vectors, axis=1)
    for bad, what in ((~np.isfinite(norms), "NaN or infinity"), (norms == 0, "only zeros")):
        if bad.any():
            raise EmbeddingError(
                "finite, non-zero vectors", f"{what} in vector {int(bad.argmax())}", "Leave it out"
            )
    unit: NDArray[np.float32] = (vectors / norms[:, None]).astype(np.float32)
    return unit


def _load(folder: Path) -> Inverter:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        if config.get("format") not in (FORMAT, SCALED_OR_SHARDED):
            raise CheckpointError(
                f"format {FORMAT} or {SCALED_OR_SHARDED} in {folder / _CONFIG}",
                str(config.get("format")),
                "Upgrade unembed, or export the inverter again",
            )
        sizes = DenoiserSizes.from_dict(config["denoiser_sizes"])
        encoder = EncoderIdentity.from_dict(config["encoder_identity"])
        token_ids, diffusion = config["token_ids"], config["diffusion_process"]
        _require_schedule(**diffusion)
        kept = config.get("encoder_fingerprint")
        fingerprint = None if kept is None else Fingerprint.from_dict(kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"an inverter's config.json in {folder}",
            f"{type(error).__name__}: {error}",
            "Copy the folder again",
        ) from error
    tokenizer = TextTokenizer.load(folder / _TOKENIZER, token_ids)
    weights = load_weights(folder)
    try:
        if sizes.layers > len(weights):  # building millions of them would take hours
            raise RuntimeError(f"{sizes.layers} layers, but {len(weights)} tensors")
        with torch.device("meta"):
            denoiser = Denoiser(sizes)
        denoiser.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights that fit config.json in {folder}",
            " ".join(str(error).split())[:300],
            "Copy the files again",
        ) from error
    card, curves = folder / _CARD, folder / CURVES
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    inverter = Inverter(
        denoiser, tokenizer, encoder, diffusion, config.get("training"), text, fingerprint
    )
    inverter.storage = stored_as(folder)
    inverter.curves = curves.read_bytes() if curves.is_file() else None
    if (folder / FILE).is_file() and onnx_is_here():
        inverter.onnx = OnnxDenoiser(folder / FILE)
    return inverter


def _require_schedule(schedule: str, rate: float) -> None:
    make_schedule(schedule, rate)
    if not 0 < rate < float("inf"):
        raise ValueError(f"a rate of {rate}")


def _mix(seed: int, index: int) -> int:
    """A generator seed for one vector of a call."""
    words: Sequence[int] = np.random.SeedSequence([seed, index]).generate_state(2).tolist()
    return words[0] << 31 | words[1] >> 1
