"""An inverter that looks texts up, for tests that need known recoveries."""

from types import SimpleNamespace

import pytest

from unembed.data.pieces import cut_pieces
from unembed.device import choose_compute
from unembed.inverter import Inversion


class LookupInverter:
    """Recovers every text it knows, perfectly; what it does not know comes back empty.

    Blindfolded it says "the".
    """

    def __init__(self, encoder, config, texts):
        self.encoder = encoder.identity
        self.tokenizer = encoder.tokenizer
        self.length = config.data.length
        self.compute = choose_compute("cpu", "float32")
        self.diffusion = {"schedule": "log-linear", "rate": 5.0}
        self.trained = {"config": config.model_dump()}
        self.known = {encoder.encode([text])[0].tobytes(): text for text in texts}
        self.calls = []
        self.stop_after = None  # calls, then as if by Ctrl-C
        self.denoiser = self.eyes = SimpleNamespace(sizes=None, state_dict=dict)

    def require_encoder(self, encoder):
        self.encoder.require_same(encoder.identity, "vectors")

    def invert(self, vectors, **options):
        if not len(vectors):
            return []  # the settings are looked at, nothing is decoded
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((len(vectors), options))
        texts = [self.known.get(vector.tobytes(), "") for vector in vectors]
        if self.denoiser is not self.eyes:
            texts = ["the"] * len(vectors)
        return [
            Inversion(text, ids, [1.0] * len(ids), passes=1, encoder_calls=0)
            for text, ids in zip(texts, self.tokenizer.encode(texts), strict=True)
        ]


@pytest.fixture(scope="session")
def pieces(passages, encoder, tiny_config):
    found = [
        piece
        for index, passage in enumerate(passages)
        for piece in cut_pieces([passage], encoder.tokenizer, tiny_config.data, index)
    ]
    assert len({piece.text for piece in found}) == len(found), "the lookup needs distinct texts"
    return found


@pytest.fixture
def lookup(encoder, tiny_config, pieces):
    return LookupInverter(encoder, tiny_config, [piece.text for piece in pieces])


@pytest.fixture
def lookup_of(encoder, tiny_config):
    return lambda texts: LookupInverter(encoder, tiny_config, texts)
