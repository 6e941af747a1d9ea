"""Chromium, the demo server, and a page object for the chat of the examples."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FRAMEWORKS = ["fastapi", "flask", "django"]

# Chromium has no sandbox when it runs as root. The other options disable its background traffic.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Demo:
    """`aibind-postgres demo --web` in a subprocess. `start` restarts it on the same port."""

    def __init__(self, framework: str, dsn: str, *, port: int = 0, delay: float = 0.05, **environment: str) -> None:
        self._arguments = ["demo", "--web", f"--framework={framework}", f"--dsn={dsn}"]
        self._environment = {**os.environ, "AIBIND_DEMO_DELAY": f"{delay}", "PYTHONWARNINGS": "ignore"}
        for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
            self._environment.pop(name, None)
        self._environment |= environment
        self.port = port
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "aibind_postgres.cli", *self._arguments, f"--port={self.port}"]
        self._process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert "http" in line, "the demo has ended: see its standard error"
        self.url = line.split()[4]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def terminate(self) -> int:
        self._process.terminate()
        self._process.communicate(timeout=30)
        return self._process.returncode

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class ChatPage:
    """A page object: one browser tab with the chat."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []  # uncaught errors of the page's script, and what its own policy forbids
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._record_violation)
        self.page.goto(url)

    def _record_violation(self, message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            self.errors.append(message.text)

    @property
    def url(self) -> str:
        return self.page.url

    @property
    def session_id(self) -> str:
        return self.page.url.partition("#")[2]

    @property
    def stream_id(self) -> str:
        """The id of the stream that writes the pending answer."""
        url = f"{self.page.url.partition('#')[0]}__aibind__/conversations/{self.session_id}"
        return str(self.page.request.get(url).json()["activeStreamId"])

    @property
    def owner(self) -> str:
        """The value of the cookie, to which the conversations of this browser belong."""
        [cookie] = [cookie for cookie in self.page.context.cookies() if cookie["name"] == "browser"]
        return cookie["value"]

    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.click("#send")

    def press(self, label: str, *, last: bool = True) -> None:
        buttons = self.page.get_by_role("button", name=label, exact=True)
        (buttons.last if last else buttons.first).click()

    def wait_for_answer(self, text: str) -> None:
        """Wait until the pending answer contains `text`."""
        expect(self.page.locator("#writing")).to_contain_text(text, timeout=20_000)

    def ask(self, text: str) -> None:
        """Send a question, and wait until its answer is stored."""
        before = len(self.turns)
        self.send(text)
        expect(self.page.locator("#messages article")).to_have_count(before + 2, timeout=20_000)
        self.wait_until_idle()

    def wait_until_idle(self, *, empty: bool = False) -> None:
        """Wait until no answer is pending and the last one is stored. With `empty`, expect no answer at all."""
        expect(self.page.locator("#writing")).to_have_count(0, timeout=30_000)
        expect(self.page.locator("#send")).to_be_enabled(timeout=20_000)
        if not empty:
            expect(self.page.get_by_role("button", name="Try again").last).to_be_visible(timeout=20_000)

    def wait_for_note(self, text: str, *, timeout: float = 30) -> None:
        """Wait until a note contains `text`, for at most `timeout` seconds."""
        expect(self.page.locator("#note")).to_contain_text(text, timeout=timeout * 1000)

    @property
    def turns(self) -> list[Any]:
        """The texts of the visible turns, in Markdown."""
        return list(
            self.page.eval_on_selector_all("#messages article", "articles => articles.map(each => each.source)")
        )

    def wait_for_titles(self, *titles: str) -> None:
        """Wait until these conversations are listed, in this order."""
        expect(self.page.locator("#conversations a")).to_have_text(list(titles), timeout=20_000)
