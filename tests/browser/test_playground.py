"""The pages in a real browser, with the demo model behind them."""

import base64
import json
import mimetypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect

from engine.args import DEMO_MODEL
from tests.browser.chromium import IS_SKIPPED
from tests.server.launch import Launch, Server

pytestmark = pytest.mark.skipif(IS_SKIPPED, reason="Chromium is not installed")

SAMPLES = Path(__file__).parents[2] / "demo" / "samples"
SHAPES = SAMPLES / "shapes.png"
KEY = "key-of-the-browser"
CHAT = "**/v1/chat/completions"
BELOW = "/vlm"
LONG_ANSWER = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
"""What the demo model needs many seconds for."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(launch: Launch) -> Server:
    """It asks for a key, and stands below a path for those that go there."""
    return launch(DEMO_MODEL, "--served-model-name", "demo", "other", "--api-key", KEY, "--root-path", BELOW)


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Open]:
    """Opens pages, on which no script may fail and nothing may offend against their policy."""
    expect.set_options(timeout=20_000)
    troubles: list[str] = []
    contexts = []

    def open_one(path: str = "/", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 720}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("console", lambda message: troubles.append(message.text) if "Policy" in message.text else None)
        page.on("request", lambda request: None if allowed(request.url) else troubles.append(request.url))
        page.goto(server.url + path)
        return page

    def allowed(url: str) -> bool:
        return url.startswith((server.url, "data:", "blob:"))

    yield open_one
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def page(open_page: Open) -> Page:
    """The playground, with the key."""
    page = open_page()
    give_key(page)
    return page


def give_key(page: Page, key: str = KEY) -> None:
    """As a person does whom the page asks for one."""
    page.get_by_label("API key").fill(key)
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_label("Model")).to_have_value("demo")
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Close the settings").click()


def message(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Message")


def answer(page: Page) -> Locator:
    """The last one, once it is complete."""
    last = page.locator(".answer").last
    expect(last).to_have_attribute("aria-busy", "false")
    return last


def ask(page: Page, question: str) -> Locator:
    message(page).fill(question)
    page.get_by_role("button", name="Send").click()
    return answer(page)


def pick(page: Page, *files: Path) -> None:
    before = page.locator("#pictures img").count()
    page.get_by_label("Pictures", exact=True).set_input_files(files)
    expect(page.locator("#pictures img")).to_have_count(before + len(files))


def set_field(page: Page, label: str, value: str) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Settings", exact=True).click()


def bring(page: Page, event: str, file: Path) -> None:
    """Paste or drop a file."""
    script = """async ([type, name, kind, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, { type: kind }));
        const init = { bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data };
        const event = type === "paste" ? new ClipboardEvent(type, init) : new DragEvent(type, init);
        document.getElementById("message").dispatchEvent(event);
    }"""
    kind, _ = mimetypes.guess_type(file)
    page.evaluate(script, [event, file.name, kind, base64.b64encode(file.read_bytes()).decode()])


def stand_in(page: Page, events: str) -> None:
    """Answer in the server's place."""

    def reply(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=events)

    page.route(CHAT, reply)


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_a_sample_is_one_click_away_and_its_answer_streams(page: Page) -> None:
    page.evaluate("""() => {
        window.lengths = new Set();
        const note = () => window.lengths.add(document.querySelector(".markdown")?.textContent.trim().length);
        new MutationObserver(note).observe(document.getElementById("chat"), { childList: true, subtree: true });
    }""")
    page.get_by_role("button", name="What is in this picture?").click()
    found = answer(page)
    for word in ("orange", "rectangle", "brown", "ring", "pink", "star"):
        expect(found).to_contain_text(word)
    assert page.evaluate("window.lengths.size") > 3
    expect(found).to_contain_text(
        re.compile(r"\d+ prompt tokens.*\d+ answer tokens.*first after [\d.]+ m?s.*\d+ tokens/s")
    )
    expect(ask(page, "What color is the star?")).to_contain_text("pink")
    expect(page.locator(".answer")).to_have_count(2)


