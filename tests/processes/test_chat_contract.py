"""The chat over HTTP in each framework, with two worker processes that share the requests."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest
from support import webapps
from support.chat_contract_apps import MAX_READERS, MAX_RUNNING, REFUSED
from support.concurrency import until
from support.webapps import Client, events

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore
from aibind_postgres.sse import ServerSentEvent

DONE = ServerSentEvent("", "done")


@pytest.fixture(scope="module", params=REFUSED)
def client(request, web_database):
    with webapps.running(request.param, web_database, "chat_contract_apps") as client:
        yield client


def path_of(id: str) -> str:
    return f"/conversations/{quote(id, safe='')}"


class User:
    """A browser of a user, or without a name a browser without a user."""

    def __init__(self, client: Client, name: str | None) -> None:
        self.client = client
        self.name = name

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        not_in: int | None = None,
    ) -> HTTPResponse:
        """Send a request with JSON, or with bytes. The process with the PID `not_in` does not answer it."""
        sent = {"Not-In": f"{not_in}", **(headers or {})}
        if self.name is not None:
            sent["User"] = self.name
        encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        while (response := self.client.request(method, path, encoded, sent)).status == 421:
            response.close()
        return response

    def call(self, *arguments: Any, **options: Any) -> tuple[int, Any]:
        """Send a request. Return the status and the JSON of the response."""
        with closing(self.request(*arguments, **options)) as response:
            return response.status, json.loads(response.read())

    def start(
        self, id: str, prompt: str | None, path: str = "/stream", **fields: Any
    ) -> tuple[str, Iterator[ServerSentEvent]]:
        """Ask a question in a conversation. Return the id of the stream and its events."""
        response = self.request("POST", path, {"sessionId": id, "prompt": prompt, **fields})
        assert response.status == 200, response.read()
        reader = events(response)
        return next(reader).data, reader

    def ask(self, id: str, prompt: str | None, **fields: Any) -> str:
        return text_of(self.start(id, prompt, **fields)[1])

    def resume(self, stream_id: str, **options: Any) -> Iterator[ServerSentEvent]:
        response = self.request("GET", f"/stream/resume?id={stream_id}", **options)
        assert response.status == 200, response.read()
        return events(response)

    def show(self, id: str, **options: Any) -> dict[str, Any]:
        status, shown = self.call("GET", path_of(id), **options)
        assert status == 200
        assert isinstance(shown, dict)
        return shown

    def history(self, id: str) -> ChatHistory[Any]:
        return ChatHistory.from_json(json.dumps(self.show(id)["history"]))

    def list(self, **query: Any) -> tuple[list[dict[str, Any]], str | None]:
        status, page = self.call("GET", f"/conversations?{urlencode(query)}")
        assert status == 200
        return page["conversations"], page["next"]


def text_of(reader: Iterator[ServerSentEvent]) -> str:
    return "".join(event.data for event in reader if event.event == "message")


def texts(chat: ChatHistory[Any]) -> list[str]:
    return [message["content"] for message in chat.messages]


class Answer(NamedTuple):
    """An answer that the test writes: the chunks of the stream `script`."""

    id: str
    pid: int  # of the process that produces it
    script: str
    reader: Iterator[ServerSentEvent]


@contextmanager
def answering(user: User, store: PostgresStreamStore, id: str, path: str = "/stream") -> Iterator[Answer]:
    """Ask a question. The answer ends with the block."""
    script = store.create()
    try:
        stream_id, reader = user.start(id, f"follow {script}", path)
        yield Answer(stream_id, int(next(reader).data), script, reader)
    finally:
        store.complete(script)


@pytest.fixture
def id():
    return uuid.uuid4().hex


@pytest.fixture
def ann(client):
    return User(client, f"ann-{uuid.uuid4().hex}")


@pytest.fixture
def bob(client):
    return User(client, f"bob-{uuid.uuid4().hex}")


@pytest.fixture
def nobody(client):
    return User(client, None)


@pytest.fixture
def _no_traceback(client):
    log_length = len(client.read_log())
    yield
    assert "Traceback" not in client.read_log()[log_length:]


MESSAGES = [{"role": "user", "content": "x"}]
GENERATIONS = {
    "/stream": {"prompt": "x"},
    "/structured": {"prompt": "x"},
    "/chat": {"messages": MESSAGES},
    "/complete": {"input": "x"},
    "/title": {"messages": MESSAGES},
    **{f"{path}/compact": {"messages": MESSAGES} for path in ("", "/stream", "/structured", "/chat")},
}
ON_CONVERSATIONS = [("GET", None), ("PATCH", {"title": "x"}), ("PATCH", {"activeLeafId": "LEAF"}), ("DELETE", None)]


@pytest.mark.usefixtures("_no_traceback")
@pytest.mark.parametrize("affix", ["", "/", "//", "%2F", "?a=1&b#c;+", "é 😀", "\n", "..", "{id}"])
def test_only_the_owner_has_access(ann, bob, nobody, id, affix):
    id = f"{affix}{id}{affix}"
    stream_id, reader = ann.start(id, "hello")
    assert text_of(reader) == "hello"
    before = ann.show(id)
    assert before["id"] == id
    for method, template in ON_CONVERSATIONS:
        body = template and json.loads(json.dumps(template).replace("LEAF", before["history"]["activeLeafId"]))
        missing = bob.call(method, path_of("missing"), body)
        assert missing[0] == 404
        assert bob.call(method, path_of(id), body) == missing
        unknown = nobody.call(method, path_of("missing"), body)
        assert unknown[0] == 401
        assert nobody.call(method, path_of(id), body) == unknown
    for path, fields in GENERATIONS.items():
        assert bob.call("POST", path, {**fields, "sessionId": id}) == missing
        assert nobody.call("POST", path, {**fields, "sessionId": id}) == unknown
    for path in ("/stream", "/structured", "/chat"):
        for user in (bob, nobody):
            for method, action, body in (("POST", "stop", {"id": "STREAM"}), ("GET", "resume?id=STREAM", None)):
                foreign, unknown = (
                    user.call(
                        method,
                        f"{path}/{action.replace('STREAM', name)}",
                        body and {"id": name},
                    )
                    for name in (stream_id, "missing")
                )
                assert foreign == unknown
                assert foreign[0] == 404
    assert bob.list() == ([], None)
    assert nobody.call("GET", "/conversations")[0] == 401
    assert ann.show(id) == before

    assert text_of(ann.resume(stream_id)) == "hello"
    assert ann.call("POST", "/stream/stop", {"id": stream_id}) == (200, {"ok": True})
    status, described = ann.call("PATCH", path_of(id), {"title": "é"})
    assert (status, described["id"], described["title"]) == (200, id, "é")
    assert ann.call("DELETE", path_of(id)) == (200, {"ok": True})
    assert ann.call("GET", path_of(id)) == missing
    assert ann.call("GET", f"/stream/resume?id={stream_id}")[0] == 404


def question(**fields: Any) -> tuple[str, str, dict[str, Any]]:
    return ("POST", "/stream", {"prompt": "x", "sessionId": "ID", **fields})


NOON = "2024-01-01T12:00:00"
LONG = "x" * 1025
HOSTILE = [
    *(
        ("GET", f"/conversations?limit={limit}", None, 400)
        for limit in ("", "0", "-1", "201", "1e1", "%C2%B2", "1%00", "9" * 500, "1&limit=2")
    ),
    *(
        ("GET", f"/conversations?before={quote(before)}", None, 400)
        for before in (
            "x",
            f"{NOON} x",
            f"{NOON}+00:00",
            f"{NOON}+00:00 ",
            f"{NOON}+00:00 \0",
            f"{NOON}+00:00 {LONG}",
            "0001-01-01T00:00:00+00:01 x",
            "9999-12-31T23:59:59-00:01 x",
            "infinity x",
        )
    ),
    ("GET", "/conversations?before=%ED%A0%80", None, 400),
    # PostgreSQL knows no such offsets.
    ("GET", f"/conversations?before={quote(f'{NOON}+23:59 x')}", None, 200),
    ("GET", f"/conversations?before={quote(f'{NOON}+00:00:00.000001 x')}", None, 200),
    *(
        (method, f"/conversations/{id}", body, status)
        for method, body in (("GET", None), ("PATCH", {"title": "x"}), ("DELETE", None))
        for id, status in (("%00", 400), (LONG, 400), ("%FF", 404), ("%ED%A0%80", 404), ("", 404), ("%7Bid%7D", 404))
    ),
    *(
        ("PATCH", "/conversations/ID", body, 400)
        for body in (
            b"",
            b"{",
            b"\xff",
            b"[" * 5000,
            [],
            {},
            {"title": 1},
            {"title": "\0"},
            {"title": "\ud800"},
            {"activeLeafId": None},
            {"activeLeafId": []},
            {"activeLeafId": "missing"},
            {"activeLeafId": "\ud800"},
            {"activeLeafId": "ROOT", "title": "\0"},
        )
    ),
    ("PATCH", "/conversations/ID", b" " * 20_000, 413),
    *((*question(parentId=value), 400) for value in (1, [], {}, True, "", "missing", "\0", "\ud800")),
    *((*question(regenerate=value), 400) for value in (1, "yes", None, [])),
    (*question(regenerate=True, parentId=None), 400),
    (*question(regenerate=True, parentId="LEAF"), 400),
    *((*question(sessionId=value), 400) for value in (1, [], "\0", "\ud800", LONG)),
    *((*question(sessionId=None, **{name: value}), 400) for name, value in (("parentId", None), ("regenerate", True))),
    *((*question(prompt=value), 400) for value in (None, 1, [], "", " \n", "\ud800")),
    (*question(prompt="x" * 20_000), 413),
]


@pytest.mark.usefixtures("_no_traceback")
def test_hostile_values(ann, id):
    ann.ask(id, "hello")
    before = ann.show(id)
    history = before["history"]
    for method, path, body, expected in HOSTILE:
        names = {'"ID"': id, '"ROOT"': history["rootIds"][0], '"LEAF"': history["activeLeafId"]}
        if not isinstance(body, bytes | None):
            text = json.dumps(body)
            for name, value in names.items():
                text = text.replace(name, json.dumps(value))
            body = text.encode()
        status, content = ann.call(method, path.replace("/ID", f"/{id}"), body)
        assert status == expected, (method, path, body, content)
        assert (list(content) == ["error"]) == (status != 200)
        assert ann.show(id) == before, (method, path, body)


def test_pages_of_the_list_and_titles(ann, bob, id):
    ids = [f"{id} é{number}" for number in range(5)]
    for each in ids:
        ann.ask(each, "hello")
    bob.ask(f"{id} of bob", "hello")
    pages = [ann.list(limit=2)]
    ann.ask(f"{id} new", "hello")
    while (position := pages[-1][1]) is not None:
        pages.append(ann.list(limit=2, before=position))
    assert [[info["id"] for info in page] for page, _ in pages] == [ids[4:2:-1], ids[2:0:-1], ids[:1]]
    assert [info["id"] for info in ann.list(limit=200)[0]] == [f"{id} new", *reversed(ids)]

    for title in ("Größe 😀", "", None):
        status, described = ann.call("PATCH", path_of(ids[0]), {"title": title})
        assert (status, described["title"]) == (200, title)
        listed = ann.list()[0][-1]
        assert listed == described
        assert {**listed, "history": ann.show(ids[0])["history"]} == ann.show(ids[0])
    assert listed.keys() == {"id", "title", "metadata", "createdAt", "updatedAt", "activeStreamId"}
    assert [info["id"] for info in bob.list()[0]] == [f"{id} of bob"]


def test_branches(ann, id):
    assert ann.ask(id, "a") == "a"
    assert ann.ask(id, "b") == "a|a|b"
    chat = ann.history(id)
    root, first, second, leaf = chat.node_ids
    assert texts(chat) == ["a", "a", "b", "a|a|b"]

    # another answer to the last question, and to the first one
    assert ann.ask(id, None, regenerate=True) == "a|a|b"
    chat = ann.history(id)
    assert chat.node_ids[:3] == [root, first, second]
    assert chat.alternative_count(leaf) == 2
    assert chat.prev_alternative(chat.node_ids[3]) == leaf
    assert ann.ask(id, None, regenerate=True, parentId=root) == "a"
    chat = ann.history(id)
    assert chat.node_ids[0] == root
    assert len(chat) == 6
    assert chat.alternative_count(first) == 2

    # another question after the first answer, and at the beginning
    assert ann.ask(id, "c", parentId=first) == "a|a|c"
    assert ann.history(id).alternative_count(second) == 2
    assert ann.ask(id, "d", parentId=None) == "d"
    assert texts(ann.history(id)) == ["d", "d"]
    assert ann.history(id).alternative_count(root) == 2

    # back to the first path
    status, _ = ann.call("PATCH", path_of(id), {"activeLeafId": leaf, "title": "back"})
    assert status == 200
    assert ann.history(id).node_ids == [root, first, second, leaf]
    assert ann.show(id)["title"] == "back"
    assert ann.ask(id, "e") == "a|a|b|a|a|b|e"


def test_question_that_is_answered_again_during_its_answer(ann, store, id):
    with answering(ann, store, id) as first:
        second_id, reader = ann.start(id, None, regenerate=True)
        assert ann.call("POST", "/stream/stop", {"id": first.id}) == (200, {"ok": True})
        assert list(first.reader) == [ServerSentEvent("", "stopped"), DONE]
        until(lambda: first.id in ann.show(id)["history"]["nodes"])
        assert ann.show(id)["history"]["activeLeafId"] == ann.history(id).node_ids[0]
    assert list(reader)[-1] == DONE
    history = ann.show(id)["history"]
    assert history["nodes"][first.id]["metadata"] == {"state": "stopped"}
    assert history["activeLeafId"] == second_id


def test_conversation_does_not_include_earlier_streams_of_other_users(ann, bob, store, id):
    with answering(bob, store, id, "/structured") as answer:  # which stores no conversation
        ann.ask(id, "x")
        assert ann.show(id)["activeStreamId"] is None
        assert ann.call("GET", f"/stream/resume?id={answer.id}")[0] == 404
        assert ann.call("DELETE", path_of(id)) == (200, {"ok": True})
        assert store.get_status(answer.id).state == "active"


def test_another_process_shows_a_running_answer(ann, store, id):
    with answering(ann, store, id) as answer:
        shown = ann.show(id, not_in=answer.pid)
        chat = ChatHistory.from_json(json.dumps(shown["history"]))
        assert texts(chat) == [f"follow {answer.script}"]
        assert shown["history"]["nodes"][chat.node_ids[0]]["metadata"] == {"streamId": answer.id}
        assert shown["activeStreamId"] == ann.list()[0][0]["activeStreamId"] == answer.id
        reader = ann.resume(answer.id, not_in=answer.pid)
        assert next(reader).data == f"{answer.pid}"
        store.append(answer.script, "more")
        assert next(reader).data == next(answer.reader).data == "more"
    assert list(reader) == list(answer.reader) == [DONE]
    shown = ann.show(id, not_in=answer.pid)
    node = shown["history"]["nodes"][answer.id]
    assert node["message"] == {"role": "assistant", "content": f"{answer.pid}more"}
    assert node["metadata"] == {}
    assert shown["history"]["activeLeafId"] == answer.id
    assert shown["activeStreamId"] is None


def test_killed_process_leaves_the_question_and_the_partial_answer(ann, store, id):
    with answering(ann, store, id) as answer:
        store.append(answer.script, "half")
        reader = ann.resume(answer.id, not_in=answer.pid)
        assert [next(reader).data for _ in range(2)] == [f"{answer.pid}", "half"]
        os.kill(answer.pid, signal.SIGKILL)
        with suppress(HTTPException, OSError):
            assert list(answer.reader)[1:] == []
        assert ann.show(id)["activeStreamId"] == answer.id
        broken_off, done = reader
        assert (broken_off.event, done) == ("error", DONE)
    shown = ann.show(id)
    node = shown["history"]["nodes"][answer.id]
    assert node["message"] == {"role": "assistant", "content": f"{answer.pid}half"}
    assert node["metadata"] == {"state": "error"}
    assert shown["history"]["activeLeafId"] == answer.id
    assert shown["activeStreamId"] is None
    assert texts(ann.history(id)) == [f"follow {answer.script}", f"{answer.pid}half"]
    assert ann.ask(id, "next").endswith(f"|{answer.pid}half|next")


def test_deletion_during_an_answer(ann, store, web_database, id):
    ann.ask(id, "hello")
    with answering(ann, store, id) as answer:
        reader = ann.resume(answer.id, not_in=answer.pid)
        assert next(reader).data == f"{answer.pid}"
        assert ann.call("DELETE", path_of(id), not_in=answer.pid) == (200, {"ok": True})
        for each in (reader, answer.reader):
            assert list(each) in ([], [ServerSentEvent("", "stopped"), DONE])
        until(lambda: ann.request("POST", "/complete", {"input": "x"}).read() == b"%d 0" % answer.pid)
    assert ann.call("GET", path_of(id))[0] == 404
    assert ann.call("GET", f"/stream/resume?id={answer.id}")[0] == 404
    assert ann.list() == ([], None)
    assert list(store.list(session_id=id)) == []
    with PostgresConversationStore(web_database) as conversations:  # without an owner, requests would not find it
        assert conversations.get_info(id) is None


def test_limit_of_running_answers(ann, bob, store, id):
    with answering(ann, store, f"{id} 0") as answer, answering(ann, store, f"{id} 1") as other:
        assert MAX_RUNNING == 2
        assert [info["activeStreamId"] for info in ann.list()[0]] == [other.id, answer.id]
        other_pid = int(ann.request("POST", "/complete", {"input": "x"}, not_in=answer.pid).read().split()[0])
        for not_in in (answer.pid, other_pid):
            assert ann.call("POST", "/stream", {"prompt": "x", "sessionId": id}, not_in=not_in)[0] == 429
        assert ann.call("POST", "/structured", {"prompt": "x"})[0] == 429
        assert ann.call("GET", path_of(id))[0] == 404
        assert bob.ask(f"{id} of bob", "x") == "x"
    assert [list(each.reader) for each in (answer, other)] == [[DONE]] * 2
    assert ann.ask(id, "x") == "x"


def test_limit_of_readers(ann, bob, store, id):
    stream_id = store.create(owner=ann.name)
    readers = []
    while len(readers) < 2 * MAX_READERS:  # in each of the two processes
        response = ann.request("GET", f"/stream/resume?id={stream_id}")
        if response.status == 200:
            readers.append(response)
        else:
            assert response.status == 429
            assert len(readers) >= MAX_READERS
            response.close()
    assert ann.call("GET", f"/stream/resume?id={stream_id}")[0] == 429
    # A refused question is not stored.
    assert ann.call("POST", "/stream", {"prompt": "x", "sessionId": id})[0] == 429
    assert ann.call("GET", path_of(id))[0] == 404
    assert [info.id for info in store.list(owner=ann.name)] == [stream_id]
    assert bob.ask(f"{id} of bob", "x") == "x"
    store.complete(stream_id)
    assert [list(events(response)) for response in readers] == [[DONE]] * len(readers)
    until(lambda: b"event: done" in ann.request("GET", f"/stream/resume?id={stream_id}").read())


ROUTES = [
    ("GET", "/conversations", None),
    *((method, "/conversations/ID", body) for method, body in ON_CONVERSATIONS),
    *(("POST", path, {**fields, "sessionId": "ID"}) for path, fields in GENERATIONS.items()),
    ("POST", "/stream/stop", {"id": "x"}),
    ("GET", "/stream/resume?id=x", None),
]


def test_refusal_of_owner_keeps_its_status(client, ann, id):
    ann.ask(id, "x")
    before = ann.show(id)
    for method, path, body in ROUTES:
        response = User(client, "refused").request(method, path.replace("ID", id), body)
        with closing(response):
            assert response.status == REFUSED[client.framework]
            assert b'"error"' not in response.read()  # the framework's own response
    assert ann.show(id) == before


@pytest.mark.usefixtures("_no_traceback")
def test_methods_origins_and_content_types(ann, id):
    ann.ask(id, "x")
    before = ann.show(id)
    for path, allowed in (("/conversations", ["GET"]), (path_of(id), ["GET", "PATCH", "DELETE"])):
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"} - set(allowed):
            response = ann.request(method, path, b"{}")
            with closing(response):
                assert response.status == 405
                assert response.getheader("Allow") == ", ".join(allowed)
        for method in allowed:
            for headers in ({"Origin": "https://evil.test"}, {"Sec-Fetch-Site": "same-site"}):
                assert ann.call(method, path, {"title": "x"}, headers)[0] == 403
    assert ann.call("PATCH", path_of(id), {"title": "x"}, {"Content-Type": "text/plain"})[0] == 415
    assert ann.show(id) == before
    own = {"Origin": f"http://127.0.0.1:{ann.client.port}", "Sec-Fetch-Site": "same-origin"}
    assert ann.call("PATCH", path_of(id), {"title": "x"}, own)[0] == 200
    assert ann.call("DELETE", path_of(id), None, own)[0] == 200
