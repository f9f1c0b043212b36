"""A browser, a server of the tiny model, and pages that may not go wrong unseen."""

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from . import serving

_PROVOKED = re.compile(r"net::ERR|with a status of (422|429|503)")  # by tests of failures


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """All tests that lack a browser are told in one line, not in one each."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = (__file__, 1, report.longrepr[2])
    return report


@pytest.fixture(scope="package")
def chromium():
    """Closed when these tests are done: while it runs, no other test may start an event loop."""
    path = serving.find_chromium()
    if path is None and os.environ.get("UNEMBED_BROWSER") == "required":
        pytest.fail("UNEMBED_BROWSER=required, and there is no Chromium (apt-get install chromium)")
    if path is None:
        pytest.skip("the page needs a Chromium to be tested (apt-get install chromium)")
    expect.set_options(timeout=60_000)  # milliseconds; machines are busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def folder(inverter, tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "inverter"
    inverter.save_pretrained(path)
    return path


@pytest.fixture(scope="package")
def server(chromium, folder):
    """Serves the tiny model; who kills it starts it again."""
    with serving.Server("tests.browser.serving", folder) as running:
        yield running


@pytest.fixture
def open_page(chromium):
    """Opens pages; what goes wrong in one unseen fails the test at its end."""
    contexts, faults = [], []

    def told(message):
        if message.type in ("error", "warning") and not _PROVOKED.search(message.text):
            faults.append(message.text)

    def opened(address, **options):
        context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
        )
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", told)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        page.locator("#invert:enabled").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []
