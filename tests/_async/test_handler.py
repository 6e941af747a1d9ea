"""The HTTP surface, without a framework: what each route answers, what it refuses, and what it keeps."""

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
    StreamEvent,
    StreamNotFoundError,
    WebError,
    WebRequest,
)
from aibind_postgres.sse import EventParser, ServerSentEvent

DONE = ServerSentEvent("", "done")


class World:
    """A handler, what it was asked to generate, and what it will."""

    def __init__(self, store, conversations):
        self.store = store
        self.conversations = conversations
        self.asked = []
        self.items = ["Hello", " world"]
        self.handler = self.with_options()

    def with_options(self, **options):
        return AsyncStreamHandler(self.generate, store=self.store, conversations=self.conversations, **options)

    async def generate(self, generation):
        self.asked.append(generation)
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    async def request(self, method, path, body=None, query=None, headers=None, handler=None):
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = WebRequest(method, f"/__aibind__{path}", query or {}, headers or {}, sent)
        return await (handler or self.handler).handle(request)

    async def post(self, path, body, **options):
        return await self.request("POST", path, body, **options)

    async def ended(self):
        """Wait until all that was begun has ended, and what is owed then is done."""
        assert await AsyncDurableStream.shutdown(self.store, 20)

    async def said(self, session_id):
        """Return a conversation once its turn has been saved."""
        chat = await self.conversations.load(session_id)
        return [(message["role"], message["content"]) for message in chat.messages]


@pytest.fixture
async def world(dsn, tables, schema_name):
    conversations = Identifier(schema_name, "conversations")
    async with (
        AsyncPostgresStreamStore(dsn, **tables) as store,
        AsyncPostgresConversationStore(dsn, table=conversations) as chats,
    ):
        yield World(store, chats)


async def events(response):
    parser = EventParser()
    return [event async for sent in response.body for event in parser.feed(sent)]


def refusal(response):
    assert response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(response.body)["error"]


@pytest.mark.parametrize("path", ["/stream", "/structured", "/chat"])
async def test_an_answer_is_streamed_and_resumed(world, path):
    world.items = ["Hello", StreamEvent("usage", "{}"), " world"]
    body = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "system": "be brief", "model": "fast"}
    response = await world.post(path, body)
    id = response.headers["X-Stream-Id"]
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Access-Control-Expose-Headers"] == "X-Stream-Id"
    arrived = [ServerSentEvent("Hello", id="1"), ServerSentEvent("{}", "usage", "2"), ServerSentEvent(" world", id="3")]
    assert await events(response) == [ServerSentEvent(id, "stream-id", id), *arrived, DONE]
    [asked] = world.asked
    assert asked.stream_id == id
    assert (asked.kind, asked.prompt, asked.system, asked.model) == (path[1:], "hi", "be brief", "fast")
    assert asked.messages == body["messages"]
    for after in range(4):
        for query, headers in (
            ({"id": id, "after": str(after)}, {}),
            ({"id": id, "after": "0"}, {"last-event-id": str(after)}),
        ):
            resumed = await world.request("GET", "/stream/resume", query=query, headers=headers)
            assert resumed.headers["X-Stream-Id"] == id
            assert await events(resumed) == [*arrived[after:], DONE]
    begun = await world.request("GET", "/structured/resume", query={"id": id}, headers={"last-event-id": id})
    assert await events(begun) == [*arrived, DONE]


async def test_stopping(world):
    await world.store.create("s")
    assert json.loads((await world.post("/stream/stop", {"id": "s"})).body) == {"ok": True}
    assert json.loads((await world.post("/structured/stop", {"id": "s"})).body) == {"ok": True}
    assert (await world.store.get_status("s")).state == "stopped"
    resumed = await world.request("GET", "/stream/resume", query={"id": "s"})
    assert await events(resumed) == [ServerSentEvent("", "stopped"), DONE]


