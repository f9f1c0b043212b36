"""When something breaks, people are told what, and have a way on."""

import json
import re
import time

import pytest
from playwright.sync_api import expect

SENTENCE = "the nurse reads my old letter."
SLOWLY = "#text=the&model=slow"  # a pass takes 0.4 seconds


def invert(page):
    page.locator("#text").fill(SENTENCE)
    page.get_by_role("button", name="Invert", exact=True).click()


def wait_for_a_step(page):
    expect(page.locator(".lane")).to_have_attribute("data-state", "running")
    expect(page.locator(".count")).to_have_text(re.compile(r"Step [1-9]\d* of"))


def told(page, words):
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text(words)
    expect(page.locator("#notice")).to_be_in_viewport()


@pytest.mark.slow
def test_a_server_killed_half_way_and_started_again(server, open_page):
    page = open_page(server.address + SLOWLY)
    invert(page)
    wait_for_a_step(page)
    server.kill()
    told(page, re.compile(r"connection broke off.*It had come to step \d+ of 8.*stays below"))
    expect(page.locator(".lane")).to_have_attribute("data-state", "stopped")
    page.locator(".timeline input").fill("1")  # what had come can still be looked at
    expect(page.locator(".count")).to_have_text("Step 1 of 8")

    page.get_by_role("button", name="Try again").click()
    told(page, "The server cannot be reached.")
    server.start()
    told(page, "The server is back. Your text and settings are still here.")
    expect(page.locator("#text")).to_have_value(SENTENCE)
    page.get_by_role("button", name="Try again").click()
    wait_for_a_step(page)
    expect(page.locator("#notice")).to_be_hidden()


@pytest.mark.slow
def test_a_page_reloaded_half_way(server, open_page):
    page = open_page(server.address + SLOWLY)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Seed").fill("9")
    invert(page)
    wait_for_a_step(page)
    page.reload()
    told(page, "The page was reloaded, which stopped the inversion. Your input is still here.")
    expect(page.locator("#text")).to_have_value(SENTENCE)
    expect(page.locator("#seed")).to_have_value("9")
    page.get_by_role("button", name="Invert again").click()
    wait_for_a_step(page)


def test_stopping(server, open_page):
    page = open_page(server.address + SLOWLY)
    invert(page)
    wait_for_a_step(page)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".lane")).to_have_attribute("data-state", "stopped")
    expect(page.get_by_role("button", name="Invert", exact=True)).to_be_visible()
    expect(page.locator("#notice")).to_be_hidden()


def test_a_reload_when_nothing_runs_keeps_the_input_and_says_nothing(server, open_page):
    page = open_page(server.address)
    invert(page)
    expect(page.locator(".lane[data-state=done]")).to_be_visible()
    page.reload()
    expect(page.locator("#text")).to_have_value(SENTENCE)
    expect(page.locator("#notice")).to_be_hidden()


@pytest.mark.slow
def test_a_lost_connection(server, open_page):
    page = open_page(server.address)
    page.context.set_offline(True)
    invert(page)
    told(page, "The server cannot be reached. This device is offline. Waiting for the server…")
    page.context.set_offline(False)
    told(page, "The server is back.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "detail"), [(503, "17 requests are waiting"), (429, "too many requests")]
)
def test_a_busy_server_is_asked_again_after_the_time_it_names(status, detail, server, open_page):
    page = open_page(server.address)
    asked = []

    def refuse_once(route):
        asked.append((route.request.post_data_json, time.monotonic()))
        if len(asked) > 1:
            return route.continue_()
        return route.fulfill(
            status=status,
            headers={"Retry-After": "3", "Content-Type": "application/problem+json"},
            body=json.dumps({"type": "about:blank", "status": status, "detail": detail}),
        )

    page.route("**/decode", refuse_once)
    invert(page)
    told(page, f"{detail.capitalize()}. This tries again by itself.")
    expect(page.locator("#countdown")).to_have_text(re.compile("in [123] s"))
    expect(page.locator(".lane[data-state=done]")).to_be_visible()
    expect(page.locator("#notice")).to_be_hidden()
    (first, then), (second, later) = asked
    assert first == second
    assert later - then > 2.5


def test_waiting_in_the_queue_and_an_error_in_the_stream(server, open_page):
    page = open_page(server.address)
    events = 'event: queued\ndata: {"position": 3}\n\n'
    problem = {"type": "about:blank", "status": 503, "title": "x", "detail": "the time is up"}
    page.evaluate("""() => {
        window.notices = [];
        new MutationObserver(() => window.notices.push(document.getElementById("notice").innerText))
            .observe(document.getElementById("notice"), { childList: true, subtree: true });
    }""")
    body = f"{events}event: error\ndata: {json.dumps(problem)}\n\n"
    page.route("**/decode", lambda r: r.fulfill(content_type="text/event-stream", body=body))
    invert(page)
    told(page, "The time is up.")
    assert any("3 ahead of you" in text for text in page.evaluate("window.notices"))
    page.unroute("**/decode")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()


def test_a_text_longer_than_the_model_writes_is_said_to_be_cut(server, open_page):
    page = open_page(server.address)
    page.locator("#text").fill("the cat " * 9)
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator("#embedding-note")).to_contain_text("longer than the model writes")
    invert(page)
    expect(page.locator("#embedding-note")).not_to_contain_text("longer")


def test_what_the_server_refuses_is_told_in_its_words(server, open_page):
    page = open_page(server.address)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_role("group", name="A").get_by_label("Steps").fill("100000")
    invert(page)
    told(page, re.compile("steps", re.IGNORECASE))
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.get_by_role("group", name="A").get_by_label("Steps").fill("4")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()


def test_a_server_that_says_nothing(server, open_page):
    page = open_page(server.address)
    page.clock.install()
    asked = []

    def hold_the_first(route):
        asked.append(route)
        if len(asked) > 1:
            route.continue_()

    page.route("**/decode", hold_the_first)
    invert(page)
    page.clock.run_for(31_000)
    told(page, "Nothing heard from the server for 30 seconds.")
    page.get_by_role("button", name="Start again").click()
    page.clock.resume()
    expect(page.locator(".lane[data-state=done]")).to_be_visible()
    assert len(asked) == 2


def test_an_empty_sentence_is_refused_at_the_field(server, open_page):
    page = open_page(server.address)
    page.locator("#text").fill("   ")
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator("#text-error")).to_have_text(
        "Type a sentence, or pick one of the examples."
    )
    expect(page.locator("#text")).to_be_focused()


def test_a_server_that_is_gone_when_the_page_is_opened(server, open_page):
    page = open_page(server.address)
    page.route("**/models", lambda route: route.abort())
    page.reload()
    told(page, "The server cannot be reached.")
    expect(page.locator("#invert")).to_be_disabled()
    page.unroute("**/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#invert")).to_be_enabled()


@pytest.mark.slow
def test_decode_reads_tokens_with_line_separators(server, open_page):
    """A token may hold U+2028 or U+2029, which end a line of JavaScript but not of an event."""
    read = """async () => {
        window.fetch = async () => new Response(
            'event: step\\ndata: {"text": "a\\u2028b\\u2029c"}\\n\\nevent: done\\ndata: {}\\n\\n');
        const { decode } = await import("/static/api.js");
        const messages = [];
        for await (const message of decode({})) messages.push(message);
        return messages;
    }"""
    step, done = open_page(server.address).evaluate(read)
    assert step == {"event": "step", "data": {"text": "a\u2028b\u2029c"}}
    assert done["event"] == "done"
