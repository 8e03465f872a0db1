"""Starts the real page in a process of its own and drives it with a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from studytiny import DialogueModel, Tokenizer, save_checkpoint
from studytiny.web.texts import TEXTS
from tests.loopback_hub import REPOSITORY, LoopbackHub

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTLED_MS = 400  # longer than the way of a question to the server and back
START_SECONDS = 90  # generous: a busy machine imports torch slowly

# app.py as it is, but with another bundled model, and one that takes its time so that a reply can be watched.
_RUNNER = """
import runpy, sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
import studytiny.scheduler, studytiny.hub
studytiny.hub.BUNDLED_FOLDER = Path({bundled!r})
draw = studytiny.scheduler.draw
def slow_draw(*arguments):
    time.sleep({seconds_per_character!r})
    return draw(*arguments)
studytiny.scheduler.draw = slow_draw
runpy.run_path({app!r}, run_name="__main__")
"""


def command(bundled: Path | None = None, seconds_per_character: float = 0.0) -> list[str]:
    """Starts app.py; ``bundled`` stands in for the model in assets."""
    app = REPOSITORY / "app.py"
    if bundled is None:
        return [sys.executable, str(app)]
    code = _RUNNER.format(
        repository=str(REPOSITORY), bundled=str(bundled), app=str(app), seconds_per_character=seconds_per_character
    )
    return [sys.executable, "-c", code]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def offline_environment(home: Path) -> dict[str, str]:
    """An environment in which ModelScope is out of reach: nobody listens where its client is sent."""
    with LoopbackHub({}) as hub:
        pass
    return hub.environment(home)


def small_bundled(folder: Path) -> Path:
    """A model of no training in ``folder``, to stand in for the bundled one: small, and always the same."""
    torch.manual_seed(0)
    tokenizer = Tokenizer("你好呀我是小天叫什么名字，。？！")
    model = DialogueModel(tokenizer.vocab_size, 32, 4, 2, max_length=64)
    return save_checkpoint(folder / "bundled", model, tokenizer)


@contextlib.contextmanager
def running_page(arguments: list[str], environment: dict[str, str], folder: Path) -> Iterator[str]:
    """The page's address; see ``running_process``."""
    with running_process(arguments, environment, folder) as (address, _):
        yield address


@contextlib.contextmanager
def running_process(
    arguments: list[str], environment: dict[str, str], folder: Path
) -> Iterator[tuple[str, subprocess.Popen[Any]]]:
    """The page's address and process; what it prints goes to page.log in ``folder``, which is also where it runs."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    log = folder / "page.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            arguments,
            cwd=folder,
            env={**environment, "GRADIO_SERVER_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(address, process, log)
        yield address, process
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(address: str, process: subprocess.Popen[Any], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        with contextlib.suppress(OSError), opener.open(address, timeout=5):
            return
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"the page did not start:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.02)


@contextlib.contextmanager
def running_browser() -> Iterator[Any]:
    """A headless browser; without one the test is skipped, or fails where CI is set."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _miss("playwright is not installed (pip install playwright)")
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.exists() else None)
        if found is None:
            _miss("no Chromium or Chrome was found (python -m playwright install chromium)")
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


def _miss(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"the browser tests must run in CI: {reason}")
    pytest.skip(reason)


class ChatPage:
    """The open page: what a visitor does with it, and what they see."""

    def __init__(self, browser: Any, address: str, locale: str = "zh-CN", width: int = 1280, **context: Any) -> None:
        self.context = browser.new_context(
            locale=locale, viewport={"width": width, "height": 844 if width < 768 else 800}, **context
        )
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.problems: list[str] = []  # errors on the console, requests to anywhere else
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        self.page.on("request", lambda request: self._watch(request.url, address))
        self.page.goto(address)
        self.box = self.page.locator("#message textarea")
        self.box.wait_for()
        self.page.wait_for_function("document.querySelector('#status').innerText.trim() !== ''")

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _watch(self, url: str, address: str) -> None:
        if not url.startswith((address, "data:", "blob:")):
            self.problems.append(f"request: {url}")

    def close(self) -> None:
        self.context.close()

    # what is seen

    def messages(self, role: str) -> list[str]:
        """Texts of the messages of ``user`` or ``bot``, oldest first."""
        return self.page.locator(f"#chat [data-testid={role}]").all_inner_texts()

    def conversation(self) -> list[dict[str, str]]:
        """All messages, as the Generator takes them."""
        bubbles = self.page.locator("#chat [data-testid=user], #chat [data-testid=bot]").all()
        names = {"user": "user", "bot": "assistant"}
        return [
            {"role": names[bubble.get_attribute("data-testid")], "content": bubble.inner_text()} for bubble in bubbles
        ]

    def text_of(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    # what is done

    def send(self, text: str) -> str:
        """Types ``text``, presses Enter, and waits for the whole reply."""
        said = len(self.messages("user"))
        self.start(text)
        self.page.wait_for_function("(n) => document.querySelectorAll('#chat [data-testid=user]').length > n", arg=said)
        return self.reply()

    def start(self, text: str) -> None:
        """Types ``text`` and presses Enter."""
        self.box.fill(text)
        self.box.press("Enter")

    def reply(self) -> str:
        """Waits until an answer is there and nothing is being written; returns it.

        An edit leaves the former answer on the page until the server has taken the new question, so a state counts once
        it has stayed for a moment; text and state are read together, for a newer state may follow at any time.
        """
        return self.page.wait_for_function(
            """([stays]) => {
                const rows = [...document.querySelectorAll('#chat [data-testid=user], #chat [data-testid=bot]')];
                const answered = rows.at(-1)?.dataset.testid === 'bot' && rows.at(-1).innerText.trim()
                    && document.querySelector('#message .submit-button')
                    && !document.querySelector('#message .stop-button');
                const state = answered ? rows.map(row => row.innerText).join('\\0') : '';
                if (state !== window.lastState) [window.lastState, window.sinceWhen] = [state, performance.now()];
                return state && performance.now() - window.sinceWhen > stays ? rows.at(-1).innerText : false;
            }""",
            arg=[SETTLED_MS],
        ).json_value()

    def open_tab(self, name: str, language: int = 0) -> None:
        """Opens a tab by the key of its name in TEXTS."""
        self.page.get_by_role("tab", name=TEXTS[name][language]).click()

    def press(self, label: str) -> None:
        """Presses the last button of that name in the chat: its newest message's."""
        self.page.locator(f"#chat button[aria-label='{label}']").last.click()

    def set(self, name: str, value: float) -> None:
        """Types a value into the field beside a slider, or into that of the seed."""
        field = self.page.locator(f"#{name} input:not([type=range])")
        field.fill(str(value))
        field.press("Tab")

    def notice(self) -> str:
        """The sentence of the newest notice, which is then closed."""
        toast = self.page.locator(".toast-body").last
        toast.wait_for()
        sentence = toast.inner_text()
        toast.locator(".toast-close").click()
        toast.wait_for(state="detached")
        return sentence
