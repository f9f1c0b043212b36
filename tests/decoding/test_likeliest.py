"""The likeliest token of each position."""

import pytest
import torch

from unembed.decoding.logits import most_probable, where_largest


@pytest.mark.parametrize("columns", [9, 64, 400, 2500])
def test_the_largest_is_the_first_of_equals(columns):
    generator = torch.Generator().manual_seed(columns)
    logits = torch.randn(50, columns, generator=generator)
    ties = torch.randint(0, 4, (50, columns), generator=generator).float()
    nothing = torch.full((1, columns), -torch.inf)
    for rows in (logits, ties, nothing):
        assert torch.equal(where_largest(rows), rows.argmax(dim=1, keepdim=True))


@pytest.mark.parametrize("columns", [9, 2500])
def test_the_most_probable_token_is_that_of_the_softmax(columns):
    logits = 4 * torch.randn(7, columns, generator=torch.Generator().manual_seed(columns))
    logits[:, 3] = -torch.inf
    expected = logits.softmax(dim=-1).max(dim=-1)
    probabilities, tokens = most_probable(logits)
    torch.testing.assert_close(probabilities, expected.values)
    assert torch.equal(tokens, expected.indices)


@pytest.mark.parametrize("columns", [9, 2500])
def test_of_no_position_nothing_is_said(columns):
    probabilities, tokens = most_probable(torch.empty(0, columns))
    assert probabilities.shape == tokens.shape == (0,)
