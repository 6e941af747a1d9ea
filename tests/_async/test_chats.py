"""Chats of a handler: access, the times at which turns are saved, branches, the routes of a page, and limits."""

from __future__ import annotations

import json
import logging
from functools import partial

import pytest
from support.concurrency import async_gather
from support.recording import AsyncRecordingClient

from aibind_postgres import (
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    AsyncStreamHandler,
    Resource,
    StreamEvent,
    WebError,
    WebRequest,
)
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres.sse import EventParser

JSON = {"content-type": "application/json"}
NO_STREAM = (404, {"error": "stream not found: it was never created, was deleted, or has expired"})
NO_CONVERSATION = (404, {"error": "conversation not found: it was never created, was deleted, or has expired"})
NOBODY = (401, {"error": "a conversation needs a user"})


class Chats:
    """A handler with owners, and requests to it. The answer to a prompt that begins with "wait" waits for the test."""

    def __init__(self, streams, store, **options):
        self.streams = streams
        self.store = store
        self.generations = []
        self.proceed = AsyncEvent()
        options = {"owner": lambda request: request.headers.get("user"), **options}
        self.handler = AsyncStreamHandler(self.generate, store=streams, conversations=store, **options)

    async def generate(self, generation):
        self.generations.append(generation)
        if generation.prompt == "fail":
            raise ValueError("no answer")
        yield f"{generation.prompt}:"
        if generation.prompt.startswith("wait"):
            await self.proceed.wait(30)
        yield StreamEvent("usage", "{}")
        yield f"{len(generation.messages)}"

    async def send(self, method, path, body=None, user="ann", **query):
        headers = JSON if user is None else {**JSON, "user": user}
        request = WebRequest(method, f"/__aibind__{path}", query, headers, json.dumps(body).encode())
        return await self.handler.handle(request)

    async def json(self, method, path, body=None, user="ann", **query):
        """Send a request. Return its status and its JSON body."""
        response = await self.send(method, path, body, user, **query)
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.body)

    async def ask(self, prompt, session_id="s", user="ann", **fields):
        """Start an answer, and return the id of its stream."""
        response = await self.send("POST", "/stream", {"prompt": prompt, "sessionId": session_id, **fields}, user)
        assert response.status == 200, response.body
        return response.headers["X-Stream-Id"]

    async def turn(self, prompt, session_id="s", user="ann", **fields):
        """Ask and wait for the end of the turn. Return the id of the stream."""
        id = await self.ask(prompt, session_id, user, **fields)
        await self.streams.wait(id)
        assert await AsyncDurableStream.shutdown(self.streams, 20)
        return id

    async def history(self, session_id="s"):
        """Return the contents of the current path, as the page gets them."""
        status, body = await self.json("GET", f"/conversations/{session_id}")
        assert status == 200
        nodes, leaf_id, path = body["history"]["nodes"], body["history"]["activeLeafId"], []
        while leaf_id is not None:
            path.append(nodes[leaf_id]["message"]["content"])
            leaf_id = nodes[leaf_id]["parentId"]
        return path[::-1]


@pytest.fixture
async def store(dsn, tables, table):
    async with AsyncPostgresConversationStore(dsn, table=table, status_table=tables["status_table"]) as store:
        yield store


@pytest.fixture
def chats(streams, store):
    return Chats(streams, store)


def routes_of(id, session_id):
    """Return a request to every route for a stream or a conversation."""
    message = {"role": "user", "content": "hi"}
    return [
        ("GET", "/stream/resume", None, {"id": id}),
        ("POST", "/stream/stop", {"id": id}, {}),
        ("GET", f"/conversations/{session_id}", None, {}),
        ("PATCH", f"/conversations/{session_id}", {"title": "mine"}, {}),
        ("PATCH", f"/conversations/{session_id}", {"activeLeafId": id}, {}),
        ("DELETE", f"/conversations/{session_id}", None, {}),
        ("POST", "/stream", {"prompt": "hi", "sessionId": session_id}, {}),
        ("POST", "/structured", {"prompt": "hi", "sessionId": session_id}, {}),
        ("POST", "/chat", {"messages": [message], "sessionId": session_id}, {}),
        ("POST", "/complete", {"input": "hi", "sessionId": session_id}, {}),
        ("POST", "/title", {"messages": [message], "sessionId": session_id}, {}),
        ("POST", "/compact", {"messages": [message], "sessionId": session_id}, {}),
    ]


