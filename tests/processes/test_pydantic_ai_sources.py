"""Runs of pydantic-ai, which needs Python 3.11, copied into durable streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

pydantic_ai = pytest.importorskip("pydantic_ai")

from ag_ui.core import RunAgentInput, UserMessage  # noqa: E402  # after the check
from pydantic_ai import Agent, CancellationToken  # noqa: E402
from pydantic_ai.exceptions import RunCancelled  # noqa: E402
from pydantic_ai.models.function import DeltaThinkingPart, DeltaToolCall, FunctionModel  # noqa: E402
from pydantic_ai.models.test import TestModel  # noqa: E402
from pydantic_ai.ui.ag_ui import AGUIAdapter  # noqa: E402
from pydantic_ai.ui.vercel_ai import VercelAIAdapter  # noqa: E402

from aibind_postgres import (  # noqa: E402
    AsyncAiSdkHandler,
    AsyncDurableStream,
    AsyncPostgresConversationStore,
    AsyncPostgresStreamStore,
    Generation,
    WebRequest,
)
from aibind_postgres.models import StreamStatus  # noqa: E402
from aibind_postgres.sources.pydantic_ai import ag_ui, vercel_ai  # noqa: E402

TIMEOUT = 60


@pytest.fixture
async def store(dsn, tables):
    async with AsyncPostgresStreamStore(dsn, **tables) as store:
        yield store


class Recorder:
    """Records the end of a model's stream and of its run."""

    def __init__(self) -> None:
        self.token = CancellationToken()
        self.is_closed = asyncio.Event()  # whether the stream of the model was closed
        self.cancelled: list[RunCancelled] = []

    async def on_cancel(self, cancelled: RunCancelled) -> None:
        await asyncio.sleep(0.01)  # as a query would
        self.cancelled.append(cancelled)


@pytest.fixture
async def recorder():
    return Recorder()


QUESTION = {"id": "m", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}


def adapter_of(agent: Any, messages: Sequence[Any] = (QUESTION,)) -> VercelAIAdapter:
    body = {"trigger": "submit-message", "id": "chat", "messages": list(messages)}
    run_input = VercelAIAdapter.build_run_input(json.dumps(body).encode())
    return VercelAIAdapter(agent=agent, run_input=run_input, sdk_version=6)


def ag_ui_adapter_of(agent: Any) -> AGUIAdapter:
    question = UserMessage(id="m", role="user", content="Hi")
    run_input = RunAgentInput(
        thread_id="thread", run_id="run", state={}, messages=[question], tools=[], context=[], forwarded_props={}
    )
    return AGUIAdapter(agent=agent, run_input=run_input)


def run(
    agent: Any, recorder: Recorder, messages: Sequence[Any] = (QUESTION,), *, encoded: bool = False
) -> AsyncIterator[Any]:
    """Return the source of a run."""
    adapter = adapter_of(agent, messages)
    events = adapter.run_stream(cancellation_token=recorder.token, on_cancel=recorder.on_cancel)
    return vercel_ai(adapter.encode_stream(events) if encoded else events, recorder.token)


def weather_agent(model: Any) -> Agent:
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        return f"sunny in {city}"

    return agent


def waiting_model(recorder: Recorder, release: asyncio.Event) -> FunctionModel:
    """A model that writes one text, then waits, then writes another."""

    async def answer(messages: Any, info: Any) -> AsyncIterator[str]:
        try:
            yield "Half"
            await release.wait()
            yield " and half."
        finally:
            recorder.is_closed.set()

    return FunctionModel(stream_function=answer)


async def chunks_of(store: AsyncPostgresStreamStore, id: str) -> list[dict[str, Any]]:
    return [json.loads(chunk.data) async for chunk in store.read_from(id)]


async def produced(store: AsyncPostgresStreamStore, source: Any) -> tuple[list[dict[str, Any]], StreamStatus]:
    stream = await AsyncDurableStream.start(store, source, wire="ai_sdk")
    status = await stream.wait(TIMEOUT)
    return await chunks_of(store, stream.id), status


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join([chunk["delta"] for chunk in chunks if chunk["type"] == "text-delta"])


