"""The pictures in docs/, made again: python -m tests.browser.screenshots

It serves the weights that ship (or --checkpoint), inverts a sentence on the page of the demo, and
takes a picture in light, in dark and of the width of a phone; then one of the report that
`make audit` has written, and with --defences one of a report of `unembed defend`.
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from .serving import ROOT, Server, find_chromium

SENTENCE = "What are the side effects of this drug?"
_LARGEST = 300_000  # bytes of a picture
_PATIENCE = 120_000  # milliseconds for a decoding on a busy machine
_DESKTOP, _PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
_REPORT, _TABLE = {"width": 1000, "height": 1000}, {"width": 1130, "height": 1000}


def take(browser, address, path, *, viewport, scheme, scale, act, last):
    """One picture of the whole width, from the top to the end of the element `last`."""
    context = browser.new_context(
        viewport=viewport, color_scheme=scheme, device_scale_factor=scale, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(address)
    page.locator("#invert:enabled").wait_for()
    page.locator("#text").fill(SENTENCE)
    act(page)
    page.evaluate("document.fonts.ready")
    page.mouse.move(0, 0)
    end = page.locator(last).first.evaluate("e => e.getBoundingClientRect().bottom + scrollY")
    clip = {"x": 0, "y": 0, "width": viewport["width"], "height": round(end) + 28}
    save(page.screenshot(full_page=True, clip=clip), path)
    context.close()


def take_report(browser, report, path, viewport, last):
    """A report as a file, from its head to the end of the last element that ``last`` names."""
    context = browser.new_context(
        viewport=viewport, color_scheme="light", device_scale_factor=1.5, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    end = page.locator(last).last.evaluate("e => e.getBoundingClientRect().bottom + scrollY")
    clip = {"x": 0, "y": 0, "width": viewport["width"], "height": round(end) + 20}
    save(page.screenshot(full_page=True, clip=clip), path)
    context.close()


def save(screenshot, path):
    """Write a picture in 256 colours."""
    picture = Image.open(io.BytesIO(screenshot))
    few = picture.convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    size = path.stat().st_size
    assert size <= _LARGEST, f"{path} has {size} bytes, more than {_LARGEST}"
    sys.stdout.write(f"{path}  {size // 1000} kB\n")


def invert(page, lanes=1):
    page.get_by_role("button", name="Invert", exact=True).click()
    expect(page.locator(".lane[data-state=done]")).to_have_count(lanes, timeout=_PATIENCE)


def half_way(page):
    """Inverted, and the timeline put back to where some of the text is settled."""
    invert(page)
    timeline = page.locator(".timeline input")
    timeline.fill(str(round(int(timeline.get_attribute("max")) * 0.4)))


def compared(page):
    """Two strategies on the same vector, the settings closed again."""
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Compare with a second strategy").check()
    page.get_by_text("Settings", exact=True).click()
    invert(page, lanes=2)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="minilm")
    parser.add_argument("--report", type=Path, default=ROOT / "audit-report" / "report.html")
    parser.add_argument("--defences", type=Path, help="a page of `unembed defend`, if there is one")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    serve = Server("unembed", "serve", "--checkpoint", given.checkpoint, "--device", "cpu")
    with serve as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        for name, scheme, viewport, scale, act, last in (
            ("light", "light", _DESKTOP, 1.5, half_way, "#result"),
            ("dark", "dark", _DESKTOP, 1.5, compared, "#result"),
            ("phone", "light", _PHONE, 2, half_way, ".key"),
        ):
            path = given.out / f"demo-{name}.png"
            take(
                browser,
                server.address,
                path,
                viewport=viewport,
                scheme=scheme,
                scale=scale,
                act=act,
                last=last,
            )
        take_report(browser, given.report, given.out / "audit.png", _REPORT, ".finding")
        if given.defences is not None:
            path = given.out / "defences.png"
            take_report(browser, given.defences, path, _TABLE, ".wide >> nth=0")
        browser.close()


if __name__ == "__main__":
    main()
