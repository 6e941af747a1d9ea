"""The HTTP API of AG-UI without a framework: runs, replays, stops, errors, access, and bad input."""

from __future__ import annotations

import json
import logging

import pytest
from support.concurrency import async_gather, async_until, async_workers

from aibind_postgres import (
    AsyncAgUiHandler,
    AsyncDurableStream,
    AsyncPostgresStreamStore,
    SchemaError,
    StreamEvent,
    WebError,
    WebRequest,
)
from aibind_postgres._async.source import close_source
from aibind_postgres._concurrency import AsyncEvent
from aibind_postgres.sse import EventParser

JSON = {"content-type": "application/json"}
NO_RUN = (404, {"error": "stream not found: it was never created, was deleted, or has expired"})
MESSAGES = [{"id": "u", "role": "user", "content": "hi"}]
OPEN = {"type": "TEXT_MESSAGE_START", "messageId": "m", "role": "assistant"}
DELTA = {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m", "delta": "Hello"}
CLOSE = {"type": "TEXT_MESSAGE_END", "messageId": "m"}


def ends(run_id="r", thread_id="t"):
    """Return RUN_STARTED and RUN_FINISHED of a run."""
    ids = {"threadId": thread_id, "runId": run_id}
    return {"type": "RUN_STARTED", **ids, "protocolVersion": "1.0"}, {"type": "RUN_FINISHED", **ids}


START, FINISH = ends()
CANCEL = {**FINISH, "outcome": {"type": "cancelled"}}


class Runs:
    """A handler, and requests to it. A run whose prompt is "wait" waits for the test after its first delta."""

    def __init__(self, store, **options):
        self.store = store
        self.generations = []
        self.proceed = AsyncEvent()
        self.items = [OPEN, DELTA, CLOSE]
        options = {"owner": lambda request: request.headers.get("user"), **options}
        self.handler = AsyncAgUiHandler(self.generate, store=store, **options)

    async def generate(self, generation):
        self.generations.append(generation)
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item
            if item == DELTA and generation.prompt == "wait":
                await self.proceed.wait(30)

    async def send(self, method, path, body=None, user="ann"):
        headers = JSON if user is None else {**JSON, "user": user}
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.handler.handle(WebRequest(method, f"/agent{path}", {}, headers, encoded))

    async def json(self, method, path, body=None, user="ann"):
        """Send a request. Return its status and its JSON body."""
        response = await self.send(method, path, body, user)
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.body)

    async def run(self, run_id="r", thread_id="t", user="ann", messages=MESSAGES, **fields):
        """Start a run."""
        return await self.send(
            "POST", "", {"runId": run_id, "threadId": thread_id, "messages": messages, **fields}, user
        )

    async def wait(self, run_id="r"):
        """Start a run that waits, and return its response and its first events."""
        response = await self.run(run_id, messages=[{"id": "u", "role": "user", "content": "wait"}])
        assert response.status == 200
        first = []
        while DELTA not in first:
            first += events_in(await response.body.__anext__())
        return response, first

    async def replay(self, run_id="r", user="ann"):
        return await self.send("GET", f"/{run_id}", None, user)


def events_in(encoded):
    return [json.loads(event.data) for event in EventParser().feed(encoded)]


async def events(response):
    assert response.status == 200, response.body
    return [event async for encoded in response.body for event in events_in(encoded)]


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


@pytest.fixture
async def runs(store):
    runs = Runs(store)
    yield runs
    runs.proceed.set()  # a source that waits in a thread outlives its stream
    await async_until(lambda: "aibind_postgres-producer" not in async_workers())


async def test_run(runs, store):
    fields = {"protocolVersion": "1.0", "state": {"a": 1}, "tools": [], "context": [], "forwardedProps": {"b": 2}}
    response = await runs.run(**fields)
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Stream-Id"] == "r"
    assert await events(response) == [START, OPEN, DELTA, CLOSE, FINISH]
    [generation] = runs.generations
    assert (generation.kind, generation.prompt, generation.messages) == ("run", "hi", MESSAGES)
    assert (generation.stream_id, generation.session_id, generation.owner) == ("r", "t", "ann")
    assert generation.body == {"runId": "r", "threadId": "t", "messages": MESSAGES, **fields}
    info = await store.get_info("r")
    assert (info.state, info.wire, info.session_id, info.owner) == ("done", "ag_ui", "t", "ann")


