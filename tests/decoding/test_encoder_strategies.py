"""The strategies that call the encoder: exact budgets, never worse, alike in any company."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unembed.decoding import Decoding, SequenceSpec
from unembed.decoding.best_of import BestOf
from unembed.decoding.guided_search.search import GuidedSearch
from unembed.diffusion import make_schedule
from unembed.errors import ConfigError
from unembed.inverter import Inverter

STRATEGIES = {
    "best-of": BestOf(samples=12),
    "guided-search": GuidedSearch(beam=2, proposals=5),
}
TEXTS = ["the small cat runs.", "the old river reads at the bank.", "the good star hides."]


class CountingScorer:
    """Cosines by the fake encoder; every text embedded is written down."""

    def __init__(self, encoder, targets, budget):
        self.encoder, self.targets, self.budget = encoder, targets, budget
        self.seen = [{} for _ in targets]
        self.corpus = []

    def __call__(self, rows, token_ids):
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
        found = []
        for row, text in zip(rows, self.encoder.tokenizer.decode(ids), strict=True):
            if text and text not in self.seen[row]:
                assert self.remaining(row) > 0, "a call too many"
                vector = self.encoder.encode([text])[0]
                self.seen[row][text] = float(vector @ self.targets[row])
            found.append(self.seen[row].get(text, -1.0))
        return torch.tensor(found)

    def vectors(self, rows, token_ids):
        texts = self.encoder.tokenizer.decode(token_ids)
        known = [bool(t) and t in self.seen[row] for row, t in zip(rows, texts, strict=True)]
        vectors = self.encoder.encode([t or "." for t in texts])
        return vectors * np.array(known, dtype=np.float32)[:, None]

    def starts(self, row):
        return self.corpus

    def token_gains(self, rows, token_ids):
        return [None] * len(rows)

    def remaining(self, row):
        return self.budget - len(self.seen[row])

    @property
    def calls(self):
        return torch.tensor([len(seen) for seen in self.seen])


def canvas_of(inverter: Inverter, end: bool = True) -> SequenceSpec:
    ids = inverter.tokenizer
    schedule = make_schedule(inverter.diffusion["schedule"], inverter.diffusion["rate"])
    special = (ids.end_id, ids.pad_id) if end else (None, None)
    return SequenceSpec(inverter.length, ids.mask_id, schedule, *special)


def decode(strategy, inverter, encoder, targets, budget, *, seed=0, end=True, on_step=None):
    """The result and the oracle of one run; each vector's generator is seeded by the vector."""
    oracle = CountingScorer(encoder, targets, budget)
    seeds = [seed + int(abs(vector[0]) * 1e6) for vector in targets]
    with torch.inference_mode():
        found = strategy(
            inverter.denoiser,
            torch.from_numpy(targets),
            canvas_of(inverter, end),
            steps=4,
            generators=[torch.Generator().manual_seed(s) for s in seeds],
            on_step=on_step,
            oracle=oracle,
        )
    return found, oracle


def out_of_reach(count, dimension=32, seed=0):
    """Vectors no text of the fake encoder has."""
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return STRATEGIES[request.param]


@pytest.mark.parametrize("budget", [1, 4, 23])
def test_guided_search_spends_its_budget_to_the_last_call(inverter, encoder, budget):
    strategy = STRATEGIES["guided-search"]
    found, oracle = decode(strategy, inverter, encoder, out_of_reach(3), budget)
    assert found.encoder_calls.tolist() == oracle.calls.tolist() == [budget] * 3


@pytest.mark.parametrize(("samples", "budget"), [(1, 9), (5, 9), (30, 9)])
def test_best_of_calls_once_for_each_different_sample(inverter, encoder, samples, budget):
    strategy = BestOf(samples=samples, temperature=3.0)
    found, oracle = decode(strategy, inverter, encoder, out_of_reach(3), budget)
    assert found.encoder_calls.tolist() == oracle.calls.tolist() == [min(samples, budget)] * 3


