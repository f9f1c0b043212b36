"""What the page is for: a sentence goes in, its vector comes back as text, step by step."""

import json
import re

import pytest
from playwright.sync_api import expect

SENTENCE = "the old bank sends the red letter."
STEPS = 12  # positions of the tiny model


def invert(page, text=SENTENCE, lanes=1):
    page.locator("#text").fill(text)
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane[data-state=done]")).to_have_count(lanes)


def states(page):
    return page.locator(".chips .chip").evaluate_all("chips => chips.map(c => c.dataset.state)")


def go_to(page, step):
    page.locator(".timeline input").fill(str(step))


def test_a_sentence_comes_back_step_by_step(server, open_page):
    page = open_page(server.address)
    assert states(page) == ["masked"] * STEPS
    invert(page, "the cat sleeps.")

    seen = []
    for step in range(int(page.locator(".timeline input").get_attribute("max")) + 1):
        go_to(page, step)
        seen.append(states(page))
    open_positions = [sum(s in ("masked", "guessed") for s in row) for row in seen]
    assert open_positions[0] == STEPS
    assert open_positions[-1] == 0
    assert open_positions == sorted(open_positions, reverse=True)
    assert "guessed" in seen[1]
    assert {"settled", "end", "padding"} >= set(seen[-1])
    sure = page.locator(".chip[data-state=settled]").first
    assert 0 < float(sure.evaluate("c => c.style.getPropertyValue('--sure')")) <= 1
    expect(sure).to_contain_text(re.compile(r"\w+ settled, \d+ %"))

    expect(page.locator(".progress")).to_have_text(
        re.compile(r"Step \d+ of \d+\s*0 % masked\s*\d+ ms")
    )
    expect(page.locator("#strip")).to_have_attribute("aria-label", re.compile("32 numbers"))
    names = page.locator(".figures dt").all_inner_texts()
    assert names == ["Token accuracy", "Exact match", "Token F1", "Cosine", "Time",
                     "Denoiser passes", "Encoder calls"]  # fmt: skip
    figures = dict(zip(names, page.locator(".figures dd").all_inner_texts(), strict=True))
    assert figures["Encoder calls"] == "0"
    assert 1 <= int(figures["Denoiser passes"]) <= STEPS
    assert -1 <= float(figures["Cosine"].replace("−", "-")) <= 1
    expect(page.locator("#status")).to_contain_text("Done.")


def test_the_strip_is_painted_in_the_colours_of_its_scale(server, open_page):
    page = open_page(server.address)
    invert(page)
    colours = page.locator("#strip").evaluate(
        """c => {
            const row = c.getContext("2d").getImageData(0, 0, c.width, 1);
            return new Set(new Uint32Array(row.data.buffer)).size;
        }"""
    )
    assert colours > 16
    scale = page.locator("#scale-low").inner_text(), page.locator("#scale-high").inner_text()
    assert scale[0].replace("−", "+") == scale[1]
    page.locator("#strip").hover(position={"x": 3, "y": 5})
    expect(page.locator("#probe")).to_have_text(re.compile(r"number 0: −?0\.\d{4}"))


def test_original_and_recovery_stand_word_by_word(server, open_page):
    page = open_page(server.address)
    invert(page)
    words = page.locator(".word")
    kinds = words.evaluate_all("all => all.map(w => w.dataset.kind)")
    assert set(kinds) <= {"right", "wrong", "missing", "extra"}
    originals = [w for w in page.locator(".word .original").all_text_contents() if "—" not in w]
    assert [w.removeprefix("original ") for w in originals] == SENTENCE.strip(".").split()
    right, whole = kinds.count("right"), len(originals)
    verdict = page.locator(".verdict").inner_text()
    assert verdict.startswith(f"{right} of {whole} words" if right < whole else "Every word")
    assert all("✓" in w.inner_text() for w in page.locator(".word[data-kind=right]").all())


@pytest.mark.slow
def test_scrubbing_and_replaying(server, open_page):
    page = open_page(server.address)
    invert(page)
    timeline = page.get_by_role("slider")
    last = timeline.input_value()
    go_to(page, 0)
    assert states(page) == ["masked"] * STEPS
    timeline.press("ArrowRight")
    expect(page.locator(".count")).to_have_text(re.compile("Step 1 of"))
    assert timeline.get_attribute("aria-valuetext").startswith("step 1 of")
    go_to(page, 0)
    page.get_by_role("button", name="Replay").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Replay")).to_be_visible()
    assert timeline.input_value() == last


@pytest.mark.slow
def test_every_step_is_shown_long_enough_to_be_seen(server, open_page):
    page = open_page(server.address, reduced_motion="no-preference")
    page.evaluate("""() => {
        window.seen = [];
        const note = () => {
            const told = document.querySelector(".count").textContent;
            if (told !== window.seen.at(-1)?.[0]) window.seen.push([told, performance.now()]);
        };
        const all = { childList: true, subtree: true, characterData: true };
        new MutationObserver(note).observe(document.getElementById("lanes"), all);
    }""")
    invert(page)
    seen = [(told, at) for told, at in page.evaluate("window.seen") if told]
    steps = [told for told, _ in seen[:-1]]  # the last one may come before its time
    assert steps == [f"Step {i + 1} of 8" for i in range(len(steps))]
    assert len(seen) > 4
    assert seen[-1][1] - seen[0][1] > 100 * (len(seen) - 1)