async def test_prompt_of_parts(runs):
    parts = [{"type": "text", "text": "Look "}, {"type": "image", "source": {}}, {"type": "text", "text": "up"}]
    await events(await runs.run("1", messages=[{"id": "u", "role": "user", "content": parts}]))
    await events(await runs.run("2", messages=[{"id": "a", "role": "assistant", "toolCalls": []}]))
    await events(await runs.run("3", messages=[]))
    assert [generation.prompt for generation in runs.generations] == ["Look up", "", ""]


async def test_replay_begins_with_the_start_and_follows(runs, other):
    response, first = await runs.wait()
    elsewhere = Runs(other)  # as in another process
    replay = await elsewhere.replay()
    again = []
    while DELTA not in again:
        again += events_in(await replay.body.__anext__())
    assert first == again == [START, OPEN, DELTA]
    runs.proceed.set()
    assert await events(response) == await events(replay) == [CLOSE, FINISH]
    for _ in range(2):
        assert await events(await elsewhere.replay()) == [START, OPEN, DELTA, CLOSE, FINISH]


async def test_run_continues_without_its_client(runs):
    response, _ = await runs.wait()
    await close_source(response.body)
    runs.proceed.set()
    assert await events(await runs.replay()) == [START, OPEN, DELTA, CLOSE, FINISH]


async def test_repeated_post_replays_the_run(runs):
    response, _ = await runs.wait()
    repeated = await runs.run(messages=[{"id": "v", "role": "user", "content": "another question"}])
    runs.proceed.set()
    assert await events(repeated) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert await events(await runs.run(thread_id="another")) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert await events(response) == [CLOSE, FINISH]
    assert len(runs.generations) == 1


async def test_simultaneous_posts_run_once(runs):
    responses = await async_gather(*[runs.run] * 4)
    expected = [START, OPEN, DELTA, CLOSE, FINISH]
    assert [await events(response) for response in responses] == [expected] * 4
    assert len(runs.generations) == 1


async def test_post_that_creates_no_stream_responds_with_the_existing_run(runs, store, monkeypatch):
    """As if another process had created the stream after the request looked for it."""
    await events(await runs.run())
    found = store.get_info
    answers = [None]

    async def get_info(stream_id):
        return answers.pop() if answers else await found(stream_id)

    monkeypatch.setattr(store, "get_info", get_info)
    assert await events(await runs.run()) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert len(runs.generations) == 1


async def test_stop(runs, store, other):
    response, _ = await runs.wait()
    assert await Runs(other).json("POST", "/r/stop", b"") == (200, {"ok": True})
    assert await events(response) == [CLOSE, CANCEL]
    assert await events(await runs.replay()) == [START, OPEN, DELTA, CLOSE, CANCEL]
    assert await events(await runs.run()) == [START, OPEN, DELTA, CLOSE, CANCEL]
    assert await runs.json("POST", "/r/stop", {}) == (200, {"ok": True})  # no effect
    assert (await store.get_status("r")).state == "stopped"
    assert await AsyncDurableStream.shutdown(store, 20)  # the source was closed


async def test_error_of_the_source(runs, caplog):
    runs.items = [OPEN, ValueError("secret")]
    assert await events(await runs.run("1")) == [
        ends("1")[0],
        OPEN,
        {"type": "RUN_ERROR", "message": "the answer was interrupted"},
    ]
    assert "secret" in caplog.text
    runs.items = [WebError(402, "no credit")]
    assert await events(await runs.run("2")) == [ends("2")[0], {"type": "RUN_ERROR", "message": "no credit"}]
    assert await events(await runs.replay("2")) == [ends("2")[0], {"type": "RUN_ERROR", "message": "no credit"}]
    exposed = Runs(runs.store, expose_errors=True)
    exposed.items = [ValueError("visible")]
    assert (await events(await exposed.run("3")))[-1] == {"type": "RUN_ERROR", "message": "visible"}
    runs.items = [StreamEvent("text", "no event of the protocol")]
    assert (await events(await runs.run("4")))[-1]["type"] == "RUN_ERROR"


async def test_refusal_by_generate(store):
    def refuse(generation):
        raise WebError(402, "no credit")

    runs = Runs(store)
    runs.handler = AsyncAgUiHandler(refuse, store=store)
    assert await runs.json("POST", "", {"runId": "r", "threadId": "t", "messages": []}) == (402, {"error": "no credit"})
    assert await store.get_info("r") is None