# Access


async def test_other_users_get_404(chats, store):
    id = await chats.turn("one")
    before = (await store.load("s")).to_json()
    for number, (method, path, body, query) in enumerate(routes_of(id, "s")):
        assert await chats.json(method, path, body, "bob", **query) == (NO_STREAM if number < 2 else NO_CONVERSATION)
    for number, (method, path, body, query) in enumerate(routes_of("missing", "missing")[:6]):
        assert await chats.json(method, path, body, "bob", **query) == (NO_STREAM if number < 2 else NO_CONVERSATION)
    assert (await store.load("s")).to_json() == before
    assert len(chats.generations) == 1
    assert (await store.get_info("s")).title is None


async def test_conversations_need_a_user(chats, store):
    id = await chats.turn("one")
    for method, path, body, query in routes_of(id, "s"):
        assert await chats.json(method, path, body, None, **query) == (NO_STREAM if "id" in (body or query) else NOBODY)
    assert await chats.json("GET", "/conversations", user=None) == (
        401,
        {"error": "a list of conversations needs a user"},
    )
    for method, path, body, query in routes_of("missing", "missing")[2:]:
        assert await chats.json(method, path, body, None, **query) == NOBODY
    assert await store.get_info("missing") is None
    assert len(chats.generations) == 1


async def test_owner_uses_every_route(chats):
    id = await chats.turn("one")
    for method, path, body, query in routes_of(id, "s"):
        if method != "DELETE":
            response = await chats.send(method, path, body, **query)
            assert response.status == 200
            if not isinstance(response.body, bytes):
                assert [part async for part in response.body]
    assert await AsyncDurableStream.shutdown(chats.streams, 20)
    assert await chats.json("DELETE", "/conversations/s") == (200, {"ok": True})


async def test_conversation_without_an_owner_is_not_accessible(chats, store):
    async with store.edit("s") as chat:
        chat.append({"role": "user", "content": "secret"})
    for user in ("ann", "bob"):
        assert await chats.json("GET", "/conversations/s", user=user) == NO_CONVERSATION
        assert await chats.json("POST", "/stream", {"prompt": "hi", "sessionId": "s"}, user) == NO_CONVERSATION
    await store.describe("s", owner="ann")
    assert await chats.history() == ["secret"]


async def test_stream_belongs_to_its_owner_or_to_that_of_its_conversation(chats, streams, store):
    await chats.turn("one")
    await streams.create("of the conversation", session_id="s")
    await streams.create("of another user", session_id="s", owner="bob")
    await streams.create("of nobody")
    await streams.create("of a missing conversation", session_id="missing")
    allowed = {
        "of the conversation": {"ann"},
        "of another user": {"bob"},
        "of nobody": {"ann", "bob", "eve", None},
        "of a missing conversation": {"ann", "bob", "eve", None},
    }
    for id, users in allowed.items():
        for user in ("eve", None, "bob", "ann"):
            status, _ = await chats.json("POST", "/stream/stop", {"id": id}, user)
            assert (status == 200) == (user in users), (id, user)


async def test_simultaneous_first_questions_of_two_users_are_not_mixed(chats, store):
    results = await async_gather(
        *[
            partial(chats.send, "POST", "/stream", {"prompt": f"{user} {number}", "sessionId": "s"}, user)
            for number in range(4)
            for user in ("ann", "bob")
        ]
    )
    assert await AsyncDurableStream.shutdown(chats.streams, 20)
    owner = (await store.get_info("s")).owner
    users = ["ann", "bob"] * 4
    assert [result.status for result in results] == [200 if user == owner else 404 for user in users]
    questions = [node["message"]["content"] for node in (await store.load("s")).tree.serialize()["nodes"].values()]
    assert len(questions) == 8
    assert all(text.startswith(owner) for text in questions)


async def test_document_is_not_read_for_other_users(streams, chats, dsn, table, tables):
    await chats.turn("one")
    options = {"table": table, "status_table": tables["status_table"]}
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresConversationStore(client, **options) as store:
        assert await Chats(streams, store).json("GET", "/conversations/s", user="bob") == NO_CONVERSATION
        [loaded] = [statement.rows for statement in client.statements if "octet_length" in statement.sql]
        assert loaded[0][0] is None


