import pytest
import torch

from unembed.decoding import SequenceSpec
from unembed.decoding.logits import Guidance
from unembed.decoding.sequential import Sequential
from unembed.diffusion import Linear
from unembed.errors import ConfigError

MASK = 4


def plain(tokens, embedding, t, where):
    """Logits that depend on the position, the vector and the time."""
    position = torch.arange(tokens.shape[1])[None, :, None] * 0.1
    logits = position + embedding[:, None, :1] * torch.arange(5) + t[:, None, None]
    return logits[where]


def asked(batch=2, length=3):
    embedding = torch.tensor([[1.0, 0.0], [0.6, 0.8]])[:batch]
    where = torch.tensor([[True, False, True], [True, True, True]])[:batch]
    return torch.full((batch, length), MASK), embedding, torch.tensor([1.0, 0.25])[:batch], where


def test_it_pushes_away_from_what_is_said_without_the_embedding():
    tokens, embedding, t, where = asked()
    told = plain(tokens, embedding, t, where)
    untold = plain(tokens, torch.zeros_like(embedding), t, where)
    w = torch.tensor([0.5, 0.5, 1.25, 1.25, 1.25])[:, None]  # 0.5 + alpha_t, alpha = 0 and 0.75
    found = Guidance(0.5, 1.5).wrap(plain, Linear())(tokens, embedding, t, where)
    torch.testing.assert_close(found, (1 + w) * told - w * untold)


def test_no_strength_is_no_guidance():
    torch.testing.assert_close(Guidance(0.0, 0.0).wrap(plain, Linear())(*asked()), plain(*asked()))


def test_a_strategy_takes_a_guided_denoiser():
    guided = Guidance(0.0, 2.0).wrap(plain, Linear())
    spec = SequenceSpec(3, MASK, Linear())
    decoded = Sequential()(guided, asked()[1], spec, steps=3)
    assert decoded.tokens.tolist() == [[3, 3, 3]] * 2


@pytest.mark.parametrize("bad", [(-1.0, 0.0), (0.0, -0.5)])
def test_negative_strengths_are_refused(bad):
    with pytest.raises(ConfigError, match="guidance of at least 0"):
        Guidance(*bad)
