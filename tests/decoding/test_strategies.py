"""What every registered strategy promises, on any length, batch, budget and seed."""

import dataclasses
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import WORD_MASK, ConstantDenoiser, FakeOracle, WordDenoiser
from unembed.decoding import (
    STRATEGIES,
    Decoding,
    DecodingStep,
    SequenceSpec,
    state,
    strategy_fields,
)
from unembed.decoding.settings import as_decoding
from unembed.decoding.strategy import Strategy
from unembed.diffusion import Linear, LogLinear
from unembed.errors import ConfigError

VOCABULARY, PAD, END, MASK = WORD_MASK + 1, 0, 1, WORD_MASK

# One or more settings of each vector-only strategy that take different paths through it.
VARIANTS = [
    ("greedy", {}),
    ("greedy", {"order": "margin"}),
    ("greedy", {"order": "left-to-right"}),
    ("greedy", {"lengths": 0}),
    ("greedy", {"lengths": 3}),
    ("entropy-bounded", {}),
    ("entropy-bounded", {"gamma": 5.0}),
    ("entropy-bounded", {"lengths": 0}),
    ("entropy-bounded", {"lengths": 2}),
    ("euler", {}),
    ("euler", {"temperature": 0.5, "top_p": 0.8}),
    ("euler", {"temperature": 0.0}),
    ("euler-remask", {}),
    ("euler-remask", {"threshold": 0.6, "probability": 1.0}),
    ("euler-remask", {"probability": 0.9}),
    ("two-stage", {}),
    ("two-stage", {"noise": 1.0}),
]


VECTOR_ONLY = [name for name, kind in STRATEGIES.items() if not kind.needs_encoder]


def embeddings(batch: int) -> torch.Tensor:
    return (torch.arange(batch)[:, None] / 100).expand(-1, 3).clone()


def generators(batch: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + row) for row in range(batch)]


def canvas_of(length: int, schedule=None) -> SequenceSpec:
    return SequenceSpec(length, MASK, schedule or LogLinear(), END, PAD)


def run(strategy: Strategy, length: int, batch: int = 3, steps: int = 4, seed: int = 0, **more):
    rows = more.pop("rows", range(batch))
    denoiser = more.pop("denoiser", None) or WordDenoiser(length)
    oracle = FakeOracle(len(rows)) if strategy.needs_encoder else None
    return strategy(
        denoiser,
        embeddings(batch)[list(rows)],
        more.pop("spec", None) or canvas_of(length),
        steps=steps,
        generators=[generators(batch, seed)[row] for row in rows],
        oracle=oracle,
        **more,
    )


def every_variant(test):
    """Each variant of the vector-only strategies, and every other registered strategy as it is."""
    covered = {name for name, _ in VARIANTS}
    rest = [(name, {}) for name in STRATEGIES if name not in covered]
    cases = []
    for name, options in VARIANTS + rest:
        marks = [pytest.mark.slow] if STRATEGIES[name].needs_encoder else []
        variant = "-".join([name, *map(str, options.values())])
        cases.append(pytest.param(name, options, id=variant, marks=marks))
    return pytest.mark.parametrize(("name", "options"), cases)(test)


def usable(options: dict, steps: int) -> bool:
    return options.get("lengths", 1) <= 1 or steps > 1


@every_variant
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_decoding_every_position_is_filled_within_the_budget(name, options, data):
    length = data.draw(st.integers(1, 9), "length")
    steps = data.draw(st.integers(1, 12).filter(lambda n: usable(options, n)), "steps")
    batch = data.draw(st.integers(1, 4), "batch")
    schedule = data.draw(st.sampled_from([Linear(), LogLinear()]), "schedule")
    denoiser = WordDenoiser(length, data.draw(st.floats(0, 8), "sharpness"))
    shown: list[DecodingStep] = []
    strategy = Decoding.of(name, **options).strategy
    decoded = run(
        strategy,
        length,
        batch,
        steps,
        denoiser=denoiser,
        spec=canvas_of(length, schedule),
        on_step=shown.append,
    )
    assert decoded.tokens.shape == decoded.confidences.shape == decoded.order.shape
    assert decoded.tokens.shape == (batch, length)
    assert not (decoded.tokens == MASK).any()
    assert ((decoded.tokens >= 0) & (decoded.tokens < VOCABULARY)).all()
    assert ((decoded.confidences > 0) & (decoded.confidences <= 1 + 1e-6)).all()
    assert (decoded.order <= steps).all() or strategy.needs_encoder
    assert (decoded.passes >= 1).all()
    if not strategy.needs_encoder:
        assert (decoded.passes <= steps * max(1, options.get("lengths", 1))).all()
        assert decoded.encoder_calls.tolist() == [0] * batch
    else:
        assert (decoded.encoder_calls <= 20).all()
    asked = sum(len(seen.tokens) for seen in denoiser.seen)
    assert int(decoded.passes.sum()) <= asked
    for seen in denoiser.seen:
        assert not (seen.where & (seen.tokens != MASK)).any(), "only masked positions are projected"
        assert ((seen.t > 0) & (seen.t <= 1)).all()
    assert [step.index for step in shown] == list(range(1, len(shown) + 1))
    assert shown[-1].index == shown[-1].total
    assert torch.equal(shown[-1].tokens, decoded.tokens)
    assert shown[-1].mask_ratio.tolist() == [0.0] * batch