async def test_stream_of_a_session_without_a_conversation_stays_with_its_user(chats, streams):
    body = {"messages": [{"role": "user", "content": "wait"}], "sessionId": "s"}
    id = (await chats.send("POST", "/chat", body, "bob")).headers["X-Stream-Id"]
    await streams.wait(await chats.ask("one"))
    assert (await chats.json("GET", "/conversations/s"))[1]["activeStreamId"] is None
    assert await chats.json("POST", "/stream/stop", {"id": id}) == NO_STREAM
    assert await chats.json("DELETE", "/conversations/s") == (200, {"ok": True})
    assert (await streams.get_info(id)).state == "active"
    assert await chats.json("POST", "/stream/stop", {"id": id}, "bob") == (200, {"ok": True})
    chats.proceed.set()


async def test_running_answer_of_another_user_is_not_shown(chats, streams, store):
    """A stream may exist longer than its conversation."""
    await chats.turn("one")
    await streams.create("of another user", session_id="s", owner="bob")
    assert (await chats.json("GET", "/conversations/s"))[1]["activeStreamId"] is None
    await streams.create("of nobody", session_id="s")
    assert (await chats.json("GET", "/conversations/s"))[1]["activeStreamId"] == "of nobody"
    assert (await store.get_info("s")).active_stream_id == "of nobody"


@pytest.mark.parametrize(("method", "body"), [("GET", None), ("PATCH", {"title": "mine"}), ("DELETE", None)])
async def test_conversation_that_another_user_creates_again_is_not_shown(streams, store, method, body):
    async def recreate(request, resource):
        """Run between the check of the owner and the use of the conversation."""
        await store.delete("s")
        async with store.edit("s", owner="bob") as chat:
            chat.append({"role": "user", "content": "secret"})
        return True

    await Chats(streams, store).turn("one")
    chats = Chats(streams, store, authorize=recreate)
    assert await chats.json(method, "/conversations/s", body) == NO_CONVERSATION
    assert (await store.get_info("s"))[:3] == ("s", "bob", None)


async def test_authorize_gets_the_resource(chats, streams, store):
    id = await chats.turn("one")
    await streams.create("other", session_id="s")
    resources = []

    async def authorize(request, resource):
        resources.append(resource)
        return resource.owner != "eve"

    checked = Chats(streams, store, owner=None, authorize=authorize)
    for stream_id in (id, "other"):
        assert (await checked.send("POST", "/stream/stop", {"id": stream_id})).status == 200
    await checked.turn("two", "s")
    await checked.turn("three", "new")
    assert resources == [
        Resource("stream", id, "ann", "s"),
        Resource("stream", "other", "ann", "s"),
        Resource("conversation", "s", "ann", "s"),
        Resource("conversation", "new", None, "new"),
    ]
    await store.describe("s", owner="eve")
    for method, path, body, query in routes_of("other", "s"):
        assert await checked.json(method, path, body, **query) == (403, {"error": "forbidden"})


def test_conversations_without_access_options_raise(streams, store):
    with pytest.raises(ValueError, match="needs owner, authorize or public"):
        AsyncStreamHandler(iter, store=streams, conversations=store)
    with pytest.raises(ValueError, match="max_running"):
        AsyncStreamHandler(iter, store=streams, max_running=1)
    with pytest.raises(ValueError, match="max_running"):
        AsyncStreamHandler(iter, store=streams, owner=iter, max_running=0)


async def test_public_conversations_have_no_list(streams, store):
    public = Chats(streams, store, owner=None, public=True)
    await public.turn("one")
    assert (await public.json("GET", "/conversations"))[0] == 404
    assert await public.history() == ["one", "one:1"]
    assert (await store.get_info("s")).owner is None


async def test_invalid_owner_is_an_error_of_the_application(streams, store, caplog):
    for owner in (7, "", "x" * 2000):
        chats = Chats(streams, store, owner=lambda request, owner=owner: owner)
        assert await chats.json("GET", "/conversations") == (500, {"error": "internal server error"})
        assert "the result of owner" in caplog.text
        caplog.clear()


async def test_owner_may_refuse(streams, store):
    def refuse(request):
        raise WebError(401, "sign in")

    chats = Chats(streams, store, owner=refuse)
    for method, path, body, query in [*routes_of("x", "s"), ("GET", "/conversations", None, {})]:
        assert await chats.json(method, path, body, **query) == (401, {"error": "sign in"})