@pytest.mark.parametrize("encoded", [False, True], ids=["events", "strings"])
async def test_tools_and_text(store, recorder, encoded):
    chunks, status = await produced(store, run(weather_agent(TestModel()), recorder, encoded=encoded))
    assert status.state == "done"
    call = {"toolCallId": "pyd_ai_tool_call_id__weather"}
    assert [chunk for chunk in chunks if chunk["type"].startswith("tool-") and "delta" not in chunk["type"]] == [
        {"type": "tool-input-start", "toolName": "weather"} | call,
        {"type": "tool-input-available", "toolName": "weather", "input": {"city": "a"}} | call,
        {"type": "tool-output-available", "output": "sunny in a"} | call,
    ]
    assert json.loads(text_of(chunks)) == {"weather": "sunny in a"}
    types = [chunk["type"] for chunk in chunks]
    assert [types.count(each) for each in ("start", "start-step", "finish-step", "finish")] == [1, 2, 2, 1]
    assert (types[0], types[-1]) == ("start", "finish")
    assert not recorder.token.cancelled


async def test_reasoning(store, recorder):
    async def answer(messages: Any, info: Any) -> AsyncIterator[Any]:
        yield {0: DeltaThinkingPart(content="Hm.")}
        yield "Yes."

    chunks, _ = await produced(store, run(Agent(FunctionModel(stream_function=answer)), recorder))
    assert [chunk["delta"] for chunk in chunks if chunk["type"] == "reasoning-delta"] == ["Hm."]
    assert text_of(chunks) == "Yes."


async def test_client_that_leaves_does_not_cancel_the_run(store, recorder):
    release = asyncio.Event()
    source = run(Agent(waiting_model(recorder, release)), recorder)
    stream = await AsyncDurableStream.start(store, source, wire="ai_sdk")
    reader = stream.sse()
    async for _ in reader:
        break
    await reader.aclose()
    release.set()
    assert (await stream.wait(TIMEOUT)).state == "done"
    assert text_of(await chunks_of(store, stream.id)) == "Half and half."
    assert (recorder.token.cancelled, recorder.cancelled) == (False, [])


async def test_stop_cancels_the_run_through_its_token(store, recorder):
    source = run(Agent(waiting_model(recorder, asyncio.Event())), recorder)
    stream = await AsyncDurableStream.start(store, source, wire="ai_sdk")
    async for event in stream.sse():
        if b"Half" in event:
            await stream.stop()
    assert await store.get_status(stream.id) == StreamStatus("stopped", None, 4)
    await asyncio.wait_for(recorder.is_closed.wait(), TIMEOUT)
    await until(lambda: recorder.cancelled)
    [cancelled] = recorder.cancelled
    [_, answer] = cancelled.all_messages()
    assert [part.content for part in answer.parts] == ["Half"]


async def test_stop_while_a_tool_runs(store, recorder):
    async def answer(messages: Any, info: Any) -> AsyncIterator[Any]:
        yield {0: DeltaToolCall(name="slow", json_args="{}", tool_call_id="call_a")}

    agent = Agent(FunctionModel(stream_function=answer))

    @agent.tool_plain
    async def slow() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            recorder.is_closed.set()
        return ""

    stream = await AsyncDurableStream.start(store, run(agent, recorder), wire="ai_sdk")
    async for event in stream.sse():
        if b"tool-input-available" in event:
            await stream.stop()
    await asyncio.wait_for(recorder.is_closed.wait(), TIMEOUT)
    await until(lambda: recorder.cancelled)


async def test_closing_a_source_waits_for_the_end_of_the_run(recorder):
    source = run(Agent(waiting_model(recorder, asyncio.Event())), recorder)
    await anext(source)
    await source.aclose()
    assert recorder.is_closed.is_set() or not recorder.cancelled[0].all_messages()[1:]
    assert len(recorder.cancelled) == 1


async def test_closing_a_source_that_is_never_read(recorder):
    source = run(Agent(waiting_model(recorder, asyncio.Event())), recorder)
    await source.aclose()
    assert (recorder.token.cancelled, recorder.is_closed.is_set()) == (False, False)


async def test_interrupted_wait_cancels_the_run(recorder):
    """As at the end of the event loop, which cancels a task again."""
    is_waiting, is_cancelled = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncIterator[str]:
        yield "data: {}\n\n"
        try:
            is_waiting.set()
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    async def read() -> None:
        async for _ in vercel_ai(events(), recorder.token):
            pass

    task = asyncio.create_task(read())
    await is_waiting.wait()
    task.cancel()
    await until(lambda: recorder.token.cancelled)  # nothing listens to this token
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    await until(is_cancelled.is_set)


