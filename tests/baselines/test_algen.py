import numpy as np
import pytest

from unembed.baselines.algen import fit_pseudo_inverse
from unembed.encoders.base import EncoderIdentity

TARGET = EncoderIdentity("own", None, 5, "0" * 64, "")


def units(rng, *shape):
    rows = rng.standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [3, 8, 60])
def test_fit_pseudo_inverse_is_the_shortest_least_squares_map(count):
    rng = np.random.default_rng(count)
    x, y = units(rng, count, 8), units(rng, count, 5)
    alignment = fit_pseudo_inverse(x, y, TARGET)
    expected = np.linalg.lstsq(x.astype(float), y.astype(float), rcond=None)[0]
    np.testing.assert_allclose(alignment.matrix, expected, atol=2e-4)
    assert not alignment.source_mean.any()
    assert not alignment.target_mean.any()
    mapped = alignment(x)
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1.0, atol=1e-5)
    if count <= 8:  # as many unknowns as pairs: they are met
        np.testing.assert_allclose(mapped, y, atol=1e-3)
