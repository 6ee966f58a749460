"""The chat page at / in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import Start
from tests.server.process import Server, eventually

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: pip install 'llorch[test]'"
)
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it (Debian: apt install chromium)")

# nothing that a browser asks its maker for by itself
QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", *(f"--{option}" for option in QUIET)]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "plain.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def slow_chat(start: Start, template: Path) -> Server:
    """A model that talks, at 20 ms a token."""
    options = ("--provider", "paced", "--chat-template", str(template))
    return start(*options, env={"PACED_STEP_SECONDS": "0.02"}).wait_healthy()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server; at the end of the test its console must have held no error but those expected."""
    contexts, problems, expected = [], [], []

    def open_page(server: Server, width: int = 1000, errors: str = "", dark: bool = False) -> Page:
        scheme, url = "dark" if dark else "light", server.url
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: _failed(request, problems))
        page.on("request", lambda request: _only(url, request.url, problems))
        if errors:
            expected.append(errors)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    left = [problem for problem in problems if not any(re.search(pattern, problem) for pattern in expected)]
    assert not left


def _failed(request: Any, problems: list[str]) -> None:
    if request.failure != "net::ERR_ABORTED":  # what the user stopped
        problems.append(f"{request.url} {request.failure}")


def _only(home: str, url: str, problems: list[str]) -> None:
    if not url.startswith(home):
        problems.append(f"the page asked another host: {url}")


def expect_done(page: Page, tokens: int) -> None:
    """The answer is whole: while it is written, a rate is shown, which may end in the same digits."""
    expect(page.locator("#status")).to_contain_text(re.compile(rf"^{tokens} tokens, "))


