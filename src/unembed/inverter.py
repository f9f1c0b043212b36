"""Vectors → texts: the denoiser, its tokenizer and a decoding strategy, ready to use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unembed.decoding import Canvas, find_strategy
from unembed.decoding.base import OnStep
from unembed.denoiser import Denoiser, DenoiserSizes
from unembed.device import Compute, choose_compute
from unembed.diffusion import make_schedule
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.preflight import Fingerprint
from unembed.encoders.tokenizer import TextTokenizer
from unembed.errors import CheckpointError, ConfigError, EmbeddingError

FORMAT = 1
DEFAULT = "minilm"
_CONFIG, _WEIGHTS, _TOKENIZER, _CARD = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
)


@dataclass(frozen=True)
class Inversion:
    """One recovered text.

    Attributes:
        text: The text.
        token_ids: Its content tokens, up to the end token.
        confidences: Probability the denoiser gave each of them when it was settled, 0 to 1.
        passes: Denoiser passes spent.
        encoder_calls: Texts embedded on the way (0: the vector alone was used).
    """

    text: str
    token_ids: list[int]
    confidences: list[float]
    passes: int
    encoder_calls: int


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
        self._proved: Encoder | None = None
        self.compute = choose_compute("cpu")

    @property
    def length(self) -> int:
        """Positions L: the longest text it writes is L - 1 tokens."""
        return self.denoiser.sizes.length

    def to(self, device: Compute | str) -> Inverter:
        """Move to a device (``"cuda"``, ``"cpu"``, ``"auto"``); returns itself.

        Raises:
            ConfigError: The device does not exist here.
        """
        compute = choose_compute(device) if isinstance(device, str) else device
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
    def invert(
        self,
        embeddings: Any,
        *,
        strategy: str = "greedy",
        steps: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        first_index: int = 0,
        on_step: OnStep | None = None,
    ) -> list[Inversion]:
        """Recover the text behind each vector, from the vector alone.

        Args:
            embeddings: One vector [D] or many [N, D]: NumPy, torch or nested lists. They are
                normalised to unit length.
            strategy: A name of `unembed.decoding.STRATEGIES`.
            steps: Denoiser passes per text; one per position when not given.
            batch_size: Vectors decoded together; changes the speed, not the texts.
            seed: Of the strategies that sample; each vector draws from (seed, its index).
            first_index: Index of the first vector, for callers that hand over a part at a time.
            on_step: Called after every pass of every batch.

        Returns:
            One result per vector, in order.

        Raises:
            EmbeddingError: Not numbers, another dimension than the encoder's, or a vector that is
                zero or not finite.
            ConfigError: An unknown strategy, or a number out of range.
        """
        vectors = as_unit_vectors(embeddings, self.encoder.dimension)
        decode = find_strategy(strategy)
        steps = self.length if steps is None else steps
        for name, value in (("steps", steps), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} of at least 1", str(value), f"Correct {name}")
        schedule = make_schedule(self.diffusion["schedule"], self.diffusion["rate"])
        canvas = Canvas(self.length, self.tokenizer.mask_id, schedule)
        results: list[Inversion] = []
        for start in range(0, len(vectors), batch_size):
            part = torch.from_numpy(vectors[start : start + batch_size]).to(self.compute.device)
            generators = [
                torch.Generator(self.compute.device).manual_seed(
                    _mix(seed, first_index + start + row)
                )
                for row in range(len(part))
            ]
            with self.compute.autocast():
                decoded = decode(
                    self.denoiser,
                    part,
                    canvas,
                    steps=steps,
                    generators=generators,
                    on_step=on_step,
                )
            texts = self.tokenizer.decode(decoded.tokens.tolist())
            for text, row, sure in zip(
                texts, decoded.tokens.tolist(), decoded.confidences.tolist(), strict=True
            ):
                kept = self.tokenizer.content_positions(row)
                results.append(
                    Inversion(
                        text=text,
                        token_ids=[row[i] for i in kept],
                        confidences=[sure[i] for i in kept],
                        passes=decoded.passes,
                        encoder_calls=decoded.encoder_calls,
                    )
                )
        return results

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
        if not Path(where).is_dir() and "/" not in where:
            raise CheckpointError(
                expected, repr(where), "Train one with `unembed train`, or pass --checkpoint"
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
        if Path(model_id).is_dir():
            return _load(Path(model_id))
        return _load(Path(snapshot_download(model_id, **kwargs)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights in float16, configuration, tokenizer and card."""
        state = self.denoiser.state_dict()
        save_file(
            {name: tensor.half().contiguous().cpu() for name, tensor in state.items()},
            save_directory / _WEIGHTS,
            {"format": "pt"},
        )
        config = {
            "format": FORMAT,
            "denoiser_sizes": self.denoiser.sizes.to_dict(),
            "encoder_identity": self.encoder.to_dict(),
            "token_ids": self.tokenizer.ids_to_dict(),
            "diffusion_process": self.diffusion,
            "training": self.trained,
        }
        if self.fingerprint is not None:
            config["encoder_fingerprint"] = self.fingerprint.to_dict()
        text = json.dumps(config, indent=2) + "\n"
        (save_directory / _CONFIG).write_text(text, encoding="utf-8")
        self.tokenizer.save(save_directory / _TOKENIZER)
        if self.card is not None:
            (save_directory / _CARD).write_text(self.card, encoding="utf-8")

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card given at construction, or a short one from the facts at hand."""
        if self.card is not None:
            return ModelCard(self.card)
        return ModelCard(
            "---\nlibrary_name: unembed\nlicense: apache-2.0\n---\n"
            f"# Inverter for {self.encoder.name}\n\nRecovers text from embeddings of "
            f"{self.encoder.describe()}, at most {self.length - 1} tokens.\n"
        )


def shipped_inverters() -> dict[str, Path]:
    """The weights that come with the package, name → folder."""
    folder = Path(str(resources.files("unembed") / "pretrained"))
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{_CONFIG}"))}


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
        if config.get("format") != FORMAT:
            raise CheckpointError(
                f"format {FORMAT} in {folder / _CONFIG}",
                str(config.get("format")),
                "Upgrade unembed, or export the inverter again",
            )
        sizes = DenoiserSizes.from_dict(config["denoiser_sizes"])
        encoder = EncoderIdentity.from_dict(config["encoder_identity"])
        token_ids, diffusion = config["token_ids"], config["diffusion_process"]
        kept = config.get("encoder_fingerprint")
        fingerprint = None if kept is None else Fingerprint.from_dict(kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"an inverter's config.json in {folder}", str(error), "Copy the folder again"
        ) from error
    tokenizer = TextTokenizer.load(folder / _TOKENIZER, token_ids)
    card = folder / _CARD
    with torch.device("meta"):
        denoiser = Denoiser(sizes)
    try:
        weights = {name: w.float() for name, w in load_file(folder / _WEIGHTS).items()}
        denoiser.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"whole weights that fit config.json in {folder / _WEIGHTS}",
            " ".join(str(error).split())[:300],
            "Copy the file again",
        ) from error
    return Inverter(
        denoiser,
        tokenizer,
        encoder,
        diffusion,
        config.get("training"),
        card.read_text(encoding="utf-8") if card.is_file() else None,
        fingerprint,
    )


def _mix(seed: int, index: int) -> int:
    """A generator seed for one vector of a call."""
    words: Sequence[int] = np.random.SeedSequence([seed, index]).generate_state(2).tolist()
    return words[0] << 31 | words[1] >> 1