async def test_texts_and_summaries(world):
    for path, body in (("/complete", {"input": "Once"}), ("/title", {"messages": [{"role": "user", "content": "hi"}]})):
        response = await world.post(path, body)
        assert (response.status, response.body) == (200, b"Hello world")
        assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert [(asked.kind, asked.prompt) for asked in world.asked] == [("complete", "Once"), ("title", "hi")]
    world.items = ["in short", StreamEvent("usage", '{"inputTokens": 9, "outputTokens": 2}')]
    said = {"messages": [{"role": "user", "content": "hi"}]}
    for path in ("/compact", "/stream/compact", "/structured/compact"):
        response = await world.post(path, said)
        assert json.loads(response.body) == {"summary": "in short", "tokensSaved": 7}
        assert world.asked[-1].kind == "compact"
    for count in ("null", "Infinity", '"many"'):
        world.items = [StreamEvent("usage", f'{{"inputTokens": {count}, "outputTokens": 1}}')]
        assert json.loads((await world.post("/compact", said)).body) == {"summary": "", "tokensSaved": 0}


async def test_a_summary_replaces_a_conversation(world):
    async def compact(generation):
        assert generation.prompt == ""
        yield ", ".join(message["content"] for message in generation.messages)

    handler = world.with_options(compact=compact)
    await events(await world.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    known = [{"role": "user", "content": "what a page that was left open knows"}]
    for messages in (known, []):
        response = await world.post("/compact", {"messages": messages, "sessionId": "a"}, handler=handler)
        assert json.loads(response.body) == {"summary": "hi, Hello world", "tokensSaved": 0}
        assert await world.said("a") == [("system", "hi, Hello world")]
    response = await world.post("/compact", {"messages": known, "sessionId": "new"}, handler=handler)
    assert json.loads(response.body)["summary"] == "what a page that was left open knows"


async def test_what_is_not_summed_up_is_not_replaced(world):
    await events(await world.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    turn = {"prompt": "said meanwhile", "sessionId": "a"}

    async def compact(generation):
        await events(await world.post("/stream", turn))
        yield "in short"

    known = [{"role": "user", "content": "hi"}]
    handler = world.with_options(compact=compact)
    response = await world.post("/compact", {"messages": known, "sessionId": "a"}, handler=handler)
    assert refusal(response) == (409, "the conversation has changed meanwhile")
    said = ["hi", "Hello world", "said meanwhile", "Hello world"]
    assert [content for _, content in await world.said("a")] == said
    async with world.conversations.edit("a") as chat:
        chat.tree.rewind(chat.node_ids[0])
    for session in ("a", "new"):
        response = await world.post("/compact", {"messages": known if session == "a" else [], "sessionId": session})
        assert refusal(response) == (400, "there is nothing to sum up")
    assert len(await world.conversations.load("a")) == 4
    assert (await world.conversations.load("new")).is_empty


async def test_a_conversation_goes_on_and_is_saved_before_an_answer_is_done(world):
    handler = world.with_options(max_messages=3)
    for number in range(1, 4):
        await events(await world.post("/stream", {"prompt": f"{number}", "sessionId": "a"}, handler=handler))
        assert (await world.said("a"))[-2:] == [("user", f"{number}"), ("assistant", "Hello world")]
    asked = [[message["content"] for message in generation.messages] for generation in world.asked]
    assert asked == [["1"], ["1", "Hello world", "2"], ["Hello world", "2", "Hello world", "3"]]
    assert world.asked[-1].prompt == "3"


@pytest.mark.parametrize("end", ["stopped", "error", "deleted"])
async def test_half_an_answer_is_saved_and_marked(world, end):
    if end == "error":
        world.items = ["Hel", ValueError("the model is gone")]

    async def generate(generation):
        yield "Hel"
        await {"stopped": world.store.stop, "deleted": world.store.delete}[end](generation.stream_id)
        for number in range(1000):
            yield f"{number}"

    handler = world.handler if end == "error" else world.with_options()
    if end != "error":
        handler._generate = generate
    response = await world.post("/stream", {"prompt": "hi", "sessionId": "a"}, handler=handler)
    if end == "error":
        assert (await events(response))[-2:] == [ServerSentEvent("the answer broke off", "error"), DONE]
    await world.ended()
    chat = await world.conversations.load("a")
    chats = chat.messages
    assert chats[0] == {"role": "user", "content": "hi"}
    assert chats[1]["content"].startswith("Hel")
    assert chat.tree.get(chat.node_ids[1]).metadata == {"state": end}
    assert chat.tree.get(chat.node_ids[0]).metadata == {}


async def test_what_is_not_authorized_is_neither_read_nor_changed(world):
    await world.store.create("s")
    await events(await world.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    asked = []

    async def authorize(request, id):
        asked.append((request.original, id))
        return request.headers.get("user") == "me"

    handler = world.with_options(authorize=authorize)
    calls = [
        ("GET", "/stream/resume", None, {"id": "s"}),
        ("GET", "/stream/resume", None, {"id": "nothing"}),
        ("POST", "/stream/stop", {"id": "s"}, None),
        ("POST", "/stream", {"prompt": "hi", "sessionId": "a"}, None),
        ("POST", "/compact", {"messages": [], "sessionId": "a"}, None),
        ("POST", "/structured", {"prompt": "hi", "sessionId": "a"}, None),
        ("POST", "/chat", {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}, None),
        ("POST", "/complete", {"input": "hi", "sessionId": "a"}, None),
        ("POST", "/title", {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}, None),
    ]
    generated = len(world.asked)
    for method, path, body, query in calls:
        assert refusal(await world.request(method, path, body, query, handler=handler)) == (403, "forbidden")
    assert [id for _, id in asked] == ["s", "nothing", "s", *"aaaaaa"]
    assert len(world.asked) == generated
    assert (await world.store.get_status("s")).state == "active"
    assert len(await world.said("a")) == 2
    mine = await world.post("/stream/stop", {"id": "s"}, headers={"user": "me"}, handler=handler)
    assert mine.status == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/nothing", {}, 404, "not found"),
        ("POST", "", {}, 404, "not found"),
        ("GET", "/stream", None, 405, "use POST"),
        ("POST", "/stream/resume", {}, 405, "use GET"),
        ("POST", "/stream", b"{", 400, "JSON"),
        ("POST", "/stream", b"\xff", 400, "JSON"),
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
        ("POST", "/compact", {"messages": []}, 400, "nothing to sum up"),
        ("POST", "/complete", {"input": ""}, 400, "input is required"),
        ("POST", "/stream/stop", {}, 400, "id is required"),
        ("POST", "/stream/stop", {"id": "nothing"}, 404, "no such stream"),
        ("GET", "/stream/resume", None, 400, "id parameter is required"),
        ("POST", "/stream", {"prompt": "x" * 10_000_000}, 413, "10000000"),
    ],
)
async def test_what_is_wrong_is_told(world, method, path, body, status, error):
    told = refusal(await world.request(method, path, body))
    assert told[0] == status
    assert error in told[1]


async def test_a_stream_whose_id_is_a_number_is_resumed_after_the_same_number(world):
    await world.store.create("1")
    await world.store.append_many("1", ["one", "two"])
    await world.store.complete("1")
    for query, headers in (({"id": "1", "after": "1"}, {}), ({"id": "1"}, {"last-event-id": "1"})):
        resumed = await world.request("GET", "/stream/resume", query=query, headers=headers)
        assert await events(resumed) == [ServerSentEvent("two", id="2"), DONE]


@pytest.mark.parametrize("after", ["-1", "1.5", "x", "٣", "9" * 16])
async def test_a_place_that_is_none_is_refused(world, after):
    await world.store.create("s")
    response = await world.request("GET", "/stream/resume", query={"id": "s", "after": after})
    assert refusal(response)[0] == 400
    missing = await world.request("GET", "/stream/resume", query={"id": "nothing"})
    assert refusal(missing) == (404, "there is no such stream")


async def test_what_generate_refuses_or_fails_at(world, caplog):
    def refuse(generation):
        raise WebError(402, "no money left")

    def refuse_without_a_word(generation):
        raise WebError(402, "")

    def fail(generation):
        raise ValueError("geheim")

    for generate, answer in (
        (refuse, (402, "no money left")),
        (refuse_without_a_word, (402, "refused")),
        (fail, (500, "the answer broke off")),
    ):
        handler = AsyncStreamHandler(generate, store=world.store)
        assert refusal(await world.post("/stream", {"prompt": "hi"}, handler=handler)) == answer
    assert "geheim" in caplog.text


@pytest.mark.parametrize("fault", [ValueError, InvalidDataError, StreamNotFoundError])
async def test_what_the_application_fails_at_is_not_told_as_a_fault_of_the_client(world, caplog, fault):
    world.items = [fault("geheim")]
    said = {"messages": [{"role": "user", "content": "hi"}], "sessionId": "a"}
    for path, body in (("/complete", {"input": "x"}), ("/compact", said)):
        caplog.clear()
        assert refusal(await world.post(path, body)) == (500, "the answer broke off")
        assert "geheim" in caplog.text

    def fail(request, id):
        raise fault("geheim")

    caplog.clear()
    handler = world.with_options(authorize=fail)
    assert refusal(await world.post("/stream/stop", {"id": "s"}, handler=handler)) == (500, "the answer broke off")
    assert "geheim" in caplog.text


async def test_another_prefix(world):
    handler = world.with_options(prefix="/ai/")
    request = WebRequest("POST", "/ai/complete", {}, {}, b'{"input": "x"}')
    assert (await handler.handle(request)).status == 200
    assert (await handler.handle(request._replace(path="/aiz/complete"))).status == 404
    assert (await handler.handle(request._replace(path="/complete"))).status == 404


@pytest.mark.parametrize(
    "option", [{"max_messages": 0}, {"max_messages": -1}, {"max_body": -1}, {"heartbeat": 0}, {"prefix": "ai"}], ids=str
)
async def test_an_option_that_is_none_is_refused(world, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        world.with_options(**option)


@pytest.mark.parametrize(
    ("id", "shown"), [("demo:1 ~", "demo:1 ~"), ("ключ", "%D0%BA%D0%BB%D1%8E%D1%87"), ("a\nb", "a%0Ab")]
)
async def test_an_id_that_no_header_can_hold_is_encoded_there(world, id, shown):
    await world.store.create(id)
    await world.store.complete(id)
    response = await world.request("GET", "/stream/resume", query={"id": id})
    assert response.headers["X-Stream-Id"] == shown
    assert await events(response) == [DONE]


@pytest.mark.parametrize("summary", ["", " \n"])
async def test_a_summary_that_says_nothing_replaces_nothing(world, summary):
    await events(await world.post("/stream", {"prompt": "hi", "sessionId": "a"}))
    world.items = [summary]
    response = await world.post("/compact", {"messages": [], "sessionId": "a"})
    assert refusal(response) == (502, "the summary is empty")
    assert await world.said("a") == [("user", "hi"), ("assistant", "Hello world")]


@pytest.mark.parametrize("items", [["a"], [ValueError("geheim")]], ids=["whole", "broken off"])
async def test_what_is_put_together_is_closed(world, items):
    closed = []

    async def generate(generation):
        try:
            for item in items:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            closed.append(generation.kind)

    await world.post("/complete", {"input": "x"}, handler=AsyncStreamHandler(generate, store=world.store))
    assert closed == ["complete"]


async def test_a_stream_that_is_deleted_while_it_is_read_ends_its_answer(world):
    id = await world.store.create()
    await world.store.append(id, "one")
    response = await world.request("GET", "/stream/resume", query={"id": id})
    body = response.body
    assert b"data: one" in await body.__anext__()
    await world.store.delete(id)
    assert [sent async for sent in body] == []


async def test_no_answer_is_kept_by_what_is_in_between(world):
    for response in (
        await world.request("GET", "/stream/resume", query={"id": "nothing"}),
        await world.post("/complete", {"input": "x"}),
        await world.post("/stream", {"prompt": "x"}),
    ):
        assert response.headers["Cache-Control"] == "no-cache"
