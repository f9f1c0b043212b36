"""The page for everybody: phones, dark rooms, keyboards, screen readers, people who get seasick."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 360, "height": 740}}


def invert(page, text="the old bank sends the red letter."):
    page.locator("#text").fill(text)
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane:not([data-state=done])")).to_have_count(0)


def compare(page):
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Compare with a second strategy").check()


def words(page):
    invert(page, "the old river sends the bank a letter and the doctor a code " * 2)
    expect(page.locator("#bars .bar").first).to_be_visible()


def refuse(page):
    page.get_by_text("Your own vector").click()
    page.locator("#vector").fill("[1, 2]")
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator("#vector-error")).to_be_visible()


STATES = (lambda page: None, invert, words, compare, invert, refuse)


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 768, 1920])
def test_nothing_is_wider_than_the_screen(width, server, open_page):
    page = open_page(server.address, viewport={"width": width, "height": 800})
    for reach in STATES:
        reach(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        edges = page.locator(
            "main :is(button, input, textarea, .chip, .word, .bar, p)"
        ).evaluate_all(
            "all => all.filter(e => e.offsetParent).map(e => e.getBoundingClientRect().right)"
        )
        assert max(edges) <= width
    top = page.locator(".top > *").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect().top)"
    )
    assert max(top) - min(top) < 20, "the head is one line"


def test_a_long_word_does_not_widen_a_phone(server, open_page):
    page = open_page(server.address, **PHONE)
    invert(page, "x" * 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_on_a_phone_the_result_comes_into_view(server, open_page):
    page = open_page(server.address, **PHONE)
    invert(page)
    expect(page.locator(".chips")).to_be_in_viewport()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(scheme, server, open_page):
    page, axe = open_page(server.address, color_scheme=scheme), Axe()
    for reach in STATES:
        reach(page)
        found = axe.run(page).response
        faults = [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found["violations"]]
        assert faults == []
        assert len(found["passes"]) > 20


def lightness(page):
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    )
    return (red + green + blue) / 3


def test_the_theme_follows_the_system_until_it_is_chosen(server, open_page):
    page = open_page(server.address, color_scheme="dark")
    assert lightness(page) < 40
    page.emulate_media(color_scheme="light")
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "false")
    assert lightness(page) > 220
    page.get_by_role("button", name="Dark theme").click()
    assert lightness(page) < 40
    invert(page)
    dark = page.locator("#strip").evaluate("c => c.toDataURL()")
    page.get_by_role("button", name="Dark theme").click()
    assert lightness(page) > 220
    assert page.locator("#strip").evaluate("c => c.toDataURL()") != dark
    page.emulate_media(color_scheme="dark")
    assert lightness(page) > 220


def test_everything_can_be_done_from_the_keyboard(server, open_page):
    page = open_page(server.address)

    def focused():
        return page.evaluate(
            "(e => e.id || e.name || e.className || e.textContent)(document.activeElement)"
        )

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if focused() == name:
                return
        raise AssertionError(f"{name} cannot be reached")

    page.keyboard.press("Tab")
    assert focused() == "skip"
    tab_to("text")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen
    page.keyboard.press("Control+A")
    page.keyboard.type("the cat sleeps.")
    page.keyboard.press("Enter")
    expect(page.locator(".lane[data-state=done]")).to_be_visible()
    tab_to("invert")
    tab_to("share")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the settings
    tab_to("compare")
    page.keyboard.press("Space")
    tab_to("strategy")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#summary")).not_to_contain_text("Greedy vs")
    tab_to("quiet play")
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    expect(page.locator(".count")).to_contain_text("Step 0 of")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".count")).to_contain_text("Step 1 of")


def test_the_live_region_tells_the_ends_and_not_every_step(server, open_page):
    page = open_page(server.address)
    page.evaluate("""() => {
        window.told = [];
        const status = document.getElementById("status");
        const listen = () => window.told.push(status.textContent);
        new MutationObserver(listen).observe(status, { childList: true });
    }""")
    invert(page)
    told = page.evaluate("window.told")
    assert len(told) == 2
    assert told[0] == "Inverting."
    assert told[1].startswith("Done. Recovered: ")
    assert not told[1].endswith("..")


@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_motion_is_only_shown_to_those_who_do_not_mind(motion, moves, server, open_page):
    page = open_page(server.address, reduced_motion=motion)
    duration = page.locator(".chip").first.evaluate("c => getComputedStyle(c).transitionDuration")
    assert (duration != "0s") == moves


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(server, open_page):
    asked = []
    page = open_page(server.address)
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    invert(page)
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(server.address)] == []
    assert (
        page.locator("[style]:not(.chip):not(canvas), style, script:not([src]), [onclick]").count()
        == 0
    )
    assert page.evaluate("document.fonts.check('16px Inter')")


def test_the_page_leads_to_the_description_of_the_api(server, open_page):
    page = open_page(server.address)
    page.get_by_role("link", name="API").click()
    expect(page.locator("body")).to_contain_text("/decode")