@every_variant
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_decoding_a_text_depends_on_its_vector_and_seed_alone(name, options, data):
    length = data.draw(st.integers(1, 8), "length")
    steps = data.draw(st.integers(2, 6), "steps")
    seed = data.draw(st.integers(0, 5), "seed")
    rows = data.draw(st.permutations(range(5)), "rows")[: data.draw(st.integers(1, 5), "batch")]
    strategy = Decoding.of(name, **options).strategy
    whole = run(strategy, length, 5, steps, seed)
    again = run(strategy, length, 5, steps, seed)
    part = run(strategy, length, 5, steps, seed, rows=rows)
    for field in ("tokens", "confidences", "order", "passes", "encoder_calls"):
        assert torch.equal(getattr(whole, field), getattr(again, field)), field
        alone, together = getattr(part, field), getattr(whole, field)[list(rows)]
        assert torch.allclose(alone.double(), together.double(), atol=1e-6), field


@every_variant
def test_decoding_logits_read_in_parts_give_the_same_as_all_at_once(name, options, monkeypatch):
    strategy = Decoding.of(name, **options).strategy
    whole, few = WordDenoiser(6), WordDenoiser(6)
    expected = run(strategy, 6, 5, steps=5, denoiser=whole)
    monkeypatch.setattr(state, "_TOGETHER", {"cpu": 4})
    found = run(strategy, 6, 5, steps=5, denoiser=few)
    assert len(few.seen) > len(whole.seen)
    if not strategy.needs_encoder:  # guided search has parts of its own beside these
        assert max(seen.where.sum() for seen in few.seen) < 4 + 6
    assert sum(len(seen.tokens) for seen in few.seen) == sum(len(s.tokens) for s in whole.seen)
    for field in ("tokens", "confidences", "order", "passes"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))


@every_variant
def test_decoding_it_draws_from_the_generators_alone(name, options):
    strategy = Decoding.of(name, **options).strategy
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = run(strategy, 6, steps=5, seed=1, denoiser=WordDenoiser(6, 0.0))
    assert torch.equal(before, torch.random.get_rng_state())
    others = [run(strategy, 6, steps=5, seed=s, denoiser=WordDenoiser(6, 0.0)) for s in range(2, 8)]
    differs = any(not torch.equal(first.tokens, other.tokens) for other in others)
    assert differs == (name not in ("greedy", "entropy-bounded")) or strategy.needs_encoder


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_what_is_settled_stays_unless_the_strategy_takes_back(name, options):
    shown: list[DecodingStep] = []
    strategy = Decoding.of(name, **options).strategy
    spec, denoiser = canvas_of(8, Linear()), WordDenoiser(8, 0.5)
    run(strategy, 8, 6, 8, spec=spec, denoiser=denoiser, on_step=shown.append)
    taken_back = 0
    for before, after in pairwise(shown):
        assert torch.equal(after.changed, before.tokens != after.tokens)
        taken_back += int(((before.tokens != MASK) & after.changed).sum())
    takes_back = name in ("euler-remask", "two-stage")
    if options.get("probability") == 1.0:
        takes_back = False  # what is doubtful is refused before it is ever shown
    if "lengths" not in options:  # the last step may show another hypothesis than those before
        assert (taken_back > 0) == takes_back