async def test_without_the_migration_owners_are_refused_and_public_chats_work(streams, store, run, run_sql, tables):
    run("ALTER TABLE {} " + ", ".join(f"DROP COLUMN {name}" for name in ("owner", "title", "metadata", "created_at")))
    run("ALTER TABLE {} DROP COLUMN updated_at")
    status = tables["status_table"].as_string()
    columns = ("session_id", "owner", "metadata", "ttl_ms", "lease_until", "wire")
    run_sql(f"ALTER TABLE {status} " + ", ".join(f"DROP COLUMN {name}" for name in columns))
    owned = Chats(streams, store)
    for path, body in (("/stream", {"prompt": "hi", "sessionId": "s"}), ("/chat", None)):
        body = body or {"messages": [{"role": "user", "content": "hi"}]}
        assert (await owned.json("POST", path, body))[0] == 500
    public = Chats(streams, store, owner=None, public=True)
    await public.turn("one")
    await public.turn("two")
    assert await public.history() == ["one", "one:1", "two", "two:3"]
    assert await public.json("PATCH", "/conversations/s", {"activeLeafId": "missing"}) == (
        400,
        {"error": "activeLeafId is not the id of a message of this conversation"},
    )
    assert (await public.json("PATCH", "/conversations/s", {"title": "T"}))[0] == 500
    assert await public.json("DELETE", "/conversations/s") == (200, {"ok": True})
    assert await public.json("GET", "/conversations/s") == NO_CONVERSATION


# Saving questions and answers


async def test_question_is_stored_before_the_first_token(chats, streams, store):
    id = await chats.ask("wait")
    info = await store.get_info("s")
    assert (info.owner, info.active_stream_id) == ("ann", id)
    stream = await streams.get_info(id)
    assert (stream.session_id, stream.owner) == ("s", "ann")
    [node] = (await store.load("s")).tree.serialize()["nodes"].values()
    assert (node["message"]["content"], node["metadata"]) == ("wait", {"streamId": id})
    status, body = await chats.json("GET", "/conversations/s")
    assert (status, body["activeStreamId"]) == (200, id)
    chats.proceed.set()
    await streams.wait(id)
    assert await AsyncDurableStream.shutdown(streams, 20)
    assert await chats.history() == ["wait", "wait:1"]
    assert (await chats.json("GET", "/conversations/s"))[1]["activeStreamId"] is None


async def test_refused_question_is_not_stored(streams, store):
    def refuse(generation):
        raise WebError(402, "no money left")

    chats = Chats(streams, store)
    chats.handler._generate = refuse
    assert await chats.json("POST", "/stream", {"prompt": "hi", "sessionId": "s"}) == (402, {"error": "no money left"})
    assert await store.get_info("s") is None


async def test_stream_of_a_failed_turn_is_not_read_again(dsn, tables, store):
    async with AsyncRecordingClient(dsn) as client, AsyncPostgresStreamStore(client, **tables) as streams:
        chats = Chats(streams, store)
        id = await chats.turn("fail")
        client.statements.clear()
        assert await chats.history() == ["fail"]
        assert [statement for statement in client.statements if id in statement.params] == []


async def test_failed_turn_is_an_alternative_to_the_next_one(chats):
    await chats.turn("one")
    await chats.turn("fail")
    assert await chats.history() == ["one", "one:1", "fail"]
    await chats.turn("two")
    assert [message["role"] for message in chats.generations[-1].messages] == ["user", "assistant", "user"]
    assert await chats.history() == ["one", "one:1", "two", "two:3"]


async def abandon(streams, id):
    """End a stream as after the death of its process: the stream has a text, and the answer is not saved."""
    await streams.append(id, "\x01partial")
    await streams.append(id, "usage\x01{}")
    await streams.append(id, "\x01 text")
    await streams.fail(id, "the producer has died")


@pytest.fixture
async def abandoned(chats, streams, store):
    """A conversation whose last answer was abandoned, with the id of its stream."""
    await chats.turn("one")
    await streams.create("abandoned", session_id="s", owner="ann")
    async with store.edit("s") as chat:
        chat.tree.append({"role": "user", "content": "two"}, {"streamId": "abandoned"})
    await abandon(streams, "abandoned")
    return "abandoned"


async def test_abandoned_answer_is_saved_when_the_conversation_is_opened(chats, store, abandoned):
    assert await chats.history() == ["one", "one:1", "two", "partial text"]
    chat = await store.load("s")
    assert chat.tree.get(abandoned).metadata == {"state": "error"}
    assert await chats.history() == ["one", "one:1", "two", "partial text"]
    assert len(chat) == 4


