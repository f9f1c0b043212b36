"""Sequential, entropy-bounded and length search beyond what every strategy promises."""

import pytest
import torch

from tests.fakes import ConstantDenoiser, preset
from unembed.backends.cpu import fast_form
from unembed.decoding import SequenceSpec
from unembed.decoding.logits import (
    RepetitionPenalty,
    entropies,
    margins,
    most_probable,
    with_processors,
)
from unembed.decoding.sequential import EntropyBounded, Sequential
from unembed.decoding.state import DenoisingState, topk_mask
from unembed.denoiser import Denoiser
from unembed.device import Compute
from unembed.diffusion import Linear, LogLinear

VOCABULARY, PAD, END, MASK = 9, 0, 1, 8


def table_of(*rows: dict[int, float]) -> torch.Tensor:
    """Logits from probabilities: the rest is spread over the tokens not named, mask excluded."""
    table = torch.empty(len(rows), VOCABULARY)
    for row, named in zip(table, rows, strict=True):
        row[:] = (1 - sum(named.values())) / (VOCABULARY - 1 - len(named))
        for token, p in named.items():
            row[token] = p
        row[MASK] = 0.3
    return table.clamp_min(1e-9).log()


def decode(strategy, table, steps=8, batch=1, ends=False, **more):
    denoiser = ConstantDenoiser(table)
    special = (END, PAD) if ends else (None, None)
    spec = SequenceSpec(len(table), MASK, Linear(), *special)
    decoded = strategy(denoiser, torch.zeros(batch, 2), spec, steps=steps, generators=[], **more)
    return decoded, denoiser


SURE = table_of({2: 0.5, 3: 0.4}, {4: 0.45, 5: 0.05}, {6: 0.9}, {7: 0.3})


@pytest.mark.parametrize(
    ("order", "passes"),
    [
        ("confidence", [2, 3, 1, 4]),
        ("margin", [4, 2, 1, 3]),
        ("left-to-right", [1, 2, 3, 4]),
    ],
)
def test_sequential_the_order_is_the_one_asked_for(order, passes):
    decoded, _ = decode(Sequential(order=order), SURE)
    assert decoded.order[0].tolist() == passes
    assert decoded.tokens[0].tolist() == [2, 4, 6, 7]
    assert decoded.confidences[0].tolist() == pytest.approx([0.5, 0.45, 0.9, 0.3], abs=1e-5)


@pytest.mark.parametrize(("steps", "sizes"), [(8, [1] * 8), (3, [3, 3, 2]), (1, [8])])
def test_sequential_positions_are_spread_evenly_and_the_timestep_is_told(steps, sizes):
    decoded, denoiser = decode(Sequential(), SURE.repeat(2, 1), steps, batch=2)
    assert torch.bincount(decoded.order[0])[1:].tolist() == sizes
    masked = [float((tokens == MASK).float().mean()) for tokens, _ in denoiser.seen]
    assert [float(t[0]) for _, t in denoiser.seen] == pytest.approx(masked)


@pytest.mark.parametrize("strategy", [Sequential(), EntropyBounded(gamma=0.0)])
def test_sequential_the_steps_show_what_is_held_likeliest_where_nothing_is_settled(strategy):
    steps = []
    decode(strategy, SURE, on_step=steps.append)
    assert [step.guesses[0].tolist() for step in steps] == [
        [2, 4, 6, 7],
        [2, 4, 0, 7],  # the surest position is settled, so it is not asked about
        [0, 4, 0, 7],
        [0, 0, 0, 7],
    ]
    first = steps[0].guess_confidences[0]
    assert first.tolist() == pytest.approx([0.5, 0.45, 0.9, 0.3], abs=1e-4), (
        "probabilities without the mask token"
    )
    assert steps[-1].guess_confidences[0, :3].tolist() == [0, 0, 0]


def test_sequential_passes_saved_by_an_early_end_are_not_spent():
    table = table_of({2: 0.5}, {END: 0.9}, {3: 0.6}, {3: 0.6}, {3: 0.6})
    decoded, denoiser = decode(Sequential(), table, ends=True)
    assert decoded.tokens[0].tolist() == [2, END, PAD, PAD, PAD]
    assert decoded.passes.tolist() == [2] and len(denoiser.seen) == 2
    assert decoded.confidences[0].tolist() == pytest.approx([0.5, 0.9, 1, 1, 1], abs=1e-5)


def test_most_probable_probability_and_margin_are_those_without_the_mask_token():
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, MASK] = -torch.inf  # as `DenoisingState.predict` hands them over
    expected = logits[:, :MASK].softmax(dim=-1).topk(2, dim=-1)
    probabilities, guesses = most_probable(logits.clone())
    torch.testing.assert_close(probabilities, expected.values[:, 0])
    assert torch.equal(guesses, expected.indices[:, 0])
    torch.testing.assert_close(margins(logits), expected.values[:, 0] - expected.values[:, 1])


def test_entropies_the_entropy_is_that_of_the_probabilities():
    logits = torch.full((2, 8), -torch.inf)
    logits[0, 3] = 1.5
    logits[1, :4] = 0.7
    torch.testing.assert_close(entropies(logits), torch.tensor([1.0, 4.0]).log())


