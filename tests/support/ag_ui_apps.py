"""The same agent for AG-UI in each web framework."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

from ag_ui import core

from aibind_postgres import (
    AgUiHandler,
    AsyncAgUiHandler,
    AsyncPostgresStreamStore,
    Generation,
    PostgresStreamStore,
)
from support import webapps

PAUSES = {"slowly": 0.05, "slower": 0.5}  # seconds after each word


def script(generation: Generation) -> list[Any]:
    """Return the events of a run. A number is a pause in seconds, an exception is raised."""
    command, _, rest = generation.prompt.partition(" ")
    message_id = f"answer to {generation.stream_id}"
    text: list[Any] = [core.TextMessageStartEvent(message_id=message_id)]
    for word in rest.split():
        text.append(core.TextMessageContentEvent(message_id=message_id, delta=f"{word} "))
        text.append(PAUSES.get(command, 0))
    if command == "fail":
        return [*text, 0.2, RuntimeError("password=secret")]
    if command == "fail-first":
        return [RuntimeError("password=secret")]
    if command == "wait":
        return [*open_parts(), *text, 60]
    text.append(core.TextMessageEndEvent(message_id=message_id))
    return every_event() + text if command == "everything" else text


def open_parts() -> list[Any]:
    """Return events that open a part of each kind."""
    return [
        core.StepStartedEvent(step_name="step"),
        core.SubagentStartedEvent(subagent_run_id="a", name="helper"),
        core.StepStartedEvent(step_name="step", subagent_run_id="a"),
        core.ReasoningStartEvent(message_id="reasoning"),
        core.ReasoningMessageStartEvent(message_id="reasoning"),
        core.ReasoningMessageContentEvent(message_id="reasoning", delta="hm"),
        core.ToolCallStartEvent(tool_call_id="call", tool_call_name="look"),
        core.ToolCallArgsEvent(tool_call_id="call", delta="{"),
    ]


def every_event() -> list[Any]:
    """Return complete parts of each kind, with a `null` that must arrive."""
    return [
        core.RunStartedEvent(thread_id="own thread", run_id="own run", protocol_version="1.0"),
        *open_parts(),
        core.ToolCallArgsEvent(tool_call_id="call", delta="}"),
        core.ToolCallEndEvent(tool_call_id="call"),
        core.ToolCallResultEvent(message_id="result", tool_call_id="call", content="blue"),
        core.ReasoningMessageEndEvent(message_id="reasoning"),
        core.ReasoningEndEvent(message_id="reasoning"),
        core.StepFinishedEvent(step_name="step", subagent_run_id="a"),
        core.SubagentFinishedEvent(subagent_run_id="a"),
        core.StepFinishedEvent(step_name="step"),
        core.StateSnapshotEvent(snapshot={"colour": "red", "size": 1}),
        core.StateDeltaEvent(delta=[{"op": "replace", "path": "/colour", "value": None}]),
        {"type": "TEXT_MESSAGE_CHUNK", "messageId": "chunks", "delta": "Grüß\r\n"},
        {"type": "TEXT_MESSAGE_CHUNK", "messageId": "chunks", "delta": "dich \U0001f642\0"},
        {"type": "CUSTOM", "name": "n", "value": {"a": None}},
        'data: {"type":"ACTIVITY_SNAPSHOT","messageId":"act',
        'ivity","activityType":"PLAN","content":{"step":1}}\n\n',
        b'data: {"type":"ACTIVITY_DELTA","messageId":"activity","activityType":"PLAN","patch":'
        b'[{"op":"replace","path":"/step","value":2}]}\n\n',
    ]


def answer(generation: Generation) -> Iterator[Any]:
    for item in script(generation):
        if isinstance(item, (int, float)):
            time.sleep(item)
        elif isinstance(item, Exception):
            raise item
        else:
            yield item


async def async_answer(generation: Generation) -> AsyncIterator[Any]:
    for item in script(generation):
        if isinstance(item, (int, float)):
            await asyncio.sleep(item)
        elif isinstance(item, Exception):
            raise item
        else:
            yield item


@cache
def agent() -> Any:
    """Return an agent of pydantic-ai, which calls a tool and then writes a text."""
    from pydantic_ai import Agent
    from pydantic_ai.messages import ModelMessage
    from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        if len(messages) == 1:
            yield {0: DeltaThinkingPart(content="Which way?")}
            yield {1: DeltaToolCall(name="look", json_args='{"where":', tool_call_id="call")}
            yield {1: DeltaToolCall(json_args='"up"}')}
            return
        for word in ("The ", "sky ", "is ", "blue"):
            await asyncio.sleep(PAUSES["slowly"])
            yield word
        if "for ever" in str(messages[0]):
            await asyncio.sleep(60)

    result = Agent(FunctionModel(stream_function=stream))

    @result.tool_plain
    def look(where: str) -> str:
        return f"blue {where} there"

    return result


def pydantic_ai_source(generation: Generation, *, encode: bool) -> AsyncIterator[Any]:
    from pydantic_ai.ui.ag_ui import AGUIAdapter

    run_input = AGUIAdapter.build_run_input(generation.request.body)
    adapter: Any = AGUIAdapter(agent=agent(), run_input=run_input, ag_ui_version="1.0")
    events: AsyncIterator[Any] = adapter.run_stream()
    return adapter.encode_stream(events) if encode else events


def handler(refuse: webapps.Refuse) -> AgUiHandler:
    return AgUiHandler(answer, store=PostgresStreamStore(os.environ["DATABASE_URL"]), heartbeat=0.1)


def async_handler(refuse: webapps.Refuse) -> AsyncAgUiHandler:
    def generate(generation: Generation) -> AsyncIterator[Any]:
        if generation.prompt.startswith("pydantic-ai"):
            return pydantic_ai_source(generation, encode="encoded" in generation.prompt)
        return async_answer(generation)

    return AsyncAgUiHandler(generate, store=AsyncPostgresStreamStore(os.environ["DATABASE_URL"]), heartbeat=0.1)


def flask() -> Any:
    return webapps.flask(handler)


def fastapi() -> Any:
    return webapps.fastapi(async_handler)


def starlette() -> Any:
    return webapps.starlette(async_handler)


def django_wsgi() -> Any:
    return webapps.django_wsgi(handler)


def django_asgi() -> Any:
    return webapps.django_asgi(async_handler)