def test_pictures_come_in_every_way_and_messages_are_edited(page: Page) -> None:
    pick(page, SAMPLES / "word.png", SAMPLES / "chart.jpg")
    bring(page, "paste", SHAPES)
    expect(page.locator("#pictures img")).to_have_count(3)
    bring(page, "drop", SHAPES)
    expect(page.locator("#pictures img")).to_have_count(4)
    bring(page, "drop", Path(__file__))
    expect(page.get_by_role("alert")).to_contain_text("test_playground.py")
    for name in ("word.png", "chart.jpg", "shapes.png"):
        page.get_by_role("button", name=f"Remove {name}").first.click()
    expect(page.locator("#pictures img")).to_have_count(1)

    expect(ask(page, "What color is the star?")).to_contain_text("pink")
    ask(page, "And the ring?")
    page.get_by_role("button", name="Edit").first.click()
    expect(message(page)).to_have_value("What color is the star?")
    expect(page.locator("#pictures img")).to_have_count(1)
    expect(ask(page, "What color is the ring?")).to_contain_text("brown")
    expect(page.locator(".question")).to_have_count(1)
    expect(page.locator(".question img")).to_have_count(1)

    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("brown")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".question, .answer")).to_have_count(0)


def test_an_answer_is_stopped(page: Page, server: Server) -> None:
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    set_field(page, "JSON schema of the answer", json.dumps(LONG_ANSWER))
    message(page).fill("Hello")
    message(page).press("Control+Enter")
    expect(page.locator(".answer .markdown")).to_contain_text("[")
    page.keyboard.press("Escape")
    found = answer(page)
    expect(found).to_contain_text("stopped")
    expect(found).to_contain_text(re.compile(r"[1-9]\d* answer tokens"))
    server.wait_for_metric("vllm:num_requests_running", lambda running: running == 0)
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 1
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_settings_are_sent(page: Page) -> None:
    sent: list[dict[str, Any]] = []
    page.route(CHAT, lambda route: (sent.append(route.request.post_data_json), route.continue_()))
    page.get_by_label("Model").select_option("other")
    page.get_by_role("button", name="Settings", exact=True).click()
    values = {"System prompt": "Be short.", "Temperature": "0.5", "Top p": "0.9", "Max tokens": "2", "Seed": "7",
              "Stop strings": "one\ntwo", "JSON schema of the answer": '{"type": "integer"}'}  # fmt: skip
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    expect(ask(page, "Hello")).to_contain_text("2 answer tokens")
    (body,) = sent
    assert body.pop("stream_options").keys() == {"include_usage", "continuous_usage_stats"}
    assert body == {
        "model": "other",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 2,
        "seed": 7,
        "stop": ["one", "two"],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "integer"}}},
    }


def test_errors_are_shown_with_the_servers_words(page: Page) -> None:
    set_field(page, "Temperature", "-1")
    error = ask(page, "Hello").get_by_role("alert")
    expect(error).to_contain_text("400")
    expect(error).to_contain_text("temperature")
    set_field(page, "Temperature", "")
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_contain_text("Hello!")

    set_field(page, "JSON schema of the answer", "{")
    message(page).fill("Hello again")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#notice")).to_contain_text("JSON schema")
    expect(message(page)).to_have_value("Hello again")
    set_field(page, "JSON schema of the answer", "")

    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("API key").fill("wrong")
    expect(ask(page, "Hello").get_by_role("alert")).to_contain_text("the API key is missing or wrong")
    expect(page.locator("#notice")).to_contain_text("API key")
    give_key(page)
    expect(ask(page, "Hello").get_by_role("alert")).to_have_count(0)  # after a question without an answer

    page.route(CHAT, lambda route: route.abort())
    expect(ask(page, "Hello").get_by_role("alert")).to_contain_text("cannot be reached")


REPLY = """\
# Title
A *word*, **two words**, `x < y`, <b>no HTML</b>, snake_case_name, 2 * 3 * 4 \\*as is\\*.
<script>window.pwned = true</script><img src=x onerror="window.pwned = true">
[good](https://example.com/a_(b)?c=d) [bad](javascript:window.pwned=true) [data](data:text/html,x) https://example.com/e_f.

- one
  - inner
- two

1. first
2. second

> quoted

| a | b |
|---|---|
| 1 | <i>2</i> |

```html
<script>window.pwned = true</script>
"""


