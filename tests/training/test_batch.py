from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.fakes import preset
from unembed.data.pairs import Pairs
from unembed.denoiser import Denoiser
from unembed.device import send
from unembed.diffusion import (
    WEIGHTS,
    LogLinear,
    corrupt_batch,
    diffusion_loss,
    make_schedule,
    mean_mask_ratio,
)
from unembed.encoders.base import FakeEncoder
from unembed.training import loss as linear_cross_entropy
from unembed.training.batch import (
    add_feedback,
    draw_hypotheses,
    max_masked,
    perturb_embeddings,
    row_reader,
    sample_contexts,
)
from unembed.training.loss import ChunkedCrossEntropy

from .helpers import make_config

CPU = torch.device("cpu")

MASK = 59


def draw(x0, rows=slice(None), seed=0, min_count=0, name="log-linear"):
    generator = torch.Generator().manual_seed(seed)
    schedule, weight = make_schedule(name, 5.0), WEIGHTS["elbo"]
    given = {"batch": len(x0), "rows": rows, "min_count": min_count}
    return corrupt_batch(x0[rows], schedule, weight, MASK, generator, **given)


def test_corrupt_batch_padded_to_a_constant_number_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=12))
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x0, embedding = torch.randint(0, MASK, (9, 12)), F.normalize(torch.randn(9, 16), dim=1)
    results = []
    for count in (0, 108):
        denoiser.zero_grad()
        batch = draw(x0, min_count=count)
        loss, _ = diffusion_loss(ChunkedCrossEntropy(denoiser), batch, embedding)
        loss.backward()
        results.append((len(batch.index), loss, [p.grad.clone() for p in denoiser.parameters()]))
    (some, plain, gradients), (every, padded, others) = results
    assert some < every == 108
    torch.testing.assert_close(padded, plain)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["log-linear", "linear"])
def test_max_masked_is_never_exceeded_and_wastes_little(name, whole):
    x0 = torch.zeros(512, 32, dtype=torch.long)
    own = slice(None) if whole else slice(0, 256)
    pairs = len(x0[own])
    most = max_masked(pairs, 32, mean_mask_ratio(make_schedule(name, 5.0)), whole)
    counts = [len(draw(x0, own, seed, name=name).index) for seed in range(60)]
    assert max(counts) <= most <= pairs * 32
    assert most < 1.25 * np.mean(counts)
    assert {len(draw(x0, own, seed, most, name).index) for seed in range(5)} == {most}


def test_row_reader_of_resident_pairs_gives_the_same_pairs(pairs):
    opened, rows = Pairs.open(pairs), np.array([5, 700, 3, 64, 63])
    stored = row_reader(opened, make_config(resident="never").training, CPU)(rows)
    resident = row_reader(opened, make_config(resident="always").training, CPU)(rows)
    assert torch.equal(resident[0], stored[0])
    torch.testing.assert_close(resident[1], stored[1])


def test_diffusion_loss_the_network_can_be_compiled_in_one_piece(monkeypatch):
    """One graph, no breaks; the kernels themselves are the compiler's business."""
    compile_ = torch.compile
    monkeypatch.setattr(
        linear_cross_entropy.torch,
        "compile",
        lambda function: compile_(function, backend="eager", fullgraph=True),
    )
    denoiser = Denoiser(preset("tiny", vocab_size=60, embedding_dim=16, length=12))
    batch, embedding = draw(torch.randint(0, MASK, (9, 12))), torch.randn(9, 16)
    losses = [
        diffusion_loss(ChunkedCrossEntropy(denoiser, compile=on), batch, embedding)[0]
        for on in (False, True)
    ]
    torch.testing.assert_close(*losses)


# Condition


@pytest.fixture
def vectors() -> torch.Tensor:
    return F.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)


def test_perturb_embeddings_switched_off_changes_nothing_and_draws_nothing(vectors):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert perturb_embeddings(vectors, 0.0, 0.0, generator) is vectors
    assert torch.equal(generator.get_state(), before)