async def test_abandoned_answer_is_part_of_the_next_turn(chats, abandoned):
    await chats.turn("three")
    assert [message["content"] for message in chats.generations[-1].messages] == [
        "one",
        "one:1",
        "two",
        "partial text",
        "three",
    ]


async def test_simultaneous_readers_save_an_abandoned_answer_once(chats, store, abandoned):
    responses = await async_gather(*[partial(chats.json, "GET", "/conversations/s")] * 8)
    assert [status for status, _ in responses] == [200] * 8
    chat = await store.load("s")
    assert len(chat) == 4
    assert chat.messages[-1]["content"] == "partial text"


async def test_abandoned_answer_on_another_branch_is_saved(chats, store, abandoned):
    async with store.edit("s") as chat:
        chat.tree.rewind(chat.node_ids[-1])
        chat.append({"role": "user", "content": "instead"})
    assert await chats.history() == ["one", "one:1", "instead"]
    assert (await store.load("s")).tree.path_to(abandoned).messages[-1]["content"] == "partial text"


async def test_abandoned_answer_in_another_wire_format_is_left_to_its_handler(chats, streams, store):
    await chats.turn("one")
    await streams.create("other", session_id="s", owner="ann", wire="ai_sdk")
    async with store.edit("s") as chat:
        chat.tree.append({"role": "user", "content": "two"}, {"streamId": "other"})
    await streams.append("other", '{"type":"text-delta","id":"1","delta":"hi"}')
    await streams.fail("other", "the producer has died")
    assert await chats.history() == ["one", "one:1", "two"]


async def test_abandoned_answer_of_a_deleted_stream(chats, streams, abandoned):
    await streams.delete(abandoned)
    assert await chats.history() == ["one", "one:1", "two"]
    await chats.turn("three")
    assert await chats.history() == ["one", "one:1", "three", "three:3"]


async def test_questions_in_two_tabs_are_alternatives(chats, streams):
    first, second = await async_gather(partial(chats.ask, "wait 1"), partial(chats.ask, "wait 2"))
    chats.proceed.set()
    for id in (first, second):
        await streams.wait(id)
    assert await AsyncDurableStream.shutdown(streams, 20)
    history = (await chats.json("GET", "/conversations/s"))[1]["history"]
    assert len(history["rootIds"]) == 2
    assert len(history["nodes"]) == 4
    assert {first, second} <= set(history["nodes"])
    assert len(await chats.history()) == 2


async def test_answer_does_not_move_a_page_that_shows_another_branch(chats, streams):
    await chats.turn("one")
    shown = (await chats.json("GET", "/conversations/s"))[1]["history"]["activeLeafId"]
    id = await chats.ask("wait")
    assert (await chats.json("PATCH", "/conversations/s", {"activeLeafId": shown}))[0] == 200
    chats.proceed.set()
    await streams.wait(id)
    assert await AsyncDurableStream.shutdown(streams, 20)
    assert await chats.history() == ["one", "one:1"]
    assert (await chats.json("PATCH", "/conversations/s", {"activeLeafId": id}))[0] == 200
    assert await chats.history() == ["one", "one:1", "wait", "wait:3"]


async def test_turn_survives_a_summary_of_its_conversation(chats, streams, store):
    await chats.turn("one")
    id = await chats.ask("wait")
    async with store.edit("s") as chat:
        chat.compact({"role": "system", "content": "summary"})
    chats.proceed.set()
    await streams.wait(id)
    assert await AsyncDurableStream.shutdown(streams, 20)
    assert await chats.history() == ["summary", "wait", "wait:3"]


async def test_answers_of_other_streams_are_not_added(chats, store):
    """Other code may have stored any text as the id of a stream."""
    secret = await chats.turn("secret", "of bob", user="bob")
    async with store.edit("s", owner="ann") as chat:
        for stream_id in (secret, "x" * 2000, "\0", "", 7):
            chat.tree.add_root({"role": "user", "content": "two"}, {"streamId": stream_id})
    assert await chats.history() == ["two"]
    assert len(await store.load("s")) == 5


async def test_read_only_server_shows_an_abandoned_answer(chats, streams, dsn, table, tables, abandoned):
    read_only = f"{dsn} options='-c default_transaction_read_only=on'"
    options = {"table": table, "status_table": tables["status_table"]}
    async with AsyncPostgresConversationStore(read_only, **options) as standby:
        assert await Chats(streams, standby).history() == ["one", "one:1", "two", "partial text"]
    assert await chats.history() == ["one", "one:1", "two", "partial text"]


