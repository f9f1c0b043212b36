"""A contract that every registered strategy meets, and what greedy promises beyond it."""

import pytest
import torch

from unembed.decoding import STRATEGIES, Canvas, DecodingStep, find_strategy
from unembed.decoding.greedy import greedy, most_probable
from unembed.diffusion import Linear, LogLinear
from unembed.errors import ConfigError

VOCABULARY, MASK = 11, 10


class WordDenoiser:
    """Wants token (row's own number + position) at each position, surest in the middle."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def wanted(self, embedding: torch.Tensor) -> torch.Tensor:
        first = (embedding[:, 0] * 100).round().long()
        return (first[:, None] + torch.arange(self.length)) % MASK

    def __call__(self, tokens, embedding, t, where):
        self.seen.append((tokens.clone(), t.clone(), where.clone()))
        logits = torch.zeros(len(tokens), self.length, VOCABULARY)
        sureness = 5.0 - (torch.arange(self.length) - self.length // 2).abs() * 0.1
        wanted = self.wanted(embedding)
        logits.scatter_(2, wanted[..., None], sureness.expand(len(tokens), -1)[..., None].clone())
        logits[..., MASK] = 50.0  # the mask must never be chosen, however probable
        return logits[where]


def embeddings(batch: int) -> torch.Tensor:
    return (torch.arange(batch)[:, None] / 100).expand(-1, 3).clone()


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(batch)]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("steps", [1, 3, 8, 50])
@pytest.mark.parametrize("length", [1, 2, 8])
def test_contract(name, steps, length):
    denoiser = WordDenoiser(length)
    canvas = Canvas(length, MASK, LogLinear())
    shown: list[DecodingStep] = []
    decoded = STRATEGIES[name](
        denoiser,
        embeddings(4),
        canvas,
        steps=steps,
        generators=generators(4),
        on_step=shown.append,
    )
    assert decoded.tokens.shape == decoded.confidences.shape == decoded.order.shape == (4, length)
    assert not (decoded.tokens == MASK).any()
    assert torch.equal(decoded.tokens, denoiser.wanted(embeddings(4)))
    assert ((decoded.confidences > 0) & (decoded.confidences <= 1)).all()
    assert decoded.passes == len(denoiser.seen) <= steps
    assert decoded.order.min() >= 1 and decoded.order.max() <= decoded.passes
    assert decoded.encoder_calls == 0
    first_tokens, first_t, _ = denoiser.seen[0]
    assert (first_tokens == MASK).all() and (first_t == 1.0).all()
    for tokens, _, where in denoiser.seen:
        assert not (where & (tokens != MASK)).any(), "only masked positions are projected"
    assert [step.index for step in shown] == list(range(1, decoded.passes + 1))
    assert torch.equal(shown[-1].tokens, decoded.tokens)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_text_does_not_depend_on_its_batch(name):
    canvas = Canvas(8, MASK, Linear())

    def run(rows: slice) -> torch.Tensor:
        return (
            STRATEGIES[name](
                WordDenoiser(8),
                embeddings(6)[rows],
                canvas,
                steps=5,
                generators=generators(6)[rows],
            )
        ).tokens

    whole = run(slice(0, 6))
    for row in range(6):
        assert torch.equal(run(slice(row, row + 1))[0], whole[row])


def test_greedy_settles_the_surest_first_and_keeps_what_it_settled():
    denoiser = WordDenoiser(8)
    decoded = greedy(denoiser, embeddings(1), Canvas(8, MASK, Linear()), steps=8)
    assert decoded.order[0].argmin() == 4
    by_pass = decoded.confidences[0][decoded.order[0].argsort()]
    assert (by_pass.diff() <= 1e-6).all()
    for (before, _, _), (after, _, _) in zip(denoiser.seen, denoiser.seen[1:], strict=False):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept])


@pytest.mark.parametrize(("steps", "sizes"), [(8, [1] * 8), (3, [3, 2, 3]), (1, [8])])
def test_greedy_spreads_positions_evenly_and_tells_the_timestep(steps, sizes):
    denoiser = WordDenoiser(8)
    decoded = greedy(denoiser, embeddings(2), Canvas(8, MASK, Linear()), steps=steps)
    counts = torch.bincount(decoded.order[0])[1:].tolist()
    assert counts == sizes
    masked = [float((tokens == MASK).float().mean()) for tokens, _, _ in denoiser.seen]
    times = [float(t[0]) for _, t, _ in denoiser.seen]
    assert times == pytest.approx(masked)


def test_confidence_is_the_probability_without_the_mask_token():
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits[:, :MASK].softmax(dim=-1).max(dim=-1)
    probabilities, guesses = most_probable(logits.clone(), MASK)
    torch.testing.assert_close(probabilities, expected.values)
    assert torch.equal(guesses, expected.indices)


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="greedy"):
        find_strategy("psychic")