def test_perturb_embeddings_drops_the_share_asked_for_to_the_zero_vector(vectors):
    dropped = perturb_embeddings(vectors, 0.1, 0.0, torch.Generator().manual_seed(1))
    gone = dropped.norm(dim=1) == 0
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[~gone], vectors[~gone])


def test_perturb_embeddings_noise_has_the_length_asked_for_and_vectors_stay_unit(vectors):
    noisy = perturb_embeddings(vectors, 0.0, 0.05, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noisy.norm(dim=1), torch.ones(len(vectors)))
    assert (noisy - vectors).norm(dim=1).mean().item() == pytest.approx(0.05, rel=0.05)


def test_perturb_embeddings_is_decided_by_its_generator(vectors):
    first, second = (
        perturb_embeddings(vectors, 0.2, 0.02, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_perturb_embeddings_what_is_drawn_is_sent_without_waiting(monkeypatch):
    """The draws are made on the host; a GPU would be waited for at a plain copy."""
    waits, original = [], torch.Tensor.to

    def spy(self, *args, **kwargs):
        waits.append(not kwargs.get("non_blocking", False))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    perturb_embeddings(torch.eye(4), 0.5, 0.1, torch.Generator())
    assert waits == [False, False]


def test_send_a_gpu_is_sent_to_from_pinned_memory():
    """Only such a copy goes on while the host does something else."""
    calls = []

    class Spy:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking):
            calls.append((device.type, non_blocking))

    for kind in ("cuda", "cpu"):
        send(Spy(), torch.device(kind))
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]


# Context

FIRST = 0  # the first id, which a careless inverse of the distribution would pick


@pytest.fixture
def small_denoiser():
    torch.manual_seed(0)
    return Denoiser(preset("tiny", vocab_size=9, embedding_dim=16, length=10))


def corrupted_batch(size):
    x0 = torch.randint(1, 9, (size, 10))
    return corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], FIRST, torch.Generator())


def replace_some(small_denoiser, batch, share):
    size = len(batch.xt)
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(2, size, 10, generator=generator)
    embedding = F.normalize(torch.randn(size, 16, generator=generator), dim=1)
    timestep = LogLinear().timestep
    return sample_contexts(
        small_denoiser, batch, embedding, draws[0] < share, draws[1], FIRST, timestep
    ), (draws[0] < share)


def test_sample_contexts_changes_chosen_visible_tokens_only(small_denoiser):
    batch = corrupted_batch(64)
    mixed, chosen = replace_some(small_denoiser, batch, 0.5)
    changed = mixed.xt != batch.xt
    assert changed.any()
    assert not (changed & ~(chosen & ~batch.masked)).any()
    assert torch.equal(mixed.xt == FIRST, batch.masked)
    for name in ("t", "masked", "index", "targets", "weights"):
        assert getattr(mixed, name) is getattr(batch, name)
    assert not mixed.xt.requires_grad


def test_sample_contexts_follows_the_denoiser_s_distribution(small_denoiser):
    """A denoiser that knows nothing but its output bias."""
    with torch.no_grad():
        small_denoiser.token_table.weight.zero_()
        small_denoiser.output_bias.copy_(torch.linspace(2.0, -2.0, 9))
    batch = corrupted_batch(4000)
    mixed, chosen = replace_some(small_denoiser, batch, 1.0)
    samples = mixed.xt[chosen & ~batch.masked]
    found = torch.bincount(samples, minlength=9) / len(samples)
    bias = small_denoiser.output_bias.detach().clone()
    bias[FIRST] = -torch.inf
    torch.testing.assert_close(found, bias.softmax(0), atol=0.02, rtol=0.0)


def test_sample_contexts_of_nothing_does_nothing(small_denoiser):
    batch = corrupted_batch(8)
    assert torch.equal(replace_some(small_denoiser, batch, 0.0)[0].xt, batch.xt)


