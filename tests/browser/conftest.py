"""Fixtures for the tests of the chat: Chromium, a database, and demo servers."""

from __future__ import annotations

import pytest
from support import servers, usechat
from support.browser import FRAMEWORKS, ChatPage, Demo, chromium
from support.usechat import UseChatPage

from aibind_postgres import PostgresConversationStore


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
    with servers.own_database(server, "template0") as dsn:  # the demo creates the tables
        yield dsn


@pytest.fixture(scope="module", params=FRAMEWORKS)
def demo(request, web_database):
    with Demo(request.param, web_database) as demo:
        yield demo


@pytest.fixture(scope="module")
def fast_demo(web_database):
    """A demo whose answers are complete at once, for tests of the page that need no framework in particular."""
    with Demo("fastapi", web_database, delay=0) as demo:
        yield demo


@pytest.fixture(scope="module")
def slow_demo(web_database):
    """A demo whose answers never end during a test."""
    with Demo("fastapi", web_database, delay=0.5) as demo:
        yield demo


@pytest.fixture
def chat(fast_demo, context):
    chat = ChatPage(context, fast_demo.url)
    yield chat
    assert chat.errors == []


@pytest.fixture
def stored(web_database):
    """Return the stored messages of a tab's conversation."""

    def stored(chat):
        with PostgresConversationStore(web_database) as store:
            return [message["content"] for message in store.load(chat.session_id).messages]

    return stored


@pytest.fixture(scope="module")
def chats(server, template):
    """A database with the whole schema."""
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the folder of the page that is built with the packages of a version."""
    folder = tmp_path_factory.mktemp("usechat")
    built = {}

    def page(packages):
        if packages not in built:
            built[packages] = usechat.build(packages, folder / packages)
        return built[packages]

    return page


@pytest.fixture
def open_chat(context):
    """Open a tab. The scripts of all tabs must end without an error."""
    opened = []

    def open_chat(url):
        opened.append(UseChatPage(context, url))
        return opened[-1]

    yield open_chat
    assert [chat.errors for chat in opened] == [[]] * len(opened)
