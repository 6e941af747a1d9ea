"""The applications with users in `examples/`, each on its server. None has a table of its own."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlencode

import psycopg
import pytest
from support.applications import EXAMPLES, Browser, environment_of, serving, text_of, wait_for_text

GUNICORN = "gunicorn --chdir=examples --workers=2 --threads=20 --bind=127.0.0.1:{port} "
UVICORN = "uvicorn --app-dir=examples --workers=2 --port={port} "
SECRET = "only for tests"
PASSWORDS = {"ann": "apple", "bob": "banana"}
LONG = "word " * 30  # its answer takes some seconds

APPLICATIONS = ["flask_login.py", "fastapi_list.py", "django_login.py", "worker.py", "replay_stream.py"]
USECHAT = ["usechat/fastapi_app.py", "usechat/flask_app.py", "usechat/django_app.py"]  # run by tests/browser
TABLES = {"aibind_stream_chunks", "aibind_stream_chunks_archive", "aibind_stream_status", "aibind_conversations"}


class Application(NamedTuple):
    """A running application.

    Attributes:
        url: Its address.
        log_in: Logs a user in and returns the user's browser.
    """

    url: str
    log_in: Callable[[str], Browser]


@contextmanager
def flask(dsn: str) -> Iterator[Application]:
    with serving(GUNICORN + "flask_login:app", dsn, SECRET_KEY=SECRET) as url:

        def log_in(name: str) -> Browser:
            browser = Browser(url)
            assert browser.status("POST", "/session", {"name": name, "password": PASSWORDS[name]}) == 204
            return browser

        yield Application(url, log_in)


@contextmanager
def fastapi(dsn: str) -> Iterator[Application]:
    tokens = {hashlib.sha256(f"token of {name}".encode()).hexdigest(): name for name in PASSWORDS}
    with serving(UVICORN + "fastapi_list:app", dsn, TOKENS=json.dumps(tokens)) as url:
        yield Application(url, lambda name: Browser(url, Authorization=f"Bearer token of {name}"))


@contextmanager
def django(dsn: str) -> Iterator[Application]:
    def manage(*command: str, **variables: str) -> None:
        environment = environment_of(dsn, SECRET_KEY=SECRET, **variables)
        command = (sys.executable, str(EXAMPLES / "django_login.py"), *command)
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)

    manage("migrate")
    for name, password in PASSWORDS.items():
        details = {"DJANGO_SUPERUSER_USERNAME": name, "DJANGO_SUPERUSER_PASSWORD": password}
        manage("createsuperuser", "--noinput", f"--email={name}@example.com", **details)
    with serving(GUNICORN + "django_login:application", dsn, SECRET_KEY=SECRET) as url:

        def log_in(name: str) -> Browser:
            browser = Browser(url)
            with browser.open("GET", "/session") as response:
                token = response.read().decode()
            form = urlencode({"username": name, "password": PASSWORDS[name]}).encode()
            with browser.open("POST", "/session", form, **{"X-CSRFToken": token}) as response:
                browser.headers["X-CSRFToken"] = response.read().decode()
            return browser

        yield Application(url, log_in)


FRAMEWORKS = {"flask": flask, "fastapi": fastapi, "django": django}


@pytest.fixture(params=FRAMEWORKS)
def application(request: pytest.FixtureRequest, database: str) -> Iterator[Application]:
    with FRAMEWORKS[request.param](database) as application:
        yield application


def tables_of(database: str) -> set[str]:
    with psycopg.connect(database) as connection:
        return {name for (name,) in connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def test_users_have_access_to_their_own_answers_only(application: Application, database: str) -> None:
    ann, bob, nobody = application.log_in("ann"), application.log_in("bob"), Browser(application.url)
    with ann.ask("Hello", "chat of ann") as response:
        stream_id = response.headers["X-Stream-Id"]
        assert text_of(response).endswith("ou asked: Hello ")
    assert [chat["id"] for chat in ann.conversations()] == ["chat of ann"]
    assert bob.conversations() == []
    conversation = "/__aibind__/conversations/chat%20of%20ann"
    requests = [
        ("GET", f"/__aibind__/stream/resume?id={stream_id}", None),
        ("POST", "/__aibind__/stream/stop", {"id": stream_id}),
        ("POST", "/__aibind__/stream", {"prompt": "Hello", "sessionId": "chat of ann"}),
        ("GET", conversation, None),
        ("PATCH", conversation, {"title": "Mine"}),
        ("DELETE", conversation, None),
    ]
    assert [bob.status(*request) for request in requests] == [404] * len(requests)
    requests += [("GET", "/__aibind__/conversations", None), ("POST", "/__aibind__/stream", {"prompt": "Hello"})]
    assert [nobody.status(*request) for request in requests] == [401] * len(requests)
    assert text_of(ann.resume(stream_id)).endswith("ou asked: Hello ")
    assert ann.status("DELETE", conversation) == 200
    assert ann.conversations() == []
    own = {name for name in tables_of(database) if not name.startswith(("auth_", "django_"))}
    assert own == TABLES


@pytest.mark.parametrize("framework", ["flask", "fastapi"])
def test_lists_have_titles_and_running_answers(framework: str, database: str) -> None:
    with FRAMEWORKS[framework](database) as application:
        ann, bob = application.log_in("ann"), application.log_in("bob")
        text_of(ann.ask("Name a colour.", "first"))
        with ann.ask(LONG, "second") as response:
            running = response.headers["X-Stream-Id"]
            wait_for_text(response)  # before it, the application sets the title
            for _ in range(4):  # in any of the workers
                chats = [(chat["id"], chat["title"], chat["activeStreamId"]) for chat in ann.conversations()]
                assert chats == [("second", LONG[:60], running), ("first", "Name a colour.", None)]
                assert bob.status("GET", f"/__aibind__/stream/resume?id={running}") == 404
        assert text_of(ann.resume(running)) == f"ann, you asked: {LONG}"
        [second, _] = ann.conversations()
        assert second["activeStreamId"] is None


def test_maximum_of_running_answers(database: str) -> None:
    with fastapi(database) as application:
        ann, bob = application.log_in("ann"), application.log_in("bob")
        with ann.ask(LONG, "first"), ann.ask(LONG, "second"):
            assert ann.status("POST", "/__aibind__/stream", {"prompt": "Hello", "sessionId": "third"}) == 429
            text_of(bob.ask("Hello", "chat of bob"))
        assert {chat["id"] for chat in ann.conversations()} == {"first", "second"}


def test_login_and_logout_in_flask(database: str) -> None:
    with flask(database) as application:
        browser = Browser(application.url)
        for body in ({"name": "ann", "password": "banana"}, {"name": "eve", "password": "apple"}, {}):
            assert browser.status("POST", "/session", body) == 401
        form = {"Content-Type": "application/x-www-form-urlencoded"}  # the only type that other sites can send
        assert browser.status("POST", "/session", b"name=ann&password=apple", **form) == 415
        ann = application.log_in("ann")
        assert ann.conversations() == []
        assert ann.status("DELETE", "/session") == 204
        assert ann.status("GET", "/__aibind__/conversations") == 401


def test_tokens_in_fastapi(database: str) -> None:
    with fastapi(database) as application:
        for header in ("Bearer token of eve", "Bearer ", "Basic YW5uOmFwcGxl"):
            stranger = Browser(application.url, Authorization=header)
            assert stranger.status("GET", "/__aibind__/conversations") == 401


def test_login_and_logout_in_django(database: str) -> None:
    with django(database) as application:
        browser = Browser(application.url)
        form = urlencode({"username": "ann", "password": "banana"}).encode()
        assert browser.status("POST", "/session", form) == 403  # without the CSRF token
        with browser.open("GET", "/session") as response:
            browser.headers["X-CSRFToken"] = response.read().decode()
        assert browser.status("POST", "/session", form) == 401
        ann = application.log_in("ann")
        assert ann.conversations() == []
        assert ann.status("DELETE", "/session") == 200
        assert ann.status("GET", "/__aibind__/conversations") == 401


@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications_are_short(name: str) -> None:
    lines = (EXAMPLES / name).read_text("utf-8").splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", USECHAT)
def test_applications_for_usechat_need_few_lines_of_their_own(name: str) -> None:
    """All other lines are those of the framework, of the model and of the page."""
    _, _, code = (EXAMPLES / name).read_text("utf-8").partition('"""\n\n')
    own = r"^.*(?:aibind|AiSdk|store|conversations|blueprint\(|router\(|chat_patterns\().*$"
    assert 5 < len(re.findall(own, code, re.MULTILINE)) <= 7