def test_sample_contexts_runs_the_denoiser_even_where_nothing_is_chosen(small_denoiser):
    """Where its weights are shared out every process must take part in every pass."""
    asked, features = [], small_denoiser.hidden_states
    small_denoiser.hidden_states = lambda *given: asked.append(1) or features(*given)
    replace_some(small_denoiser, corrupted_batch(8), 0.0)
    del small_denoiser.hidden_states
    assert asked


# Feedback


def hypotheses_of(pairs, share, rows=slice(None), seed=4):
    opened = Pairs.open(pairs)
    tokens, vectors = opened.rows(np.arange(40))
    sizes = {"vocab_size": opened.tokenizer.size, "embedding_dim": vectors.shape[1], "length": 12}
    torch.manual_seed(0)
    denoiser = Denoiser(preset("tiny", **sizes))
    x0, embedding = torch.from_numpy(tokens)[rows], torch.from_numpy(vectors)[rows]
    generator = torch.Generator().manual_seed(seed)
    given = draw_hypotheses(denoiser, x0, embedding, opened, share, generator, 40, rows)
    return opened.tokenizer, x0, embedding, given


def test_draw_hypotheses_damages_content_from_one_token_to_all_of_it(pairs):
    tokenizer, x0, _, hypotheses = hypotheses_of(pairs, 1.0)
    special = torch.tensor(sorted(tokenizer.special_ids))
    content, wrong = ~torch.isin(x0, special), hypotheses != x0
    assert not (wrong & ~content).any()
    assert not torch.isin(hypotheses[content], special).any()
    shares = wrong.sum(dim=1) / content.sum(dim=1)
    assert (shares > 0).float().mean() > 0.9  # now and then a guess is right
    assert shares.max() > 0.8 and shares.median() < 0.5
    assert torch.equal(hypotheses_of(pairs, 1.0)[3], hypotheses), "the generator decides"
    part = hypotheses_of(pairs, 1.0, slice(10, 30))[3]
    assert torch.equal(part, hypotheses[10:30]), "a process draws what one alone would"


def test_draw_hypotheses_leaves_the_other_texts_alone(pairs):
    _, x0, _, hypotheses = hypotheses_of(pairs, 0.4)
    assert 0.2 < (hypotheses != x0).any(dim=1).float().mean() < 0.6
    assert torch.equal(hypotheses_of(pairs, 0.0)[3], x0)


def test_add_feedback_shows_the_hypotheses_and_embeds_the_wrong_ones(pairs):
    tokenizer, x0, embedding, hypotheses = hypotheses_of(pairs, 0.5)
    embedding[3] = 0.0  # a null condition
    hypotheses[3, 0] = x0[4, 0]
    batch = corrupt_batch(x0, LogLinear(), WEIGHTS["uniform"], tokenizer.mask_id, torch.Generator())
    encoder = FakeEncoder(dimension=embedding.shape[1])
    shown, condition = add_feedback(batch, embedding, x0, hypotheses, encoder, tokenizer)
    assert torch.equal(shown.xt[~batch.masked], hypotheses[~batch.masked])
    right = (hypotheses == x0) & ~batch.masked
    sampled = replace(batch, xt=torch.where(right, x0[0, 0], batch.xt))  # as `sample_contexts` does
    kept, _ = add_feedback(sampled, embedding, x0, hypotheses, encoder, tokenizer)
    assert torch.equal(kept.xt[right], sampled.xt[right]), "what is right is left to others"
    assert (shown.xt[batch.masked] == tokenizer.mask_id).all()
    assert shown.targets is batch.targets
    target, known = condition.chunk(2, dim=1)
    assert torch.equal(target, embedding)
    wrong = (hypotheses != x0).any(dim=1)
    wrong[3] = False
    assert not known[~wrong].any()
    texts = tokenizer.decode(hypotheses[wrong].tolist())
    np.testing.assert_allclose(known[wrong].numpy(), encoder.encode(texts), atol=1e-6)
