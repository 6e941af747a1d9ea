"""Contrast, sizes of targets and overflow of the chat page, measured in Chromium by computed styles."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.browser import CHROMIUM, ChatPage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

MEASURE = Path(__file__).with_name("measure.js").read_text("utf-8")
WIDTHS = {"desktop": 1280, "phone": 360}
TEXT, CONTROL = 4.5, 3.0  # minimal contrast, as in WCAG 2
TARGET = 44  # pixels

LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2


@pytest.fixture(params=WIDTHS)
def width(request):
    return request.param


@pytest.fixture(params=["light", "dark"])
def page(request, browser, width):
    """Return a function that opens a tab of a demo in one scheme and width."""
    phone = width == "phone"
    context = browser.new_context(
        viewport={"width": WIDTHS[width], "height": 740},
        color_scheme=request.param,
        reduced_motion="reduce",
        is_mobile=phone,
        has_touch=phone,
        bypass_csp=True,  # for the measurement, which is evaluated in the page
    )
    yield lambda demo: ChatPage(context, demo.url)
    context.close()


def check(chat):
    """Fail with the elements that are hard to see or to hit, or that are cut off."""
    chat.page.mouse.move(0, 0)
    measured = {name: chat.page.evaluate(f"{MEASURE}.{name}()") for name in ("texts", "controls", "focus", "targets")}
    limits = {"texts": TEXT, "controls": CONTROL, "focus": CONTROL, "targets": TARGET - 0.01}
    assert all(measured.values())
    wrong = {
        name: {label: value for label, value in values if value < limits[name]} for name, values in measured.items()
    }
    assert wrong == {"texts": {}, "controls": {}, "focus": {}, "targets": {}}
    assert chat.page.evaluate(f"{MEASURE}.cut()") == []


def test_start_page(page, fast_demo):
    chat = page(fast_demo)
    chat.page.locator("#welcome").wait_for()
    check(chat)


def test_conversation(page, width, fast_demo):
    chat = page(fast_demo)
    chat.ask("Show me what Markdown looks like")
    chat.ask("Show me the code")
    chat.press("Try again")
    chat.page.locator("footer", has_text="2 / 2").wait_for()
    chat.wait_until_idle()
    chat.ask(f"{LONG} {LONG}")
    check(chat)
    chat.page.locator("#scroller").evaluate("element => element.scrollTop = 0")
    chat.page.locator("#to-end").wait_for()
    check(chat)
    chat.page.fill("#prompt", "\n".join(LONG for _ in range(50)))
    chat.press("Edit", last=False)
    check(chat)
    chat.press("Cancel")
    check(chat)
    if width == "phone":
        chat.press("Conversations")
        check(chat)
    chat.page.locator("#conversations button").first.click()
    chat.page.get_by_role("dialog").wait_for()
    check(chat)


def test_answer_that_is_being_written(page, slow_demo):
    chat = page(slow_demo)
    chat.send("What survives?")
    chat.wait_for_answer("You wrote")
    check(chat)
    chat.press("Stop")
    chat.wait_for_note("Stopped.")
    chat.wait_until_idle()
    check(chat)
