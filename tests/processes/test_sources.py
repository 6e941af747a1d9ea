"""Streams of the published `openai` client, from a server on this machine; and the scripts of docs/sources.md."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai as library
import pytest
from pydantic import TypeAdapter
from support import model_server
from support.model_server import ModelServer
from support.source_streams import TIMEOUT, Async, Sync

from aibind_postgres import AsyncDurableStream, DurableStream
from aibind_postgres.errors import StreamExistsError
from aibind_postgres.sources import openai

PAGE = (Path(__file__).parents[2] / "docs" / "sources.md").read_text("utf-8")


@pytest.fixture(params=[Sync, Async])
def flavour(request, dsn, tables):
    return request.param(dsn, tables)


@pytest.fixture
def provider():
    with model_server.running() as provider:
        yield provider


def ask(flavour: Sync | Async, provider: ModelServer, api: str) -> Iterator[Any] | AsyncIterator[Any]:
    """Return the source of a call of the client, as an application would write it."""
    options = {"api_key": "-", "base_url": provider.url, "max_retries": 0}

    def with_threads() -> Iterator[Any]:
        with library.OpenAI(**options) as client:
            if api == "responses":
                yield from openai.responses(client.responses.create(model="m", input="Hi", stream=True))
            else:
                stream = client.chat.completions.create(model="m", messages=[], stream=True)
                yield from openai.chat_completions(stream)

    async def with_asyncio() -> AsyncIterator[Any]:
        async with library.AsyncOpenAI(**options) as client:
            if api == "responses":
                source = openai.responses(await client.responses.create(model="m", input="Hi", stream=True))
            else:
                stream = await client.chat.completions.create(model="m", messages=[], stream=True)
                source = openai.chat_completions(stream)
            async for item in source:
                yield item

    return with_threads() if isinstance(flavour, Sync) else with_asyncio()


# --- OpenAI: chat completions


def completion(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk as the API sends it."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "usage": None}
    return head | {"choices": [choice]}


def piece(index: int, arguments: str, id: str | None = None, name: str | None = None) -> dict[str, Any]:
    """A chunk with a piece of a tool call."""
    call: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if id is not None:
        call |= {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return completion(tool_calls=[call])


USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def test_chat_completion_text(flavour, provider):
    last = completion() | {"choices": [], "usage": USAGE}
    provider.events = [
        completion(role="assistant", content=""),
        completion(content="Hé"),
        completion(content="llo\n"),
        completion("stop"),
        last,
    ]
    produced = flavour.produce(ask(flavour, provider, "chat"))
    assert produced.status.state == "done"
    assert produced.text == "Héllo\n"
    assert produced.types == [
        "start", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish"
    ]  # fmt: skip


def test_chat_completion_reasoning_of_both_names(flavour, provider):
    provider.events = [
        completion(reasoning_content="Let me "),
        completion(reasoning="think."),
        completion(content="Yes."),
        completion("stop"),
    ]
    produced = flavour.produce(ask(flavour, provider, "chat"))
    assert (produced.reasoning, produced.text) == ("Let me think.", "Yes.")


def test_chat_completion_tool_calls(flavour, provider):
    provider.events = [
        completion(role="assistant", content=None),
        piece(0, "", "call_a", "weather"),
        piece(0, '{"city": '),
        piece(0, '"Rome"}'),
        piece(1, "", "call_b", "time"),
        piece(1, ""),
        completion("tool_calls"),
    ]
    produced = flavour.produce(ask(flavour, provider, "chat"))
    assert produced.chunks[2:-2] == [
        {"type": "tool-input-start", "toolCallId": "call_a", "toolName": "weather"},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '{"city": '},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '"Rome"}'},
        {"type": "tool-input-start", "toolCallId": "call_b", "toolName": "time"},
        {"type": "tool-input-available", "toolCallId": "call_a", "toolName": "weather", "input": {"city": "Rome"}},
        {"type": "tool-input-available", "toolCallId": "call_b", "toolName": "time", "input": {}},
    ]


def test_chat_completion_tool_calls_with_one_index(flavour, provider):
    provider.events = [piece(0, '{"n":1}', "call_a", "f"), piece(0, '{"n":2}', "call_b", "f"), completion("tool_calls")]
    inputs = flavour.produce(ask(flavour, provider, "chat")).of("tool-input-available")
    assert [(chunk["toolCallId"], chunk["input"]) for chunk in inputs] == [("call_a", {"n": 1}), ("call_b", {"n": 2})]


@pytest.mark.parametrize("arguments", ['{"city": "Ro', '{"n": NaN}'])
def test_chat_completion_invalid_tool_input(flavour, provider, arguments):
    provider.events = [piece(0, arguments, "call_a", "weather"), completion("length")]
    produced = flavour.produce(ask(flavour, provider, "chat"))
    [error] = produced.of("tool-input-error")
    assert (error["toolCallId"], error["toolName"], error["input"]) == ("call_a", "weather", arguments)
    assert produced.status.state == "done"


def test_chat_completion_refusal_is_text(flavour, provider):
    provider.events = [completion(refusal="I cannot "), completion(refusal="help."), completion("stop")]
    assert flavour.produce(ask(flavour, provider, "chat")).text == "I cannot help."


def test_chat_completion_second_choice_is_ignored(flavour, provider):
    other = completion(content="B")
    other["choices"][0]["index"] = 1
    provider.events = [completion(content="A"), other, completion("stop")]
    assert flavour.produce(ask(flavour, provider, "chat")).text == "A"


# --- OpenAI: responses


def response(status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": error,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "gpt-5",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
    }


def recorded(*events: dict[str, Any]) -> list[dict[str, Any]]:
    """Events between those that begin and end a response, numbered, and checked with the types of the client."""
    first = {"type": "response.created", "response": response("in_progress")}
    last = {"type": "response.completed", "response": response("completed")}
    numbered = [event | {"sequence_number": seq} for seq, event in enumerate([first, *events, last])]
    if int(library.__version__.partition(".")[0]) >= 3:  # the types of older versions lack some of these events
        TypeAdapter(list[library.types.responses.ResponseStreamEvent]).validate_python(numbered)
    return numbered


def part(type: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    """An event of the output item with this index."""
    return {"type": f"response.{type}", "output_index": index, "item_id": f"item_{index}"} | fields


def text_delta(text: str, index: int = 0) -> dict[str, Any]:
    return part("output_text.delta", index, content_index=0, delta=text, logprobs=[])


def call_item(arguments: str) -> dict[str, Any]:
    return {"id": "fc_1", "type": "function_call", "call_id": "call_a", "name": "weather", "arguments": arguments}


def test_response_reasoning_and_text(flavour, provider):
    item = {"id": "rs_1", "type": "reasoning", "summary": []}
    summary = {"text": "", "type": "summary_text"}
    provider.events = recorded(
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        part("reasoning_summary_part.added", summary_index=0, part=summary),
        part("reasoning_summary_text.delta", summary_index=0, delta="First."),
        part("reasoning_summary_part.added", summary_index=1, part=summary),
        part("reasoning_summary_text.delta", summary_index=1, delta="Second."),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        text_delta("Yes", 1),
        text_delta(".", 1),
    )
    produced = flavour.produce(ask(flavour, provider, "responses"))
    assert (produced.reasoning, produced.text) == ("First.\n\nSecond.", "Yes.")
    assert produced.types[2:] == [
        "reasoning-start", "reasoning-delta", "reasoning-end", "text-start", "text-delta", "text-end", "finish-step",
        "finish",
    ]  # fmt: skip


def test_response_reasoning_text(flavour, provider):
    provider.events = recorded(part("reasoning_text.delta", content_index=0, delta="Hm."), text_delta("Yes.", 1))
    produced = flavour.produce(ask(flavour, provider, "responses"))
    assert (produced.reasoning, produced.text) == ("Hm.", "Yes.")


def test_response_tool_calls(flavour, provider):
    custom = {"id": "ct_1", "type": "custom_tool_call", "call_id": "call_b", "name": "sql", "input": "SELECT 1"}
    provider.events = recorded(
        {"type": "response.output_item.added", "output_index": 0, "item": call_item("")},
        part("function_call_arguments.delta", delta='{"city":'),
        part("function_call_arguments.delta", delta='"Rome"}'),
        part("function_call_arguments.done", arguments='{"city":"Rome"}', name="weather"),
        {"type": "response.output_item.done", "output_index": 0, "item": call_item('{"city":"Rome"}')},
        {"type": "response.output_item.done", "output_index": 1, "item": custom},
    )
    assert flavour.produce(ask(flavour, provider, "responses")).chunks[2:-2] == [
        {"type": "tool-input-start", "toolCallId": "call_a", "toolName": "weather"},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '{"city":'},
        {"type": "tool-input-delta", "toolCallId": "call_a", "inputTextDelta": '"Rome"}'},
        {"type": "tool-input-available", "toolCallId": "call_a", "toolName": "weather", "input": {"city": "Rome"}},
        {"type": "tool-input-available", "toolCallId": "call_b", "toolName": "sql", "input": "SELECT 1"},
    ]


def test_response_tool_call_that_was_cut_off(flavour, provider):
    provider.events = recorded({"type": "response.output_item.added", "output_index": 0, "item": call_item("")}, part(
        "function_call_arguments.delta", delta='{"ci'
    ))[:-1]  # fmt: skip
    [error] = flavour.produce(ask(flavour, provider, "responses")).of("tool-input-error")
    assert error["input"] == '{"ci'


def test_response_citations(flavour, provider):
    url = {"type": "url_citation", "url": "https://a.test/", "title": "A", "start_index": 0, "end_index": 1}
    document = {"type": "file_citation", "file_id": "file-1", "filename": "a.pdf", "index": 1}
    events = [
        part("output_text.annotation.added", annotation=annotation, annotation_index=index, content_index=0)
        for index, annotation in enumerate([url, url, document, None])
    ]
    provider.events = recorded(text_delta("See."), *events)
    assert flavour.produce(ask(flavour, provider, "responses")).of("source-url", "source-document") == [
        {"type": "source-url", "sourceId": "https://a.test/", "url": "https://a.test/", "title": "A"},
        {
            "type": "source-document",
            "sourceId": "file-1",
            "mediaType": "text/plain",
            "title": "a.pdf",
            "filename": "a.pdf",
        },
    ]


def test_response_image(flavour, provider):
    image = {"id": "ig_1", "type": "image_generation_call", "status": "completed", "result": "iVBO"}
    webp = image | {"id": "ig_2", "output_format": "webp"}
    items = [{"type": "response.output_item.done", "output_index": 0, "item": item} for item in (image, webp)]
    provider.events = recorded(*items)
    assert flavour.produce(ask(flavour, provider, "responses")).of("file") == [
        {"type": "file", "url": "data:image/png;base64,iVBO", "mediaType": "image/png"},
        {"type": "file", "url": "data:image/webp;base64,iVBO", "mediaType": "image/webp"},
    ]


def test_response_refusal_is_text(flavour, provider):
    provider.events = recorded(part("refusal.delta", content_index=0, delta="I cannot help."))
    assert flavour.produce(ask(flavour, provider, "responses")).text == "I cannot help."


@pytest.mark.parametrize(
    "failure",
    [
        {"type": "response.failed", "response": response("failed", {"code": "server_error", "message": "Too busy."})},
        {"type": "error", "code": "server_error", "message": "Too busy.", "param": None},
    ],
    ids=["failed", "error"],
)
def test_failed_response_ends_the_stream(flavour, provider, failure):
    provider.events = recorded(text_delta("Half"), failure)
    produced = flavour.produce(ask(flavour, provider, "responses"))
    assert produced.text == "Half"
    assert produced.status.state == "error"
    assert produced.status.error == "the response of the model failed: server_error: Too busy."


# --- OpenAI: both interfaces

BEGINNINGS = {"chat": [completion(content="Half")], "responses": recorded(text_delta("Half"))[:2]}


@pytest.mark.parametrize("api", BEGINNINGS)
def test_error_of_the_provider_ends_the_stream(flavour, provider, api):
    provider.events = [*BEGINNINGS[api], {"error": {"message": "Too busy.", "type": "server_error"}}]
    produced = flavour.produce(ask(flavour, provider, api))
    assert produced.text == "Half"
    assert (produced.status.state, produced.status.error) == ("error", "Too busy.")


@pytest.mark.parametrize("api", BEGINNINGS)
def test_lost_connection_ends_the_stream(flavour, provider, api):
    provider.events, provider.then = BEGINNINGS[api], "cut"
    produced = flavour.produce(ask(flavour, provider, api))
    assert produced.text == "Half"
    assert produced.status.state == "error"


@pytest.mark.parametrize("api", BEGINNINGS)
def test_stop_closes_the_connection(flavour, provider, api):
    provider.events, provider.then = BEGINNINGS[api], "repeat"
    produced = flavour.produce(ask(flavour, provider, api), stop=True)
    assert produced.status.state == "stopped"
    assert provider.disconnected.wait(TIMEOUT)


def test_source_that_is_never_read_closes_the_connection(dsn, tables, provider):
    provider.events, provider.then = BEGINNINGS["chat"], "repeat"
    with Sync(dsn, tables).open_store() as store, library.OpenAI(api_key="-", base_url=provider.url) as client:
        store.create("a")
        stream = client.chat.completions.create(model="m", messages=[], stream=True)
        with pytest.raises(StreamExistsError):
            DurableStream.start(store, openai.chat_completions(stream), id="a", wire="ai_sdk")
        assert provider.disconnected.wait(TIMEOUT)


async def test_async_source_that_is_never_read_closes_the_connection(dsn, tables, provider):
    provider.events, provider.then = BEGINNINGS["chat"], "repeat"
    client = library.AsyncOpenAI(api_key="-", base_url=provider.url)
    async with Async(dsn, tables).open_store() as store, client:
        await store.create("a")
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        with pytest.raises(StreamExistsError):
            await AsyncDurableStream.start(store, openai.chat_completions(stream), id="a", wire="ai_sdk")
        assert await asyncio.to_thread(provider.disconnected.wait, TIMEOUT)


# --- the page and the modules


def test_modules_import_no_library() -> None:
    libraries = ["openai", "pydantic_ai", "langchain_core", "ag_ui", "pydantic"]
    code = (
        "import sys\nfrom aibind_postgres.sources import langchain, openai, pydantic_ai\n"
        f"print([name for name in {libraries} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# The imports of each script of the page, and the events of the server.
SCRIPTS = {
    "openai import chat_completions": [completion(content="Hello"), completion("stop")],
    "openai import responses": recorded(text_delta("Hello")),
    "langchain import messages": [],
    "pydantic_ai import vercel_ai": [],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_the_page_run(name, provider, database):
    if name.startswith("pydantic_ai"):
        pytest.importorskip("pydantic_ai")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "environ" in block and f"sources.{name}\n" in block]
    provider.events = SCRIPTS[name]
    variables = {"DATABASE_URL": database, "OPENAI_API_KEY": "-", "OPENAI_BASE_URL": provider.url}
    command = [sys.executable, "-W", "error", "-c", block]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"type":"text-delta"' in done.stdout
    assert done.stdout.endswith("data: [DONE]\n\n\n")
