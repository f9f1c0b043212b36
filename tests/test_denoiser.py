from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unembed.backends.cpu import PackedDenoiser
from unembed.denoiser import (
    Block,
    Denoiser,
    DenoiserSizes,
    attention,
    parameter_counts,
)
from unembed.errors import CheckpointError

from .fakes import preset

TINY = preset("tiny", vocab_size=50, embedding_dim=16, length=8)


@pytest.fixture
def trained() -> Denoiser:
    """A denoiser none of whose weights is at its special starting value."""
    torch.manual_seed(0)
    network = Denoiser(TINY)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (batch, 8), generator=generator)
    embedding = F.normalize(torch.randn(batch, 16, generator=generator), dim=-1)
    return tokens, embedding, torch.rand(batch, generator=generator)


def test_parameter_counts_reference_size_counts():
    """The report counts 78 M without gates; those of AdaLN-Zero are 2 H^2 a block more: 88 M."""
    with torch.device("meta"):
        network = Denoiser(preset("reference"))
    beside, vocabulary = parameter_counts(network)
    gates = 8 * (2 * 768**2 + 2 * 768)
    assert 78e6 < beside - gates < 79e6
    assert 88e6 < beside < 89e6
    assert vocabulary == 30_522 * 769


def test_a_block_starts_as_the_identity():
    torch.manual_seed(0)
    block = Denoiser(TINY).blocks[0]
    assert isinstance(block, Block)
    x, condition = torch.randn(2, 8, 64), torch.randn(2, 64)
    torch.testing.assert_close(block(x, condition), x, rtol=0, atol=0)


def test_denoiser_at_the_start_the_embedding_changes_nothing(trained):
    torch.manual_seed(0)
    fresh = Denoiser(TINY)
    tokens, embedding, t = inputs()
    torch.testing.assert_close(fresh(tokens, embedding, t), fresh(tokens, -embedding, t))
    assert not torch.allclose(trained(tokens, embedding, t), trained(tokens, -embedding, t))


def test_denoiser_timestep_and_position_matter(trained):
    tokens, embedding, t = inputs()
    first = trained(tokens, embedding, t)
    assert not torch.allclose(first, trained(tokens, embedding, 1.0 - t))
    same = torch.full_like(tokens, 7)
    logits = trained(same, embedding, t)
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def test_denoiser_every_position_sees_every_other(trained):
    tokens, embedding, t = inputs()
    before = trained(tokens, embedding, t)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    after = trained(changed, embedding, t)
    assert (before - after).abs().amax(dim=(0, 2)).min() > 1e-6


def test_where_selects_rows_of_the_full_logits(trained):
    tokens, embedding, t = inputs()
    where = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = trained(tokens, embedding, t)[where]
    torch.testing.assert_close(trained(tokens, embedding, t, where), expected)
    index = where.flatten().nonzero()[:, 0]
    torch.testing.assert_close(trained(tokens, embedding, t, index), expected)


def test_denoiser_without_gradients_logits_are_float32_in_a_coarser_format_too(trained):
    tokens, embedding, t = inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        h = trained.hidden_states(tokens, embedding, t)
        found = trained(tokens, embedding, t)
    assert h.dtype == found.dtype == torch.float32
    with torch.no_grad():
        expected = F.linear(h, trained.token_table.weight, trained.output_bias)
    assert torch.equal(found, expected)


