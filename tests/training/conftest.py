from pathlib import Path

import numpy as np
import pytest

from unembed.data.prepare import prepare_pairs
from unembed.encoders.base import FakeEncoder

from .helpers import make_config


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    words = "cat dog bird fish house river city runs walks eats sleeps red blue green".split()
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, size=generator.integers(3, 9))) for _ in range(2000)]
    folder = tmp_path_factory.mktemp("pairs")
    source = folder / "texts.txt"
    source.write_text("\n".join(lines) + "\n")
    prepare_pairs(source, folder / "data", make_config(), FakeEncoder())
    return folder / "data"