async def test_abandoned_run(runs, store):
    await store.create("r", session_id="t", owner="ann", wire="ag_ui")
    await store.append("r", json.dumps(START))
    await store.fail("r", "the process has died")
    assert await events(await runs.replay()) == [START, {"type": "RUN_ERROR", "message": "the process has died"}]


async def test_end_before_the_first_event(runs, store):
    await store.create("r", session_id="t", owner="ann", wire="ag_ui")
    await store.stop("r")
    assert await events(await runs.replay()) == [START, CANCEL]


async def test_deletion_during_reading(runs, store, caplog):
    caplog.set_level(logging.INFO, "aibind_postgres")
    response, _ = await runs.wait()
    await store.delete("r")
    assert await events(response) == [{"type": "RUN_ERROR", "message": "the answer was deleted"}]
    assert await runs.json("GET", "/r") == NO_RUN
    runs.proceed.set()
    assert await events(await runs.run()) == [START, OPEN, DELTA, CLOSE, FINISH]  # a new run


async def test_runs_of_other_users_are_as_missing_ones(runs, store):
    await events(await runs.run())
    body = {"runId": "r", "threadId": "t", "messages": MESSAGES}
    for user in ("bob", None):
        for method, path, content in (("GET", "/r", None), ("POST", "/r/stop", {}), ("POST", "", body)):
            assert await runs.json(method, path, content, user) == NO_RUN
    for method, path in (("GET", "/missing"), ("POST", "/missing/stop")):
        assert await runs.json(method, path, {}) == NO_RUN
    assert len(runs.generations) == 1


async def test_without_owner_the_id_gives_access(store):
    runs = Runs(store, owner=None)
    await events(await runs.run(user=None))
    assert (await events(await runs.replay(user="bob")))[-1] == FINISH
    assert await runs.json("POST", "/r/stop", {}, None) == (200, {"ok": True})
    assert await runs.json("GET", "/missing", None, None) == NO_RUN
    assert await runs.json("POST", "/missing/stop", {}, None) == NO_RUN


async def test_streams_of_other_handlers_are_no_runs(runs, store):
    await store.create("r", owner="ann")
    for method, path, content in (
        ("GET", "/r", None),
        ("POST", "/r/stop", {}),
        ("POST", "", {"runId": "r", "threadId": "t", "messages": []}),
    ):
        assert await runs.json(method, path, content) == NO_RUN
    assert (await store.get_status("r")).state == "active"


async def test_authorize(store):
    checked = []

    async def authorize(request, resource):
        checked.append(tuple(resource))
        return resource.id != "private"

    runs = Runs(store, authorize=authorize)
    forbidden = (403, {"error": "forbidden"})
    body = {"runId": "r", "threadId": "private", "messages": []}
    assert await runs.json("POST", "", body) == forbidden
    await events(await runs.run())
    await events(await runs.replay())
    assert checked == [
        ("conversation", "private", None, "private"),
        ("conversation", "t", None, "t"),
        ("stream", "r", "ann", "t"),
    ]
    await events(await runs.run("private"))
    assert await runs.json("GET", "/private") == forbidden
    assert await runs.json("POST", "/private/stop", {}) == forbidden


async def test_limits(store):
    runs = Runs(store, max_running=1, max_readers=2, max_body=1000)
    response, _ = await runs.wait()
    assert (await runs.run("2")).status == 429
    assert await store.get_info("2") is None
    replay = await runs.run()  # the running run, so it is not refused
    assert replay.status == 200
    assert (await runs.replay()).status == 429
    runs.proceed.set()
    assert await events(response) == [CLOSE, FINISH]
    assert await events(replay) == [START, OPEN, DELTA, CLOSE, FINISH]
    assert (await runs.run("3", state="x" * 1000)).status == 413


