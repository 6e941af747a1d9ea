"""Answers in plain text: each text is sent as it is produced, and the source is closed."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager

import pytest
from support.concurrency import AsyncBackground, async_until, async_workers

from aibind_postgres import AsyncPostgresStreamStore, AsyncStreamHandler, StreamEvent, WebError, WebRequest
from aibind_postgres._async.source import close_source
from aibind_postgres._concurrency import AsyncEvent

JSON = {"content-type": "application/json"}
BODY = {"input": "x", "messages": [{"role": "user", "content": "x"}]}
PATHS = pytest.mark.parametrize("path", ["/complete", "/title"])


class Answers:
    """A handler whose `generate` yields `items`. It raises exceptions among them, and waits for events."""

    def __init__(self, **options):
        self.items = []
        self.log = []
        self.options = options

    async def generate(self, generation):
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, AsyncEvent):
                    await item.wait()
                else:
                    self.log.append("yields")
                    yield item
        finally:
            self.log.append("closed")

    @asynccontextmanager
    async def context(self):
        self.log.append("entered")
        yield
        self.log.append("left")

    async def post(self, path="/complete", **fields):
        async with AsyncPostgresStreamStore("") as store:  # these routes need no database
            handler = AsyncStreamHandler(self.generate, store=store, **self.options)
            request = WebRequest("POST", f"/__aibind__{path}", {}, JSON, json.dumps(BODY).encode())
            return await handler.handle(request._replace(**fields))


@pytest.fixture
def answers():
    return Answers()


@PATHS
async def test_each_text_is_sent_before_the_next_one_is_produced(answers, path):
    gate = AsyncEvent()
    answers.items = ["to be", "", StreamEvent("usage", "{}"), gate, "\0😀"]
    response = await answers.post(path)
    assert (response.status, response.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    texts = response.body
    assert await texts.__anext__() == b"to be"
    gate.set()
    assert [text async for text in texts] == ["\0😀".encode()]
    assert answers.log == ["yields"] * 4 + ["closed"]
    await async_until(lambda: not async_workers())


async def test_source_is_read_only_as_far_as_requested(answers):
    answers.items = ["a", "b", "c"]
    texts = (await answers.post()).body
    assert await texts.__anext__() == b"a"
    assert answers.log == ["yields"]
    assert await texts.__anext__() == b"b"
    assert answers.log == ["yields", "yields"]
    await close_source(texts)
    await async_until(lambda: answers.log == ["yields", "yields", "closed"])


@pytest.mark.parametrize("items", [[], ["", StreamEvent("usage", "{}")]], ids=["nothing", "no text"])
async def test_answer_without_a_text_is_empty(answers, items):
    answers.items = items
    response = await answers.post()
    assert (response.status, response.body) == (200, b"")
    assert answers.log[-1] == "closed"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (WebError(402, "no money left"), 402, "no money left"),
        (ValueError("geheim"), 500, "internal server error"),
    ],
)
async def test_error_before_the_first_text_has_its_status(answers, error, status, text):
    answers.items = ["", StreamEvent("usage", "{}"), error]
    response = await answers.post(context=answers.context)
    assert (response.status, json.loads(response.body)) == (status, {"error": text})
    assert answers.log == ["entered", "yields", "yields", "closed"]
    await async_until(lambda: not async_workers())


async def test_invalid_item_and_source_are_errors(answers):
    for items in ([7], [StreamEvent("done", "")]):
        answers.items = items
        assert (await answers.post()).status == 500
    answers.generate = lambda generation: 7
    assert (await answers.post()).status == 500


@pytest.mark.parametrize("error", [WebError(402, "no money left"), ValueError("geheim")])
async def test_error_after_the_first_text_ends_the_body(answers, error):
    answers.items = ["half ", error, "way"]
    texts = (await answers.post()).body
    received = []
    with pytest.raises(type(error)):  # the server closes the connection
        async for text in texts:
            received.append(text)
    assert received == [b"half "]
    assert answers.log == ["yields", "closed"]


async def test_context_surrounds_the_source(answers):
    answers.items = ["a", "b"]
    response = await answers.post(context=answers.context)
    assert [text async for text in response.body] == [b"a", b"b"]
    assert answers.log == ["entered", "yields", "yields", "closed", "left"]


async def test_client_that_leaves_closes_the_source(answers):
    gate = AsyncEvent()
    answers.items = ["a", gate, "b", "c"]
    texts = (await answers.post()).body
    assert await texts.__anext__() == b"a"
    await close_source(texts)
    gate.set()  # a generator that runs in a thread cannot be interrupted
    await async_until(lambda: answers.log[-1] == "closed")
    assert answers.log.count("yields") <= 2
    await async_until(lambda: not async_workers())


async def test_client_that_does_not_read_is_disconnected():
    answers = Answers(send_timeout=0.1)
    answers.items = ["a", "b"]
    texts = (await answers.post(disconnect=lambda: answers.log.append("disconnected"))).body
    assert await texts.__anext__() == b"a"
    await async_until(lambda: answers.log == ["yields", "closed", "disconnected"])
    with pytest.raises(TimeoutError, match="the client does not read"):
        await texts.__anext__()
    await async_until(lambda: not async_workers())


async def test_body_ends_after_its_client_was_disconnected():
    answers, closing = Answers(send_timeout=0.1), AsyncEvent()

    async def generate(generation):
        try:
            yield "a"
            yield "b"
        finally:
            answers.log.append("closing")
            await closing.wait()

    answers.generate = generate
    texts = (await answers.post(disconnect=lambda: answers.log.append("disconnected"))).body
    assert await texts.__anext__() == b"a"
    await async_until(lambda: answers.log)

    async def read():
        with pytest.raises(TimeoutError):
            await texts.__anext__()
        # Else the server would use the connection for the next request, which would be disconnected.
        assert answers.log == ["closing", "disconnected"]

    async with AsyncBackground(read) as reading:
        closing.set()
        await reading.result()


async def test_response_that_is_never_sent_closes_the_source():
    answers = Answers(send_timeout=0.1)
    answers.items = ["a", "b"]
    response = await answers.post()
    assert response.status == 200
    del response
    await async_until(lambda: answers.log == ["yields", "closed"])
    await async_until(lambda: not async_workers())


async def test_slow_source_is_not_a_client_that_does_not_read():
    answers, gate = Answers(send_timeout=1), AsyncEvent()
    answers.items = ["a", gate, "b"]
    disconnected = []

    async def read():
        response = await answers.post(disconnect=lambda: disconnected.append(1))
        return [text async for text in response.body]

    async with AsyncBackground(read) as reading:
        await gate.wait(1.5)
        gate.set()
        assert await reading.result() == [b"a", b"b"]
    assert disconnected == []
