from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unembed.encoders.base import FakeEncoder
from unembed.encoders.fingerprint import (
    PROBES,
    Fingerprint,
    make_fingerprint,
    preflight,
    require_encoder,
)
from unembed.errors import EncoderError


class Faulty(FakeEncoder):
    """Does one thing wrong."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.calls = 0

    def encode(self, texts, progress=None):
        self.calls += 1
        vectors = super().encode(texts, progress)
        return np.asarray(self.fault(vectors, self.calls), dtype=np.float32)


class Own(Faulty):
    """One that a user wrote: what it gives need be no array."""

    def encode(self, texts, progress=None):
        return self.fault(FakeEncoder.encode(self, texts, progress), 0)


def turned(vectors, amount):
    """The vectors a little aside, still of unit length."""
    aside = vectors + amount * np.roll(vectors, 1, axis=1)
    return aside / np.linalg.norm(aside, axis=1, keepdims=True)


def verdicts(report):
    return {check.name: check.passed for check in report.checks}


def failed(report):
    return {name for name, passed in verdicts(report).items() if passed is False}


def test_preflight_a_sound_encoder_passes(encoder):
    report = preflight(encoder, expected=make_fingerprint(encoder))
    assert report.passed
    assert verdicts(report)["fingerprint"] is True
    assert verdicts(report)["agrees with SentenceTransformer.encode"] is None
    assert report.to_dict()["encoder"] == encoder.identity.to_dict()
    assert report.to_dict()["passed"] is True


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (lambda v, n: v[:, :-1], {"dimension", "unit length"}),
        (lambda v, n: v * 2, {"unit length"}),
        (lambda v, n: v if n != 2 else turned(v, 1e-4), {"deterministic"}),
        (lambda v, n: turned(v, 0.5) if len(v) == 1 else v, {"batch invariant"}),
        (lambda v, n: np.repeat(v[:1], len(v), axis=0), {"distinct texts, distinct vectors"}),
    ],
    ids=["dimension", "norm", "noise", "batch", "pooling"],
)
def test_preflight_each_fault_is_named(fault, names):
    report = preflight(Faulty(fault))
    assert names <= failed(report)
    assert not report.passed
    others = {"dimension", "unit length", "deterministic", "finite values"} - names
    assert not others & failed(report)


def test_preflight_values_that_are_not_finite_fail():
    report = preflight(Faulty(lambda v, n: v * np.nan))
    assert {"finite values", "unit length", "batch invariant"} <= failed(report)


def test_another_fingerprint_fails(encoder):
    report = preflight(Faulty(lambda v, n: turned(v, 0.5)), expected=make_fingerprint(encoder))
    assert failed(report) == {"fingerprint"}


def test_a_fingerprint_is_the_same_in_every_instance_and_survives_json(encoder):
    fingerprint = make_fingerprint(encoder)
    data = fingerprint.to_dict()
    assert make_fingerprint(FakeEncoder()).to_dict() == data
    again = Fingerprint.from_dict(data)
    assert again.sha256 == fingerprint.sha256
    assert np.array_equal(again.vectors, fingerprint.vectors)
    assert again.vectors.shape == (len(PROBES), encoder.identity.dimension)


def test_make_fingerprint_a_number_format_is_allowed_for_and_another_model_is_not(encoder):
    fingerprint = make_fingerprint(encoder)
    fingerprint.require_same(Faulty(lambda v, n: v.astype(np.float16)), "pairs")
    fingerprint.require_same(Faulty(lambda v, n: turned(v, 0.01)), "pairs")
    with pytest.raises(EncoderError, match="cosine of only") as caught:
        fingerprint.require_same(Faulty(lambda v, n: turned(v, 0.3)), "pairs")
    assert f"expected pairs of an encoder with the fingerprint {fingerprint.sha256[:12]}" in str(
        caught.value
    )
    for broken in (FakeEncoder(dimension=16), Faulty(lambda v, n: v * np.nan)):
        with pytest.raises(EncoderError, match=r"only -1\.0000"):
            fingerprint.require_same(broken, "pairs")


@pytest.mark.parametrize(
    "data", [{}, {"sha256": "0", "shape": [2, 3], "float16": "AAAA"}, {"float16": "%"}]
)
def test_a_damaged_fingerprint_is_refused(data):
    with pytest.raises(EncoderError, match="a fingerprint of an encoder"):
        Fingerprint.from_dict(data)


@pytest.mark.slow
def test_preflight_the_real_encoder_passes_and_agrees_with_the_library(minilm):
    report = preflight(minilm)
    assert report.passed, [check for check in report.checks if check.passed is False]
    assert verdicts(report)["agrees with SentenceTransformer.encode"] is True


def test_preflight_an_official_pipeline_that_disagrees_fails(encoder):
    other = FakeEncoder()
    other.official = lambda texts: turned(encoder.encode(texts), 0.5)
    assert failed(preflight(other)) == {"agrees with SentenceTransformer.encode"}


def test_probes_differ_in_length_and_writing():
    assert len({len(text) for text in PROBES}) == len(PROBES)
    assert any(not text.isascii() for text in PROBES)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda v, n: v.tolist(), r"NumPy array \[N, D\]; found shape .* list"),
        (lambda v, n: torch.from_numpy(v), "found shape .* Tensor"),
        (lambda v, n: None, "NoneType"),
        (lambda v, n: v[0], r"found shape \[32\], ndarray"),
        (lambda v, n: 7 * v, "an encoder of unit vectors; found lengths from 7 to 7"),
    ],
)
def test_require_same_refuses_an_encoder_that_gives_something_else(encoder, fault, message):
    with pytest.raises(EncoderError, match=message):
        make_fingerprint(encoder).require_same(Own(fault), "pairs")


def test_require_encoder_refuses_what_has_no_identity_or_cannot_encode(encoder):
    for other in (SimpleNamespace(identity=3), SimpleNamespace(identity=encoder.identity), None):
        with pytest.raises(EncoderError, match="an encoder; found"):
            require_encoder(other, encoder.identity, None, "vectors")
