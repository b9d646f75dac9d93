"""A server and a browser that the tests of one file share."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import PATH, chromium
from tests.server.conftest import launch

__all__ = ["launch"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PATH is None:
        pytest.skip("Chromium is not installed")
    with chromium() as started:
        yield started