@pytest.mark.parametrize("name", VECTOR_ONLY)
def test_decoding_nothing_is_asked_behind_the_end(name):
    denoiser = WordDenoiser(8, 3.0)
    run(Decoding.of(name).strategy, 8, 6, 8, denoiser=denoiser)
    behind = 0
    for seen in denoiser.seen:
        ends = (seen.tokens == END).long()
        late = ends.cumsum(dim=1) - ends > 0
        behind += int(late.sum())
        assert not (seen.where & late).any()
        assert not (seen.tokens[late] == MASK).any()
    assert behind > 0, "no text ended before the last position"


def test_decoding_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="greedy"):
        Decoding.of("psychic")


def test_decoding_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"greedy \(order, lengths\); found 'courage'"):
        Decoding.of("greedy", courage=3)
    with pytest.raises(ConfigError, match="found 'name'"):
        Decoding.of("greedy", name="euler")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("greedy", {"order": "random"}, "order among confidence, margin, left-to-right"),
        ("greedy", {"lengths": -1}, "lengths of at least 0 and at most 64; found -1"),
        ("greedy", {"lengths": 2.5}, "lengths of type int; found 2.5"),
        ("greedy", {"lengths": "two"}, "lengths of type int; found 'two'"),
        ("greedy", {"lengths": True}, "lengths of type int; found True"),
        ("entropy-bounded", {"gamma": -1}, "gamma of at least 0"),
        (
            "entropy-bounded",
            {"gamma": float("nan")},
            "gamma .* at most 1000; found nan",
        ),
        (
            "entropy-bounded",
            {"gamma": float("inf")},
            "gamma .* at most 1000; found inf",
        ),
        ("euler", {"temperature": -0.1}, "temperature of at least 0"),
        ("euler", {"temperature": 101}, "temperature of at least 0 and at most 100"),
        ("euler", {"top_p": 0}, "top_p above 0 and at most 1; found 0"),
        ("euler", {"top_p": 1.1}, "top_p above 0 and at most 1; found 1.1"),
        ("euler-remask", {"probability": 2}, "probability of at least 0 and at most 1"),
        ("euler-remask", {"threshold": -1}, "threshold of at least 0 and at most 1"),
        ("two-stage", {"noise": 1.5}, "noise of at least 0 and at most 1"),
        ("two-stage", {"top_p": 0}, "top_p above 0"),
    ],
)
def test_decoding_bad_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Decoding.of(name, **options)


@pytest.mark.parametrize("option", ["exploration", "curiosity", "refills", "probes", "likelihood"])
def test_decoding_an_option_that_is_gone_is_accepted_with_a_note(option, caplog):
    decoding = Decoding.parse(f"guided-search:{option}=0.1:enough=0.99:encoder_calls=9")
    assert decoding == Decoding.of("guided-search", stop_cosine=0.99, encoder_calls=9)
    assert f"guided-search has no {option} any more" in caplog.text


@pytest.mark.parametrize("options", ["x", [1], {1: 2}, {"lengths": 2}])
def test_as_decoding_refuses_options_that_are_none(options):
    with pytest.raises(ConfigError, match=r"options|each option once"):
        as_decoding(None, {"options": options, "lengths": 1})


@pytest.mark.parametrize("text", [None, 3, b"greedy"])
def test_parse_refuses_what_is_no_text(text):
    with pytest.raises(ConfigError, match="a decoding as NAME"):
        Decoding.parse(text)


def test_decoding_takes_the_numbers_of_numpy():
    numbers = {"steps": np.int64(2), "length": np.int32(5), "encoder_calls": np.uint8(3)}
    scalars = {"guidance": [np.float32(0), np.float64(1)], "repetition": np.float32(1)}
    decoding = Decoding.of("euler", **numbers, **scalars, temperature=np.float32(0.5))
    plain = {"steps": 2, "length": 5, "encoder_calls": 3, "guidance": (0.0, 1.0)}
    expected = Decoding.of("euler", **plain, repetition=1.0, temperature=0.5)
    assert decoding == expected and str(decoding) == str(expected)
    json.dumps(dataclasses.asdict(decoding))
    assert Decoding.of(lengths=np.int8(3)).strategy.lengths == 3
    for wrong in ({"steps": np.True_}, {"steps": np.float32(2)}, {"guidance": [np.True_, 1]}):
        with pytest.raises(ConfigError):
            Decoding.of(**wrong)


