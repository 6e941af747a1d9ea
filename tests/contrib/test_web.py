"""The web frameworks, on the servers that people use, each with two worker processes."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import closing

import pytest
from support.webapps import events

from aibind_postgres.sse import EventParser, ServerSentEvent

DONE = ServerSentEvent("", "done")
BLUE = '{"colour": "blue"}'
USAGE = ("usage", '{"outputTokens": 3}')
CALL = ("tool_call", '{"name": "look", "args": {"where": "up"}}')

# The routes that stream: what is asked, where it is resumed, and the events of the answer.
ROUTES = {
    "stream": ({"prompt": "to be"}, "/stream", [("message", "to "), ("message", "be "), USAGE]),
    "structured": (
        {"prompt": "the sky", "schema": {"type": "object"}},
        "/structured",
        [("partial", "{}"), ("partial", '{"colour": "b"}'), ("partial", BLUE), ("data", BLUE), USAGE],
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "which colour?"}]},
        "/stream",
        [("message", "The sky "), CALL, CALL, ("message", "is "), ("message", "blue"), USAGE],
    ),
}


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


@pytest.mark.parametrize("route", ROUTES)
def test_events_come_once_also_to_a_client_that_breaks_off_after_any_of_them(client, route):
    asked, resumed, answered = ROUTES[route]
    told = [ServerSentEvent(data, event, f"{number}") for number, (event, data) in enumerate(answered, start=1)]
    for length in range(len(told) + 1):
        response = client.post(f"/{route}", asked)
        with closing(response):
            reader = events(response)
            id = next(reader).id
            received = [next(reader) for _ in range(length)]
        received += events(client.resume(id, received[-1].id if received else 0, path=resumed))
        assert received == [*told, DONE]


@pytest.mark.parametrize("route", ROUTES)
def test_events_come_once_to_a_client_that_breaks_off_after_each_of_them(client, route):
    asked, resumed, answered = ROUTES[route]
    response = client.post(f"/{route}", asked)
    received = []
    with closing(response):
        last = id = next(events(response)).id
    while DONE not in received:
        # As a browser's EventSource does it: there the id of the first event, too, is one to go on from.
        response = client.resume(id, 0, {"Last-Event-ID": last}, resumed)
        with closing(response):
            received.append(next(events(response)))
        last = received[-1].id
    assert [(event.event, event.data) for event in received] == [*answered, ("done", "")]
    assert [event.id for event in received[:-1]] == [f"{number}" for number in range(1, len(received))]


def test_an_answer_that_fails_says_so_and_nothing_of_the_exception(client, store):
    response = client.post("/stream", {"prompt": "fail"})
    id = response.getheader("X-Stream-Id")
    with closing(response):
        received = response.read()
    assert b"secret" not in received
    [_, *told] = EventParser().feed(received)
    error = ServerSentEvent("the answer broke off", "error")
    assert told == [ServerSentEvent("half ", id="1"), ServerSentEvent("way", id="2"), error, DONE]
    for after in range(3):
        assert list(events(client.resume(id, after))) == told[after:]
    assert store.get_status(id) == ("error", "the answer broke off", 2)


def test_an_answer_comes_as_it_is_made_and_can_be_stopped_in_its_silence(client, store):
    reader = events(client.post("/stream", {"prompt": "silence"}))
    id = next(reader).data
    assert next(reader).data == "one"
    assert store.get_status(id).state == "active"
    for _ in range(2):  # the second time there is nothing to stop any more
        assert json.loads(client.post("/stream/stop", {"id": id}).read()) == {"ok": True}
    assert list(reader) == [ServerSentEvent("", "stopped"), DONE]
    assert store.get_status(id) == ("stopped", None, 1)
    assert list(events(client.resume(id, 0))) == [ServerSentEvent("one", id="1"), ServerSentEvent("", "stopped"), DONE]


@pytest.mark.parametrize("path", ["/stream", "/structured"])
def test_a_stop_that_another_process_gets_closes_the_source(client, store, path):
    trace = store.create()
    reader = events(client.post("/stream", {"prompt": f"hold {trace}"}))
    id, producer = next(reader).data, next(reader).data
    answers = []
    while 200 not in answers:  # the process of the producer refuses it
        response = client.post(f"{path}/stop", {"id": id}, {"Not-In": producer})
        with closing(response):
            answers.append(response.status)
            assert json.loads(response.read()) in ({"error": "forbidden"}, {"ok": True})
    assert list(reader) == [ServerSentEvent("", "stopped"), DONE]
    assert store.wait(trace, 30).state == "done"
    assert [chunk.data for chunk in store.read_from(trace)] == [f"closed in {producer}"]


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
        ("GET", "/structured/resume?id=nothing", None, {}, 404),
        ("GET", "/stream/resume", None, {}, 400),
        ("POST", "/stream/stop", b'{"id": "nothing"}', {}, 404),
        ("POST", "/stream/stop", b"{}", {}, 400),
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


# Each is the head of a request and a piece of its body.
CUT_OFF = {
    "of a known length": b'Content-Length: 1000\r\n\r\n{"prompt": "to be',
    "in chunks": b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"prompt": "to be',
}


@pytest.mark.parametrize("piece", CUT_OFF.values(), ids=CUT_OFF)
@pytest.mark.parametrize("abruptly", [False, True])
def test_a_request_that_is_cut_off_is_no_fault_of_the_application(client, piece, abruptly):
    logged = len(client.read_log())
    for _ in range(10):
        with client.connect() as line:
            line.sendall(b"POST /__aibind__/stream HTTP/1.1\r\nHost: test\r\n" + piece)
            if abruptly:  # with a reset
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                line.shutdown(socket.SHUT_WR)
                with line.makefile("rb") as answer:
                    assert answer.readline().lower() in (b"", b"http/1.1 400 bad request\r\n")
    # Each process has others to answer, and so has seen what came before.
    for _ in range(20):
        assert client.post("/complete", {"input": "x"}).read() == b"x "
    assert "Traceback" not in client.read_log()[logged:]


def test_a_body_in_chunks_is_refused_where_it_gets_too_long(client):
    for size, status in ((9_000, 200), (12_000, 413)):
        text = b'{"input": "%s"}' % (b"x" * size)
        response = client.request("POST", "/complete", iter([text[:5000], text[5000:]]))
        with closing(response):
            # Django reads nothing under WSGI of which nobody tells the length.
            assert response.status == (400 if client.framework == "django, wsgi" else status)
            response.read()
    assert client.post("/complete", {"input": "x"}).read() == b"x "