async def test_error_of_the_model_ends_the_stream(store, recorder, caplog):
    async def answer(messages: Any, info: Any) -> AsyncIterator[str]:
        yield "Half"
        raise ValueError("too busy")

    chunks, status = await produced(store, run(Agent(FunctionModel(stream_function=answer)), recorder))
    assert text_of(chunks) == "Half"
    assert (status.state, status.error) == ("error", "the answer was interrupted")
    assert "too busy" in caplog.text
    assert chunks[-1]["type"] == "text-end"


async def test_error_of_the_events_ends_the_stream(store, recorder):
    async def events() -> AsyncIterator[str]:
        yield 'data: {"type":"start"}\n\n'
        raise ValueError("broken")

    stream = await AsyncDurableStream.start(store, vercel_ai(events(), recorder.token), wire="ai_sdk")
    assert (await stream.wait(TIMEOUT)).state == "error"


async def test_error_of_on_cancel_is_logged(recorder, caplog):
    async def on_cancel(cancelled: RunCancelled) -> None:
        raise ValueError("no database")

    adapter = adapter_of(Agent(waiting_model(recorder, asyncio.Event())))
    source = vercel_ai(adapter.run_stream(cancellation_token=recorder.token, on_cancel=on_cancel), recorder.token)
    await anext(source)
    await source.aclose()
    [record] = caplog.records
    assert record.getMessage() == "a cancelled run of pydantic-ai raised"
    assert str(record.exc_info[1]) == "no database"


@pytest.mark.parametrize("encoded", [False, True], ids=["events", "strings"])
async def test_ag_ui(store, recorder, encoded):
    adapter = ag_ui_adapter_of(weather_agent(TestModel()))
    events = adapter.run_stream(cancellation_token=recorder.token)
    source = ag_ui(adapter.encode_stream(events) if encoded else events, recorder.token)
    stream = await AsyncDurableStream.start(store, source, wire="ag_ui")
    assert (await stream.wait(TIMEOUT)).state == "done"
    types = [chunk["type"] for chunk in await chunks_of(store, stream.id)]
    assert (types[0], types[-1]) == ("RUN_STARTED", "RUN_FINISHED")
    assert "TOOL_CALL_RESULT" in types


async def test_stop_cancels_a_run_of_ag_ui(store, recorder):
    adapter = ag_ui_adapter_of(Agent(waiting_model(recorder, asyncio.Event())))
    events = adapter.run_stream(cancellation_token=recorder.token, on_cancel=recorder.on_cancel)
    stream = await AsyncDurableStream.start(store, ag_ui(events, recorder.token), wire="ag_ui")
    async for event in stream.sse():
        if b"Half" in event:
            await stream.stop()
    await until(lambda: recorder.cancelled)


async def test_handler_for_usechat(store, conversations, recorder, dsn):
    """The model gets the stored messages, and the chat gets the messages of the run."""
    received = []

    async def answer(messages: Any, info: Any) -> AsyncIterator[str]:
        received.append([part.content for message in messages for part in message.parts])
        yield f"Answer {len(received)}"

    def generate(generation: Generation) -> AsyncIterator[Any]:
        return run(Agent(FunctionModel(stream_function=answer)), Recorder(), generation.ui_messages)

    async def ask(id: str, text: str) -> None:
        message = {"id": id, "role": "user", "parts": [{"type": "text", "text": text}]}
        body = json.dumps({"id": "chat", "messages": [message], "trigger": "submit-message"}).encode()
        headers = {"content-type": "application/json"}
        response = await handler.handle(WebRequest("POST", "/api/chat", {}, headers, body))
        async for _ in response.body:
            pass

    async with AsyncPostgresConversationStore(dsn, table=conversations) as chats:
        handler = AsyncAiSdkHandler(generate, store=store, conversations=chats, public=True)
        await ask("1", "One")
        await ask("2", "Two")
        response = await handler.handle(WebRequest("GET", "/api/chat/chat", {}, {}, b""))
    assert received == [["One"], ["One", "Answer 1", "Two"]]
    parts = [part for message in json.loads(response.body)["messages"] for part in message["parts"]]
    assert [part["text"] for part in parts if part["type"] == "text"] == ["One", "Answer 1", "Two", "Answer 2"]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)
