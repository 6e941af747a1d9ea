"""`useChat` of the published AI SDK 5, 6 and 7 in Chromium, with the page of `examples/usechat`."""

from __future__ import annotations

import json
from urllib.request import urlopen

import pytest
from playwright.sync_api import expect
from support import usechat
from support.browser import CHROMIUM
from support.concurrency import until
from support.proxy import Proxy
from support.usechat import TIMEOUT
from support.usechat_apps import SAID, count

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module", params=usechat.VERSIONS)
def packages(request):
    """The packages of a version of the AI SDK."""
    return request.param


@pytest.fixture(scope="module")
def url(packages, chats, pages):
    """The address of an application for the version."""
    with usechat.application(packages, pages(packages), chats) as url:
        yield url


def test_reload_and_second_tab_during_an_answer(url, open_chat):
    prompt = "count reload 40 0.05"
    chat = open_chat(url)
    chat.send(prompt)
    for word in ("reload-3 ", "reload-12 "):
        chat.wait_for_text(word)
        assert count(prompt).startswith(chat.answer)
        chat.reload()
    chat.wait_for_text("reload-14 ")
    assert count(prompt).startswith(chat.answer)
    second = open_chat(chat.url)
    for tab in (chat, second):
        tab.wait_for_turns(prompt, count(prompt))
    for tab in (chat, second):
        tab.reload()
        tab.wait_for_turns(prompt, count(prompt))


def test_stop_ends_the_answer_in_all_tabs(url, open_chat):
    chat = open_chat(url)
    chat.send("count stop 500 0.05")
    chat.wait_for_text("stop-5 ")
    second = open_chat(chat.url)
    second.wait_for_text("stop-7 ")
    second.press("Stop")
    for tab in (chat, second):
        tab.wait_for_status("ready")
    assert chat.turns == second.turns
    assert "stop-7 " in chat.answer
    stopped = chat.turns
    chat.reload()
    chat.wait_for_turns(*stopped)
    chat.ask("Next?", "You asked: Next?")


def test_edit(url, open_chat):
    chat = open_chat(url)
    chat.ask("first", "You asked: first")
    chat.ask("second", "You asked: second")
    chat.press("Edit", last=False)
    assert chat.page.input_value("input") == "first"
    chat.page.fill("input", "edited")
    chat.press("Save")
    chat.wait_for_turns("edited", "You asked: edited")
    chat.ask("third", "You asked: third")
    chat.reload()
    chat.wait_for_turns("edited", "You asked: edited", "third", "You asked: third")


def test_regenerate(url, open_chat):
    prompt = "count again 20 0.05"
    chat = open_chat(url)
    chat.ask("first", "You asked: first")
    chat.ask(prompt, count(prompt))
    chat.press("Try again")
    chat.wait_for_text("again-5 ")
    chat.reload()
    turns = ["first", "You asked: first", prompt, count(prompt)]
    chat.wait_for_turns(*turns)
    chat.press("Try again", last=False)
    chat.wait_for_turns("first", "You asked: first")
    chat.reload()
    chat.wait_for_turns("first", "You asked: first")


def test_failed_answer_keeps_its_text(url, open_chat):
    chat = open_chat(url)
    chat.send("fail")
    chat.page.get_by_role("alert").wait_for(timeout=TIMEOUT)
    assert "secret" not in chat.page.inner_text("main")
    assert chat.turns == ["fail", "half "]
    chat.reload()
    chat.wait_for_turns("fail", "half ")
    chat.ask("Next?", "You asked: Next?")


