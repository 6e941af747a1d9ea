"""The web frameworks, on the servers that people use, each with two worker processes."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from support import servers, webapps
from support.webapps import SERVERS, events

from aibind_postgres import PostgresStreamStore
from aibind_postgres.sse import ServerSentEvent

DONE = ServerSentEvent("", "done")


@pytest.fixture(scope="module")
def web_database(server, template):
    with servers.own_database(server, template) as dsn:
        yield dsn


@pytest.fixture(scope="module", params=SERVERS)
def client(request, web_database):
    with webapps.running(request.param, web_database) as client:
        yield client


@pytest.fixture
def store(web_database):
    with PostgresStreamStore(web_database) as store:
        yield store


def test_an_answer_is_streamed_and_resumed_at_every_number(client):
    response = client.post("/stream", {"prompt": "to be or not to be 😀"})
    assert response.status == 200
    assert response.getheader("Content-Type").startswith("text/event-stream")
    assert response.getheader("Cache-Control") == "no-cache"
    assert response.getheader("Access-Control-Expose-Headers") == "X-Stream-Id"
    id = response.getheader("X-Stream-Id")
    [first, *told, done] = events(response)
    assert first == ServerSentEvent(id, "stream-id", id)
    assert "".join(event.data for event in told if event.event == "message") == "to be or not to be 😀 "
    assert [event.event for event in told].count("usage") == 1
    assert [event.id for event in told] == [f"{number}" for number in range(1, 9)]
    assert done == DONE
    for after in range(9):
        for headers in ({}, {"Last-Event-ID": f"{after}"}):
            assert list(events(client.resume(id, 0 if headers else after, headers))) == [*told[after:], DONE]


def test_an_answer_comes_as_it_is_made_and_stopping_in_another_process_ends_its_silence(client, store):
    reader = events(client.post("/stream", {"prompt": "silence"}))
    id = next(reader).data
    assert next(reader).data == "one"
    assert store.get_status(id).state == "active"
    assert json.loads(client.post("/stream/stop", {"id": id}).read()) == {"ok": True}
    assert list(reader) == [ServerSentEvent("", "stopped"), DONE]
    assert store.get_status(id) == ("stopped", None, 1)


def test_a_client_that_goes_away_leaves_the_answer_to_be_finished(client, store):
    response = client.post("/stream", {"prompt": "slowly one two three four"})
    with closing(response):
        id = response.getheader("X-Stream-Id")
        assert b"stream-id" in response.read1(65536)
    assert store.wait(id, 20) == ("done", None, 4)


def test_a_quiet_answer_shows_that_it_lives(client, store):
    response = client.post("/stream", {"prompt": "silence"})
    received = b""
    with closing(response):
        while received.count(b": ping\n\n") < 3:
            received += response.read1(65536)
        store.stop(response.getheader("X-Stream-Id"))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/stream", b"{}", {}, 400),
        ("POST", "/stream", b"{", {}, 400),
        ("POST", "/stream", b" " * 1_000_000, {}, 413),
        ("GET", "/stream", None, {}, 405),
        ("PUT", "/stream", b"{}", {}, 405),
        ("POST", "/nothing", b"{}", {}, 404),
        ("GET", "/stream/resume?id=nothing", None, {}, 404),
        ("GET", "/stream/resume?id=nothing", None, {"User": "stranger"}, 403),
        ("POST", "/stream/stop", b'{"id": "nothing"}', {"User": "stranger"}, 403),
    ],
)
def test_what_is_wrong_is_told(client, method, path, body, headers, status):
    response = client.request(method, path, body, headers)
    with closing(response):
        assert response.status == status
        assert list(json.loads(response.read())) == ["error"]


def test_texts(client):
    response = client.post("/complete", {"input": "once upon"})
    with closing(response):
        assert response.getheader("Content-Type") == "text/plain; charset=utf-8"
        assert response.read() == b"once upon "
