import pytest
import torch

from unembed.decoding import DecodingStep
from unembed.decoding.strategy import Inversion
from unembed.demo.events import Speller, figures, is_news, step_event
from unembed.evaluation.metrics import token_accuracy, token_set_f1


@pytest.fixture(scope="module")
def speller(minilm):
    return Speller(minilm.tokenizer)


def make_step(tokens, before=None, **given):
    tokens = torch.tensor([tokens])
    before = torch.full_like(tokens, 103) if before is None else torch.tensor([before])
    masked = tokens == 103
    sure = torch.where(masked, 0.0, 0.5)
    ratio = masked.float().mean(dim=1)
    return DecodingStep(2, 4, tokens, sure, tokens != before, ratio, **given)


def test_every_kind_of_position(speller, minilm):
    dog, end, pad, mask = minilm.tokenizer.encode(["dog"])[0][0], 102, 0, 103
    guesses = torch.tensor([[dog, dog, end, dog, dog]])
    step = make_step([dog, mask, mask, end, pad], guesses=guesses, guess_confidences=guesses / 9e4)
    event = step_event(step, 0, speller, 0.0123)
    assert {k: v for k, v in event.items() if k != "tokens"} == {
        "index": 2,
        "total": 4,
        "mask_ratio": 0.4,
        "milliseconds": 12.3,
    }
    told = [(t["text"], t["state"], t["changed"]) for t in event["tokens"]]
    assert told == [
        ("dog", "settled", True),
        ("dog", "guessed", False),
        ("", "guessed", False),
        ("", "end", True),
        ("", "padding", True),
    ]
    assert event["tokens"][1]["confidence"] == pytest.approx(dog / 9e4, abs=1e-4)


def test_step_event_without_guesses_a_mask_is_a_mask(speller):
    told = step_event(make_step([103, 103]), 0, speller, 0.0)["tokens"]
    assert told == [{"text": "", "confidence": 0.0, "state": "masked", "changed": False}] * 2


def test_step_event_the_encoders_answers_are_told(speller):
    given = {"cosines": torch.tensor([0.25]), "encoder_calls": torch.tensor([7])}
    event = step_event(make_step([102], **given), 0, speller, 0.0)
    assert (event["cosine"], event["encoder_calls"]) == (0.25, 7)


def test_is_news_only_news_is_told():
    done = [5, 102]
    assert is_news(make_step([103, 103]), None, 0)
    assert is_news(make_step([103, 103]), make_step([103, 103]), 0), "still masked"
    assert is_news(make_step(done), make_step([103, 103]), 0)
    assert not is_news(make_step(done, done), make_step(done), 0)

    def search(calls):
        return make_step(done, done, encoder_calls=torch.tensor([calls]))

    assert is_news(search(2), search(1), 0)
    assert not is_news(search(2), search(2), 0)


def test_markup_stays_text(speller):
    text = "<script>alert(1)</script>"
    assert "".join(speller.all(text)).replace("##", "") == text


def test_the_figures_are_those_of_an_evaluation(speller, minilm):
    original, got = "The dog sleeps by the river.", "a dog sleeps near the river"
    ids, got_ids = minilm.tokenizer.encode([original, got])
    found = Inversion(got, got_ids, [0.5] * len(got_ids), 4, 0)
    told = figures(found, original, 0.9, speller)
    assert told["token_accuracy"] == token_accuracy(ids, got_ids)
    assert told["token_f1"] == token_set_f1(ids, got_ids)
    assert told["exact_match"] is False
    assert [word["kind"] for word in told["alignment"]].count("right") == 4
    same = Inversion("", ids, [0.5] * len(ids), 4, 0)
    assert figures(same, original, None, speller)["exact_match"] is True


def test_figures_without_an_original_nothing_is_compared(speller):
    told = figures(Inversion("", [], [], 4, 0), None, None, speller)
    empty = ("alignment", "token_accuracy", "exact_match", "token_f1", "cosine")
    assert {told[name] for name in empty} == {None}
    # a text of which the vocabulary knows no sign
    odd = figures(Inversion("", [], [], 4, 0), "\u200b", None, speller)
    assert odd["token_accuracy"] is None


def test_byte_level_tokens_can_be_read(architecture):
    from unembed.encoders.sentence import load_encoder

    tokenizer = load_encoder(str(architecture)).tokenizer
    told = Speller(tokenizer).all("Straße 日本")
    assert not any("Ã" in text or "æ" in text for text in told), told
