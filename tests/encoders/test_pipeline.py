"""What a model's own files say, and what happens where they do not."""

import importlib.util
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from tests.tokenizers import KINDS
from unembed.device import choose_compute
from unembed.encoders.base import EncoderIdentity
from unembed.encoders.fingerprint import preflight
from unembed.encoders.pipeline import refuse_foreign_code, require_pooling, variant
from unembed.encoders.sentence import load_encoder
from unembed.errors import ConfigError, EncoderError
from unembed.tokenizer import word_tokenizer

_SPREAD = {"initializer_range": 0.5}  # so that random networks tell texts apart
TEXTS = ["the nurse reads a letter", "the file is closed", "it was a good day"]
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load(folder, **options):
    return load_encoder(str(folder), compute=choose_compute("cpu", "float32"), **options)


def hugging(kind, **special):
    backend = KINDS[kind]().backend
    backend.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A small network with CLS pooling."""
    folder = tmp_path_factory.mktemp("bert")
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]", "mask_token": "[M]"}
    tokenizer = hugging("word_piece", **names)
    tokenizer.save_pretrained(folder / "net")
    sizes = {**_SPREAD, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)
    BertModel(config).save_pretrained(folder / "net")
    network = Transformer(str(folder / "net"), max_seq_length=64)
    modules = [network, Pooling(16, pooling_mode="cls"), Normalize()]
    prompts = {"query": "the query ", "document": ""}
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save(str(folder / "right"), create_model_card=False)
    return folder / "right"


@pytest.fixture(scope="module")
def bare(bert):
    """The same without the files that say the pooling."""
    folder = bert.parent / "lost"
    folder.mkdir()
    for name in FILES:
        shutil.copy(bert / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    module = StaticEmbedding(KINDS["word_piece"]().backend, embedding_dim=16)
    SentenceTransformer(modules=[module], device="cpu").save(str(folder), create_model_card=False)
    return folder


def changed(folder, tmp_path, name, change):
    """A copy of a model of which one JSON file is edited."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = json.loads((copy / name).read_text(encoding="utf-8"))
    change(data)
    (copy / name).write_text(json.dumps(data), encoding="utf-8")
    return copy


def test_require_pooling_refuses_to_make_it_up(bare):
    with pytest.raises(EncoderError, match=r"the pooling that makes one vector of many.*mean"):
        load(bare)


def test_load_encoder_takes_the_pooling_that_the_user_states(bare, bert):
    right, stated = load(bert), load(bare, pooling="cls")
    assert np.abs(right.encode(TEXTS) - stated.encode(TEXTS)).max() < 1e-6
    assert np.abs(right.encode(TEXTS) - load(bare, pooling="mean").encode(TEXTS)).max() > 1e-3
    assert dict(stated.pipeline)["pooling"] == "cls"
    with pytest.raises(EncoderError, match="pooling cls"):
        right.identity.require_same(stated.identity, "vectors")


def test_require_pooling_refuses_two_answers_and_unknown_ones(bert, bare):
    with pytest.raises(EncoderError, match=r"Leave encoder\.pooling out"):
        require_pooling(bert, "mean")
    with pytest.raises(EncoderError, match="a pooling: mean"):
        require_pooling(bare, "avg")


def test_preflight_shows_the_pipeline(bert):
    report = preflight(load(bert))
    shown = {check.name: check.found for check in report.checks}
    assert report.passed
    assert shown["modules"] == "Transformer → Pooling → Normalize"
    assert shown["pooling"] == "cls"
    assert shown["longest text"] == "64 tokens, special ones included"
    assert shown["truncation"] == "none"


def test_preflight_a_default_prompt_of_queries_is_not_put_before_documents(bert, tmp_path):
    def query_by_default(data):
        data["default_prompt_name"] = "query"

    name = "config_sentence_transformers.json"
    encoder = load(changed(bert, tmp_path, name, query_by_default))
    assert encoder.identity.prompt == ""
    report = preflight(encoder)
    shown = {check.name: check.found for check in report.checks}
    assert report.passed, "the library embeds documents so"
    assert "'the query ', is for queries" in shown["prompt of documents"]
    named = load(tmp_path / "copy", prompt_name="query")
    assert named.identity.prompt == "the query "
    assert "prompt of documents" not in dict(named.pipeline)


