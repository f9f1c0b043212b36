"""An inverter that looks texts up, for tests that need known recoveries."""

import pytest

from tests.fakes import LookupInverter
from unembed.data.pieces import cut_pieces


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
