"""The picture of the words: for texts that the model cannot write out, and for vectors."""

import json
import re

import pytest
from playwright.sync_api import expect

from unembed.encoders.base import FakeEncoder

LONG = "the old river sends the bank a letter and the doctor a code " * 3  # beyond 12 positions
BEFORE = "e => e.previousElementSibling.id === 'words'"


def invert(page, text=None):
    if text is not None:
        page.locator("#text").fill(text)
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()


def paste(page):
    page.get_by_text("Your own vector").click()
    page.locator("#vector").fill(json.dumps(FakeEncoder().encode([LONG])[0].tolist()))


def test_the_words_of_a_long_text_are_drawn_with_their_probabilities(server, open_page):
    page = open_page(server.address)
    with page.expect_response("**/words") as answer:
        invert(page, LONG)
    words = answer.value.json()["words"]
    bars = page.locator("#bars .bar")
    expect(bars).to_have_count(len(words))
    for bar, word in zip(bars.all(), words, strict=True):
        percent = f"{int(100 * word['probability'] + 0.5)} %"
        sign = "✓ in your text," if word["occurs"] else ""
        assert bar.text_content() == f"{word['word']}{sign}{percent}"
        share = float(bar.evaluate("e => e.style.getPropertyValue('--sure')"))
        assert share == pytest.approx(word["probability"])
        drawn = bar.evaluate(
            "e => parseFloat(getComputedStyle(e, '::after').width) / e.clientWidth"
        )
        assert drawn == pytest.approx(share, abs=0.03)
    right = sum(word["occurs"] for word in words)
    assert 0 < right < len(words)
    expect(page.locator("#words-note")).to_contain_text(f"{right} of these {len(words)} are in")
    assert page.locator("#bars .name").all_inner_texts() == ["River"]
    assert page.locator("#lanes").evaluate(BEFORE), "of a long text the words say more"


def test_a_short_text_is_written_out_and_needs_no_words(server, open_page):
    page = open_page(server.address)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    invert(page, "the cat sleeps.")
    expect(page.locator("#words")).to_be_hidden()
    assert not [url for url in asked if url.endswith("/words")]


def test_the_words_of_a_vector_are_drawn_without_a_verdict(server, open_page):
    page = open_page(server.address)
    paste(page)
    invert(page)
    expect(page.locator("#bars .bar").first).to_be_visible()
    expect(page.locator("#words-note")).to_have_text(re.compile("^Of the words given 30 %"))
    assert page.locator("#bars .sign").count() == 0
    assert not page.locator("#lanes").evaluate(BEFORE)
    page.get_by_text("A sentence").click()
    invert(page, "the cat sleeps.")  # what was drawn before goes
    expect(page.locator("#words")).to_be_hidden()
    assert page.locator("#bars .bar").count() == 0


def test_words_that_cannot_be_had_are_told_and_the_rest_goes_on(server, open_page):
    page = open_page(server.address)
    problem = {"status": 503, "title": "Busy", "detail": "64 requests are waiting already"}
    page.route("**/words", lambda route: route.fulfill(status=503, json=problem))
    invert(page, LONG)
    expect(page.locator("#words-note")).to_have_text("64 requests are waiting already.")
    expect(page.locator("#notice")).to_be_hidden()
    page.unroute("**/words")
    page.route("**/words", lambda route: route.abort())
    invert(page)
    expect(page.locator("#words-note")).to_have_text("The server cannot be reached.")


def test_words_are_never_markup_and_fit_a_small_phone(server, open_page):
    page = open_page(server.address, viewport={"width": 320, "height": 700})
    evil = "<img src=x onerror=window.stolen=1>" + "x" * 200
    word = {"word": evil, "probability": 1.0, "base_rate": 0.01, "is_name": True, "occurs": True}
    body = {"model": "tiny", "encoder": "fake", "words": [word] * 3}
    page.route("**/words", lambda route: route.fulfill(json=body))
    invert(page, LONG)
    expect(page.locator("#bars .bar")).to_have_count(3)
    assert page.locator("#words img").count() == 0 and page.evaluate("window.stolen") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    edges = page.locator("#words :is(li, p, h2, span:not(.hidden))").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().right)"
    )
    assert max(edges) <= 320