def test_a_reply_is_text_and_never_runs(page: Page) -> None:
    # Cut in the middle of everything, as any answer may be.
    pieces = [REPLY[at : at + 7] for at in range(0, len(REPLY), 7)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    events = "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks)
    stand_in(page, f": a comment\n\n{events}data: [DONE]\n\n")
    markdown = ask(page, "<img src=x onerror='window.pwned = true'>").locator(".markdown")
    expect(page.locator(".question")).to_contain_text("<img src=x")
    assert page.evaluate("window.pwned") is None
    expect(page.locator("#chat img, #chat script, #chat i, #chat b")).to_have_count(0)
    expect(markdown).to_contain_text("<b>no HTML</b>, snake_case_name, 2 * 3 * 4 *as is*.")
    expect(markdown).to_contain_text('<img src=x onerror="window.pwned = true">')
    for selector, texts in {
        "h3": ["Title"],
        "em": ["word"],
        "strong": ["two words"],
        "p code": ["x < y"],
        "pre code": ["<script>window.pwned = true</script>\n"],
        "ul > li > ul > li": ["inner"],
        "ol > li": ["first", "second"],
        "blockquote": ["quoted"],
        "td": ["1", "<i>2</i>"],
        "a": ["good", "https://example.com/e_f"],
    }.items():
        assert markdown.locator(selector).all_text_contents() == texts
    links = markdown.locator("a")
    assert links.nth(0).get_attribute("href") == "https://example.com/a_(b)?c=d"
    assert "noopener" in str(links.nth(0).get_attribute("rel"))
    expect(markdown).to_contain_text("[bad](javascript:window.pwned=true) [data](data:text/html,x)")


def test_no_reply_holds_the_page_up(page: Page) -> None:
    """Lines that a reader with overlapping parts would go over again and again."""
    long = 8000
    lines = [
        f"# a{' ' * long}b", f"# {'#' * long} b", f"```{' ' * long}`", f"{'~' * long}`", f"```{'a' * long}`",
        f"| a |\n{' ' * long}x", f"| a |\n|{'-' * long}x", f"| a |\n{'-|' * long}x", "* " * long, f"-{' ' * long}x",
    ]  # fmt: skip
    script = """async (lines) => {
        const { renderMarkdown } = await import(new URL("playground/markdown.js", document.baseURI));
        const began = performance.now();
        lines.forEach(renderMarkdown);
        return performance.now() - began;
    }"""
    assert page.evaluate(script, lines) < 2000  # 20 s and more where parts overlap


def test_tokens_per_second_counts_tokens_without_text(page: Page) -> None:
    """Half a second passes at each look at the clock: two tokens after the first one, a second."""
    page.evaluate("() => { let now = 0; performance.now = () => (now += 500); }")
    usage = [{"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count} for count in (0, 1, 2, 3)]
    deltas = [{"role": "assistant", "content": ""}, {"content": "It "}, {"content": "is"}, {}]
    chunks = [
        {"choices": [{"index": 0, "delta": delta}], "usage": used} for delta, used in zip(deltas, usage, strict=True)
    ]
    stand_in(page, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")
    expect(ask(page, "Hello").locator(".statistics")).to_contain_text("2 tokens/s")


def test_a_picture_that_is_still_being_read_is_sent(page: Page) -> None:
    page.evaluate("""() => {
        const read = FileReader.prototype.readAsDataURL;
        FileReader.prototype.readAsDataURL = function (file) { setTimeout(() => read.call(this, file), 400); };
    }""")
    page.get_by_label("Pictures", exact=True).set_input_files([SHAPES])
    message(page).fill("What color is the star?")
    message(page).press("Enter")
    expect(answer(page)).to_contain_text("pink")
    expect(page.locator(".question img")).to_have_count(1)
    expect(page.locator("#pictures img")).to_have_count(0)


def test_what_was_being_written_comes_back(page: Page) -> None:
    ask(page, "Hello")
    message(page).fill("my draft")
    page.get_by_role("button", name="Edit").click()
    expect(message(page)).to_have_value("Hello")
    page.get_by_role("button", name="Cancel").click()
    expect(message(page)).to_have_value("my draft")
    page.get_by_role("button", name="Edit").click()
    expect(ask(page, "Who are you?")).to_contain_text("demo model")
    expect(message(page)).to_have_value("my draft")
    ask(page, "Hello")
    expect(page.get_by_role("button", name="Try again")).to_have_count(1)  # that of the last answer


def test_a_stream_that_breaks_off_keeps_its_text(page: Page) -> None:
    event = 'data: {"choices": [{"index": 0, "delta": {"content": "Half an"}}]}\n\n'
    error = 'data: {"error": {"message": "the engine failed"}}\n\n'
    for end, told in ((error, "the engine failed"), ("", "broke off")):
        stand_in(page, event + end)
        found = ask(page, "Hello")
        expect(found.locator(".markdown")).to_have_text("Half an")
        expect(found.get_by_role("alert")).to_contain_text(told)


@pytest.mark.parametrize("form", ["curl", "Python"])
def test_a_copied_request_runs(page: Page, form: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pick(page, SHAPES)
    set_field(page, "Stop strings", 'It\'s "so" $HOME `id` \\')
    expect(ask(page, "What color is the star?")).to_contain_text("pink")
    page.get_by_role("button", name=f"Copy this request as a {form}").click()
    expect(page.locator("#status")).to_contain_text("copied")
    text = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in text
    if form == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["bash", "-c", text] if form == "curl" else [sys.executable, "-c", text]
    ended = subprocess.run(
        command,
        env={**os.environ, "API_KEY": KEY, "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "pink" in ended.stdout and "error" not in ended.stdout


def test_the_keyboard_is_enough(page: Page) -> None:
    page.get_by_role("heading", name="Playground").click()
    names = []
    for _ in range(9):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", names
    assert names[:5] == ["model", "new-chat", "Dashboard", "settings-toggle", "theme"]
    assert names[5:8] == ["What is in this picture?", "What does it say?", "Which bar is the tallest?"]
    assert names[8] == "message"

    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(message(page)).to_have_value("one\ntwo")
    message(page).fill("Hello")
    page.keyboard.press("Enter")
    expect(answer(page)).to_contain_text("Hello!")
    expect(message(page)).to_be_focused()

    toggle = page.get_by_role("button", name="Settings", exact=True)
    toggle.press("Enter")
    expect(toggle).to_have_attribute("aria-expanded", "true")
    page.get_by_label("Seed").press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(toggle).to_be_focused()


def test_everything_has_a_name(page: Page) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    pick(page, SHAPES)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, a")].filter(
        (node) => !(node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim())
    ).map((node) => node.outerHTML)""")
    assert nameless == []
    expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "polite")


def test_a_phone_scrolls_in_one_direction(open_page: Open) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    give_key(page)
    assert no_sideways_scroll(page)
    page.get_by_role("button", name="What is in this picture?").click()
    expect(answer(page)).to_contain_text("star")
    assert no_sideways_scroll(page)
    page.get_by_role("button", name="Settings", exact=True).click()
    assert no_sideways_scroll(page)
    expect(page.get_by_role("button", name="Close the settings")).to_be_focused()
    for _ in range(12):  # what lies below the panel is not reached
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main, header')") is None
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings", exact=True)).to_be_focused()
    dashboard = open_page("/dashboard", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect(dashboard.get_by_role("status")).to_have_text("Live")
    assert no_sideways_scroll(dashboard)


def test_light_and_dark(open_page: Open) -> None:
    def is_dark() -> bool:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return all(int(part) < 64 for part in re.findall(r"\d+", color)[:3])

    page = open_page(color_scheme="dark")
    give_key(page)
    assert is_dark()
    page.get_by_role("button", name="Switch to the light theme").click()
    assert not is_dark()
    page.reload()
    assert not is_dark()
    page.emulate_media(color_scheme="light")
    page.get_by_role("button", name="Switch to the dark theme").click()
    assert is_dark()
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{"theme":"dark"},{},""]'
    assert page.get_by_label("API key").input_value() == ""


def test_both_pages_work_below_a_path_and_the_dashboard_shows_numbers(open_page: Open, server: Server) -> None:
    page = open_page(f"{BELOW}/")
    give_key(page)
    page.get_by_role("link", name="Dashboard").click()
    expect(page).to_have_url(f"{server.url}{BELOW}/dashboard")
    expect(page.get_by_role("status")).to_have_text("Live")
    other = open_page(f"{BELOW}/")
    give_key(other)
    other.get_by_role("button", name="What is in this picture?").click()
    expect(answer(other)).to_contain_text("star")

    def value(row: str) -> Locator:
        return page.get_by_role("row", name=row).get_by_role("cell").first

    some = re.compile(r"^[1-9]")
    for row in ("Tokens per second: prompt", "Tokens per second: generation", "Time to first token: p50"):
        expect(value(row)).to_have_text(some)
    expect(value("Time between tokens: p99")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    for row in ("Requests: running", "Requests: waiting"):
        expect(value(row)).to_have_text("0")
    expect(value("Cache: KV cache in use")).to_have_text(re.compile("%$"))
    stopped = server.metric("vllm:request_success_total", finished_reason="stop")
    expect(page.get_by_role("row", name="stop").get_by_role("cell").nth(1)).to_have_text(f"{stopped:.0f}")
    chart = page.get_by_role("img", name="Time to first token over the last 5 minutes; now p50")
    expect(chart.locator("polyline")).not_to_have_count(0)
    expect(chart).to_contain_text("5 min")

    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("status")).to_have_text("Paused")
    page.get_by_role("button", name="Pause").click()
    page.route("**/metrics", lambda route: route.abort())
    expect(page.get_by_role("status")).to_contain_text("No answer from the server since")
    page.get_by_role("link", name="Playground").click()
    expect(page).to_have_url(f"{server.url}{BELOW}/")
