"""What the published sampler gave before decoding was rewritten, kept token by token."""

import json
from pathlib import Path

import pytest

from unembed.demo.schemas import EXAMPLES
from unembed.inverter import Inverter

TOKENS = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "greedy_steps32.json").read_text(encoding="utf-8")
)


@pytest.mark.slow
def test_invert_with_32_steps_gives_the_tokens_it_always_gave(minilm):
    vectors = minilm.encode(list(EXAMPLES[: len(TOKENS)]))
    inversions = Inverter.from_pretrained("minilm").invert(vectors, decoding="greedy:steps=32")
    assert [inversion.token_ids for inversion in inversions] == TOKENS
