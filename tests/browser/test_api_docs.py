"""The page at /docs, in a real browser that reaches nothing but the server."""

from playwright.sync_api import Browser, expect

from tests.conftest import MakeCheckpoint
from tests.server.launch import Launch


def test_it_lists_the_endpoints(browser: Browser, launch: Launch, checkpoint: MakeCheckpoint) -> None:
    server = launch(checkpoint(), "--api-key", "key")
    page = browser.new_page()
    asked, troubles = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    response = page.goto(f"{server.url}/docs")
    assert response is not None and "'unsafe-inline'" not in response.headers["content-security-policy"].split(";")[1]
    expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()
    expect(page.get_by_role("button", name="Authorize")).to_be_visible()
    assert all(url.startswith((server.url, "data:")) for url in asked), asked
    assert not troubles
    page.close()