async def test_questions_of_two_tabs_do_not_follow_each_other(chats, streams, store):
    await chats.turn("one")
    generate = chats.handler._generate

    async def slow(generation):
        chats.handler._generate = generate
        async with store.edit("s") as chat:  # as /compact in the other tab does
            chat.compact({"role": "system", "content": "summary"})
        await chats.ask("wait in the other tab")
        return generate(generation)

    chats.handler._generate = slow
    await chats.ask("wait here")
    chats.proceed.set()
    assert await AsyncDurableStream.shutdown(streams, 20)
    await chats.turn("next")
    roles = [message["role"] for message in chats.generations[-1].messages]
    assert roles == ["system", "user", "assistant", "user"]


async def test_invalid_row_is_hidden_from_other_users(chats, run):
    await chats.turn("one")
    run("UPDATE {} SET data = '[]'")
    assert await chats.json("GET", "/conversations/s", user="bob") == NO_CONVERSATION
    assert (await chats.json("GET", "/conversations/s"))[0] == 500


async def test_source_is_checked_before_the_question_is_saved(streams, store):
    chats = Chats(streams, store)
    chats.handler._generate = lambda generation: 7
    assert (await chats.json("POST", "/stream", {"prompt": "x", "sessionId": "s"}))[0] == 500
    assert await store.get_info("s") is None


async def test_stream_of_an_unsaved_question_is_deleted(chats, streams, store):
    await chats.turn("one")
    generate = chats.handler._generate

    async def delete_first(generation):
        await store.delete("s")
        return generate(generation)

    chats.handler._generate = delete_first
    assert await chats.json("POST", "/stream", {"prompt": "two", "sessionId": "s"}) == NO_CONVERSATION
    assert [info.state async for info in streams.list(state="active")] == []
    assert await store.get_info("s") is None


# Branches


async def test_failed_regeneration_keeps_the_earlier_answer(chats):
    await chats.turn("one")
    generate = chats.handler._generate

    def fail(generation):
        return generate(generation._replace(prompt="fail"))

    chats.handler._generate = fail
    await chats.turn("", regenerate=True)
    assert await chats.history() == ["one", "one:1"]


async def test_question_that_changes_before_a_regeneration_is_saved(chats, store):
    """The source was made for the earlier question, so its answer must not follow the other one."""
    await chats.turn("one")

    async def other_code(generation):
        async with store.edit("s") as chat:
            chat.append({"role": "user", "content": "by other code"})
        return chats.generate(generation)

    chats.handler._generate = other_code
    refusal = (409, {"error": "the conversation has changed: load it again"})
    assert await chats.json("POST", "/stream", {"sessionId": "s", "regenerate": True}) == refusal
    assert await chats.history() == ["one", "one:1", "by other code"]


async def test_regenerate_and_parent_id(chats):
    first = await chats.turn("one")
    await chats.turn("two")
    again = await chats.turn("ignored", regenerate=True)
    assert chats.generations[-1].prompt == "two"
    assert await chats.history() == ["one", "one:1", "two", "two:3"]
    nodes = (await chats.json("GET", "/conversations/s"))[1]["history"]["nodes"]
    question = nodes[nodes[again]["parentId"]]
    assert (question["message"]["content"], len(question["children"])) == ("two", 2)
    assert question["metadata"] == {"streamId": again}
    await chats.turn("instead", parentId=first)
    assert await chats.history() == ["one", "one:1", "instead", "instead:3"]
    await chats.turn("new", parentId=None)
    assert await chats.history() == ["new", "new:1"]
    response = await chats.send("POST", "/stream", {"sessionId": "s", "regenerate": True})
    assert response.status == 200


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"parentId": "missing"}, "parentId is not the id of a message of this conversation"),
        ({"parentId": 7}, "parentId must be a string"),
        ({"regenerate": "yes"}, "regenerate must be true or false"),
        ({"regenerate": 1}, "regenerate must be true or false"),
        (
            {"regenerate": True},
            "there is no question to answer again: parentId must be the id of a message of the user",
        ),
        (
            {"regenerate": True, "sessionId": None},
            "parentId and regenerate need a stored conversation: send its sessionId",
        ),
        (
            {"parentId": "x", "sessionId": None},
            "parentId and regenerate need a stored conversation: send its sessionId",
        ),
    ],
)
async def test_invalid_position_is_refused(chats, store, fields, error):
    body = {"prompt": "hi", "sessionId": "s", **fields}
    assert await chats.json("POST", "/stream", body) == (400, {"error": error})
    assert await store.get_info("s") is None
    assert chats.generations == []


