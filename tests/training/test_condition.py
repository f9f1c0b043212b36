import pytest
import torch
import torch.nn.functional as F

from unembed.training.batch import perturb, sent


@pytest.fixture
def vectors() -> torch.Tensor:
    return F.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)


def test_switched_off_it_changes_nothing_and_draws_nothing(vectors):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert perturb(vectors, 0.0, 0.0, generator) is vectors
    assert torch.equal(generator.get_state(), before)


def test_dropout_replaces_the_share_asked_for_by_the_zero_vector(vectors):
    dropped = perturb(vectors, 0.1, 0.0, torch.Generator().manual_seed(1))
    gone = dropped.norm(dim=1) == 0
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[~gone], vectors[~gone])


def test_noise_has_the_length_asked_for_and_vectors_stay_unit(vectors):
    noisy = perturb(vectors, 0.0, 0.05, torch.Generator().manual_seed(1))
    torch.testing.assert_close(noisy.norm(dim=1), torch.ones(len(vectors)))
    assert (noisy - vectors).norm(dim=1).mean().item() == pytest.approx(0.05, rel=0.05)


def test_the_same_generator_gives_the_same_batch(vectors):
    first, second = (
        perturb(vectors, 0.2, 0.02, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_what_is_drawn_is_sent_without_waiting(monkeypatch):
    """The draws are made on the host; a GPU would be waited for at a plain copy."""
    waits, original = [], torch.Tensor.to

    def spy(self, *args, **kwargs):
        waits.append(not kwargs.get("non_blocking", False))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    perturb(torch.eye(4), 0.5, 0.1, torch.Generator())
    assert waits == [False, False]


def test_a_gpu_is_sent_to_from_pinned_memory():
    """Only such a copy goes on while the host does something else."""
    calls = []

    class Spy:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking):
            calls.append((device.type, non_blocking))

    for kind in ("cuda", "cpu"):
        sent(Spy(), torch.device(kind))
    assert calls == ["pinned", ("cuda", True), ("cpu", True)]
