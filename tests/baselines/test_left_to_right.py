import itertools

import pytest
import torch
import torch.nn.functional as F

from unembed.baselines.left_to_right import LeftToRight, PrefixSizes, write_texts
from unembed.tokenizer import word_tokenizer

IDS = word_tokenizer("cat dog bird fish".split())
LENGTH = 5


def network_of(corrector: bool, length: int = LENGTH, seed: int = 0) -> LeftToRight:
    torch.manual_seed(seed)
    sizes = PrefixSizes(IDS.size, 6, length, 16, 2, 2, 32, slots=2, corrector=corrector)
    network = LeftToRight(sizes).eval()
    for parameter in network.parameters():  # far from the start, where all texts are alike
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def inputs(corrector: bool, batch: int = 3, length: int = LENGTH):
    generator = torch.Generator().manual_seed(1)
    e = F.normalize(torch.randn(batch, 12 if corrector else 6, generator=generator), dim=1)
    hypothesis = torch.randint(IDS.size, (batch, length), generator=generator)
    return e, hypothesis if corrector else None


def log_p_of(network, text, e, hypothesis):
    """Log-probability of each token of target sequences [B, L], by the path that trains."""
    tokens = text if hypothesis is None else torch.cat([hypothesis, text], dim=1)
    h = network.hidden_states(tokens, e)
    logits = F.linear(h, network.token_table.weight, network.output_bias)
    logits[..., [IDS.pad_id, IDS.mask_id]] = -torch.inf
    logits[:, 0, IDS.end_id] = -torch.inf
    log_p = logits.log_softmax(dim=-1).gather(2, text[..., None])[..., 0]
    return log_p.masked_fill(text == IDS.pad_id, 0.0)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_write_texts_scores_what_the_network_in_training_says(corrector, beams):
    network, (e, hypothesis) = network_of(corrector), inputs(corrector)
    with torch.no_grad():
        texts, scores = write_texts(network, IDS, e, hypothesis, beams)
        assert texts.shape == (3, beams, LENGTH)
        for beam in range(beams):
            log_p = log_p_of(network, texts[:, beam], e, hypothesis)
            count = (texts[:, beam] != IDS.pad_id).sum(dim=1)
            torch.testing.assert_close(scores[:, beam], log_p.sum(dim=1) / count)
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("corrector", [False, True])
def test_write_texts_with_all_beams_gives_the_best_of_all_texts(corrector):
    length = 3
    network, (e, hypothesis) = network_of(corrector, length), inputs(corrector, 1, length)
    words = [k for k in range(IDS.size) if k not in IDS.special_ids]
    texts = [(*text, IDS.end_id) for n in (1, 2) for text in itertools.product(words, repeat=n)]
    rows = torch.tensor([[*text, *[IDS.pad_id] * (length - len(text))] for text in texts])
    with torch.no_grad():
        many = None if hypothesis is None else hypothesis.expand(len(rows), -1)
        log_p = log_p_of(network, rows, e.expand(len(rows), -1), many).sum(dim=1)
        means = log_p / torch.tensor([len(text) for text in texts])
        best, scores = write_texts(network, IDS, e, hypothesis, beams=len(texts))
    assert best[0, 0].tolist() == rows[means.argmax()].tolist()
    assert scores[0, 0] == pytest.approx(float(means.max()), abs=1e-5)


def test_write_texts_ends_every_text_and_leaves_none_empty():
    for seed in range(4):
        texts, _ = write_texts(network_of(False, seed=seed), IDS, inputs(False)[0], beams=2)
        for row in texts.flatten(0, 1).tolist():
            content = IDS.content_positions(row)
            assert content == list(range(len(content)))
            assert len(content) >= 1
            assert row[len(content)] == IDS.end_id
            assert set(row[len(content) + 1 :]) <= {IDS.pad_id}


@pytest.mark.parametrize("corrector", [False, True])
def test_hidden_states_see_the_tokens_before_and_the_whole_prefix(corrector):
    network, (e, hypothesis) = network_of(corrector), inputs(corrector, 1)
    text = torch.tensor([[3, 4, 5, 3, 4]])

    def states(text, hypothesis, e):
        tokens = text if hypothesis is None else torch.cat([hypothesis, text], dim=1)
        return network.hidden_states(tokens, e)[0]

    before = states(text, hypothesis, e)
    other = text.clone()
    other[0, 2] = 5 if text[0, 2] != 5 else 4
    changed = (states(other, hypothesis, e) - before).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == [False, False, False, True, True]
    assert ((states(text, hypothesis, -e) - before).abs().amax(dim=1) > 1e-4).all()
    if hypothesis is not None:
        others = (hypothesis + 1) % IDS.size
        assert ((states(text, others, e) - before).abs().amax(dim=1) > 1e-4).all()