# The routes of a page


async def test_list_of_conversations(chats, store):
    for number in range(5):
        await chats.turn("hi", f"s{number}")
    await chats.turn("hi", "of bob", user="bob")
    await chats.json("PATCH", "/conversations/s3", {"title": "Three"})
    status, body = await chats.json("GET", "/conversations", limit="2")
    assert status == 200
    assert [(each["id"], each["title"]) for each in body["conversations"]] == [("s4", None), ("s3", "Three")]
    assert set(body["conversations"][0]) == {"id", "title", "metadata", "createdAt", "updatedAt", "activeStreamId"}
    ids = []
    while body["next"]:
        _, body = await chats.json("GET", "/conversations", limit="2", before=body["next"])
        ids += [each["id"] for each in body["conversations"]]
    assert ids == ["s2", "s1", "s0"]
    assert [each["id"] for each in (await chats.json("GET", "/conversations", user="bob"))[1]["conversations"]] == [
        "of bob"
    ]


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "-1"},
        {"limit": "201"},
        {"limit": "x"},
        {"limit": "٣"},
        {"limit": "9" * 5000},
        {"before": "x"},
        {"before": "2026-01-01 s"},
        {"before": "2026-01-01T00:00:00+00:00 "},
        {"before": "2026-01-01T00:00:00+00:00 \0"},
    ],
)
async def test_invalid_page_is_refused(chats, query):
    assert (await chats.json("GET", "/conversations", **query))[0] == 400


@pytest.mark.parametrize(
    "body", [{}, {"other": 1}, {"title": 7}, {"activeLeafId": None}, {"activeLeafId": "missing"}, {"title": "\0"}, []]
)
async def test_invalid_change_is_refused(chats, store, body):
    await chats.turn("one")
    before = await store.get_info("s")
    assert (await chats.json("PATCH", "/conversations/s", body))[0] == 400
    assert await store.get_info("s") == before


async def test_page_that_only_shows_does_not_reorder_the_list(chats, streams, store, abandoned):
    await chats.turn("one", "newer")
    before = await store.get_info("s")
    assert await chats.history() == ["one", "one:1", "two", "partial text"]
    leaf = (await store.load("s")).node_ids[1]
    assert (await chats.json("PATCH", "/conversations/s", {"activeLeafId": leaf}))[0] == 200
    assert await chats.history() == ["one", "one:1"]
    assert (await store.get_info("s"))[:6] == before[:6]
    listed = (await chats.json("GET", "/conversations"))[1]["conversations"]
    assert [each["id"] for each in listed] == ["newer", "s"]
    await chats.turn("three")
    assert (await store.get_info("s")).updated_at > before.updated_at


async def test_title_is_limited(chats):
    await chats.turn("one")
    assert (await chats.json("PATCH", "/conversations/s", {"title": "ü" * 1000}))[0] == 200
    error = {"error": "title must have at most 1000 characters"}
    assert await chats.json("PATCH", "/conversations/s", {"title": "x" * 1001}) == (400, error)


async def test_change_of_the_title(chats, store):
    await chats.turn("one")
    for title in ("T", "Überschrift 🎉", None):
        status, body = await chats.json("PATCH", "/conversations/s", {"title": title})
        assert (status, body["title"], "history" in body) == (200, title, False)
        assert (await store.get_info("s")).title == title


@pytest.mark.parametrize("session_id", ["a/b", "ü 🎉", "%2F", "{id}", "list", "..", "a?b#c"])
async def test_any_id_works_in_a_path(chats, session_id):
    await chats.turn("one", session_id)
    assert await chats.history(session_id) == ["one", "one:1"]
    assert await chats.json("DELETE", f"/conversations/{session_id}") == (200, {"ok": True})


async def test_invalid_id_in_a_path(chats):
    for session_id in ("\0", "x" * 2000):
        for method, body in (("GET", None), ("PATCH", {"title": "x"}), ("DELETE", None)):
            assert (await chats.json(method, f"/conversations/{session_id}", body))[0] == 400
    assert (await chats.json("GET", "/conversations/"))[0] == 404
    status, _ = await chats.json("POST", "/conversations/s", {})
    response = await chats.send("POST", "/conversations/s", {})
    assert (status, response.headers["Allow"]) == (405, "GET, PATCH, DELETE")