def test_load_encoder_keeps_the_first_dimensions_of_a_matryoshka_model(bert):
    whole, short = load(bert), load(bert, truncate_dim=8)
    expected = whole.encode(TEXTS)[:, :8]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert short.identity.dimension == 8
    assert np.abs(short.encode(TEXTS) - expected).max() < 1e-5
    assert dict(short.pipeline)["truncation"] == "the first 8 dimensions"
    assert preflight(short).passed
    assert EncoderIdentity.from_dict(short.identity.to_dict()) == short.identity
    assert whole.identity.to_dict().keys() & {"truncate_dim", "pooling"} == set()
    with pytest.raises(EncoderError, match="truncated"):
        whole.identity.require_same(short.identity, "vectors")
    with pytest.raises(EncoderError, match=r"Lower encoder\.truncate_dim"):
        load(bert, truncate_dim=99)


def test_load_encoder_reads_a_static_embedding(static):
    encoder = load(static)
    assert encoder.most_tokens is None
    assert encoder.word_embeddings().shape[1] == 16
    vectors = encoder.encode(TEXTS)
    table = encoder.word_embeddings()
    means = np.stack([table[ids].mean(axis=0) for ids in encoder.tokenizer.encode(TEXTS)])
    cosines = (vectors * means).sum(axis=1) / np.linalg.norm(means, axis=1)
    assert cosines == pytest.approx(1.0, abs=1e-5)
    report = preflight(encoder)
    assert report.passed, report.checks
    assert dict(encoder.pipeline)["longest text"] == "no limit"


@pytest.fixture
def _optimum(monkeypatch):
    """The package is there, if only by name."""
    if importlib.util.find_spec("optimum") is None:
        module = ModuleType("optimum")
        module.__spec__ = ModuleSpec("optimum", None)
        monkeypatch.setitem(sys.modules, "optimum", module)


@pytest.fixture
def exported(bare, tmp_path):
    """A folder with an ONNX file and no other weights: each token's row of a table."""
    folder = tmp_path / "exported"
    (folder / "onnx").mkdir(parents=True)
    for name in set(FILES) - {"model.safetensors"}:
        shutil.copy(bare / name, folder / name)
    table = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
    names = ("input_ids", "attention_mask")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])],
        "tokens",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "L"]) for name in names],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["B", "L", 16])],
        [numpy_helper.from_array(table, "table")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "onnx" / "model.onnx"
    )
    return folder, table


def test_load_encoder_runs_an_onnx_file(exported):
    pytest.importorskip("optimum.onnxruntime", reason="its releases take transformers up to 4.57")
    folder, table = exported
    encoder = load(folder, backend="onnx", pooling="mean")
    vectors = encoder.encode(TEXTS)
    means = np.stack([table[ids].mean(axis=0) for ids in encoder.tokenizer.encode(TEXTS)])
    cosines = (vectors * means).sum(axis=1) / np.linalg.norm(means, axis=1)
    assert cosines == pytest.approx(1.0, abs=1e-5)
    assert encoder.word_embeddings() is None
    report = preflight(encoder)
    assert report.passed, report.checks
    identity = encoder.identity
    assert EncoderIdentity.from_dict(identity.to_dict()) == identity
    assert identity.backend == "onnx" and identity.describe().endswith(", with onnx)")
    (folder / "onnx" / "model.onnx_data").write_bytes(b"weights beside it")
    again = load(folder, backend="onnx", pooling="mean")
    with pytest.raises(EncoderError, match="expected vectors of the encoder"):
        identity.require_same(again.identity, "vectors")


