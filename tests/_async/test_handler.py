"""The HTTP API without a framework: the responses and errors of each route, and the saved conversations."""

from __future__ import annotations

import json

import pytest
from psycopg.sql import Identifier

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    InvalidDataError,
    Resource,
    StreamEvent,
    StreamNotFoundError,
    WebError,
    WebRequest,
)
from aibind_postgres.sse import EventParser, ServerSentEvent
from aibind_postgres.web import QueryParameters

DONE = ServerSentEvent("", "done")
JSON = {"content-type": "application/json"}


class Api:
    """A handler, with helpers that send requests to it.

    Its `generate` yields `items` and collects its arguments in `generations`.
    """

    def __init__(self, store, conversations):
        self.store = store
        self.conversations = conversations
        self.generations = []
        self.items = ["Hello", " world"]
        self.handler = self.with_options()

    def with_options(self, **options):
        return AsyncStreamHandler(
            self.generate, store=self.store, conversations=self.conversations, **{"public": True, **options}
        )

    async def generate(self, generation):
        self.generations.append(generation)
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    async def request(self, method, path, body=None, query=None, headers=None, handler=None):
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = WebRequest(method, f"/__aibind__{path}", query or {}, {**JSON, **(headers or {})}, encoded)
        return await (handler or self.handler).handle(request)

    async def post(self, path, body, **options):
        return await self.request("POST", path, body, **options)

    async def wait_for_producers(self):
        """Wait until all producers have ended and their `on_finish` callbacks have returned."""
        assert await AsyncDurableStream.shutdown(self.store, 20)

    async def saved_messages(self, session_id):
        """Return role and content of each message of a stored conversation."""
        chat = await self.conversations.load(session_id)
        return [(message["role"], message["content"]) for message in chat.messages]


@pytest.fixture
async def api(dsn, tables, schema_name):
    conversations = Identifier(schema_name, "conversations")
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        AsyncPostgresConversationStore(dsn, table=conversations) as chats,
    ):
        yield Api(store, chats)


async def events(response):
    parser = EventParser()
    return [event async for encoded in response.body for event in parser.feed(encoded)]


def error_of(response):
    assert response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(response.body)["error"]


@pytest.mark.parametrize("path", ["/stream", "/structured", "/chat"])
async def test_stream_and_resume(api, path):
    api.items = ["Hello", StreamEvent("usage", "{}"), " world"]
    body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "system": "be brief", "model": "fast"}
    response = await api.post(path, body)
    id = response.headers["X-Stream-Id"]
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache, no-store, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Access-Control-Expose-Headers"] == "X-Stream-Id"
    arrived = [ServerSentEvent("Hello", id="1"), ServerSentEvent("{}", "usage", "2"), ServerSentEvent(" world", id="3")]
    assert await events(response) == [ServerSentEvent(id, "stream-id", id), *arrived, DONE]
    [generation] = api.generations
    assert generation.stream_id == id
    assert (generation.kind, generation.prompt) == (path[1:], "hi")
    assert (generation.system, generation.model) == ("be brief", "fast")
    assert generation.messages == body["messages"]
    for after in range(4):
        for query, headers in (
            ({"id": id, "after": str(after)}, {}),
            ({"id": id, "after": "0"}, {"last-event-id": str(after)}),
        ):
            resumed = await api.request("GET", f"{path}/resume", query=query, headers=headers)
            assert resumed.headers["X-Stream-Id"] == id
            assert await events(resumed) == [*arrived[after:], DONE]
    from_start = await api.request("GET", "/structured/resume", query={"id": id}, headers={"last-event-id": id})
    assert await events(from_start) == [*arrived, DONE]


async def test_stop(api):
    await api.store.create("s")
    assert json.loads((await api.post("/stream/stop", {"id": "s"})).body) == {"ok": True}
    for path in ("/structured/stop", "/chat/stop"):
        assert json.loads((await api.post(path, {"id": "s"})).body) == {"ok": True}
    assert (await api.store.get_status("s")).state == "stopped"
    resumed = await api.request("GET", "/stream/resume", query={"id": "s"})
    assert await events(resumed) == [ServerSentEvent("", "stopped"), DONE]