def test_strategy_the_nearest_text_is_kept_and_it_only_gets_nearer(strategy, inverter, encoder):
    targets, steps = encoder.encode(TEXTS), []
    found, oracle = decode(strategy, inverter, encoder, targets, 40, on_step=steps.append)
    texts = inverter.tokenizer.decode(found.tokens.tolist())
    for text, seen, last in zip(texts, oracle.seen, steps[-1].cosines.tolist(), strict=True):
        assert seen[text] == pytest.approx(max(seen.values()), abs=1e-5) == pytest.approx(last)
    cosines = torch.stack([step.cosines for step in steps])
    assert (cosines.diff(dim=0) >= 0).all()
    start = [next(iter(seen.values())) for seen in oracle.seen]  # greedy comes first
    assert (cosines[-1] >= torch.tensor(start)).all()
    assert cosines[-1].mean() > np.mean(start) + 0.02


def test_steps_tell_where_the_search_is(strategy, inverter, encoder):
    steps = []
    found, _ = decode(strategy, inverter, encoder, out_of_reach(2), 12, on_step=steps.append)
    assert [step.index for step in steps] == list(range(1, len(steps) + 1))
    assert all(step.total >= step.index for step in steps)
    assert steps[-1].total == steps[-1].index
    assert torch.equal(steps[-1].tokens, found.tokens)
    assert torch.equal(steps[-1].encoder_calls, found.encoder_calls)
    assert steps[0].changed.all()
    for before, after in pairwise(steps):
        assert torch.equal(after.changed, before.tokens != after.tokens)


def test_strategy_a_result_is_whole(strategy, inverter, encoder):
    found, _ = decode(strategy, inverter, encoder, encoder.encode(TEXTS), 15)
    assert not (found.tokens == inverter.tokenizer.mask_id).any()
    assert ((found.confidences > 0) & (found.confidences <= 1)).all()
    assert (found.order >= 1).all()
    assert (found.order.max(dim=1).values <= found.passes).all()


def test_strategy_a_text_does_not_depend_on_its_company(strategy, inverter, encoder):
    targets = encoder.encode(TEXTS)
    together, _ = decode(strategy, inverter, encoder, targets, 20)
    apart = [decode(strategy, inverter, encoder, targets[k : k + 1], 20)[0] for k in range(3)]
    assert torch.equal(together.tokens, torch.cat([one.tokens for one in apart]))
    assert torch.equal(together.passes, torch.cat([one.passes for one in apart]))
    assert torch.equal(together.encoder_calls, torch.cat([one.encoder_calls for one in apart]))


@pytest.mark.slow
def test_the_same_seed_asks_the_same_and_another_seed_does_not(strategy, inverter, encoder):
    targets = out_of_reach(2)
    asked = [
        [list(seen) for seen in decode(strategy, inverter, encoder, targets, 60, seed=s)[1].seen]
        for s in (0, 0, 1)
    ]
    assert asked[0] == asked[1] != asked[2]


def test_strategy_a_text_that_is_right_is_left_alone(strategy, inverter, encoder):
    greedy, _ = decode(BestOf(samples=1), inverter, encoder, encoder.encode(TEXTS), 1)
    targets = encoder.encode(inverter.tokenizer.decode(greedy.tokens.tolist()))
    targets[1] = out_of_reach(1)[0]
    found, _ = decode(strategy, inverter, encoder, targets, 10)
    calls = found.encoder_calls.tolist()
    assert calls[1] > 1
    for row in (0, 2):
        start = CountingScorer(encoder, targets[row : row + 1], 1)(
            [0], greedy.tokens[row : row + 1]
        )
        assert calls[row] == 1 or start[0] < 0.9999


