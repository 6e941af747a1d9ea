"""The chat examples in Chromium: reloads, several tabs, branches, and servers that stop or die."""

from __future__ import annotations

import pytest
from support.browser import CHROMIUM, FRAMEWORKS, ChatPage, Demo
from support.concurrency import until
from support.proxy import Proxy

from aibind_postgres import PostgresStreamStore

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def test_reload_and_second_tab_during_an_answer(demo, context, stored):
    chat = ChatPage(context, demo.url)
    chat.send("What is a durable stream?")
    chat.wait_for_answer("no language model")
    chat.page.reload()
    chat.wait_for_answer("no language model")
    second = ChatPage(context, chat.url)
    second.wait_for_answer("interrupt")
    for tab in (chat, second):
        tab.wait_until_idle()
    [question, answer] = chat.turns
    assert question == "What is a durable stream?"
    assert answer.startswith("You wrote: “What is a durable stream?”")
    assert answer.endswith("✦")
    assert second.turns == stored(chat) == [question, answer]
    assert chat.errors == second.errors == []


def test_prompt_appears_in_other_open_tab(demo, context):
    chat = ChatPage(context, demo.url)
    second = ChatPage(context, chat.url)
    chat.send("Who is there?")
    second.wait_for_answer("You wrote: “Who is there?”")
    second.press("Stop")
    for tab in (chat, second):
        tab.wait_for_note("Stopped.")
        tab.wait_until_idle()
    assert chat.turns == second.turns


def test_other_browser_with_the_same_cookie_follows_the_answer(slow_demo, browser, context):
    chat = ChatPage(context, slow_demo.url)
    chat.send("Who follows?")
    chat.wait_for_answer("You")
    with_cookie = browser.new_context(storage_state={"cookies": context.cookies()})
    second = ChatPage(with_cookie, slow_demo.url)
    second.page.locator("#conversations a").click()  # it has no title yet
    second.wait_for_answer("You wrote")
    assert second.turns[0] == "Who follows?"
    assert second.page.get_by_role("button", name="Stop", exact=True).is_visible()
    second.press("Stop")
    for tab in (chat, second):
        tab.wait_for_note("Stopped.")
        tab.wait_until_idle()
        tab.wait_for_titles("Who follows?")
    assert chat.turns == second.turns
    assert chat.errors == second.errors == []
    with_cookie.close()


def test_question_without_an_answer_can_be_asked_again(web_database, context, stored):
    with Demo("fastapi", web_database, delay=60) as demo:  # the first text takes longer than the test
        chat = ChatPage(context, demo.url)
        chat.send("Too early")
        for _ in range(2):
            chat.press("Stop")
            chat.wait_for_note("Stopped.")
            chat.wait_until_idle()
            assert chat.turns == stored(chat) == ["Too early"]
            assert chat.page.locator(".user footer", has_text="No answer").count() == 1
            chat.page.reload()
            chat.wait_until_idle()
            assert chat.turns == ["Too early"]
            chat.press("Try again")
        chat.press("Stop")
        chat.wait_until_idle()
        chat.send("Now?")
        chat.press("Stop")
        chat.wait_until_idle()
        assert chat.turns == ["Now?"]  # an alternative, since two questions never follow each other
        assert chat.page.locator(".user footer", has_text="2 / 2").count() == 1
        assert chat.errors == []


def test_stopped_answer_keeps_its_text(demo, context, stored):
    chat = ChatPage(context, demo.url)
    chat.send("Stop soon")
    chat.wait_for_answer("no language model")
    chat.press("Stop")
    chat.wait_for_note("Stopped.")
    chat.wait_until_idle()
    [question, answer] = chat.turns
    assert question == "Stop soon"
    assert "no language model" in answer
    assert not answer.endswith("✦")
    assert stored(chat) == [question, answer]
    chat.page.reload()
    chat.wait_until_idle()
    assert chat.turns == [question, answer]