@pytest.mark.parametrize(
    ("gamma", "sizes"),
    # Entropies: two certain positions, then 0.69, 0.69 and 1.39 nats.
    [(0.0, [3, 1, 1]), (0.69, [3, 1, 1]), (0.70, [4, 1]), (1.4, [5])],
)
def test_entropy_bounded_settles_what_the_bound_allows(gamma, sizes):
    table = torch.full((5, VOCABULARY), -torch.inf)
    table[0, 2] = table[1, 3] = 0.0
    table[2, [4, 5]] = table[3, [5, 6]] = 0.0
    table[4, [6, 7, 0, 1]] = 0.0
    decoded, denoiser = decode(EntropyBounded(gamma=gamma), table, steps=5)
    assert torch.bincount(decoded.order[0])[1:].tolist() == sizes
    assert decoded.passes.tolist() == [len(denoiser.seen)] == [len(sizes)]


def test_entropy_bounded_ends_in_time():
    flat = torch.zeros(7, VOCABULARY)
    decoded, _ = decode(EntropyBounded(gamma=0.0), flat, steps=3)
    assert torch.bincount(decoded.order[0])[1:].tolist() == [3, 2, 2]


def test_sequential_the_likeliest_of_several_lengths_wins():
    # The end is likeliest at position 1, but a text that ends at position 2 is far likelier.
    table = table_of({2: 0.9}, {END: 0.5, 3: 0.4}, {END: 0.45, 4: 0.01}, {5: 0.02, END: 0.02})
    one, _ = decode(Sequential(), table, ends=True)
    assert one.tokens[0].tolist() == [2, END, PAD, PAD]
    table[1, 3] = 8.0  # where the end is excluded, its token is nearly certain
    table[1, END] = 7.9
    several, denoiser = decode(Sequential(lengths=2), table, ends=True, batch=2)
    assert several.tokens.tolist() == [[2, 3, END, PAD]] * 2
    assert several.passes.tolist() == [1 + 1 + 2] * 2
    for tokens, _ in denoiser.seen[1:]:
        assert ((tokens == END).sum(dim=1) == 1).all()


def test_sequential_a_fixed_end_keeps_other_ends_and_padding_out():
    table = table_of({END: 0.6, 2: 0.2}, {PAD: 0.6, 3: 0.2}, {END: 0.9}, {END: 0.5})
    decoded, _ = decode(Sequential(lengths=3), table, ends=True)
    ids = decoded.tokens[0].tolist()
    assert ids.index(END) >= 1
    assert not {END, PAD, MASK} & set(ids[: ids.index(END)])


def test_topk_mask_the_surest_are_the_first_among_equals():
    chosen = topk_mask(
        torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.1, 0.2, 0.3, 0.4]]),
        torch.tensor([[True, True, False, True], [True] * 4]),
        torch.tensor([2, 0]),
    )
    assert chosen.tolist() == [[True, True, False, False], [False] * 4]


def test_remask_masking_the_end_again_takes_what_follows_it_along():
    spec = SequenceSpec(5, MASK, Linear(), END, PAD)
    state = DenoisingState(torch.zeros(2, 2), spec, torch.tensor([[2, 3, END, PAD, PAD]] * 2))
    state.remask(torch.tensor([[True, False, True, False, False], [True] + [False] * 4]))
    assert state.tokens.tolist() == [[MASK, 3, MASK, MASK, MASK], [MASK, 3, END, PAD, PAD]]


def plain_twin(denoiser, vector, spec, penalty):
    """Sequential as one would first write it: one text, every position, every probability."""
    tokens = [spec.mask_id] * spec.length
    while spec.mask_id in tokens:
        share = tokens.count(spec.mask_id) / spec.length
        t = spec.schedule.timestep(torch.tensor([share]))
        p = denoiser(torch.tensor([tokens]), vector[None], t)[0].clone()  # [L, V]
        for token in tokens:
            if token not in (spec.mask_id, spec.end_id, spec.pad_id):
                p[:, token] -= penalty
        p[:, spec.mask_id] = -torch.inf
        best, guesses = p.softmax(dim=-1).max(dim=-1)
        open_places = [i for i in range(spec.length) if tokens[i] == spec.mask_id]
        place = max(open_places, key=lambda i: float(best[i]))
        tokens[place] = int(guesses[place])
        if spec.end_id in tokens:
            end = tokens.index(spec.end_id)
            tokens = [
                spec.pad_id if i > end and token == spec.mask_id else token
                for i, token in enumerate(tokens)
            ]
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_sequential_the_quick_path_equals_its_plain_twin_token_for_token(
    encoder, passages, penalty, quick, batch
):
    """A real network: only masked positions projected, only unfinished texts, all at once.

    As it is, and in its quickest form.
    """
    ids = encoder.tokenizer
    spec = SequenceSpec(12, ids.mask_id, LogLinear(5.0), ids.end_id, ids.pad_id)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Denoiser(preset("tiny", vocab_size=ids.size, embedding_dim=32, length=12))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.2)
            network.output_bias[ids.end_id] = 5.0  # texts of different lengths
    vectors = torch.from_numpy(encoder.encode(passages[:12]))
    with torch.inference_mode():
        form = network
        if quick:
            compute = Compute(torch.device("cpu"), torch.float32)
            form = fast_form(network, compute)
        denoiser = with_processors(form, [RepetitionPenalty(spec, penalty)])
        found = [
            Sequential()(denoiser, part, spec, steps=spec.length) for part in vectors.split(batch)
        ]
        expected = [plain_twin(network, vector, spec, penalty) for vector in vectors]
    assert torch.cat([part.tokens for part in found]).tolist() == expected
    assert len({tuple(row) for row in expected}) == 12
    passes = torch.cat([part.passes for part in found])
    assert penalty or len(set(passes.tolist())) > 1, "no text was done before the others"