def test_two_strategies_on_the_same_vector(server, open_page):
    page = open_page(server.address)
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if "decode" in r.url else None)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Compare with a second strategy").check()
    a, b = page.get_by_role("group", name="A"), page.get_by_role("group", name="B")
    a.get_by_label("Strategy").select_option("euler")
    a.get_by_label("Temperature").fill("0.5")
    a.get_by_label("Steps").fill("6")
    b.get_by_label("Strategy").select_option("guided-search")
    b.get_by_label("Encoder calls").fill("20")
    page.get_by_label("Seed").fill("7")
    invert(page, lanes=2)

    bodies.sort(key=lambda body: body["strategy"])
    assert [body["strategy"] for body in bodies] == ["euler", "guided-search"]
    assert bodies[0]["text"] == bodies[1]["text"] == SENTENCE
    assert {body["seed"] for body in bodies} == {7}
    assert (bodies[0]["options"], bodies[0]["steps"]) == ({"temperature": 0.5}, 6)
    assert bodies[1]["encoder_calls"] == 20
    titles = page.locator(".lane h2").all_inner_texts()
    assert titles[0].startswith("A: Euler")
    assert titles[1].startswith("B: Guided search")
    calls = page.locator(".figures div:last-child dd").all_inner_texts()
    assert calls[0] == "0"
    assert 1 <= int(calls[1]) <= 20
    assert page.locator(".timeline input").count() == 2


def test_controls_that_do_not_apply_are_off_and_say_why(server, open_page):
    page = open_page(server.address)
    page.get_by_text("Settings", exact=True).click()
    group = page.get_by_role("group", name="A")
    for label, why in {
        "Temperature": "This strategy draws nothing at random.",
        "Encoder calls": "This strategy does not ask the encoder.",
        "Guidance, late": "This model was not trained for guidance.",
    }.items():
        expect(group.get_by_label(label)).to_be_disabled()
        expect(group.get_by_title(why).get_by_label(label)).to_be_visible()
    group.get_by_label("Strategy").select_option("best-of")
    expect(group.get_by_label("Temperature")).to_be_enabled()
    expect(group.get_by_label("Encoder calls")).to_be_enabled()


def test_a_share_link_restores_text_and_settings_and_sends_nothing(server, open_page):
    page = open_page(server.address)
    page.locator("#text").fill("my secret code & 100% more #1")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Compare with a second strategy").check()
    first = page.get_by_role("group", name="A")
    first.get_by_label("Strategy").select_option("euler-remask")
    first.get_by_label("Temperature").fill("0.25")
    second = page.get_by_role("group", name="B")
    second.get_by_label("Steps").fill("5")
    page.get_by_label("Seed").fill("42")
    page.get_by_role("button", name="Share link").click()
    link = page.url
    assert "#text=my+secret" in link

    requests = []
    other = page.context.new_page()
    other.on("request", lambda request: requests.append((request.url, request.post_data)))
    other.goto(link)
    expect(other.locator("#text")).to_have_value("my secret code & 100% more #1")
    expect(other.get_by_label("Seed")).to_have_value("42")
    group = other.get_by_role("group", name="A")
    other.get_by_text("Settings", exact=True).click()
    expect(group.get_by_label("Strategy")).to_have_value("euler-remask")
    expect(group.get_by_label("Temperature")).to_have_value("0.25")
    expect(other.get_by_role("group", name="B").get_by_label("Steps")).to_have_value("5")
    expect(other.get_by_label("Compare with a second strategy")).to_be_checked()
    assert "secret" not in json.dumps([(url.split("#")[0], data) for url, data in requests])
    assert (
        other.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    )


def test_a_link_with_nonsense_is_read_as_far_as_it_makes_sense(server, open_page):
    nonsense = "#text=the+cat&strategy=__proto__&steps=many&model=none&seed=-1&2.strategy=toString"
    page = open_page(server.address + nonsense)
    expect(page.locator("#text")).to_have_value("the cat")
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane[data-state=done]").first).to_be_visible()


def test_examples_and_a_surprise(server, open_page):
    page = open_page(server.address)
    for example in page.locator("#examples button[title]").all():
        example.click()
        expect(page.locator("#text")).to_have_value(example.get_attribute("title"))
    before = page.locator("#text").input_value()
    page.get_by_role("button", name="Surprise me").click()
    expect(page.locator("#text")).not_to_have_value(before)


@pytest.mark.parametrize(
    "text", ["<script>window.stolen = 1</script>", "<img src=x onerror=stolen=1>"]
)
def test_markup_is_shown_as_text(text, server, open_page):
    page = open_page(server.address)
    invert(page, text)
    assert page.evaluate("window.stolen") is None
    assert page.locator("#result :is(script, img)").count() == 0
    shown = "".join(page.locator(".word .original").all_text_contents())
    assert any(word in shown for word in ("script", "img"))


def test_tokens_and_messages_of_the_server_are_never_markup(server, open_page):
    evil = "<img src=x onerror=window.stolen=1>"
    token = {"text": evil, "confidence": 0.9, "state": "settled", "changed": True}
    start = {
        "encoder": evil,
        "dimension": 2,
        "length": 1,
        "embedding": [0.6, -0.8],
        "tokens": [evil],
    }
    step = {"index": 1, "total": 1, "mask_ratio": 0.0, "milliseconds": 1.0, "tokens": [token]}
    done = {
        "text": evil, "tokens": [token], "token_accuracy": 1.0, "exact_match": False,
        "alignment": [{"kind": "wrong", "original": evil, "recovered": evil}],
        "token_f1": 1.0, "cosine": 1.0, "milliseconds": 1.0, "passes": 1, "encoder_calls": 0,
    }  # fmt: skip
    events = (("start", start), ("step", step), ("done", done))
    body = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    page = open_page(server.address)
    page.route(
        "**/decode", lambda route: route.fulfill(content_type="text/event-stream", body=body)
    )
    invert(page)
    assert page.locator("#result img").count() == 0
    assert evil in page.locator(".chip").first.text_content()
    assert evil in page.locator(".recovered").first.text_content()
    assert page.evaluate("window.stolen") is None
