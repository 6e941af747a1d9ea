"""The web frameworks on gunicorn and uvicorn, each with two worker processes."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import closing
from http.client import IncompleteRead

import pytest
from support.webapps import REFUSED, SERVERS, events, running

from aibind_postgres.sse import EventParser, ServerSentEvent

DONE = ServerSentEvent("", "done")
BLUE = '{"colour": "blue"}'
USAGE = ("usage", '{"outputTokens": 3}')
CALL = ("tool_call", '{"name": "look", "args": {"where": "up"}}')

# The routes that stream: the request body, the path to resume at, and the events of the answer.
ROUTES = {
    "stream": ({"prompt": "to be"}, "/stream", [("message", "to "), ("message", "be "), USAGE]),
    "structured": (
        {"prompt": "the sky", "schema": {"type": "object"}},
        "/structured",
        [("partial", "{}"), ("partial", '{"colour": "b"}'), ("partial", BLUE), ("data", BLUE), USAGE],
    ),
    "chat": (
        {"messages": [{"role": "user", "content": "which colour?"}]},
        "/chat",
        [("message", "The sky "), CALL, CALL, ("message", "is "), ("message", "blue"), USAGE],
    ),
}


@pytest.fixture
def known_stream(store):
    store.acquire("known")


def test_stream_and_resume_at_every_number(client):
    response = client.post("/stream", {"prompt": "to be or not to be 😀"})
    assert response.status == 200
    assert response.getheader("Content-Type").startswith("text/event-stream")
    assert response.getheader("Cache-Control") == "no-cache, no-store, no-transform"
    assert response.getheader("Access-Control-Expose-Headers") == "X-Stream-Id"
    id = response.getheader("X-Stream-Id")
    [first, *stored, done] = events(response)
    assert first == ServerSentEvent(id, "stream-id", id)
    assert "".join(event.data for event in stored if event.event == "message") == "to be or not to be 😀 "
    assert [event.event for event in stored].count("usage") == 1
    assert [event.id for event in stored] == [f"{number}" for number in range(1, 9)]
    assert done == DONE
    for after in range(9):
        for headers in ({}, {"Last-Event-ID": f"{after}"}):
            assert list(events(client.resume(id, 0 if headers else after, headers))) == [*stored[after:], DONE]


@pytest.mark.parametrize("route", ROUTES)
def test_client_that_reconnects_once_gets_each_event_once(client, route):
    body, resume_path, answer = ROUTES[route]
    expected = [ServerSentEvent(data, event, f"{number}") for number, (event, data) in enumerate(answer, start=1)]
    for length in range(len(expected) + 1):
        response = client.post(f"/{route}", body)
        with closing(response):
            reader = events(response)
            id = next(reader).id
            received = [next(reader) for _ in range(length)]
        received += events(client.resume(id, received[-1].id if received else 0, path=resume_path))
        assert received == [*expected, DONE]


@pytest.mark.parametrize("route", ROUTES)
def test_client_that_reconnects_after_each_event_gets_each_once(client, route):
    body, resume_path, answer = ROUTES[route]
    response = client.post(f"/{route}", body)
    received = []
    with closing(response):
        last = id = next(events(response)).id
    while DONE not in received:
        # Like a browser's EventSource, which also sends the id of the first event.
        response = client.resume(id, 0, {"Last-Event-ID": last}, resume_path)
        with closing(response):
            received.append(next(events(response)))
        last = received[-1].id
    assert [(event.event, event.data) for event in received] == [*answer, ("done", "")]
    assert [event.id for event in received[:-1]] == [f"{number}" for number in range(1, len(received))]


def test_failed_answer_hides_the_exception(client, store):
    response = client.post("/stream", {"prompt": "fail"})
    id = response.getheader("X-Stream-Id")
    with closing(response):
        received = response.read()
    assert b"secret" not in received
    [_, *after_id] = EventParser().feed(received)
    error = ServerSentEvent("the answer was interrupted", "error")
    assert after_id == [ServerSentEvent("half ", id="1"), ServerSentEvent("way", id="2"), error, DONE]
    for after in range(3):
        assert list(events(client.resume(id, after))) == after_id[after:]
    assert store.get_status(id) == ("error", "the answer was interrupted", 2)


def test_stop_while_the_model_is_silent(client, store):
    reader = events(client.post("/stream", {"prompt": "silence"}))
    id = next(reader).data
    assert next(reader).data == "one"
    assert store.get_status(id).state == "active"
    for _ in range(2):  # the second call finds a stopped stream
        assert json.loads(client.post("/stream/stop", {"id": id}).read()) == {"ok": True}
    assert list(reader) == [ServerSentEvent("", "stopped"), DONE]
    assert store.get_status(id) == ("stopped", None, 1)
    assert list(events(client.resume(id, 0))) == [ServerSentEvent("one", id="1"), ServerSentEvent("", "stopped"), DONE]


@pytest.mark.parametrize("path", ["/stream", "/structured", "/chat"])
def test_stop_in_another_process_closes_the_source(client, store, path):
    log_id = store.create()
    reader = events(client.post("/stream", {"prompt": f"block {log_id}"}))
    id, producer = next(reader).data, next(reader).data
    statuses = []
    while 200 not in statuses:  # the process of the producer refuses
        response = client.post(f"{path}/stop", {"id": id}, {"Not-In": producer})
        with closing(response):
            statuses.append(response.status)
            assert json.loads(response.read()) in ({"error": "forbidden"}, {"ok": True})
    assert list(reader) == [ServerSentEvent("", "stopped"), DONE]
    assert store.wait(log_id, 30).state == "done"
    assert [chunk.data for chunk in store.read_from(log_id)] == [f"closed in {producer}"]


def test_answer_is_finished_after_client_disconnects(client, store):
    response = client.post("/stream", {"prompt": "slowly one two three four"})
    with closing(response):
        id = response.getheader("X-Stream-Id")
        assert b"stream-id" in response.read1(65536)
    assert store.wait(id, 20) == ("done", None, 4)


def test_heartbeat(client, store):
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
        ("GET", "/stream/resume?id=nothing&id=nothing", None, {}, 400),
        ("GET", "/stream/resume?id=nothing&%69d=other", None, {}, 400),
        ("GET", "/stream/resume?id=nothing&after=1&after=2", None, {}, 400),
        ("GET", "/stream/resume?id=%ff", None, {}, 400),
        ("POST", "/stream", '{"prompt": "x"}'.encode("utf-16"), {}, 400),
        ("POST", "/stream/stop", b'{"id": "nothing"}', {}, 404),
        ("POST", "/stream/stop", b"{}", {}, 400),
        ("GET", "/stream/resume?id=known", None, {"User": "stranger"}, 403),
        ("POST", "/stream/stop", b'{"id": "known"}', {"User": "stranger"}, 403),
        ("POST", "/stream", b'{"prompt": "x"}', {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/stream", b'{"prompt": "x"}', {"Sec-Fetch-Site": "same-site"}, 403),
        ("POST", "/stream/stop", b'{"id": "nothing"}', {"Origin": "https://evil.test"}, 403),
        ("GET", "/stream/resume?id=nothing", None, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/stream/resume?id=nothing", None, {"Origin": "null"}, 403),
        ("POST", "/stream", b'{"prompt": "x"}', {"Content-Type": "text/plain;charset=UTF-8"}, 415),
        ("POST", "/stream", b'{"prompt": "x"}', {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/complete", b'{"input": "fail-first"}', {}, 500),
        ("POST", "/title", b'{"messages": [{"role": "user", "content": "fail-first"}]}', {}, 500),
    ],
)
def test_error_response(client, known_stream, method, path, body, headers, status):
    response = client.request(method, path, body, headers)
    with closing(response):
        assert response.status == status
        assert response.getheader("Cache-Control") == "no-store"
        received = response.read()
        assert list(json.loads(received)) == ["error"]
        assert b"secret" not in received


def test_requests_of_a_page_of_the_server_are_accepted(client):
    for headers in ({"Origin": f"http://127.0.0.1:{client.port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert client.post("/complete", {"input": "x"}, headers).read() == b"x "


# Each refuses before the response has begun.
REFUSALS = [
    ("POST", "/stream", {"prompt": "refuse"}, {}),
    ("POST", "/complete", {"input": "refuse"}, {}),
    ("POST", "/complete", {"input": "refuse-later"}, {}),
    ("POST", "/title", {"messages": [{"role": "user", "content": "refuse-later"}]}, {}),
    ("POST", "/stream/stop", {"id": "known"}, {"User": "nobody"}),
    ("GET", "/stream/resume?id=known", None, {"User": "nobody"}),
]


@pytest.mark.parametrize(("method", "path", "body", "headers"), REFUSALS)
def test_refusal_of_the_framework_keeps_its_status(client, known_stream, method, path, body, headers):
    log_length = len(client.read_log())
    encoded = None if body is None else json.dumps(body).encode()
    response = client.request(method, path, encoded, headers)
    with closing(response):
        assert response.status == REFUSED[client.framework]
        assert b'"error"' not in response.read()  # the framework's own response
    assert "Traceback" not in client.read_log()[log_length:]


def test_refusal_of_a_running_source_ends_the_stream(client, store):
    response = client.post("/stream", {"prompt": "refuse-later"})
    id = response.getheader("X-Stream-Id")
    assert response.status == 200
    assert list(events(response))[1:] == [ServerSentEvent("the answer was interrupted", "error"), DONE]
    assert store.get_status(id).state == "error"


TEXTS = {
    "/complete": lambda prompt: {"input": prompt},
    "/title": lambda prompt: {"messages": [{"role": "user", "content": prompt}]},
}


@pytest.mark.parametrize("path", TEXTS)
def test_plain_text(client, path):
    response = client.post(path, TEXTS[path]("once upon"))
    with closing(response):
        assert response.getheader("Content-Type") == "text/plain; charset=utf-8"
        assert response.getheader("Cache-Control") == "no-store, no-transform"
        assert response.getheader("X-Accel-Buffering") == "no"
        assert response.read() == b"once upon "


@pytest.mark.parametrize("path", TEXTS)
def test_plain_text_arrives_while_it_is_produced(client, store, path):
    log_id = store.create()
    response = client.post(path, TEXTS[path](f"count {log_id}"))
    with closing(response):
        producer = int(response.read1(65536).split()[0])
        assert store.get_status(log_id).state == "active"  # the source has not ended
        assert response.read1(65536)
    # The client has left.
    assert store.wait(log_id, 30).state == "done"
    assert [chunk.data for chunk in store.read_from(log_id)] == [f"closed in {producer}"]


@pytest.mark.parametrize("path", TEXTS)
def test_plain_text_that_fails_is_incomplete(client, path):
    response = client.post(path, TEXTS[path]("fail"))
    with closing(response):
        assert response.status == 200
        with pytest.raises((IncompleteRead, ConnectionError)) as caught:
            response.read()
    if isinstance(caught.value, IncompleteRead):
        assert caught.value.partial in (b"half way", b"half ", b"")
    assert client.post("/complete", {"input": "x"}).read() == b"x "


@pytest.mark.parametrize("framework", SERVERS)
def test_unreachable_database_is_503(framework):
    with running(framework, "host=127.0.0.1 port=1 password=geheim") as client:
        for method, path, body in (
            ("POST", "/stream", {"prompt": "x"}),
            ("POST", "/stream/stop", {"id": "x"}),
            ("GET", "/stream/resume?id=x", None),
        ):
            response = client.request(method, path, None if body is None else json.dumps(body).encode())
            with closing(response):
                assert (response.status, response.getheader("Retry-After")) == (503, "5")
                assert json.loads(response.read()) == {"error": "the database is unavailable: try again later"}
        log = client.read_log()
        assert log.count("the database is unavailable") == 3
        assert "Traceback" not in log
        assert "geheim" not in log


# The last header and the first part of the body.
TRUNCATED = {
    "content-length": b'Content-Length: 1000\r\n\r\n{"prompt": "to be',
    "chunked": b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"prompt": "to be',
}


@pytest.mark.parametrize("part", TRUNCATED.values(), ids=TRUNCATED)
@pytest.mark.parametrize("reset", [False, True])
def test_truncated_request_logs_no_traceback(client, part, reset):
    log_length = len(client.read_log())
    for _ in range(10):
        with client.connect() as connection:
            connection.sendall(
                b"POST /__aibind__/stream HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n" + part
            )
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as response:
                    assert response.readline().lower() in (b"", b"http/1.1 400 bad request\r\n")
    # More requests, so that each process has handled the truncated ones.
    for _ in range(20):
        assert client.post("/complete", {"input": "x"}).read() == b"x "
    assert "Traceback" not in client.read_log()[log_length:]


def test_chunked_body_over_the_limit_is_refused(client):
    for size, status in ((9_000, 200), (12_000, 413)):
        text = b'{"input": "%s"}' % (b"x" * size)
        response = client.request("POST", "/complete", iter([text[:5000], text[5000:]]))
        with closing(response):
            # Under WSGI, Django does not read a body without a Content-Length.
            assert response.status == (400 if client.framework == "django, wsgi" else status)
            response.read()
    assert client.post("/complete", {"input": "x"}).read() == b"x "