def test_decoding_options_may_be_text_as_on_the_command_line():
    assert (
        Decoding.of("euler", temperature="0.5").strategy
        == Decoding.of("euler", temperature=0.5).strategy
    )
    assert Decoding.of("euler", temperature=1).strategy == Decoding.of("euler").strategy
    assert Decoding.of("greedy", lengths="3", order="margin").strategy.lengths == 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_fields_every_option_has_a_plain_default_and_is_documented(name):
    for field in strategy_fields(name):
        assert type(field.default) in (int, float, bool, str)
        assert field.metadata["help"].endswith(".")
        bounded = field.metadata["high"] is not None or field.metadata["choices"]
        assert bounded or type(field.default) is bool, f"{field.name} has no upper bound"


def test_decoding_several_lengths_need_two_passes():
    with pytest.raises(ConfigError, match="at least 2 passes"):
        run(Decoding.of("greedy", lengths=2).strategy, 4, steps=1)


def lengths_of(decoded) -> list[int]:
    """Tokens before the end, or before padding, of each sequence."""
    return (~torch.isin(decoded.tokens, torch.tensor([END, PAD]))).cumprod(1).sum(1).tolist()


@every_variant
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_given_length_is_kept(name, options, data):
    length = data.draw(st.integers(2, 9), "length")
    content = data.draw(st.integers(1, length - 1), "content")
    steps = data.draw(st.integers(1, 2 * length), "steps")
    spec = replace(canvas_of(length), content=content)
    decoded = run(Decoding.of(name, **options).strategy, length, 3, steps, spec=spec)
    for row in decoded.tokens.tolist():
        assert row[content:] == [END, *[PAD] * (length - content - 1)]
        assert not {END, PAD, MASK} & set(row[:content])


def ending(length: int, goes_on: list[float]) -> ConstantDenoiser:
    """A denoiser of texts that have more than l tokens with probability ``goes_on[l]``."""
    more = torch.tensor(goes_on)
    ends = torch.cat([torch.ones(1), more[:-1]]) - more
    table = torch.zeros(length, VOCABULARY)
    table[:, 2:MASK] = more[:, None] / (MASK - 2)  # eight words, each less probable than the end
    table[:, END], table[:, PAD] = ends, 1.0 - more - ends
    return ConstantDenoiser(table.clamp_min(1e-9).log())


@pytest.mark.parametrize("name", ["greedy", "entropy-bounded"])
def test_the_length_is_the_median_one_where_passes_are_fewer_than_positions(name):
    goes_on = [1.0, 0.9, 0.8, 0.7, 0.55, 0.45, 0.2, 0.0]
    denoiser, median = ending(8, goes_on), 5
    assert (
        lengths_of(run(Decoding.of(name).strategy, 8, steps=4, denoiser=denoiser)) == [median] * 3
    )
    free = run(Decoding.of(name, lengths=0).strategy, 8, steps=4, denoiser=denoiser)
    assert max(lengths_of(free)) < median, "the denoiser does not tempt into ending early"
    # One position a pass is the published sampler, whatever `lengths` is
    plain = run(Decoding.of(name, lengths=0).strategy, 8, steps=8, denoiser=denoiser)
    default = run(Decoding.of(name).strategy, 8, steps=8, denoiser=denoiser)
    assert torch.equal(plain.tokens, default.tokens)
    assert plain.passes.tolist() == default.passes.tolist()


def test_fixing_the_length_takes_no_pass_of_its_own():
    denoiser = ending(8, [1.0, 0.9, 0.8, 0.7, 0.55, 0.45, 0.2, 0.0])
    decoded = run(Decoding.of("greedy").strategy, 8, steps=4, denoiser=denoiser)
    assert decoded.passes.tolist() == [4] * 3
    assert (decoded.order[:, :5] == 1).any(dim=1).all(), "the first pass unmasked no word"
    sure = decoded.confidences[0]
    assert sure[5] == pytest.approx(0.1, abs=1e-4), "P(end) at the end"
    assert sure[:5].tolist() == pytest.approx([1 / 8] * 5, abs=1e-4), "among words alone"


def test_two_stage_keeps_the_median_length():
    denoiser = ending(8, [1.0, 0.9, 0.8, 0.7, 0.55, 0.45, 0.2, 0.0])
    strategy = Decoding.of("two-stage", noise=1.0).strategy
    assert lengths_of(run(strategy, 8, steps=6, denoiser=denoiser)) == [5] * 3