def test_denoiser_a_row_does_not_depend_on_its_batch(trained):
    tokens, embedding, t = inputs(batch=5)
    together = trained(tokens, embedding, t)
    for row in range(5):
        alone = trained(tokens[row : row + 1], embedding[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)


def test_denoiser_shorter_sequences_are_accepted(trained):
    tokens, embedding, t = inputs()
    assert trained(tokens[:, :5], embedding, t).shape == (3, 5, 50)


@pytest.mark.parametrize("width", [64, 40, 90])
def test_the_token_table_starts_from_word_embeddings(width):
    torch.manual_seed(0)
    network = Denoiser(TINY)
    untouched = network.token_table.weight[45:].clone()
    words = torch.randn(45, width) * 0.05
    network.start_from_words(words)
    table = network.token_table.weight[:45]
    torch.testing.assert_close(table.std(), words.std(), rtol=1e-3, atol=0)
    torch.testing.assert_close(network.token_table.weight[45:], untouched)
    if width == 64:
        torch.testing.assert_close(table, words)
    # words that are close stay close: the cosines agree
    before = F.cosine_similarity(words[:10, None], words[None, :10], dim=-1)
    after = F.cosine_similarity(table[:10, None], table[None, :10], dim=-1)
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.8


def test_denoiser_the_output_bias_starts_at_log_frequencies():
    network = Denoiser(TINY)
    network.start_from_frequencies(torch.arange(50))
    assert float(network.output_bias.detach().exp().sum()) == pytest.approx(1.0)
    ratio = (network.output_bias[40] - network.output_bias[4]).detach().exp()
    assert float(ratio) == pytest.approx(40.5 / 4.5, rel=1e-4)


def test_denoiser_the_direct_path_starts_from_pairs():
    """Vectors that say which words are in a text: then the path alone tells the words apart."""
    generator = torch.Generator().manual_seed(0)
    network = Denoiser(TINY)
    network.start_from_words(torch.randn(50, TINY.hidden, generator=generator))
    x0 = torch.randint(1, 50, (600, 6), generator=generator)
    x0[::2, 3:] = 0  # padding
    directions = torch.randn(50, TINY.embedding_dim, generator=generator)
    e = F.normalize((directions[x0] * (x0 > 0)[..., None]).sum(dim=1), dim=1)
    network.start_from_pairs(x0[:500], e[:500], pad_id=0)

    def loss(vectors):
        shift = network.embedding_shift(vectors * TINY.embedding_dim**0.5)
        logits = (shift @ network.token_table.weight.T).repeat_interleave(6, dim=0)
        return F.cross_entropy(logits[:, 1:], x0[500:].flatten() - 1, ignore_index=-1).item()

    assert network.embedding_shift.weight.any()
    assert loss(e[500:]) < loss(torch.zeros_like(e[500:])) - 0.3
    assert loss(e[500:].roll(1, dims=0)) > loss(torch.zeros_like(e[500:]))


@pytest.mark.parametrize("count", [1, 3, 500])
def test_denoiser_the_direct_path_stays_at_zero_where_pairs_say_nothing(count):
    generator = torch.Generator().manual_seed(1)
    network = Denoiser(TINY)
    x0 = torch.full((count, 4), 7)
    e = F.normalize(torch.randn(count, TINY.embedding_dim, generator=generator), dim=1)
    network.start_from_pairs(x0, e, pad_id=0)
    assert network.embedding_shift.weight.abs().max() < 1e-4


def test_denoiser_feedback_says_nothing_at_first_and_nothing_where_there_is_no_hypothesis(trained):
    tokens, embedding, t = inputs()
    hypothesis = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    told = Denoiser(replace(TINY, feedback=True))
    missing, _ = told.load_state_dict(trained.state_dict(), strict=False)
    assert missing == ["feedback.weight"]
    both = torch.cat([embedding, hypothesis], dim=1)
    plain = trained(tokens, embedding, t)
    for condition in (embedding, both):
        torch.testing.assert_close(told(tokens, condition, t), plain)
    torch.nn.init.normal_(told.feedback.weight, std=0.2)
    assert not torch.allclose(told(tokens, both, t), plain, atol=0.01)
    nothing = torch.cat([embedding, torch.zeros_like(hypothesis)], dim=1)
    for condition in (embedding, nothing):
        torch.testing.assert_close(told(tokens, condition, t), plain)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 0},
        {"hidden": 65},
        {"layers": "2"},
        {"colour": 3},
        {"length": 1.5},
        {"feedback": 1},
        {"prefix": 8},
        {"prefix": -1},
        {"prefix": 2.0},
    ],
)
def test_denoiser_sizes_bad_sizes_are_refused(change):
    with pytest.raises(CheckpointError):
        DenoiserSizes.from_dict({**TINY.to_dict(), **change})
    assert DenoiserSizes.from_dict(TINY.to_dict()) == TINY
    told = replace(TINY, feedback=True, prefix=4)
    assert DenoiserSizes.from_dict(told.to_dict()) == told
    assert "feedback" not in TINY.to_dict(), "folders of plain networks stay as they were"


@pytest.mark.parametrize("length", [1, 7, 32])
def test_both_kernels_of_attention_agree(length):
    """bfloat16 with a gradient takes the batched products, without one the fused kernel."""
    q, k, v = torch.randn(
        3, 2, 4, length, 16, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    fused = attention(q, k, v)
    products = attention(q.requires_grad_(), k, v)
    assert products.requires_grad and not fused.requires_grad
    torch.testing.assert_close(products.detach(), fused, rtol=0.02, atol=0.02)


def test_denoiser_without_values_draws_none(monkeypatch):
    """`normal_` on the meta device loads torch's compiler, which takes seconds."""

    def draw(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(torch.nn.init, "normal_", draw)
    with torch.device("meta"):
        assert Denoiser(TINY).token_table.weight.is_meta
    with pytest.raises(AssertionError, match="drawn"):
        Denoiser(TINY)


@torch.no_grad()
def test_output_states_are_guided_but_where_all_is_masked(trained):
    guided = Denoiser(replace(TINY, guidance=0.5)).eval()
    weights = {name: torch.randn_like(x) for name, x in guided.unconditional.state_dict().items()}
    guided.load_state_dict(
        trained.state_dict() | {f"unconditional.{name}": x for name, x in weights.items()}
    )
    tokens, embedding, t = inputs()
    t[1] = 1.0
    h = trained.hidden_states(tokens, embedding, t)
    condition = (embedding * 4.0)[:, None].expand(-1, 8, -1)  # the root of 16
    without = guided.unconditional(torch.cat([h, condition], dim=-1))
    expected = h + 0.5 * (h - without)
    expected[1] = h[1]
    torch.testing.assert_close(guided.output_states(tokens, embedding, t), expected)
    torch.testing.assert_close(guided.hidden_states(tokens, embedding, t), h)

    positions = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    of_some = guided.output_states(tokens, embedding, t, positions)
    torch.testing.assert_close(of_some, expected[positions])
    index = positions.flatten().nonzero()[:, 0]
    torch.testing.assert_close(guided.output_states(tokens, embedding, t, index), of_some)
    logits = F.linear(of_some, guided.token_table.weight, guided.output_bias)
    torch.testing.assert_close(guided(tokens, embedding, t, positions), logits)
    packed = PackedDenoiser(guided)(tokens, embedding, t, positions)
    torch.testing.assert_close(packed, logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strength", [-1.0, 11.0, "strong", True])
def test_denoiser_sizes_refuse_a_guidance_that_is_none(strength):
    with pytest.raises(CheckpointError, match="guidance"):
        DenoiserSizes.from_dict(TINY.to_dict() | {"guidance": strength})
    assert DenoiserSizes.from_dict(TINY.to_dict() | {"guidance": 0.4}).guidance == 0.4
