"""A server and a browser that the tests of one file share."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import IS_SKIPPED, chromium
from tests.server.conftest import launch

__all__ = ["launch"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if IS_SKIPPED:
        pytest.skip("Chromium is not installed")
    with chromium() as started:
        yield started
