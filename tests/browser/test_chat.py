"""The chat of the examples in a real browser: what people do to an answer while it is written."""

from __future__ import annotations

import pytest
from support import servers
from support.browser import CHROMIUM, Chat, Demo, chromium
from support.concurrency import until
from support.proxy import Proxy

from aibind_postgres import PostgresConversationStore, PostgresStreamStore

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

FRAMEWORKS = ["fastapi", "flask", "django"]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture(scope="module")
def web_database(server):
    with servers.own_database(server, "template0") as dsn:  # without tables: the chat makes them
        yield dsn


@pytest.fixture(scope="module", params=FRAMEWORKS)
def demo(request, web_database):
    with Demo(request.param, web_database) as demo:
        yield demo


@pytest.fixture
def stored(web_database):
    """Return what is stored of a tab's conversation."""

    def stored(chat):
        with PostgresConversationStore(web_database) as store:
            return [message["content"] for message in store.load(chat.session).messages]

    return stored


def test_an_answer_survives_a_reload_and_is_seen_in_a_second_tab(demo, context, stored):
    chat = Chat(context, demo.url)
    chat.say("What is a durable stream?")
    chat.sees("no language model")
    chat.page.reload()
    chat.sees("no language model")
    second = Chat(context, chat.url)
    second.sees("rude")
    for tab in (chat, second):
        tab.rests()
    [question, answer] = chat.turns
    assert question == "What is a durable stream?"
    assert answer.startswith("You wrote: “What is a durable stream?”")
    assert answer.endswith("✦")
    assert second.turns == stored(chat) == [question, answer]
    assert chat.faults == second.faults == []


def test_a_tab_that_was_there_before_sees_what_another_asks(demo, context):
    chat = Chat(context, demo.url)
    second = Chat(context, chat.url)
    chat.say("Who is there?")
    second.sees("You wrote: “Who is there?”")
    second.press("Stop")
    for tab in (chat, second):
        tab.notes("Stopped.")
        tab.rests()
    assert chat.turns == second.turns


def test_what_was_said_until_it_was_stopped_is_kept(demo, context, stored):
    chat = Chat(context, demo.url)
    chat.say("Stop soon")
    chat.sees("no language model")
    chat.press("Stop")
    chat.notes("Stopped.")
    chat.rests()
    [question, answer] = chat.turns
    assert question == "Stop soon"
    assert "no language model" in answer
    assert not answer.endswith("✦")
    assert stored(chat) == [question, answer]
    chat.page.reload()
    chat.rests()
    assert chat.turns == [question, answer]


def test_the_branches_of_a_conversation(demo, context, stored):
    chat = Chat(context, demo.url)

    def turn(text=None):
        if text is not None:
            chat.say(text)
        chat.sees("You wrote")
        chat.press("Stop")
        chat.rests()

    turn("first")
    turn("second")
    chat.press("Edit", last=False)
    assert chat.page.input_value("#prompt") == "first"
    turn("first, edited")
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["first, edited"]
    chat.press("Try again")
    turn()
    assert chat.page.locator("footer", has_text="3 / 3").count() == 1
    chat.press("Previous alternative")
    chat.page.locator("footer", has_text="2 / 3").wait_for()
    chat.press("Previous alternative")
    chat.page.locator("footer", has_text="1 / 3").wait_for()
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["first", "second"]
    assert stored(chat) == chat.turns
    assert chat.faults == []


def test_what_is_asked_twice_at_once_is_asked_once(demo, context, stored):
    chat = Chat(context, demo.url)
    chat.say("once")
    chat.sees("You wrote")
    chat.press("Stop")
    chat.rests()
    posts = []
    chat.page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    chat.page.get_by_role("button", name="Try again").dblclick()
    chat.sees("You wrote")
    chat.press("Stop")
    chat.rests()
    assert [url.rpartition("/")[2] for url in posts if "__aibind__" in url] == ["stream", "stop"]
    assert chat.page.locator("footer", has_text="2 / 2").count() == 1
    assert chat.faults == []