@pytest.mark.parametrize("decision", ["Yes", "No"])
def test_tool_call_with_approval(packages, url, open_chat, decision):
    if packages == "ai5":
        pytest.skip("the AI SDK 5 has no approvals")
    chat = open_chat(url)
    chat.send("Delete report.txt")
    allow = chat.page.get_by_text('Allow deleteFile {"file":"report.txt"}?')
    allow.wait_for(timeout=TIMEOUT)
    chat.wait_for_status("ready")
    if decision == "Yes":  # also in a page that has loaded the call from the server
        chat.reload()
        allow.wait_for(timeout=TIMEOUT)
        chat.wait_for_status("ready")
    chat.press(decision)
    result, text = {
        "Yes": ('deleteFile: {"deleted":"report.txt"}', "It is deleted."),
        "No": ("deleteFile: output-denied", "I have kept it."),
    }[decision]
    for _ in range(2):
        chat.wait_for_turns("Delete report.txt", f"I need your permission. {text}")
        expect(chat.page.locator(".tool")).to_have_text([result], timeout=TIMEOUT)
        chat.reload()


def test_tool_call_of_the_page(url, open_chat):
    chat = open_chat(url)
    chat.send("confirm")
    chat.page.get_by_text("Really?").wait_for(timeout=TIMEOUT)
    chat.wait_for_status("ready")
    chat.press("Yes")
    for word in ("said-5 ", "said-20 "):  # a replay includes the tool call
        chat.wait_for_text(word)
        assert count(SAID).startswith(chat.answer)
        expect(chat.page.locator(".tool")).to_have_text(['confirm: "yes"'], timeout=TIMEOUT)
        chat.reload()
    for _ in range(2):
        chat.wait_for_turns("confirm", count(SAID))
        expect(chat.page.locator(".tool")).to_have_text(['confirm: "yes"'], timeout=TIMEOUT)
        chat.reload()


def test_lost_connection_is_resumed(url, open_chat):
    proxy = Proxy(f"host=127.0.0.1 port={url.rpartition(':')[2]}")
    try:
        prompt = "count network 50 0.05"
        chat = open_chat(f"http://127.0.0.1:{proxy.port}")
        chat.send(prompt)
        chat.wait_for_text("network-5 ")
        proxy.refuse()
        proxy.cut()
        chat.wait_for_status("error")
        kept = chat.answer
        assert "network-5 " in kept
        assert count(prompt).startswith(kept)
        proxy.heal()
        chat.wait_for_text("network-20 ")
        proxy.cut()
        chat.wait_for_turns(prompt, count(prompt))
    finally:
        proxy.close()


def test_question_during_an_answer_is_refused_and_kept(url, open_chat):
    prompt = "count busy 60 0.05"
    chat = open_chat(url)
    second = open_chat(chat.url)
    chat.send(prompt)
    chat.wait_for_text("busy-2 ")
    second.send("Too early?")
    second.wait_for_status("error")
    assert second.page.get_by_role("alert").is_visible()
    second.press("Reload")
    for tab in (chat, second):
        tab.wait_for_turns(prompt, count(prompt))
    assert second.page.input_value("input") == "Too early?"
    second.press("Send")
    second.wait_for_turns(prompt, count(prompt), "Too early?", "You asked: Too early?")


def test_message_that_is_not_sent_is_kept(url, open_chat):
    proxy = Proxy(f"host=127.0.0.1 port={url.rpartition(':')[2]}")
    try:
        chat = open_chat(f"http://127.0.0.1:{proxy.port}")
        proxy.refuse()
        proxy.cut()
        chat.send("Hello?")
        chat.wait_for_status("error")
        assert chat.turns == ["Hello?"]
        proxy.heal()
        expect(chat.page.locator("input")).to_have_value("Hello?", timeout=TIMEOUT)
        chat.wait_for_turns()
        chat.press("Send")
        chat.wait_for_turns("Hello?", "You asked: Hello?")
    finally:
        proxy.close()


def test_answer_that_ends_during_a_page_load(url, open_chat):
    """It ends after the page has got the messages, and before `useChat` asks for the running answer."""
    prompt = "count late 20 0.05"
    chat = open_chat(url)
    chat.send(prompt)
    chat.wait_for_text("late-2 ")

    def wait_for_end(route):
        until(lambda: json.load(urlopen(f"{url}/api/chat/{chat.id}", timeout=20))["activeStreamId"] is None)
        route.continue_()

    chat.page.route("**/stream", wait_for_end)
    chat.reload()
    chat.wait_for_turns(prompt, count(prompt))