def test_conversation_branches(demo, context, stored):
    chat = ChatPage(context, demo.url)

    def turn(text=None):
        if text is not None:
            chat.send(text)
        chat.wait_for_answer("You wrote" if text is not None else "another answer")
        chat.press("Stop")
        chat.wait_until_idle()

    turn("first")
    turn("second")
    chat.press("Edit", last=False)
    assert chat.page.input_value("#prompt") == "first"
    turn("first, edited")
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["first, edited"]
    first_answer = chat.turns[-1]
    chat.press("Try again")
    turn()
    [question, second_answer] = chat.turns
    assert (question, second_answer == first_answer) == ("first, edited", False)
    assert stored(chat) == chat.turns
    # Both the question and its answer have an alternative.
    assert chat.page.locator(".user footer", has_text="2 / 2").count() == 1
    assert chat.page.locator(".assistant footer", has_text="2 / 2").count() == 1
    chat.press("Previous alternative")
    chat.page.locator(".assistant footer", has_text="1 / 2").wait_for()
    assert chat.turns == [question, first_answer]
    chat.press("Previous alternative", last=False)
    chat.page.locator(".user footer", has_text="1 / 2").wait_for()
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["first", "second"]
    assert stored(chat) == chat.turns
    assert chat.errors == []


def test_double_click_sends_one_prompt(demo, context, stored):
    chat = ChatPage(context, demo.url)
    chat.send("once")
    chat.wait_for_answer("You wrote")
    chat.press("Stop")
    chat.wait_until_idle()
    chat.wait_for_titles("once")
    posts = []
    chat.page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    chat.page.get_by_role("button", name="Try again").dblclick()
    chat.wait_for_answer("You wrote")
    chat.press("Stop")
    chat.wait_until_idle()
    assert [url.partition("__aibind__/")[2] for url in posts] == ["stream", "stream/stop"]
    assert chat.page.locator(".assistant footer", has_text="2 / 2").count() == 1
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["once"]
    assert chat.errors == []


def test_reload_while_another_answer_is_written(demo, context, stored):
    chat = ChatPage(context, demo.url)
    chat.send("Twice")
    chat.wait_for_answer("You wrote")
    chat.press("Stop")
    chat.wait_until_idle()
    chat.press("Try again")
    chat.wait_for_answer("another answer")
    chat.page.reload()
    chat.wait_for_answer("no language model")
    assert len(chat.turns) == 2
    chat.press("Stop")
    chat.wait_for_note("Stopped.")
    chat.wait_until_idle()
    assert chat.page.locator(".assistant footer", has_text="2 / 2").count() == 1
    assert stored(chat) == chat.turns
    assert chat.errors == []


def test_failed_send_keeps_prompt_and_turns(demo, context, stored):
    chat = ChatPage(context, demo.url)
    chat.send("kept")
    chat.wait_for_answer("You wrote")
    chat.press("Stop")
    chat.wait_until_idle()
    before = chat.turns
    chat.page.route("**/__aibind__/stream", lambda route: route.abort())
    chat.press("Edit")
    chat.send("not lost")
    chat.wait_for_note("That failed")
    assert chat.page.input_value("#prompt") == "not lost"
    chat.wait_until_idle()
    assert chat.turns == before == stored(chat)
    chat.page.unroute("**/__aibind__/stream")
    chat.page.press("#prompt", "Enter")
    chat.wait_for_answer("You wrote: “not lost”")
    chat.press("Stop")
    chat.wait_until_idle()
    assert chat.page.locator("footer", has_text="2 / 2").count() == 1
    chat.press("Edit")
    chat.press("Cancel")
    assert chat.page.input_value("#prompt") == ""
    chat.send("behind it")
    chat.wait_for_answer("You wrote: “behind it”")
    chat.press("Stop")
    chat.wait_until_idle()
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["not lost", "behind it"]
    assert chat.errors == []


