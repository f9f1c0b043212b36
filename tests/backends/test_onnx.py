"""The exported denoiser decodes the same tokens, and only with the weights it is of."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fakes import preset
from unembed.backends.onnx import FILE
from unembed.denoiser import Denoiser
from unembed.encoders.base import FakeEncoder
from unembed.errors import CheckpointError, ConfigError
from unembed.inverter import Inverter, export_folder

TEXTS = ["the cat runs", "a dog sleeps by the river", "rain"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny inverter with lively weights, and its ONNX file in the same folder."""
    import torch

    encoder = FakeEncoder()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        size = encoder.tokenizer.size
        network = Denoiser(preset("tiny", vocab_size=size, embedding_dim=32, length=8, layers=1))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
    process = {"schedule": "log-linear", "rate": 5.0}
    folder = tmp_path_factory.mktemp("onnx") / "inverter"
    Inverter(network, encoder.tokenizer, encoder.identity, process).save_pretrained(folder)
    if torch.__version__.startswith("2.6."):
        with pytest.raises(CheckpointError, match="Upgrade PyTorch"):
            export_folder(folder, folder / FILE)
        pytest.skip("PyTorch 2.6 cannot export it")
    export_folder(folder, folder / FILE)
    return folder


def test_a_denoiser_with_a_prefix_is_exported_for_both_lengths(exported, tmp_path):
    encoder = FakeEncoder()
    sizes = preset("tiny", vocab_size=encoder.tokenizer.size, embedding_dim=32, length=12, prefix=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Denoiser(sizes)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
            network.output_bias[[encoder.tokenizer.end_id, encoder.tokenizer.pad_id]] += 5.0
    process = {"schedule": "log-linear", "rate": 5.0}
    Inverter(network, encoder.tokenizer, encoder.identity, process).save_pretrained(tmp_path)
    vectors = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    plain = Inverter.from_pretrained(tmp_path).invert(vectors)
    assert {len(one.token_ids) > 4 for one in plain} == {True, False}
    export_folder(tmp_path, tmp_path / FILE)
    other = Inverter.from_pretrained(tmp_path)
    assert [r.token_ids for r in other.invert(vectors)] == [r.token_ids for r in plain]


def test_export_folder_says_which_pytorch_cannot(tmp_path, monkeypatch):
    encoder = FakeEncoder()
    sizes = preset("tiny", vocab_size=encoder.tokenizer.size, embedding_dim=32, length=8, layers=1)
    process = {"schedule": "log-linear", "rate": 5.0}
    inverter = Inverter(Denoiser(sizes), encoder.tokenizer, encoder.identity, process)
    inverter.save_pretrained(tmp_path)

    def refuse(*arguments, **options):
        raise torch.onnx.OnnxExporterError("step 2/3")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(CheckpointError, match=r"from PyTorch .*; found step 2/3. Upgrade PyTorch"):
        export_folder(tmp_path, tmp_path / FILE)
    assert not (tmp_path / FILE).exists()


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "exported"))


def watch_session(inverter: Inverter) -> list:
    """Collect the calls of an inverter's ONNX session."""
    source, session = inverter._onnx
    calls = []
    inverter._onnx = source, lambda *inputs: calls.append(inputs) or session(*inputs)
    return calls


@pytest.mark.slow
def test_invert_another_denoiser_is_not_decoded_with_the_session_of_the_first(folder):
    vectors = FakeEncoder().encode(TEXTS)
    inverter = Inverter.from_pretrained(folder)
    calls = watch_session(inverter)
    first = inverter.denoiser
    inverter.denoiser = copy.deepcopy(first)
    with torch.no_grad():
        inverter.denoiser.token_table.weight.copy_(first.token_table.weight.flip(0))
    other = inverter.invert(vectors)
    assert not calls
    inverter.denoiser = first
    assert [i.token_ids for i in inverter.invert(vectors)] != [i.token_ids for i in other]
    assert calls
    del calls[:]
    with torch.no_grad():
        first.token_table.weight.copy_(first.token_table.weight.flip(0))
    inverter.invert(vectors)
    assert not calls, "its weights are others now"


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("name", ["greedy", "entropy-bounded", "euler"])
def test_the_same_tokens_come_out(folder, name, steps):
    vectors = FakeEncoder().encode(TEXTS)
    fast = Inverter.from_pretrained(folder)
    calls = watch_session(fast)
    found = fast.invert(vectors, strategy=name, steps=steps, seed=2)
    assert calls, "the file was not used"
    (folder / FILE).unlink()
    plain = Inverter.from_pretrained(folder)
    assert plain._onnx is None
    expected = plain.invert(vectors, strategy=name, steps=steps, seed=2)
    assert [item.token_ids for item in found] == [item.token_ids for item in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-3)


def test_from_pretrained_without_the_runtime_the_weights_are_used(folder, monkeypatch):
    monkeypatch.setattr("unembed.inverter.onnx_is_here", lambda: False)
    assert Inverter.from_pretrained(folder)._onnx is None


def test_from_pretrained_a_file_of_other_weights_is_refused(folder, inverter_folder):
    shutil.copy(folder / FILE, inverter_folder / FILE)
    with pytest.raises(CheckpointError, match=r"found others\. Export it again"):
        Inverter.from_pretrained(inverter_folder)


def test_from_pretrained_a_damaged_file_is_refused(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="an ONNX file at"):
        Inverter.from_pretrained(folder)


def test_export_folder_without_the_extra_the_export_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match=r"pip install .*\[onnx\]"):
        export_folder(folder, folder / FILE)
    assert not (folder / FILE).exists()
