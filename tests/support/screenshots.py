"""Take the screenshots in docs/images, of the chat, `examples/usechat`, the admin and the site."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from aibind_postgres import PostgresConversationStore, PostgresStreamStore, embedded, schema

from . import django_project, site, usechat, usechat_apps
from .browser import ChatPage, Demo, chromium

FOLDER = Path(__file__).parents[2] / "docs" / "images"
DESKTOP, TALL, SMALL, PHONE = (1200, 760), (1200, 1060), (760, 620), (360, 740)  # in CSS pixels
ADMIN, SITE = (1100, 860), (1280, 800)
COLOURS = 128  # of the PNG's palette; the page has few
SURVIVAL, CODE, BRANCHES, MARKDOWN = (
    "What survives a reload or a crash?",
    "Show me the code of a durable stream",
    "How do branches work?",
    "Show me what Markdown looks like",
)


@contextmanager
def tab(browser: Browser, url: str, size: tuple[int, int], scheme: str = "light") -> Iterator[ChatPage]:
    """Open a tab of a browser that has no conversations yet."""
    phone = size == PHONE
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        device_scale_factor=2,
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
        is_mobile=phone,
        has_touch=phone,
    )
    chat = ChatPage(context, url)
    chat.page.locator("#welcome").wait_for()
    yield chat
    context.close()


def save(page: Page, name: str) -> None:
    """Save the visible part of the page as a PNG with a palette."""
    page.mouse.move(0, 0)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


def ask_all(chat: ChatPage, *questions: str) -> None:
    """Ask each question in a new conversation, and wait until its title is stored."""
    for question in questions:
        chat.press("New chat")
        chat.page.locator("#welcome").wait_for()
        with chat.page.expect_response(lambda response: response.request.method == "PATCH"):
            chat.ask(question)


def take(browser: Browser, fast: Demo, slow: Demo) -> None:
    """Take all screenshots: of demos whose answers are complete at once, and of one that is writing."""
    with tab(browser, fast.url, DESKTOP) as chat:
        ask_all(chat, MARKDOWN, BRANCHES, CODE)
        chat.page.goto(slow.url)  # with the same cookie and the same database
        chat.page.locator("#welcome").wait_for()
        chat.send(SURVIVAL)
        chat.wait_for_answer("Disconnect from the network.")
        save(chat.page, "desktop")
    with tab(browser, fast.url, DESKTOP, "dark") as chat:
        ask_all(chat, MARKDOWN, BRANCHES, SURVIVAL, CODE)
        save(chat.page, "dark")
    with tab(browser, fast.url, DESKTOP) as chat:
        ask_all(chat, MARKDOWN)
        save(chat.page, "markdown")
    with tab(browser, fast.url, TALL) as chat:
        ask_all(chat, CODE, "How do trees work?", BRANCHES)
        chat.press("Edit")
        chat.send("How do branches work, in short?")
        chat.page.locator(".user footer", has_text="2 / 2").wait_for()
        chat.wait_until_idle()
        chat.press("Try again")
        chat.page.locator(".assistant footer", has_text="2 / 2").wait_for()
        chat.wait_until_idle()
        save(chat.page, "branches")
    for scheme in ("light", "dark"):
        with tab(browser, fast.url, PHONE, scheme) as chat:
            if scheme == "dark":
                chat.ask(CODE)
            save(chat.page, f"phone-{scheme}")


def take_usechat(browser: Browser, dsn: str) -> None:
    """Take the screenshot of the example for the AI SDK, with a tool call, while an answer is being written."""
    schema.migrate(dsn)
    with tempfile.TemporaryDirectory() as folder:
        page = usechat.build("ai7", Path(folder, "page"))
        context = browser.new_context(viewport={"width": SMALL[0], "height": SMALL[1]}, device_scale_factor=2)
        with usechat.application("ai7", page, dsn) as url:
            chat = usechat.UseChatPage(context, url)
            chat.send("Delete report.txt")
            chat.wait_for_text("Allow")
            chat.wait_for_status("ready")
            chat.press("Yes")
            chat.wait_for_text("It is deleted.")
            chat.wait_for_status("ready")
            chat.send(usechat_apps.SURVIVAL)
            chat.wait_for_text("open it in a second")
            save(chat.page, "usechat")
        context.close()


def take_site(browser: Browser) -> None:
    """Take the screenshot of the documentation site, with a diagram."""
    with tempfile.TemporaryDirectory() as folder, site.served(site.build(Path(folder))) as url:
        options = {"viewport": {"width": SITE[0], "height": SITE[1]}, "device_scale_factor": 2}
        tab = site.SitePage(browser, url, **options)
        tab.open("concepts.html")
        tab.draw_diagrams()
        save(tab.page, "site")
        tab.context.close()


def take_admin(browser: Browser, dsn: str) -> None:
    """Take the screenshots of the admin of the app for Django: a stream that is being written, and branches."""
    with tempfile.TemporaryDirectory() as folder:
        project = django_project.write(Path(folder, "project"))
        django_project.must_manage(project, dsn, "migrate")
        django_project.create_admin(project, dsn)
        with (
            PostgresStreamStore(dsn) as streams,
            PostgresConversationStore(dsn) as conversations,
            django_project.served(project, dsn) as address,
        ):
            with conversations.edit("lisbon", owner="ada") as chat:
                question = chat.append({"role": "user", "content": "Plan a day in Lisbon."})
                first = "Start in Alfama, and take tram 28 to the castle. Then have lunch in the Time Out Market."
                chat.append({"role": "assistant", "content": first})
                chat.append({"role": "user", "content": "And if it rains?"})
                second = "Begin at the Gulbenkian Museum, and spend the afternoon in the Oceanarium."
                chat.tree.branch(question, {"role": "assistant", "content": second})
            conversations.describe("lisbon", title="A day in Lisbon")
            stream_id = streams.create(owner="ada", session_id="lisbon", metadata={"model": "example"})
            streams.append_many(stream_id, [f"{word} " for word in second.split()[:9]])
            context = browser.new_context(
                viewport={"width": ADMIN[0], "height": ADMIN[1]}, device_scale_factor=2, color_scheme="light"
            )
            page = context.new_page()
            django_project.log_in(page, address)
            page.goto(f"{address}/admin/aibind_postgres/stream/{stream_id}/change/")
            page.get_by_text("active: chunk 9 of 9").wait_for()
            save(page, "admin-stream")
            page.goto(f"{address}/admin/aibind_postgres/conversation/lisbon/change/")
            save(page, "admin-conversation")
            context.close()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with (
        embedded.server() as dsn,
        Demo("fastapi", dsn, delay=0) as fast,
        Demo("fastapi", dsn, delay=0.05) as slow,
        chromium() as browser,
    ):
        take(browser, fast, slow)
        take_usechat(browser, dsn)
        take_site(browser)
        take_admin(browser, dsn)


if __name__ == "__main__":
    main()
