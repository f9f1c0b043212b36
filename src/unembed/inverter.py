"""Vectors → texts: the denoiser, its tokenizer and a way to decode, ready to use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray

from unembed.backends.cpu import fast_form
from unembed.backends.onnx import FILE, OnnxDenoiser, export_onnx, onnx_is_here
from unembed.checkpoints import (
    CARD,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    shipped_inverters,
)
from unembed.decoding import Decoding, SequenceSpec
from unembed.decoding.logits import (
    Guidance,
    LogitsProcessor,
    RepetitionPenalty,
    with_callback,
    with_processors,
)
from unembed.decoding.prefix import split_by_prefix
from unembed.decoding.settings import as_decoding
from unembed.decoding.strategy import Inversion, OnStep, mix_seeds
from unembed.denoiser import Denoiser
from unembed.device import Compute, choose_compute
from unembed.diffusion import DenoiserFn, make_schedule
from unembed.encoders.alignment import Alignment
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.fingerprint import Fingerprint, require_encoder
from unembed.encoders.oracle import Corpus, EncoderOracle, OnCall
from unembed.encoders.pipeline import licence_lines, licence_note
from unembed.encoders.vectors import as_unit_vectors
from unembed.errors import CheckpointError, require_callable, require_switch, require_whole
from unembed.files import as_path, exists, is_folder
from unembed.tokenizer import TextTokenizer

DEFAULT = "minilm"
_OF_THE_MIXIN = {"config", "model_card_kwargs"}  # its `push_to_hub` saves with these
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


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
        alignment: Map that vectors of another encoder go through first, where there is one.

    Where its folder holds ``denoiser.onnx``, it decodes with ONNX Runtime on a CPU, if that is
    installed: the same tokens, faster on some processors (docs/fast-decoding.md).

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
        parts = (denoiser, tokenizer, encoder, diffusion, trained or {}, card, fingerprint)
        self._set_up(Checkpoint(*parts))

    def _set_up(self, checkpoint: Checkpoint) -> None:
        self.denoiser = checkpoint.denoiser.eval()
        self.tokenizer = checkpoint.tokenizer
        self.encoder = checkpoint.encoder
        self.diffusion = checkpoint.diffusion
        self.trained = checkpoint.trained
        self.card = checkpoint.card
        self.fingerprint = checkpoint.fingerprint
        self.storage = checkpoint.storage
        self.curves = checkpoint.curves
        self.alignment: Alignment | None = None
        self.compute = choose_compute("cpu", "float32")
        self._format_given = False
        self._proved: Encoder | None = None
        self._onnx: tuple[Any, OnnxDenoiser] | None = None  # the weights it was exported from
        self._fast: dict[Compute, tuple[Any, DenoiserFn]] = {}  # what each was made of

    def __repr__(self) -> str:
        """Say whose vectors it inverts, and up to which length."""
        return (
            f"Inverter({self.encoder.describe()}, up to {self.length - 1} tokens, "
            f"{self.compute.describe()})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be copied and is made again when it is needed."""
        return {**self.__dict__, "_fast": {}, "_onnx": None, "_proved": None}

    @property
    def length(self) -> int:
        """Positions L: the longest text it writes is L - 1 tokens."""
        return self.denoiser.sizes.length

    @property
    def dimension(self) -> int:
        """Numbers of the vectors it takes: the encoder's, or those of the alignment."""
        return self.encoder.dimension if self.alignment is None else self.alignment.dimension

    @property
    def spec(self) -> SequenceSpec:
        """Sequence that a strategy fills: length, special tokens, schedule."""
        ids = self.tokenizer
        schedule = make_schedule(self.diffusion["schedule"], self.diffusion["rate"])
        numbers = self.length, ids.mask_id, schedule, ids.end_id, ids.pad_id
        sizes = self.denoiser.sizes
        return SequenceSpec(*numbers, feedback=sizes.feedback, prefix=sizes.prefix)

    def to(self, device: Compute | str, dtype: str | None = None) -> Inverter:
        """Move to a device (``"cuda"``, ``"cpu"``, ``"auto"``); returns itself.

        Args:
            device: Its name, or a device and a format.
            dtype: Format of the matrix products: ``float32``, ``bfloat16``, ``float16`` or ``auto``
                (what is quickest there). When not given that is ``auto``; but float32 on a CPU
                where no encoder is called, so that every processor gives the same text.

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
        self.compute, self._format_given = compute, dtype is not None or compute is device
        return self

    @property
    def search_compute(self) -> Compute:
        """Device and format of strategies that call the encoder; see `to`."""
        if self._format_given or self.compute.device.type != "cpu":
            return self.compute
        return choose_compute("cpu", training=False)

    def aligned(self, alignment: Alignment | str | Path | None) -> Inverter:
        """The same network for vectors that the alignment maps; None: for its encoder's own.

        Raises:
            CheckpointError: No alignment there, or one into the space of another encoder.
        """
        path = alignment if isinstance(alignment, (str, Path)) else None
        value: object = alignment if path is None else Alignment.load(path)
        if value is not None:
            if not isinstance(value, Alignment):
                raise CheckpointError("a map, or its folder", type(value).__name__, "Correct align")
            value.require_target(self.encoder)
        inverter = copy.copy(self)
        vars(inverter).update(vars(self), alignment=value)  # its fast form is shared
        return inverter

    def map_vectors(self, embeddings: Any) -> NDArray[np.float32]:
        """Unit vectors [N, D] in the encoder's space; raises what `invert` does."""
        if self.alignment is None:
            return as_unit_vectors(embeddings, self.encoder.dimension, self.encoder.name)
        return self.alignment(embeddings)

    def require_encoder(self, encoder: Encoder) -> None:
        """Refuse an encoder that is not the one the inverter was trained for.

        Raises:
            EncoderError: Its weights or prompt differ, or it embeds the probe texts elsewhere.
        """
        if self._proved is not encoder:  # the probe texts are embedded once
            require_encoder(encoder, self.encoder, self.fingerprint, "vectors")
            self._proved = encoder

    # Inversion

    @torch.inference_mode()
    def invert(  # noqa: PLR0913 - the front door; all but the first have a default
        self,
        embeddings: Any,
        *,
        decoding: Decoding | str | None = None,
        encoder: Encoder | None = None,
        seed: int = 0,
        batch_size: int = 64,
        first_index: int = 0,
        draws: Sequence[tuple[int, int]] | None = None,
        on_step: OnStep | None = None,
        before_pass: Callable[[], None] | None = None,
        on_call: OnCall | None = None,
        corpus: Corpus | None = None,
        **settings: Any,
    ) -> list[Inversion]:
        """Recover the text behind each vector, from the vector alone unless an encoder is given.

        Args:
            embeddings: One vector [D] or many [N, D]: NumPy, torch or nested lists. They are
                normalised to unit length.
            decoding: How to decode: a `Decoding`, or the text of one (``"greedy:steps=16"``).
            encoder: What made the vectors, for a strategy that calls it.
            seed: Of the strategies that sample; each vector draws from (seed, its index).
            batch_size: Vectors decoded together; changes the speed, and logits to rounding only.
            first_index: Index of the first vector, for callers that hand over a part at a time.
            draws: For each vector the (seed, index) it draws from, in place of the two above.
            on_step: Called after every pass of every batch.
            before_pass: Called before every single denoiser pass; what it raises ends the work.
            on_call: Called after every encoder call, see `unembed.encoders.oracle.OnCall`.
            corpus: Gives texts like those behind vectors, which guided search starts from.
            **settings: In place of ``decoding`` the keywords of `Decoding.of`: ``strategy``,
                ``steps`` and others, and the strategy's options by name or in a dict ``options``.

        Returns:
            One result per vector, in order.

        Raises:
            EmbeddingError: Not numbers, another dimension than the encoder's, or a vector that is
                zero or not finite.
            EncoderError: The encoder is not the one the inverter was trained for.
            ConfigError: An unknown strategy or option, a number out of range, or a strategy that
                calls the encoder without an encoder or without calls.
        """
        decoding = as_decoding(decoding, settings)
        decoding.check(has_encoder=encoder is not None, has_corpus=corpus is not None)
        require_whole(seed=(seed, 0), batch_size=(batch_size, 1), first_index=(first_index, 0))
        require_callable(on_step=on_step, before_pass=before_pass, on_call=on_call, corpus=corpus)
        vectors = self.map_vectors(embeddings)
        target = encoder if decoding.strategy.needs_encoder else None
        if target is not None:
            self.require_encoder(target)
        if draws is None:
            draws = [(seed, first_index + row) for row in range(len(vectors))]
        seeds, ids = mix_seeds(draws, len(vectors)), self.tokenizer
        compute = self.compute if target is None else self.search_compute
        spec, denoiser = self.spec.with_length(decoding.length), self._prepare(decoding, compute)
        if before_pass is not None:
            denoiser = with_callback(denoiser, before_pass)
        results: dict[int, Inversion] = {}
        for start in range(0, len(vectors), batch_size):
            batch = torch.from_numpy(vectors[start : start + batch_size]).to(compute.device)
            with compute.autocast():
                for part in split_by_prefix(denoiser, batch, spec, on_step):
                    indices = [start + row for row in part.rows]
                    how = vectors[indices], decoding.encoder_calls, on_call, corpus, indices
                    decoded = decoding.strategy(
                        denoiser,
                        batch[part.rows],
                        part.spec,
                        steps=decoding.steps,
                        generators=[torch.Generator().manual_seed(seeds[k]) for k in indices],
                        on_step=part.on_step,
                        oracle=None if target is None else EncoderOracle(target, ids, *how),
                    )
                    spent = decoded.passes + part.passes
                    passes = spent if decoding.guidance is None else 2 * spent
                    inversions = replace(decoded, passes=passes).inversions(ids)
                    results.update(zip(indices, inversions, strict=True))
        return [results[index] for index in range(len(vectors))]

    def warm_up(self) -> None:
        """Put the network into its fast form now, before several threads ask for it at once."""
        self._fast_denoiser(self.compute)

    def _prepare(self, decoding: Decoding, compute: Compute) -> DenoiserFn:
        """The network in its fast form, with what a decoding does to its logits."""
        denoiser = self._fast_denoiser(compute)
        processors: list[LogitsProcessor] = []
        if decoding.guidance is not None:
            processors.append(Guidance(denoiser, self.spec, *decoding.guidance))
        if decoding.repetition_penalty > 0.0:
            processors.append(RepetitionPenalty(self.spec, decoding.repetition_penalty))
        return with_processors(denoiser, processors)

    def _fast_denoiser(self, compute: Compute) -> DenoiserFn:
        """The network as it decodes quickest; made again when it or its weights are others."""
        network: Any = self.denoiser
        if not isinstance(network, Denoiser):  # whatever else was put in its place
            return cast(DenoiserFn, network)
        version = _version(self.denoiser)
        plain = compute == choose_compute("cpu", "float32") and not network.sizes.feedback
        if plain and self._onnx is not None and self._onnx[0] == version:
            return self._onnx[1]
        if compute not in self._fast or self._fast[compute][0] != version:
            self._fast[compute] = version, fast_form(self.denoiser, compute)
        return self._fast[compute][1]

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = DEFAULT,
        *,
        align: Alignment | str | Path | None = None,
        **kwargs: Any,
    ) -> Inverter:
        """Load an inverter.

        Args:
            pretrained_model_name_or_path: ``minilm`` (ships with the package), a folder, or a Hub
                repository. A folder of a shipped name is ``./minilm``.
            align: An alignment, for vectors of another encoder; see `aligned`.
            **kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and
                ``force_download`` of `huggingface_hub`.

        Raises:
            CheckpointError: Nothing there, or the files are damaged or do not fit together.
        """
        if align is not None:
            return cls.from_pretrained(pretrained_model_name_or_path, **kwargs).aligned(align)
        if unknown := sorted(kwargs.keys() - set(_HUB_OPTIONS)):
            options = f"options of align, {', '.join(_HUB_OPTIONS)}"
            raise CheckpointError(options, ", ".join(unknown), "Device and dtype are those of `to`")
        where, shipped = str(pretrained_model_name_or_path), shipped_inverters()
        if isinstance(pretrained_model_name_or_path, str) and where in shipped:
            return _load(shipped[where])
        expected = (
            f"an inverter: a shipped one ({', '.join(shipped) or 'none'}), a folder or a Hub "
            "repository (owner/name)"
        )
        if is_folder(Path(where)):
            return _load(Path(where))
        if exists(Path(where)) or not _may_be_a_repository(where):
            there = f"the file {where}" if exists(Path(where)) else f"no folder {where}"
            todo = "Train one with `unembed train`, or pass --checkpoint"
            raise CheckpointError(expected, there, todo)
        try:
            return super().from_pretrained(where, **kwargs)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ValueError) as error:
            what = f"{where} ({' '.join(str(error).split())[:200]})"
            todo = "Correct the name, or copy the folder again"
            raise CheckpointError(expected, what, todo) from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> Inverter:
        return _load(Path(snapshot_download(model_id, **kwargs)))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the inverter's folder; an earlier one there stays whole if that fails.

        Args:
            save_directory: The folder, made where it is not there.
            kwargs: ``push_to_hub=True``, ``repo_id`` and others of `ModelHubMixin.push_to_hub`.

        Raises:
            CheckpointError: The weights do not fit the format, or the disk refused.
        """
        folder, push = as_path(save_directory), kwargs.pop("push_to_hub", False)
        require_switch(push_to_hub=push)
        if not push and (idle := ", ".join(kwargs.keys() - _OF_THE_MIXIN)):
            raise CheckpointError("push_to_hub=True", f"{idle} without it", "Leave it out")
        bare = self.card is None and not exists(folder / CARD)
        card = str(self.generate_model_card()) if bare else self.card
        parts = (self.denoiser, self.tokenizer, self.encoder, self.diffusion, self.trained, card)
        save_checkpoint(Checkpoint(*parts, self.fingerprint, self.storage, self.curves), folder)
        if not push:
            return None
        return str(self.push_to_hub(repo_id=kwargs.pop("repo_id", None) or folder.name, **kwargs))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the card given at construction, or a short one from the facts at hand."""
        if self.card is not None:
            return ModelCard(self.card)
        return ModelCard(
            f"---\nlibrary_name: unembed\n{licence_lines(self.encoder.name)}\n---\n"
            f"# Inverter for {self.encoder.name}\n\nRecovers text from embeddings of "
            f"{self.encoder.describe()}, at most {self.length - 1} tokens.\n\n"
            f"{licence_note(self.encoder.name)}\n"
        )


