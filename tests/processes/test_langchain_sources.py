"""Streams of LangChain's models and of LangGraph's graphs, from models for tests."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from support.source_streams import TIMEOUT, Async, Sync

from aibind_postgres.errors import InvalidDataError
from aibind_postgres.sources import langchain
from aibind_postgres.wire.ai_sdk import reasoning


@pytest.fixture(params=[Sync, Async])
def flavour(request, dsn, tables):
    return request.param(dsn, tables)


def messages_of(flavour: Sync | Async, model: Any, value: Any, **options: Any) -> Iterator[Any] | AsyncIterator[Any]:
    """Return the source of a call of a model or graph."""
    run = model.stream if isinstance(flavour, Sync) else model.astream
    return langchain.messages(run(value, **options))


class ScriptedModel(GenericFakeChatModel):
    """Streams the given pieces, one list for each call."""

    def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Iterator[Any]:
        for each in next(self.messages):
            if isinstance(each, Exception):
                raise each
            chunk = ChatGenerationChunk(message=each.model_copy())
            if run_manager:
                run_manager.on_llm_new_token("", chunk=chunk)
            yield chunk


def scripted(*calls: Iterable[Any]) -> ScriptedModel:
    return ScriptedModel.model_construct(messages=iter(calls))


def tool_piece(index: int | None, args: str, id: str | None = None, name: str | None = None) -> AIMessageChunk:
    call = {"type": "tool_call_chunk", "index": index, "id": id, "name": name, "args": args}
    return AIMessageChunk(content="", tool_call_chunks=[call])


CALLS = [tool_piece(0, "", "call_a", "weather"), tool_piece(0, '{"city":'), tool_piece(0, '"Rome"}')]


@tool
def weather(city: str) -> str:
    """The weather."""
    if city == "Atlantis":
        raise ValueError("no such city")
    return f"sunny in {city}"


def agent(model: Any) -> Any:
    """A graph that calls a model and its tools until the model calls none."""

    def ask(state, config):  # Python 3.10 has no tasks with a context, so LangGraph needs the config there
        return {"messages": [model.invoke(state["messages"], config)]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", ask)
    graph.add_node("tools", ToolNode([weather], handle_tool_errors=True))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


QUESTION = {"messages": [HumanMessage("Hi")]}
WEATHER_INPUT = {
    "type": "tool-input-available",
    "toolCallId": "call_a",
    "toolName": "weather",
    "input": {"city": "Rome"},
}


def test_langchain_text(flavour):
    model = GenericFakeChatModel(messages=iter(["Hello, wide world!"]))
    produced = flavour.produce(messages_of(flavour, model, "Hi"))
    assert produced.text == "Hello, wide world!"
    assert len(produced.of("text-delta")) == 5
    assert produced.status.state == "done"


def test_langchain_reasoning(flavour):
    blocks = [{"type": "reasoning", "reasoning": "Hm. "}], [{"type": "text", "text": "Yes."}]
    of_deepseek = AIMessageChunk(content="", additional_kwargs={"reasoning_content": "Let me "})
    model = scripted([of_deepseek, *[AIMessageChunk(content=block) for block in blocks]])
    produced = flavour.produce(messages_of(flavour, model, "Hi"))
    assert (produced.reasoning, produced.text) == ("Let me Hm. ", "Yes.")


def test_langchain_tool_calls(flavour):
    pieces = [*CALLS, tool_piece(1, '{"city": 1}', "call_b", "weather")]
    assert flavour.produce(messages_of(flavour, scripted(pieces), "Hi")).chunks[2:-2] == [
        {"type": "tool-input-start", "toolCallId": "call_a", "toolName": "weather"},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '{"city":'},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '"Rome"}'},
        {"type": "tool-input-start", "toolCallId": "call_b", "toolName": "weather"},
        {"type": "tool-input-delta", "toolCallId": "call_b", "inputTextDelta": '{"city": 1}'},
        WEATHER_INPUT,
        WEATHER_INPUT | {"toolCallId": "call_b", "input": {"city": 1}},
    ]


def test_langgraph_text(flavour):
    model = GenericFakeChatModel(messages=iter(["Hello, wide world!"]))
    produced = flavour.produce(messages_of(flavour, agent(model), QUESTION, stream_mode="messages"))
    assert produced.text == "Hello, wide world!"
    assert len(produced.of("text-delta")) == 5


def test_langgraph_tools_and_steps(flavour):
    model = scripted(CALLS, [AIMessageChunk(content="It is "), AIMessageChunk(content="sunny.")])
    produced = flavour.produce(messages_of(flavour, agent(model), QUESTION, stream_mode="messages"))
    assert produced.types == [
        "start", "start-step", "tool-input-start", "tool-input-delta", "tool-input-available", "tool-output-available",
        "finish-step", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish",
    ]  # fmt: skip
    assert produced.of("tool-input-available", "tool-output-available") == [
        WEATHER_INPUT,
        {"type": "tool-output-available", "toolCallId": "call_a", "output": "sunny in Rome"},
    ]
    assert produced.text == "It is sunny."


def test_langgraph_error_of_a_tool(flavour):
    calls = [tool_piece(0, '{"city": "Atlantis"}', "call_a", "weather")]
    model = scripted(calls, [AIMessageChunk(content="Sorry.")])
    produced = flavour.produce(messages_of(flavour, agent(model), QUESTION, stream_mode="messages"))
    [error] = produced.of("tool-output-error")
    assert "no such city" in error["errorText"]
    assert (produced.text, produced.status.state) == ("Sorry.", "done")


def test_langgraph_messages_that_are_not_streamed(flavour):
    call = {"name": "weather", "args": {"city": "Rome"}, "id": "call_a"}
    invalid = {"name": "weather", "args": "{", "id": "call_b", "error": None, "type": "invalid_tool_call"}
    items = [
        (HumanMessage("Hi"), {}),
        (AIMessage("Let me see.", tool_calls=[call], invalid_tool_calls=[invalid]), {}),
        (ToolMessage("sunny", tool_call_id="call_a"), {}),
        (ToolMessage("of an earlier answer", tool_call_id="call_0"), {}),
    ]
    produced = flavour.produce(langchain.messages(flavour.iterate(items)))
    assert produced.text == "Let me see."
    assert produced.of("tool-input-available") == [WEATHER_INPUT]
    assert [chunk["input"] for chunk in produced.of("tool-input-error")] == ["{"]
    assert [chunk["output"] for chunk in produced.of("tool-output-available")] == ["sunny"]
    assert produced.status.state == "done"


def test_langgraph_message_without_a_last_piece(flavour):
    items = [*CALLS, ToolMessage("sunny", tool_call_id="call_a")]
    produced = flavour.produce(langchain.messages(flavour.iterate(items)))
    assert produced.types[-4:-2] == ["tool-input-available", "tool-output-available"]


def test_langgraph_parallel_nodes(flavour):
    first, second = ([each.model_copy(update={"id": id}) for each in CALLS] for id in ("a", "b"))
    second[0] = tool_piece(0, "", "call_b", "weather").model_copy(update={"id": "b"})
    items = [each for pair in zip(first, second, strict=True) for each in pair]
    last = AIMessageChunk(content="", id="a", chunk_position="last")
    produced = flavour.produce(langchain.messages(flavour.iterate([*items[:4], items[4], last, items[5]])))
    assert produced.of("tool-input-available") == [WEATHER_INPUT, WEATHER_INPUT | {"toolCallId": "call_b"}]
    assert produced.of("tool-input-error") == []


def test_langgraph_other_stream_modes_are_refused(flavour):
    model = GenericFakeChatModel(messages=iter(["Hello"]))
    produced = flavour.produce(messages_of(flavour, agent(model), QUESTION, stream_mode="values"))
    assert produced.status.state == "error"
    assert "an item must be a message" in produced.status.error


def test_error_of_langchain_ends_the_stream(flavour):
    model = scripted([AIMessageChunk(content="Half"), ValueError("too busy")])
    produced = flavour.produce(messages_of(flavour, agent(model), QUESTION, stream_mode="messages"))
    assert produced.text == "Half"
    assert (produced.status.state, produced.status.error) == ("error", "too busy")


def test_stop_closes_the_stream_of_langchain(flavour):
    closed = threading.Event()

    def endless() -> Iterator[AIMessageChunk]:
        try:
            while True:
                yield AIMessageChunk(content="x")
        finally:
            closed.set()

    produced = flavour.produce(messages_of(flavour, scripted(endless()), "Hi"), stop=True)
    assert produced.status.state == "stopped"
    assert closed.wait(TIMEOUT)


def test_items() -> None:
    chunks = [AIMessageChunk(content=[{"type": "reasoning", "reasoning": "Hm."}]), AIMessageChunk(content="Yes.")]
    assert list(langchain.messages(chunks)) == [reasoning("Hm."), "Yes."]


def test_langchain_refuses_other_items() -> None:
    with pytest.raises(InvalidDataError, match="must be a message"):
        list(langchain.messages([("updates", {})]))
