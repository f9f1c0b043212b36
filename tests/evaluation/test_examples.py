import pytest

from unembed.evaluation import samples as module
from unembed.evaluation.metrics import Recovery
from unembed.evaluation.samples import (
    Sample,
    choose_examples,
    draw_indices,
    make_example,
)

from .. import architectures


def test_make_example_right_tokens_are_marked(encoder):
    tokenizer = encoder.tokenizer
    (ids,), (back,) = tokenizer.encode(["the cat sleeps ."]), tokenizer.encode(["the dog cat ."])
    sample = Sample("the cat sleeps .", ids, {"lang": "en"})
    example = make_example(4, "inverter", sample, Recovery("the dog cat.", back), tokenizer)
    assert [mark for _, mark in example.tokens] == ["right", "wrong", "elsewhere", "right"]
    assert "".join(piece for piece, _ in example.tokens) == "the dog cat."
    assert (example.index, example.labels, example.cosine) == (4, {"lang": "en"}, None)
    assert example.f1 == pytest.approx(0.75)


@pytest.mark.parametrize("name", list(architectures.TOKENIZERS))
def test_pieces_of_pieces_join_to_the_text_in_every_script(name):
    from unembed.tokenizer import from_transformers

    tokenizer = from_transformers(architectures.TOKENIZERS[name]())
    for text in architectures.TEXTS:
        (ids,) = tokenizer.encode([text])
        (whole,) = tokenizer.decode([ids])
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == whole


def an_example(index, f1, row="inverter"):
    return module.Example(f"text {index}", "", None, index, row, f1, [], {})


def test_choose_examples_examples_are_chosen_by_seed_from_each_third():
    scores = [(index * 7) % 30 / 30 for index in range(30)]
    examples = [an_example(index, f1) for index, f1 in enumerate(scores)]
    others = [an_example(index, 0.5, "other") for index in range(30)]
    chosen = choose_examples(examples + others, seed=3)
    assert list(chosen) == ["good", "middling", "bad"]
    ranked = sorted(scores, reverse=True)
    for place, third in enumerate(chosen.values()):
        assert len(third) == 3
        assert {example.row for example in third} == {"inverter"}
        assert {e.f1 for e in third} <= set(ranked[10 * place : 10 * place + 10])
        assert [e.index for e in third] == sorted(e.index for e in third)
    assert choose_examples(examples, seed=3) == chosen
    assert choose_examples(examples, seed=4) != chosen


def test_choose_examples_few_examples_are_few():
    chosen = choose_examples([an_example(0, 1.0), an_example(1, 0.0)], seed=0)
    assert [len(third) for third in chosen.values()] == [1, 1, 0]


def test_draw_indices_kept_texts_are_all_or_a_sample(monkeypatch):
    monkeypatch.setattr(module, "MOST", 5)
    assert draw_indices(5, 0) == set(range(5))
    drawn = draw_indices(100, 0)
    assert len(drawn) == 5 and drawn <= set(range(100))
    assert drawn == draw_indices(100, 0) != draw_indices(100, 1)