@pytest.mark.usefixtures("_optimum")
def test_load_encoder_refuses_a_folder_without_one_onnx_file(bare, exported):
    with pytest.raises(EncoderError, match=r"found no \.onnx file"):
        load(bare, backend="onnx", pooling="mean")
    folder, _ = exported
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(folder / "onnx" / "model.onnx", folder / name)
    (folder / "onnx" / "model.onnx").unlink()
    with pytest.raises(EncoderError, match=r"found a\.onnx, b\.onnx\. Give one that name"):
        load(folder, backend="onnx", pooling="mean")


def test_require_backend_names_what_to_install(bare, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sentence-transformers\[onnx\]'"):
        load(bare, backend="onnx")
    with pytest.raises(ConfigError, match="torch or onnx; found 'tensorrt'"):
        load(bare, backend="tensorrt")


def gpt(folder, **special):
    tokenizer = hugging("byte_level", **special)
    tokenizer.save_pretrained(folder / "net")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, **_SPREAD
    )
    GPT2Model(config).save_pretrained(folder / "net")
    network = Transformer(str(folder / "net"), max_seq_length=48)
    model = SentenceTransformer(modules=[network, Pooling(16), Normalize()], device="cpu")
    model.save(str(folder / "model"), create_model_card=False)
    return folder / "model"


def test_load_encoder_a_missing_padding_token_is_made_up_and_said(tmp_path):
    encoder = load(gpt(tmp_path, eos_token="<|end|>"))
    together = encoder.encode(["a letter", "the nurse reads a letter"])
    alone = encoder.encode(["a letter"])
    assert np.abs(together[0] - alone[0]).max() < 1e-5
    assert "made up" in dict(encoder.pipeline)["padding"]
    assert encoder.tokenizer.pad_id != encoder.tokenizer.end_id


def test_load_encoder_a_missing_padding_token_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(EncoderError, match="a padding token; found none"):
        load(gpt(tmp_path))


@pytest.mark.parametrize("kind", ["code.Pooler", "os.path", "sentence_transformersx.Pooling"])
def test_refuse_foreign_code_refuses_modules_of_the_model(bert, tmp_path, kind):
    (tmp_path / "ran.py").write_text("raise SystemExit('code of the model was run')")
    copy = changed(bert, tmp_path, "modules.json", lambda data: data[1].update(type=kind))
    with pytest.raises(EncoderError, match="pass --trust-remote-code"):
        load(copy)


def test_refuse_foreign_code_reads_routes_and_activations(tmp_path):
    refuse_foreign_code(tmp_path)
    (tmp_path / "2_Dense").mkdir()
    path = tmp_path / "2_Dense" / "config.json"
    path.write_text(json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"}))
    refuse_foreign_code(tmp_path)
    path.write_text(json.dumps({"activation_function": "evil.Tanh"}))
    with pytest.raises(EncoderError, match=r"'evil\.Tanh', whose code comes with the model"):
        refuse_foreign_code(tmp_path)
    path.unlink()
    (tmp_path / "router_config.json").write_text(json.dumps({"types": {"query_0_X": "evil.X"}}))
    with pytest.raises(EncoderError, match=r"'evil\.X'"):
        refuse_foreign_code(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_refuse_foreign_code_refuses_damaged_settings(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(EncoderError, match="JSON in"):
        refuse_foreign_code(tmp_path)


def test_from_transformers_takes_a_bare_tokenizer():
    from unembed.tokenizer import from_transformers

    backend = word_tokenizer(["cat", "dog"]).backend
    assert from_transformers(backend).encode(["cat dog"]) == [[1, 2]]


@pytest.mark.slow
def test_variant_reads_more_of_a_text_and_leaves_the_encoder_alone(minilm):
    long = "fish " * 300 + "bird " * 100
    plain, far = (
        variant(minilm.differentiable, None, tokens).encode([long], normalize_embeddings=True)[0]
        for tokens in (256, 512)
    )
    assert plain @ far < 0.999, "the birds behind the 256th token were not read"
    assert plain @ minilm.encode([long])[0] > 0.9999
    with pytest.raises(ValueError, match="no positions for 1024"):
        variant(minilm.differentiable, None, 1024)
    assert minilm.differentiable.max_seq_length == 256, "the encoder was changed"
