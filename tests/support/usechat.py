"""The page of `examples/usechat`, built with the published packages, its servers, and a page object."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect

from . import npm
from .applications import EXAMPLES, serving, serving_process

TIMEOUT = 20_000  # milliseconds

VERSIONS = {"ai5": 5, "ai6": 6, "ai7": 7}  # by the folder of `tests/npm`

SERVERS = {
    "fastapi": "uvicorn --app-dir={folder} --port={{port}} fastapi_app:app",
    "flask": "gunicorn --chdir={folder} --workers=2 --threads=20 --bind=127.0.0.1:{{port}} flask_app:app",
    "django": "gunicorn --chdir={folder} --workers=2 --threads=20 --bind=127.0.0.1:{{port}} django_app:application",
}


def build(packages: str, folder: Path, *, leave_out: str | None = None) -> Path:
    """Copy the example into a new folder and build its page with its own command. Skip the test without Node.

    Lines of the page that contain `leave_out` are left out.
    """
    modules = npm.install(packages) / "node_modules"
    shutil.copytree(EXAMPLES / "usechat", folder, ignore=shutil.ignore_patterns("node_modules", "dist", "__pycache__"))
    (folder / "node_modules").symlink_to(modules)
    if leave_out is not None:
        lines = (folder / "page.jsx").read_text("utf-8").splitlines(keepends=True)
        (folder / "page.jsx").write_text("".join([line for line in lines if leave_out not in line]), "utf-8")
    done = subprocess.run(["npm", "run", "build"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@contextmanager
def example(framework: str, folder: Path, dsn: str) -> Iterator[str]:
    """Run an application of the example. Yield its address."""
    with serving(SERVERS[framework].format(folder=folder), dsn) as url:
        yield url


@contextmanager
def application(packages: str, folder: Path, dsn: str, **variables: str) -> Iterator[str]:
    """Run the application of `usechat_apps` for the client of these packages. Yield its address."""
    with application_process(packages, folder, dsn, **variables) as (url, _):
        yield url


@contextmanager
def application_process(
    packages: str, folder: Path, dsn: str, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run it as `application` does. Yield its address and its process, which may be killed."""
    variables |= {"PAGE": str(folder / "dist"), "SDK_VERSION": str(VERSIONS[packages])}
    command = "uvicorn --port={port} --factory support.usechat_apps:fastapi"
    with serving_process(command, dsn, **variables) as process:
        yield process


class UseChatPage:
    """A page object: one browser tab with one chat.

    Attributes:
        page: The page of Playwright.
        errors: The uncaught errors of the page's script.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator("form").wait_for()

    @property
    def url(self) -> str:
        """The address of the chat, for a second tab."""
        return self.page.url

    @property
    def id(self) -> str:
        """The id of the chat."""
        return self.page.url.partition("#")[2]

    @property
    def turns(self) -> list[str]:
        """The texts of the visible messages."""
        return list(self.page.eval_on_selector_all("article", "articles => articles.map(TEXT)".replace("TEXT", TEXT)))

    @property
    def answer(self) -> str:
        """The text of the last message if it is an answer, else an empty text."""
        script = "articles => articles.slice(-1).filter(each => each.className === 'assistant').map(TEXT).join('')"
        return str(self.page.eval_on_selector_all("article", script.replace("TEXT", TEXT)))

    def send(self, text: str) -> None:
        self.page.fill("input", text)
        self.press("Send")  # waits while version 5 asks for a running answer

    def press(self, label: str, *, last: bool = True) -> None:
        buttons = self.page.get_by_role("button", name=label, exact=True)
        (buttons.last if last else buttons.first).click()

    def reload(self) -> None:
        """Reload the page, and wait until the server has answered whether an answer is running.

        A new request before that would make the client read its answer twice.
        """
        with self.page.expect_response(lambda response: response.url.endswith("/stream"), timeout=TIMEOUT):
            self.page.reload()

    def wait_for_text(self, text: str) -> None:
        """Wait until the last answer contains a text."""
        expect(self.page.locator("article.assistant").last).to_contain_text(text, timeout=TIMEOUT)

    def wait_for_status(self, status: str) -> None:
        expect(self.page.locator("form")).to_have_attribute("data-status", status, timeout=TIMEOUT)

    def wait_for_turns(self, *texts: str) -> None:
        """Wait until the page shows these messages and the client is ready."""
        deadline = time.monotonic() + TIMEOUT / 1000
        while self.turns != list(texts) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.turns == list(texts), self.turns
        self.wait_for_status("ready")
        assert self.turns == list(texts), self.turns

    def ask(self, text: str, answer: str) -> None:
        """Send a message, and wait until its answer is complete."""
        before = self.turns
        self.send(text)
        self.wait_for_turns(*before, text, answer)


TEXT = "each => [...each.querySelectorAll('.text')].map(text => text.textContent).join('')"
