"""A real headless Chromium, the distribution's, for the tests that open pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no browser: Chromium is not installed")
A4_PIXELS = 718
"""The width of a page on A4 with Chromium's usual margins, at 96 to the inch."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str, scheme: str = "light") -> Iterator[Page]:
    """A page of 1280 by 900; it must have said nothing on the console when it is left, but what a test expects."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=cast(Any, scheme))
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"{request.failure}: {request.url}"))
    page.goto(address)
    yield page
    # Chromium tells as errors an answer that refuses, and a question that was given up for the next: both are meant
    assert [text for text in said if "status of 4" not in text and "ERR_ABORTED" not in text] == []
    page.close()


def read_by_all(page: Page) -> None:
    """No violation by axe-core's rules: contrast, labels, order of headings and so on."""
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]][:3]) for one in found] == []


def drawn(page: Page) -> list[int]:
    """How many shapes each picture of a page has that are really to be seen."""
    return cast(
        list[int],
        page.evaluate(
            """() => {
            const seen = (each) => { const box = each.getBoundingClientRect(); return box.width + box.height > 0; };
            return [...document.querySelectorAll("svg")].map(
                (svg) => [...svg.querySelectorAll("path, rect, use")].filter(seen).length);
            }"""
        ),
    )


def printed_whole(page: Page) -> None:
    """On paper nothing reaches beyond the page's edge."""
    page.emulate_media(media="print")
    page.set_viewport_size({"width": A4_PIXELS, "height": 1000})
    beyond = page.evaluate(
        """(width) => [...document.querySelectorAll("main *")].filter((each) => !each.closest("svg")
        && each.getBoundingClientRect().right > width + 1).map((each) => each.outerHTML.slice(0, 100))""",
        A4_PIXELS,
    )
    assert beyond == []