VALID = {"runId": "r", "threadId": "t", "messages": []}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "the body is not JSON in UTF-8"),
        (b"{", "the body is not JSON in UTF-8"),
        (b"\xff", "the body is not JSON in UTF-8"),
        (b"[" * 50_000, "the body is not JSON in UTF-8"),
        ([], "the body must be a JSON object"),
        ({}, "runId is required"),
        ({**VALID, "runId": 7}, "runId must be a string"),
        ({**VALID, "runId": " "}, "runId is required"),
        ({**VALID, "threadId": None}, "threadId is required"),
        ({**VALID, "threadId": ["t"]}, "threadId must be a string"),
        ({"runId": "r", "threadId": "t"}, "messages must be a list"),
        ({**VALID, "messages": {}}, "messages must be a list"),
        ({**VALID, "messages": ["hi"]}, "each message must be an object with a role"),
        ({**VALID, "messages": [{"content": "hi"}]}, "each message must be an object with a role"),
        ({**VALID, "tools": {}}, "tools must be a list"),
        ({**VALID, "context": "x"}, "context must be a list"),
        ({**VALID, "resume": 1}, "resume must be a list"),
        ({**VALID, "runId": "."}, "runId must not be '.' or '..', and must not end with '/stop'"),
        ({**VALID, "runId": ".."}, "runId must not be '.' or '..', and must not end with '/stop'"),
        ({**VALID, "runId": "a/stop"}, "runId must not be '.' or '..', and must not end with '/stop'"),
        ({**VALID, "runId": "a\0"}, "runId"),
        ({**VALID, "runId": "\ud800"}, "runId"),
        ({**VALID, "runId": "x" * 1025}, "runId must be at most 1024 bytes long in UTF-8"),
        ({**VALID, "threadId": "a\0"}, "a session id"),
        ({**VALID, "threadId": "x" * 1025}, "a session id must be at most 1024 bytes long in UTF-8"),
    ],
)
async def test_bad_input(runs, body, text):
    status, answer = await runs.json("POST", "", body)
    assert (status, answer["error"][: len(text)]) == (400, text)
    assert runs.generations == []


async def test_many_values(runs):
    body = b'{"runId":"r","threadId":"t","messages":[],"state":[' + b"1," * 200_000 + b"1]}"
    assert (await runs.send("POST", "", body)).status == 413


@pytest.mark.parametrize("id", ["a/b", "../x", "%2e", "r?x#y", "a\nb", "'; --", "Grüße \U0001f642", "x" * 1024, "stop"])
async def test_hostile_ids(runs, id):
    start, finish = ends(id, id)
    response = await runs.run(id, id)
    assert response.headers["X-Stream-Id"].isascii()
    assert await events(response) == [start, OPEN, DELTA, CLOSE, finish]
    assert await events(await runs.replay(id)) == [start, OPEN, DELTA, CLOSE, finish]
    assert await runs.json("POST", f"/{id}/stop", {}) == (200, {"ok": True})


async def test_invalid_ids_in_paths(runs):
    for id in ("a\0", "\ud800", "x" * 1025):
        assert (await runs.json("GET", f"/{id}"))[0] == 400
        assert (await runs.json("POST", f"/{id}/stop", {}))[0] == 400


async def test_methods_and_other_requests(runs):
    for method, path, allowed in (("GET", "", "POST"), ("POST", "/r", "GET"), ("GET", "/r/stop", "POST")):
        response = await runs.send(method, path, {})
        assert (response.status, response.headers["Allow"]) == (405, allowed)
    plain = WebRequest("POST", "/agent", {}, {"content-type": "text/plain"}, json.dumps(VALID).encode())
    assert (await runs.handler.handle(plain)).status == 415
    foreign = WebRequest("GET", "/agent/r", {}, {"origin": "https://evil.example", "host": "here"}, b"")
    assert (await runs.handler.handle(foreign)).status == 403
    assert (await runs.handler.handle(WebRequest("GET", "/agents", {}, {}, b""))).status == 404


async def test_missing_migration(dsn, tables, run_sql, schema_name, caplog):
    columns = ("session_id", "owner", "metadata", "ttl_ms", "lease_until", "wire")
    run_sql(f'ALTER TABLE "{schema_name}".status ' + ", ".join(f"DROP COLUMN {name}" for name in columns))
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        for options in ({}, {"owner": None}):
            assert (await Runs(store, **options).run()).status == 500
    assert [type(record.exc_info[1]) for record in caplog.records] == [SchemaError] * 2


def test_arguments(store):
    with pytest.raises(ValueError, match="prefix"):
        AsyncAgUiHandler(iter, store=store, prefix="agent")
    with pytest.raises(ValueError, match="max_running"):
        AsyncAgUiHandler(iter, store=store, max_running=1)
    with pytest.raises(TypeError, match="store"):
        AsyncAgUiHandler(iter, store=None)
