"""The applications of `examples/usechat` with the AI SDK 7 in Chromium: frameworks, reloads and killed workers."""

from __future__ import annotations

import random
import time

import pytest
from playwright.sync_api import expect
from support import usechat
from support.browser import CHROMIUM
from support.proxy import Proxy
from support.usechat import TIMEOUT
from support.usechat_apps import count

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

ANSWERS, TABS, RELOADS = 20, 2, 10  # each tab shows one answer at a time


@pytest.fixture(scope="module", params=usechat.SERVERS)
def example(request, chats, pages):
    """The address of an application of the example."""
    with usechat.example(request.param, pages("ai7"), chats) as url:
        yield url


def test_example_streams_and_survives_reloads(example, open_chat):
    prompt = " ".join(f"word-{number}" for number in range(30))
    answer = f"You asked: {prompt} "
    chat = open_chat(example)
    chat.send(prompt)
    chat.wait_for_text("word-5 ")
    assert answer.startswith(chat.answer)
    chat.reload()
    chat.wait_for_text("word-10 ")
    assert answer.startswith(chat.answer)
    second = open_chat(chat.url)
    for tab in (chat, second):
        tab.wait_for_turns(prompt, answer)
    chat.reload()
    chat.wait_for_turns(prompt, answer)


def test_example_stops_in_all_tabs(example, open_chat):
    prompt = " ".join(f"word-{number}" for number in range(200))
    chat = open_chat(example)
    chat.send(prompt)
    chat.wait_for_text("word-3 ")
    second = open_chat(chat.url)
    second.wait_for_text("word-6 ")
    second.press("Stop")
    for tab in (chat, second):
        tab.wait_for_status("ready")
    assert "word-6 " in chat.answer
    assert f"You asked: {prompt}".startswith(chat.answer)
    assert second.turns == chat.turns
    stopped = chat.turns
    chat.reload()
    chat.wait_for_turns(*stopped)
    # The chat goes on.
    chat.ask("Next?", "You asked: Next? ")


def test_lost_connection_is_resumed_without_code_of_the_page(tmp_path, chats, open_chat):
    """Version 7 resumes by itself when the user looks at the page again."""
    page = usechat.build("ai7", tmp_path / "page", leave_out="onFinish:")
    prompt = "count alone 60 0.05"
    with usechat.application("ai7", page, chats) as url:
        proxy = Proxy(f"host=127.0.0.1 port={url.rpartition(':')[2]}")
        try:
            chat = open_chat(f"http://127.0.0.1:{proxy.port}")
            chat.send(prompt)
            chat.wait_for_text("alone-5 ")
            proxy.cut()
            chat.wait_for_status("error")
            chat.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
            chat.wait_for_turns(prompt, count(prompt))
        finally:
            proxy.close()


def test_killed_worker(pages, chats, open_chat):
    """The end of the answer is known when its lease has expired, without a reload."""
    prompt = "count killed 2000 0.05"
    with usechat.application("ai7", pages("ai7"), chats, LEASE="3") as survivor:
        with usechat.application_process("ai7", pages("ai7"), chats, LEASE="3") as (url, process):
            chat = open_chat(url)
            chat.send(prompt)
            chat.wait_for_text("killed-5 ")
            second = open_chat(chat.url.replace(url, survivor))
            second.wait_for_text("killed-7 ")
            process.kill()
            chat.wait_for_status("error")
        expect(second.page.get_by_role("alert")).to_be_visible(timeout=TIMEOUT)
        [_, answer] = second.turns
        assert count(prompt).startswith(answer)
        assert "killed-7 " in answer
        second.reload()
        second.wait_for_turns(prompt, answer)
        second.ask("Next?", "You asked: Next?")


def test_no_text_is_lost_or_doubled_by_reloads(pages, chats, open_chat, long):
    seed = time.time_ns()
    print(f"the seed of the moments is {seed}")
    moments = random.Random(seed)
    with usechat.application("ai7", pages("ai7"), chats) as url:
        for first in range(0, ANSWERS if long else TABS, TABS):
            tabs = {f"count tab{number} 120 0.05": open_chat(url) for number in range(first, first + TABS)}
            for prompt, tab in tabs.items():
                tab.send(prompt)
                tab.wait_for_text(prompt.split()[1])
            for _ in range(RELOADS):
                for prompt, tab in tabs.items():
                    time.sleep(moments.uniform(0, 0.2))
                    assert count(prompt).startswith(tab.answer)
                    tab.page.reload(wait_until="commit")
            for prompt, tab in tabs.items():
                tab.wait_for_turns(prompt, count(prompt))
                tab.page.close()