def say(page: Page, text: str, *settings: tuple[str, str]) -> None:
    if settings:
        page.get_by_text("Settings").click()
        for label, value in settings:
            page.get_by_label(label).fill(value)
            page.get_by_label(label).press("Tab")
        page.get_by_text("Settings").click()
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_an_answer_is_streamed_and_counted(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    expect(page.locator("#machine")).to_contain_text("paced on")
    say(page, "Once upon a time", ("Most tokens", "60"), ("Temperature", "0"))
    answer = page.locator(".message.assistant.writing span").last
    expect(answer).not_to_be_empty()
    early = answer.inner_text()
    expect_done(page, 60)
    whole = page.locator(".message.assistant span").last.inner_text()
    assert whole.startswith(early)
    assert len(whole) > len(early), "the answer came in one piece"
    expect(page.locator("#status")).to_contain_text(re.compile(r"[\d.]+ tokens/s, \d+ of 512 tokens of context used"))
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_stop_ends_the_answer_and_the_job(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    say(page, "Once upon a time", ("Most tokens", "400"))
    expect(page.locator(".message.assistant span").last).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    with slow_chat.client() as client:
        eventually(lambda: "llorch_running_requests 0.0" in client.get("/metrics").text, what="no request running")
    expect(page.locator(".message.assistant.unfinished")).to_be_visible()
    say(page, "And then")
    expect(page.locator(".message.user")).to_have_count(2)
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_history_survives_a_reload_and_a_new_chat_ends_it(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    say(page, "Lily saw a cat", ("Most tokens", "5"))
    expect_done(page, 5)
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".message.user")).to_contain_text("Lily saw a cat")
    assert page.get_by_label("Most tokens").input_value() == "5"
    page.get_by_role("button", name="New chat").click()
    page.reload()
    expect(page.locator(".message")).to_have_count(0)


@pytest.mark.parametrize("leave", ["reload", "close"])
def test_leaving_in_the_middle_of_an_answer_keeps_what_had_come(open_page: Open, slow_chat: Server, leave: str) -> None:
    page = open_page(slow_chat)
    say(page, "Lily saw a cat", ("Most tokens", "400"))
    answer = page.locator(".message.assistant span").last
    expect(answer).to_have_text(re.compile(".{20}"))
    early = answer.inner_text()
    if leave == "reload":
        page.reload()
    else:
        page.close(run_before_unload=True)
        page = page.context.new_page()
        page.goto(slow_chat.url)
    expect(page.locator(".message.user")).to_contain_text("Lily saw a cat")
    expect(page.locator(".message.assistant.unfinished")).to_contain_text(early)
    say(page, "Go on", ("Most tokens", "3"))  # the server takes what is kept
    expect_done(page, 3)
    expect(page.locator(".message")).to_have_count(4)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_each_of_two_tabs_keeps_its_conversation(open_page: Open, slow_chat: Server) -> None:
    first = open_page(slow_chat)
    say(first, "Lily saw a cat", ("Most tokens", "400"))
    second = first.context.new_page()

    def opened() -> bool:
        second.goto(slow_chat.url)
        return second.locator(".message.assistant.unfinished").count() == 1

    eventually(opened, what="an answer that is kept while it is written, as a crash would leave it")
    expect(first.locator(".message.assistant.writing")).to_be_visible()
    second.get_by_role("button", name="New chat").click()
    say(second, "Tom had a ball", ("Most tokens", "3"))
    expect_done(second, 3)
    first.get_by_role("button", name="Stop").click()
    expect(first.locator("#status")).to_have_text("Stopped.")
    for page, question in ((first, "Lily saw a cat"), (second, "Tom had a ball")):
        page.reload()
        expect(page.locator(".message")).to_have_count(2)
        expect(page.locator(".message.user")).to_contain_text(question)


def test_a_question_without_an_answer_is_kept_to_be_sent_again(
    open_page: Open, start: Start, template: Path, tmp_path: Path
) -> None:
    stall = tmp_path / "stall"
    stall.touch()
    options = ("--provider", "paced", "--chat-template", str(template))
    page = open_page(start(*options, env={"PACED_STALL_WHEN": str(stall)}).wait_healthy())
    box = page.get_by_label("Message")
    say(page, "Hello", ("Most tokens", "3"))
    page.reload()
    expect(page.locator(".message.user.unanswered")).to_contain_text("Hello")
    expect(box).to_have_value("Hello")
    page.reload()
    expect(box).to_have_value("Hello")
    box.press("Enter")
    box.fill("What I typed meanwhile")
    page.keyboard.press("Escape")
    expect(box).to_have_value("Hello\n\nWhat I typed meanwhile")
    box.fill("Hello")
    stall.unlink()
    box.press("Enter")
    expect_done(page, 3)
    expect(page.locator(".message")).to_have_count(2)


OFF = """for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });"""
FULL = """for (const storage of [localStorage, sessionStorage])
  for (let text = "", size = 1 << 23; size; size >>= 1)
    try { storage.setItem("filler", text + "x".repeat(size)); text += "x".repeat(size); } catch {}"""


@pytest.mark.parametrize("broken", [OFF, FULL], ids=["off", "full"])
def test_without_storage_the_page_works_and_says_so(open_page: Open, slow_chat: Server, broken: str) -> None:
    page = open_page(slow_chat)
    page.add_init_script(broken)
    page.reload()
    say(page, "Hello", ("Most tokens", "60"))  # long enough for what is kept while it is written
    for turn in (1, 2):
        expect(page.locator(".message.assistant:not(.writing)")).to_have_count(turn)
        expect(page.locator("#status")).to_contain_text("keeps no history")
        if turn == 1:
            say(page, "Again")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_who_scrolls_up_is_left_there(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    say(page, "line\n" * 60, ("Most tokens", "400"))
    conversation, answer = page.locator("#conversation"), page.locator(".message.assistant span").last
    end = "c => c.scrollHeight - c.scrollTop - c.clientHeight <= 1"
    expect(answer).to_have_text(re.compile(".{20}"))
    assert conversation.evaluate(end)
    conversation.evaluate("c => c.scrollTop -= 100")
    early = answer.inner_text()
    expect(answer).not_to_have_text(early)
    assert not conversation.evaluate(end)
    conversation.evaluate("c => c.scrollTop = c.scrollHeight")
    expect(answer).to_have_text(re.compile(".{200}", re.DOTALL))
    assert conversation.evaluate(end)


def test_what_a_model_writes_is_text(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    say(page, "<img src=x onerror=alert(1)><b>bold</b>", ("Most tokens", "3"))
    expect_done(page, 3)
    expect(page.locator(".message.user")).to_contain_text("<b>bold</b>")
    assert page.locator(".message img, .message b").count() == 0


def test_an_error_is_a_sentence_and_the_question_comes_back(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat, errors="status of 400")
    say(page, "word " * 600)
    error = page.get_by_role("alert").locator("span").last
    expect(error).to_contain_text("512")
    assert re.fullmatch(r"[A-Z].*[.!?]", error.inner_text(), re.DOTALL)
    assert page.get_by_label("Message").input_value().startswith("word word")
    page.get_by_label("Message").fill("")
    say(page, "Hello", ("Most tokens", "3"))
    expect_done(page, 3)


def test_a_model_without_a_template_says_so(open_page: Open, server: Server) -> None:
    page = open_page(server, errors="status of 400")
    say(page, "Hello")
    expect(page.get_by_role("alert").locator("span").last).to_contain_text("template")


def test_a_key_is_asked_for(open_page: Open, start: Start, template: Path) -> None:
    keyed = start("--chat-template", str(template), env={"LLORCH_API_KEY": "sesame"}).wait_healthy()
    page = open_page(keyed, errors="status of 401")
    say(page, "Hello", ("Most tokens", "4"))
    key = page.get_by_role("textbox", name="API key")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#key-error")).to_contain_text("not one of")
    key.press("Escape")
    expect(page.locator("#status")).to_contain_text("Not sent")
    expect(page.get_by_label("Message")).to_have_value("Hello")
    page.get_by_role("button", name="Send").click()
    key.fill("sesame")
    key.press("Enter")
    expect_done(page, 4)
    say(page, "Again")
    expect(page.locator(".message.assistant")).to_have_count(2)


def test_the_server_is_gone_and_comes_back(open_page: Open, start: Start, template: Path) -> None:
    options = ("--provider", "paced", "--chat-template", str(template))
    ending = start(*options, env={"PACED_STEP_SECONDS": "0.02"}).wait_healthy()
    # refused, or reset where the browser has not yet seen its end; 503 while the next one loads
    page = open_page(ending, errors="net::ERR_|status of 503")
    say(page, "Once upon a time")
    expect(page.locator(".message.assistant span").last).not_to_be_empty()
    ending.process.kill()
    alert = page.get_by_role("alert").locator("span").last
    expect(alert).to_have_text("The connection ended before the answer did.")
    expect(page.locator(".message.assistant.unfinished")).to_be_visible()
    expect(page.locator("#machine")).to_contain_text("does not answer")
    say(page, "Hello", ("Most tokens", "3"))
    expect(alert).to_contain_text("does not answer")
    start(*options, port=urlsplit(page.url).port).wait_healthy()
    expect(page.locator("#machine")).to_contain_text("paced on")
    page.get_by_role("button", name="Send").click()
    expect_done(page, 3)
    expect(page.locator(".message.user")).to_have_count(2)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_and_axe(open_page: Open, slow_chat: Server, dark: bool) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(slow_chat, width=400, dark=dark)
    say(page, "Hello " + "x" * 200, ("Most tokens", "20"))
    expect_done(page, 20)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send is not None
    assert send["x"] + send["width"] <= 400
    assert send["y"] + send["height"] <= 800
    page.get_by_text("Settings").click()
    found = Axe().run(page).response["violations"]
    assert [violation for violation in found if violation["impact"] in ("serious", "critical")] == []


def test_the_keyboard_is_enough(open_page: Open, slow_chat: Server) -> None:
    page = open_page(slow_chat)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    assert page.get_by_label("Message").input_value() == "Hello\nyou"
    page.keyboard.press("Enter")
    expect(page.locator(".message.user span").last).to_have_text("Hello\nyou")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_demonstration_says_what_it_is(open_page: Open, start: Start, server: Server) -> None:
    page = open_page(start(model=None).wait_healthy())
    expect(page.locator("#demo")).to_contain_text("llorch serve --model")
    say(page, "What is the capital of France?", ("Temperature", "0"))
    expect(page.locator(".message.assistant span").last).to_contain_text("I am a small demonstration model")
    expect(page.locator("#demo")).to_be_hidden()
    real = open_page(server)
    expect(real.locator("#machine")).to_contain_text("numpy-cpu on")
    expect(real.locator("#demo")).to_be_hidden()


def test_links_and_policy(server: Server) -> None:
    with server.client() as client:
        response = client.get("/")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "<script>" not in response.text
        assert "style=" not in response.text
        for link in re.findall(r'(?:href|src)="([^"]+)"', response.text):
            assert link.startswith("/"), "an outside address"
            assert client.get(link).status_code == 200
