"""The pictures in docs/images, of a server of the demo model that runs.

python -m tests.browser.screenshots http://127.0.0.1:8000
"""

import sys
import threading
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect

from tests.browser.chromium import chromium
from tests.server.launch import data_url, image_part, text_part, user

_ROOT = Path(__file__).parents[2]
_IMAGES = _ROOT / "docs" / "images"
_SAMPLES = _ROOT / "demo" / "samples"
_WIDE, _PHONE = {"width": 1100, "height": 780}, {"width": 390, "height": 844}
_TRAFFIC_SECONDS = 200


def _ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false", timeout=30_000)


def _playground(browser: Browser, url: str, name: str, *, dark: bool = False, phone: bool = False) -> None:
    page = browser.new_page(viewport=_PHONE if phone else _WIDE, color_scheme="dark" if dark else "light")
    page.goto(url)
    page.get_by_role("button", name="What is in this picture?").click()
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false", timeout=30_000)
    _ask(page, "What color is the star?")
    if dark:
        page.get_by_role("button", name="Settings", exact=True).click()
        page.get_by_label("Temperature").fill("0.2")
        page.get_by_label("Max tokens").fill("128")
    page.screenshot(path=_IMAGES / name)
    page.close()


def _traffic(url: str, number: int, stop: threading.Event) -> None:
    """Questions of one client, with pauses that differ from client to client."""
    files = sorted(_SAMPLES.iterdir())
    count = 0
    while not stop.is_set():
        count += 1
        message = user(text_part("Describe the picture."), image_part(data_url(files[(count + number) % len(files)])))
        httpx.post(f"{url}/v1/chat/completions", json={"messages": [message], "cache_salt": str(count % 3)}, timeout=60)
        stop.wait(0.2 * number)


def _dashboard(browser: Browser, url: str, name: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 760}, color_scheme="light")
    page.goto(f"{url}/dashboard")
    stop = threading.Event()
    clients = [threading.Thread(target=_traffic, args=(url, number, stop)) for number in range(1, 6)]
    for client in clients:
        client.start()
    page.wait_for_timeout(_TRAFFIC_SECONDS * 1000)
    page.screenshot(path=_IMAGES / name)
    stop.set()
    for client in clients:
        client.join()
    page.close()


def main(url: str) -> None:
    """Take all of them."""
    _IMAGES.mkdir(exist_ok=True)
    with chromium() as browser:
        _playground(browser, url, "playground-light.png")
        _playground(browser, url, "playground-dark.png", dark=True)
        _playground(browser, url, "playground-phone.png", phone=True)
        _dashboard(browser, url, "dashboard.png")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
