"""A real browser, which may talk to this machine alone."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
MILLISECONDS = 1000.0
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install chromium"
)


@contextmanager
def browser_page(deadline: float) -> Iterator[Any]:
    """A page that may talk to this machine alone; what it waits for comes within the deadline."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        found = browser.new_page(viewport={"width": 1200, "height": 1000})
        found.set_default_timeout(deadline * MILLISECONDS)
        strangers: list[str] = []

        def refuse(route: Any) -> None:
            strangers.append(route.request.url)
            route.abort()

        found.route(re.compile(r"^https?://(?!127\.0\.0\.1[:/])"), refuse)
        yield found
        browser.close()
        assert strangers == [], "the page has asked others"