def export_folder(folder: str | Path, out: str | Path) -> None:
    """Write the denoiser of an inverter's folder as ONNX (`unembed.backends.onnx.export_onnx`).

    Args:
        folder: From `Inverter.save_pretrained`.
        out: File to write. ``denoiser.onnx`` in the folder itself is what a CPU then decodes with.

    Raises:
        CheckpointError: Not an inverter's folder, or the file cannot be written.
        ConfigError: The extra is not installed.
    """
    export_onnx(load_checkpoint(as_path(folder)).denoiser, as_path(folder), as_path(out))


def _load(folder: Path) -> Inverter:
    checkpoint = load_checkpoint(folder)
    inverter = Inverter.__new__(Inverter)
    inverter._set_up(checkpoint)
    if (folder / FILE).is_file() and onnx_is_here():
        inverter._onnx = _version(inverter.denoiser), OnnxDenoiser(folder / FILE)
    return inverter


def _version(denoiser: Denoiser) -> tuple[Denoiser, list[tuple[int, int]]]:
    """Identify a network with its weights: where each lies and how often it was written to."""
    return denoiser, [(p.data_ptr(), p._version) for p in denoiser.parameters()]


def _may_be_a_repository(name: str) -> bool:
    """Tell whether a name has the form owner/name; a path is not sent to the Hub."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not owner.startswith((".", "~"))