@pytest.mark.slow
def test_guided_search_makes_more_of_its_calls_than_sampling(inverter, encoder):
    targets, cosines = encoder.encode(TEXTS), {}
    plans = {"greedy": BestOf(samples=1), "best": BestOf(samples=120), "guided": GuidedSearch()}
    for name, strategy in plans.items():
        _, oracle = decode(strategy, inverter, encoder, targets, 120)
        cosines[name] = np.mean([max(seen.values()) for seen in oracle.seen])
    assert cosines["greedy"] <= cosines["best"] < cosines["guided"] - 0.1


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 6), budget=st.integers(1, 8), end=st.booleans())
def test_any_length_and_budget_with_and_without_an_end(inverter, encoder, length, budget, end):
    whole = canvas_of(inverter, end)
    spec = SequenceSpec(length, whole.mask_id, whole.schedule, whole.end_id, whole.pad_id)
    targets = out_of_reach(2, seed=length)
    oracle = CountingScorer(encoder, targets, budget)
    found = STRATEGIES["guided-search"](
        inverter.denoiser,
        torch.from_numpy(targets),
        spec,
        steps=3,
        generators=[torch.Generator().manual_seed(k) for k in range(2)],
        oracle=oracle,
    )
    assert found.tokens.shape == (2, length)
    assert not (found.tokens == spec.mask_id).any()
    assert (found.encoder_calls <= budget).all()


def test_without_an_encoder_they_refuse(strategy, inverter, encoder):
    with pytest.raises(ConfigError, match=r"expected an encoder for the strategy .*encoder-calls"):
        strategy(
            inverter.denoiser,
            torch.from_numpy(out_of_reach(1)),
            canvas_of(inverter),
            steps=2,
            generators=[torch.Generator()],
        )


@pytest.mark.parametrize("name", ["best-of", "guided-search"])
@pytest.mark.parametrize(("given", "calls"), [(False, 9), (True, 0)])
def test_invert_an_inverter_refuses_without_encoder_or_calls(inverter, encoder, name, given, calls):
    options = {"encoder": encoder if given else None, "encoder_calls": calls}
    with pytest.raises(ConfigError, match=r"at least 1 encoder call for the strategy"):
        inverter.invert(encoder.encode(TEXTS), strategy=name, **options)


def test_invert_an_inverter_counts_the_calls_of_each_text(inverter, encoder):
    found = inverter.invert(
        out_of_reach(3), strategy="guided-search", encoder=encoder, encoder_calls=7, batch_size=2
    )
    assert [one.encoder_calls for one in found] == [7, 7, 7]
    assert all(len(one.token_ids) == len(one.confidences) for one in found)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (BestOf, {"samples": 0}, "samples"),
        (BestOf, {"temperature": -1.0}, "temperature"),
        (BestOf, {"stop_cosine": 2.0}, "stop_cosine"),
        (GuidedSearch, {"beam": 0}, "beam"),
        (GuidedSearch, {"proposals": 0}, "proposals"),
        (GuidedSearch, {"gain": -0.1}, "gain"),
        (GuidedSearch, {"gain": float("nan")}, "gain"),
        (GuidedSearch, {"stop_cosine": -2.0}, "stop_cosine"),
        (GuidedSearch, {"rounds": -1}, "rounds"),
        (GuidedSearch, {"gamma": -0.5}, "gamma"),
        (GuidedSearch, {"steering": 11.0}, "steering"),
    ],
)
def test_best_of_options_out_of_range_are_refused(kind, options, named):
    with pytest.raises(ConfigError, match=f"expected {named} "):
        kind(**options)


def test_guided_search_starts_from_the_texts_of_a_corpus(inverter, encoder):
    targets = encoder.encode(TEXTS)
    oracle = CountingScorer(encoder, targets, 5)
    oracle.corpus = inverter.tokenizer.encode([TEXTS[1], TEXTS[0]])
    with torch.inference_mode():
        result = GuidedSearch(rounds=0, proposals=2)(
            inverter.denoiser,
            torch.from_numpy(targets),
            canvas_of(inverter),
            steps=4,
            generators=[torch.Generator().manual_seed(k) for k in range(3)],
            oracle=oracle,
        )
    texts = inverter.tokenizer.decode(result.tokens.tolist())
    known = inverter.tokenizer.decode(inverter.tokenizer.pack(oracle.corpus, 12).tolist())
    assert texts[:2] == known[::-1]  # which are the answers
    for seen in oracle.seen:
        assert list(seen)[1:3] == known


def test_decoding_names_the_threat_model_of_open_weights():
    assert Decoding.parse("guided-search:encoder_calls=9").threat_model == "vector + encoder"
    decoding = Decoding.parse("guided-search:encoder_calls=9:open_weights=true")
    assert decoding.threat_model == "vector + encoder's weights"