def test_page_runs_its_own_script_alone(demo, context):
    chat = ChatPage(context, demo.url)
    chat.wait_until_idle(empty=True)
    assert chat.errors == []
    headers = chat.page.request.get(demo.url).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in headers["content-security-policy"]
    chat.page.evaluate(
        """() => {
            const attacks = [
                () => {
                    const inserted = document.createElement("script");
                    inserted.textContent = "window.attacked = true";
                    document.body.append(inserted);
                },
                () => document.body.insertAdjacentHTML("beforeend", "<button onclick='window.attacked = true'>"),
                () => { document.body.innerHTML = "<img src=x onerror='window.attacked = true'>"; },
            ];
            for (const attack of attacks) {
                try { attack(); } catch (error) { console.error("Content Security Policy", error); }
            }
        }"""
    )
    until(lambda: len(chat.errors) >= 3 or chat.page.evaluate("() => window.attacked"))
    assert chat.page.evaluate("() => window.attacked") is None
    assert chat.page.locator("#prompt").count() == 1


def test_chat_without_local_storage(demo, context):
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    chat = ChatPage(context, demo.url)
    chat.send("hi")
    chat.wait_for_answer("You wrote: “hi”")
    chat.press("Stop")
    chat.wait_until_idle()
    assert chat.turns[0] == "hi"
    assert chat.errors == []


def test_new_chat_is_empty(demo, context):
    chat = ChatPage(context, demo.url)
    chat.send("hi")
    chat.wait_for_answer("You wrote")
    before = chat.session_id
    chat.press("New chat")
    chat.page.wait_for_function("before => location.hash.length > 1 && location.hash !== before", arg=f"#{before}")
    chat.wait_until_idle(empty=True)
    assert chat.turns == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_page_reports_a_killed_server(framework, web_database, context, stored):
    with Demo(framework, web_database) as demo, PostgresStreamStore(web_database) as store:
        chat = ChatPage(context, demo.url)
        chat.send("Will you live?")
        chat.wait_for_answer("no language model")
        stream = chat.stream_id
        demo.kill()
        chat.wait_for_note("The connection is lost.")
        assert stored(chat) == ["Will you live?"]
        demo.start()
        second = ChatPage(context, chat.url)  # shows the question, and waits for the end of the lease
        second.wait_for_answer("no language model")
        for tab in (chat, second):
            tab.wait_for_note("The answer is incomplete: abandoned", timeout=60)
            tab.wait_until_idle()
        written = "".join(data for _, event, data in store.events(stream) if event == "message")
        assert "no language model" in written
        assert chat.turns == second.turns == stored(chat) == ["Will you live?", written]
        chat.page.reload()
        chat.wait_until_idle()
        assert chat.turns == ["Will you live?", written]
        assert chat.page.locator(".assistant footer", has_text="Incomplete").count() == 1
        chat.press("Try again")
        chat.wait_for_answer("another answer")
        chat.press("Stop")
        chat.wait_until_idle()
        assert chat.errors == second.errors == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_terminated_server_saves_the_answer(framework, web_database, context, stored):
    with Demo(framework, web_database, delay=0.2) as demo:
        chat = ChatPage(context, demo.url)
        chat.send("Goodbye")
        chat.wait_for_answer("no language model")
        assert demo.terminate() in (143, -15)
        demo.start()
        chat.wait_for_note("The answer is incomplete: the answer was interrupted")
        chat.wait_until_idle()
        [question, answer] = stored(chat)
        assert chat.turns == [question, answer]
        assert question == "Goodbye"
        assert "no language model" in answer


def test_page_continues_an_answer_on_another_server(web_database, context, stored):
    with Demo("fastapi", web_database, delay=0.05) as producer, Demo("fastapi", web_database) as survivor:
        proxy = Proxy(f"host=127.0.0.1 port={producer.port}")
        try:
            chat = ChatPage(context, f"http://127.0.0.1:{proxy.port}/")
            chat.send("Go on without me")
            chat.wait_for_answer("no language model")
            proxy.refuse()
            proxy.cut()
            chat.wait_for_note("The connection is lost.")
            proxy.redirect(f"host=127.0.0.1 port={survivor.port}")
            proxy.heal()
            chat.wait_until_idle()
            [question, answer] = chat.turns
            assert answer.endswith("✦")
            assert stored(chat) == [question, answer]
        finally:
            proxy.close()