def test_what_could_not_be_sent_stays_where_it_was(demo, context, stored):
    chat = Chat(context, demo.url)
    chat.say("kept")
    chat.sees("You wrote")
    chat.press("Stop")
    chat.rests()
    before = chat.turns
    chat.page.route("**/__aibind__/stream", lambda route: route.abort())
    chat.press("Edit")
    chat.say("not lost")
    chat.notes("That failed")
    assert chat.page.input_value("#prompt") == "not lost"
    chat.rests()
    assert chat.turns == before == stored(chat)
    chat.page.unroute("**/__aibind__/stream")
    chat.page.press("#prompt", "Enter")
    chat.sees("You wrote: “not lost”")
    chat.press("Stop")
    chat.rests()
    assert chat.page.locator("footer", has_text="2 / 2").count() == 1
    chat.press("Edit")
    chat.press("Cancel")
    assert chat.page.input_value("#prompt") == ""
    chat.say("behind it")
    chat.sees("You wrote: “behind it”")
    chat.press("Stop")
    chat.rests()
    assert [turn for turn in chat.turns if not turn.startswith("You wrote")] == ["not lost", "behind it"]
    assert chat.faults == []


def test_without_a_place_to_keep_anything_it_still_chats(demo, context):
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    chat = Chat(context, demo.url)
    chat.say("hi")
    chat.sees("You wrote: “hi”")
    chat.press("Stop")
    chat.rests()
    assert chat.turns[0] == "hi"
    assert chat.faults == []


def test_a_new_chat_is_empty(demo, context):
    chat = Chat(context, demo.url)
    chat.say("hi")
    chat.sees("You wrote")
    before = chat.session
    chat.press("New chat")
    chat.page.wait_for_function("before => location.hash.length > 1 && location.hash !== before", arg=f"#{before}")
    chat.rests(empty=True)
    assert chat.turns == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_reader_is_told_of_the_end_of_a_server_that_was_killed(framework, web_database, context):
    with Demo(framework, web_database) as demo, PostgresStreamStore(web_database) as store:
        chat = Chat(context, demo.url)
        chat.say("Will you live?")
        chat.sees("no language model")
        demo.kill()
        chat.notes("The connection is lost.")
        demo.start()
        until(lambda: chat.stream in store.fail_abandoned(1))
        chat.notes("It broke off: abandoned")
        written = "".join(chunk.data.lstrip("\x01") for chunk in store.read_from(chat.stream))
        chat.rests()
        assert chat.turns == ["Will you live?", written]
        assert "no language model" in written
        chat.page.reload()
        chat.rests()
        assert chat.turns == ["Will you live?", written]
        chat.press("Try again")
        chat.sees("no language model")
        chat.press("Stop")
        chat.rests()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_server_that_is_told_to_end_keeps_what_was_said(framework, web_database, context, stored):
    with Demo(framework, web_database, delay=0.2) as demo:
        chat = Chat(context, demo.url)
        chat.say("Goodbye")
        chat.sees("no language model")
        assert demo.terminate() in (143, -15)
        demo.start()
        chat.notes("It broke off: the answer broke off")
        chat.rests()
        [question, answer] = stored(chat)
        assert chat.turns == [question, answer]
        assert question == "Goodbye"
        assert "no language model" in answer


def test_a_reader_whose_server_is_gone_goes_on_at_another_while_the_answer_is_written(web_database, context, stored):
    with Demo("fastapi", web_database, delay=0.05) as producer, Demo("fastapi", web_database) as survivor:
        proxy = Proxy(f"host=127.0.0.1 port={producer.port}")
        try:
            chat = Chat(context, f"http://127.0.0.1:{proxy.port}/")
            chat.say("Go on without me")
            chat.sees("no language model")
            proxy.refuse()
            proxy.cut()
            chat.notes("The connection is lost.")
            proxy.redirect(f"host=127.0.0.1 port={survivor.port}")
            proxy.heal()
            chat.rests()
            [question, answer] = chat.turns
            assert answer.endswith("✦")
            assert stored(chat) == [question, answer]
        finally:
            proxy.close()
