"""Debian's Chromium without a screen."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

PATH = shutil.which("chromium")
IS_SKIPPED = PATH is None and not os.environ.get("REQUIRE_BROWSER")
"""Whether tests do without it. With that variable they fail."""
# It runs as root in containers, whose sandbox it cannot use, and asks nobody outside for anything.
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATH, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()