async def test_delete_during_an_answer_stops_it_and_deletes_all(chats, streams, store, caplog):
    caplog.set_level(logging.ERROR, "aibind_postgres")
    await chats.turn("one")
    response = await chats.send("POST", "/stream", {"prompt": "wait", "sessionId": "s"})
    id = response.headers["X-Stream-Id"]
    assert await chats.json("DELETE", "/conversations/s") == (200, {"ok": True})
    chats.proceed.set()
    sent = b"".join([part async for part in response.body])  # ends, since the stream was stopped and deleted
    assert not [event for event in EventParser().feed(sent) if event.event == "error"]
    assert await AsyncDurableStream.shutdown(streams, 20)
    assert await store.get_info("s") is None
    assert await streams.get_status(id) is None
    assert [each async for each in streams.list(session_id="s")] == []
    assert caplog.records == []
    await chats.turn("new")
    assert await chats.history() == ["new", "new:1"]


# Limits


async def test_running_answers_of_a_user_are_limited(streams, store):
    chats = Chats(streams, store, max_running=2)
    for number in range(2):
        await chats.ask(f"wait {number}", f"s{number}")
    refused = {"error": "at most 2 answers are produced at the same time: wait for one"}
    for path, body in (
        ("/stream", {"prompt": "x", "sessionId": "s3"}),
        ("/structured", {"prompt": "x"}),
        ("/chat", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        assert await chats.json("POST", path, body) == (429, refused)
    assert await store.get_info("s3") is None
    await chats.ask("wait", "of bob", user="bob")
    await chats.ask("wait", None, user=None)
    chats.proceed.set()
    assert await AsyncDurableStream.shutdown(streams, 20)
    await chats.turn("three", "s3")


async def test_simultaneous_requests_do_not_exceed_the_limit(streams, store):
    chats = Chats(streams, store, max_running=3)
    body = {"prompt": "wait"}
    responses = await async_gather(*[partial(chats.send, "POST", "/stream", body)] * 12)
    statuses = [response.status for response in responses]
    assert statuses.count(200) <= 3
    assert statuses.count(200) + statuses.count(429) == 12
    running = [info async for info in streams.list(state="active")]
    assert len(running) == statuses.count(200)
    chats.proceed.set()
    assert await AsyncDurableStream.shutdown(streams, 20)


async def test_deletion_leaves_the_streams_of_other_users(chats, streams):
    await chats.turn("one")
    await streams.create("of another user", session_id="s", owner="bob")
    await streams.create("of nobody", session_id="s")
    assert await chats.json("DELETE", "/conversations/s") == (200, {"ok": True})
    assert [info.id async for info in streams.list()] == ["of another user"]
    assert (await streams.get_status("of another user")).state == "active"


async def test_stream_of_a_dead_process_does_not_count_as_running(streams, store, run_sql, tables):
    chats = Chats(streams, store, max_running=1)
    await streams.create("dead", owner="ann", lease=60)
    assert (await chats.json("POST", "/stream", {"prompt": "x"}))[0] == 429
    run_sql(f"UPDATE {tables['status_table'].as_string()} SET lease_until = 0")
    await chats.turn("x")


async def test_readers_of_a_user_are_limited(streams, store):
    chats = Chats(streams, store, max_readers=2)
    bodies = []
    for session_id in ("a", "b"):
        response = await chats.send("POST", "/stream", {"prompt": "wait", "sessionId": session_id})
        bodies.append(response.body)
        await anext_of(response.body)
    id = await chats.ask("wait", "of bob", user="bob")
    assert await chats.json("GET", "/stream/resume", id=id) == NO_STREAM
    own = (await store.get_info("a")).active_stream_id
    refused = (429, {"error": "the user has the maximum of 2 readers: try again later"})
    assert await chats.json("GET", "/stream/resume", id=own) == refused
    assert await chats.json("POST", "/stream", {"prompt": "x", "sessionId": "c"}) == refused
    assert await store.get_info("c") is None
    chats.proceed.set()
    for body in bodies:
        assert [part async for part in body]
    assert (await chats.send("GET", "/stream/resume", id=own)).status == 200


async def anext_of(body):
    return await body.__anext__()