async def test_complete_title_and_compact(api):
    for path, body in (("/complete", {"input": "Once"}), ("/title", {"messages": [{"role": "user", "content": "hi"}]})):
        response = await api.post(path, body)
        assert (response.status, [text async for text in response.body]) == (200, [b"Hello", b" world"])
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert [(generation.kind, generation.prompt) for generation in api.generations] == [
        ("complete", "Once"),
        ("title", "hi"),
    ]
    api.items = ["in short", StreamEvent("usage", '{"inputTokens": 9, "outputTokens": 2}')]
    conversation = {"messages": [{"role": "user", "content": "hi"}]}
    for path in ("/compact", "/stream/compact", "/structured/compact", "/chat/compact"):
        response = await api.post(path, conversation)
        assert json.loads(response.body) == {"summary": "in short", "tokensSaved": 7}
        assert api.generations[-1].kind == "compact"
    for count in ("null", "Infinity", '"many"'):
        api.items = [StreamEvent("usage", f'{{"inputTokens": {count}, "outputTokens": 1}}')]
        assert json.loads((await api.post("/compact", conversation)).body) == {"summary": "", "tokensSaved": 0}


async def test_compact_replaces_conversation(api):
    async def compact(generation):
        assert generation.prompt == ""
        yield ", ".join(message["content"] for message in generation.messages)

    handler = api.with_options(compact=compact)
    await events(await api.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    outdated = [{"role": "user", "content": "the messages of an outdated page"}]
    for messages in (outdated, []):
        response = await api.post("/compact", {"messages": messages, "sessionId": "a"}, handler=handler)
        assert json.loads(response.body) == {"summary": "hi, Hello world", "tokensSaved": 0}
        assert await api.saved_messages("a") == [("system", "hi, Hello world")]
    response = await api.post("/compact", {"messages": outdated, "sessionId": "new"}, handler=handler)
    assert json.loads(response.body)["summary"] == "the messages of an outdated page"


async def test_compact_of_changed_or_empty_conversation_is_refused(api):
    await events(await api.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    turn = {"prompt": "concurrent", "sessionId": "a"}

    async def compact(generation):
        await events(await api.post("/stream", turn))
        yield "in short"

    messages = [{"role": "user", "content": "hi"}]
    handler = api.with_options(compact=compact)
    response = await api.post("/compact", {"messages": messages, "sessionId": "a"}, handler=handler)
    assert error_of(response) == (409, "the conversation changed while it was summarised: try again")
    contents = ["hi", "Hello world", "concurrent", "Hello world"]
    assert [content for _, content in await api.saved_messages("a")] == contents
    async with api.conversations.edit("a") as chat:
        chat.tree.rewind(chat.node_ids[0])
    for session in ("a", "new"):
        response = await api.post("/compact", {"messages": messages if session == "a" else [], "sessionId": session})
        assert error_of(response) == (400, "the conversation has no messages to summarise")
    assert len(await api.conversations.load("a")) == 4
    assert (await api.conversations.load("new")).is_empty


async def test_turn_is_saved_before_done_and_continues_conversation(api):
    handler = api.with_options(max_messages=3)
    for number in range(1, 4):
        await events(await api.post("/stream", {"prompt": f"{number}", "sessionId": "a"}, handler=handler))
        assert (await api.saved_messages("a"))[-2:] == [("user", f"{number}"), ("assistant", "Hello world")]
    contents = [[message["content"] for message in generation.messages] for generation in api.generations]
    assert contents == [["1"], ["1", "Hello world", "2"], ["2", "Hello world", "3"]]
    assert api.generations[-1].prompt == "3"


@pytest.mark.parametrize("end", ["stopped", "error", "deleted"])
async def test_incomplete_answer_is_saved_with_its_state(api, end):
    if end == "error":
        api.items = ["Hel", ValueError("the model is gone")]

    async def generate(generation):
        yield "Hel"
        await {"stopped": api.store.stop, "deleted": api.store.delete}[end](generation.stream_id)
        for number in range(1000):
            yield f"{number}"

    handler = api.handler
    if end != "error":
        handler = AsyncStreamHandler(generate, store=api.store, conversations=api.conversations, public=True)
    response = await api.post("/stream", {"prompt": "hi", "sessionId": "a"}, handler=handler)
    if end == "error":
        assert (await events(response))[-2:] == [ServerSentEvent("the answer was interrupted", "error"), DONE]
    await api.wait_for_producers()
    chat = await api.conversations.load("a")
    question, answer = chat.messages[:2]
    assert question == {"role": "user", "content": "hi"}
    assert answer["content"].startswith("Hel")
    assert chat.tree.get(chat.node_ids[1]).metadata == {"state": end}
    stream_id = response.headers["X-Stream-Id"]
    assert chat.tree.get(chat.node_ids[0]).metadata == {"streamId": stream_id}
    assert chat.node_ids[1] == stream_id


async def test_unauthorized_requests_read_and_change_nothing(api):
    await api.store.create("s")
    await events(await api.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    checked = []

    async def authorize(request, resource):
        checked.append(resource)
        return request.headers.get("user") == "me"

    handler = api.with_options(authorize=authorize)
    calls = [
        ("GET", "/stream/resume", None, {"id": "s"}),
        ("POST", "/stream/stop", {"id": "s"}, None),
        ("POST", "/stream", {"prompt": "hi", "sessionId": "a"}, None),
        ("POST", "/compact", {"messages": [], "sessionId": "a"}, None),
        ("POST", "/structured", {"prompt": "hi", "sessionId": "a"}, None),
        ("POST", "/chat", {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}, None),
        ("POST", "/complete", {"input": "hi", "sessionId": "a"}, None),
        ("POST", "/title", {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}, None),
    ]
    generated = len(api.generations)
    for method, path, body, query in calls:
        assert error_of(await api.request(method, path, body, query, handler=handler)) == (403, "forbidden")
    stream, conversation = Resource("stream", "s", None, None), Resource("conversation", "a", None, "a")
    assert checked == [stream, stream, *[conversation] * 6]
    missing = await api.request("GET", "/stream/resume", query={"id": "nothing"}, handler=handler)
    assert error_of(missing)[0] == 404
    assert len(api.generations) == generated
    assert (await api.store.get_status("s")).state == "active"
    assert len(await api.saved_messages("a")) == 2
    allowed = await api.post("/stream/stop", {"id": "s"}, headers={"user": "me"}, handler=handler)
    assert allowed.status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/nothing", {}, 404, "not found"),
        ("POST", "", {}, 404, "not found"),
        ("GET", "/stream", None, 405, "use POST"),
        ("POST", "/stream/resume", {}, 405, "use GET"),
        ("POST", "/stream", b"{", 400, "JSON"),
        ("POST", "/stream", b"\xff", 400, "JSON"),
        ("POST", "/stream", '{"prompt": "x"}'.encode("utf-16"), 400, "UTF-8"),
        ("POST", "/stream", '{"prompt": "x"}'.encode("utf-16-le"), 400, "UTF-8"),
        ("POST", "/stream", '{"prompt": "x"}'.encode("utf-32-be"), 400, "UTF-8"),
        ("POST", "/stream", '{"prompt": "x"}'.encode("utf-8-sig"), 400, "UTF-8"),
        ("POST", "/stream", b"[" * 100_000, 400, "JSON"),
        ("POST", "/stream", [], 400, "object"),
        ("POST", "/stream", {}, 400, "prompt is required"),
        ("POST", "/stream", {"prompt": "  "}, 400, "prompt is required"),
        ("POST", "/stream", {"prompt": 7}, 400, "prompt must be a string"),
        ("POST", "/stream", {"prompt": "x", "sessionId": 7}, 400, "sessionId must be a string"),
        ("POST", "/stream", {"prompt": "x", "sessionId": "\0"}, 400, "NUL"),
        ("POST", "/stream", {"prompt": "x", "sessionId": "x" * 2000}, 400, "1024"),
        ("POST", "/chat", {"messages": []}, 400, "messages is required"),
        ("POST", "/chat", {"messages": ["x"]}, 400, "role"),
        ("POST", "/chat", {"messages": [{"role": "user", "content": 7}]}, 400, "content"),
        ("POST", "/title", {}, 400, "messages is required"),
        ("POST", "/compact", {}, 400, "messages is required"),
        ("POST", "/compact", {"messages": []}, 400, "no messages to summarise"),
        ("POST", "/complete", {"input": ""}, 400, "input is required"),
        ("POST", "/stream/stop", {}, 400, "id is required"),
        ("POST", "/stream/stop", {"id": "nothing"}, 404, "stream not found"),
        ("GET", "/stream/resume", None, 400, "id parameter is required"),
        ("POST", "/stream", {"prompt": "x" * 10_000_000}, 413, "10000000"),
        *[
            ("POST", "/stream", {"prompt": "x", "more": values}, 413, "at most 100000 values")
            for values in ([[]] * 100_000, [0] * 100_000, [{}, ""] * 50_000, [r"\"[]", "\\\\"] * 50_000)
        ],
    ],
)
async def test_error_response(api, method, path, body, status, error):
    actual_status, text = error_of(await api.request(method, path, body))
    assert actual_status == status
    assert error in text


@pytest.mark.parametrize("text", [",[{" * 100_000, '\\",' * 100_000, "\n, \\" * 100_000])
async def test_limit_of_values_ignores_texts(api, text):
    assert (await api.post("/chat", {"messages": [{"role": "user", "content": "x"}], "attachment": text})).status == 200


async def test_resume_of_stream_with_numeric_id(api):
    await api.store.create("1")
    await api.store.append_many("1", ["one", "two"])
    await api.store.complete("1")
    for query, headers in (({"id": "1", "after": "1"}, {}), ({"id": "1"}, {"last-event-id": "1"})):
        resumed = await api.request("GET", "/stream/resume", query=query, headers=headers)
        assert await events(resumed) == [ServerSentEvent("two", id="2"), DONE]


@pytest.mark.parametrize("after", ["-1", "1.5", "x", "٣", "9" * 16])
async def test_invalid_resume_cursor_and_missing_stream(api, after):
    await api.store.create("s")
    response = await api.request("GET", "/stream/resume", query={"id": "s", "after": after})
    assert error_of(response)[0] == 400
    missing = await api.request("GET", "/stream/resume", query={"id": "nothing"})
    assert error_of(missing) == (404, "stream not found: it was never created, was deleted, or has expired")


async def test_errors_of_generate(api, caplog):
    def refuse(generation):
        raise WebError(402, "no money left")

    def refuse_without_text(generation):
        raise WebError(402, "")

    def fail(generation):
        raise ValueError("geheim")

    for generate, expected in (
        (refuse, (402, "no money left")),
        (refuse_without_text, (402, "refused")),
        (fail, (500, "internal server error")),
    ):
        handler = AsyncStreamHandler(generate, store=api.store)
        assert error_of(await api.post("/stream", {"prompt": "hi"}, handler=handler)) == expected
    assert "geheim" in caplog.text


@pytest.mark.parametrize("fault", [ValueError, InvalidDataError, StreamNotFoundError])
async def test_application_errors_are_500(api, caplog, fault):
    api.items = [fault("geheim")]
    conversation = {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}
    for path, body in (("/complete", {"input": "x"}), ("/compact", conversation)):
        caplog.clear()
        assert error_of(await api.post(path, body)) == (500, "internal server error")
        assert "geheim" in caplog.text

    await api.store.create("s")

    def fail(request, resource):
        raise fault("geheim")

    caplog.clear()
    handler = api.with_options(authorize=fail)
    assert error_of(await api.post("/stream/stop", {"id": "s"}, handler=handler)) == (500, "internal server error")
    assert "geheim" in caplog.text


async def test_custom_prefix(api):
    handler = api.with_options(prefix="/ai/")
    request = WebRequest("POST", "/ai/complete", {}, JSON, b'{"input": "x"}')
    assert [text async for text in (await handler.handle(request)).body] == [b"Hello", b" world"]
    assert (await handler.handle(request._replace(path="/aiz/complete"))).status == 404
    assert (await handler.handle(request._replace(path="/complete"))).status == 404


@pytest.mark.parametrize(
    "option", [{"max_messages": 0}, {"max_messages": -1}, {"max_body": -1}, {"heartbeat": 0}, {"prefix": "ai"}], ids=str
)
async def test_invalid_option_raises(api, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        api.with_options(**option)


async def test_store_of_another_kind_raises(api):
    with pytest.raises(TypeError, match="store must be of type"):
        AsyncStreamHandler(api.generate, store=api.conversations)
    with pytest.raises(TypeError, match="conversations must be of type"):
        AsyncStreamHandler(api.generate, store=api.store, conversations=api.store, public=True)


@pytest.mark.parametrize(
    ("id", "header"), [("demo:1 ~", "demo:1 ~"), ("ключ", "%D0%BA%D0%BB%D1%8E%D1%87"), ("a\nb", "a%0Ab")]
)
async def test_id_is_quoted_in_header(api, id, header):
    await api.store.create(id)
    await api.store.complete(id)
    response = await api.request("GET", "/stream/resume", query={"id": id})
    assert response.headers["X-Stream-Id"] == header
    assert await events(response) == [DONE]


@pytest.mark.parametrize("summary", ["", " \n"])
async def test_blank_summary_replaces_nothing(api, summary):
    await events(await api.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    api.items = [summary]
    response = await api.post("/compact", {"messages": [], "sessionId": "a"})
    assert error_of(response) == (502, "the summary is empty")
    assert await api.saved_messages("a") == [("user", "hi"), ("assistant", "Hello world")]


async def test_delete_while_reading_ends_response(api):
    id = await api.store.create()
    await api.store.append(id, "one")
    response = await api.request("GET", "/stream/resume", query={"id": id})
    body = response.body
    assert b"data: one" in await body.__anext__()
    await api.store.delete(id)
    assert [encoded async for encoded in body] == []


async def test_responses_are_not_stored(api):
    for response in (
        await api.request("GET", "/stream/resume", query={"id": "nothing"}),
        await api.request("GET", "/stream"),
        await api.post("/complete", {"input": ""}),
        await api.post("/compact", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        assert response.headers["Cache-Control"] == "no-store"
    for path, cache_control in (
        ("/stream", "no-cache, no-store, no-transform"),
        ("/complete", "no-store, no-transform"),
    ):
        response = await api.post(path, {"prompt": "x", "input": "x"})
        assert response.headers["Cache-Control"] == cache_control
        assert response.headers["X-Accel-Buffering"] == "no"
        assert [part async for part in response.body]


@pytest.mark.parametrize("query_string", [b"id=s&id=s", b"id=s&%69d=other", b"after=&after=1", b"id=%ff"])
async def test_ambiguous_query_is_refused(api, query_string):
    await api.store.create("s")
    for method, path in (("GET", "/stream/resume"), ("POST", "/stream/stop")):
        request = WebRequest(method, f"/__aibind__{path}", QueryParameters(query_string), JSON, b'{"id": "s"}')
        assert error_of(await api.handler.handle(request))[0] == 400
    assert (await api.store.get_status("s")).state == "active"
