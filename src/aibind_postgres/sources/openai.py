"""Streams of the `openai` client as sources. They work alike for other providers with the same API."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, overload

from ..errors import AibindError
from ..wire.ai_sdk import file, reasoning, source_document, source_url, tool_input
from ._reading import Item, OpenCalls, read

__all__ = ["chat_completions", "responses"]


@overload
def chat_completions(stream: AsyncIterable[Any]) -> AsyncIterator[Item]: ...
@overload
def chat_completions(stream: Iterable[Any]) -> Iterator[Item]: ...
def chat_completions(stream: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Item] | Iterator[Item]:
    """Convert a stream of chat completion chunks.

    Text and refusals become text. Reasoning and tool calls are converted too. Only the first choice is read.

    Args:
        stream: The result of `client.chat.completions.create(..., stream=True)`, a `Stream` or an `AsyncStream`.

    Returns:
        A generator of items of the wire format `ai_sdk`, asynchronous for an `AsyncStream`. Closing it closes the
        stream.
    """
    return read(stream, _ChatCompletion())


@overload
def responses(stream: AsyncIterable[Any]) -> AsyncIterator[Item]: ...
@overload
def responses(stream: Iterable[Any]) -> Iterator[Item]: ...
def responses(stream: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Item] | Iterator[Item]:
    """Convert a stream of the Responses API.

    Text and refusals become text. Reasoning, calls of your tools, citations and generated images are converted too.
    Calls of OpenAI's own tools are left out.

    Args:
        stream: The result of `client.responses.create(..., stream=True)`, a `Stream` or an `AsyncStream`.

    Returns:
        A generator of items of the wire format `ai_sdk`, asynchronous for an `AsyncStream`. Closing it closes the
        stream. It raises `AibindError` if the response fails.
    """
    return read(stream, _Response())


class _ChatCompletion:
    def __init__(self) -> None:
        self._calls = OpenCalls()

    def items(self, event: Any) -> Iterator[Item]:
        for choice in event.choices:
            if choice.index == 0:
                yield from self._delta(choice.delta)

    def _delta(self, delta: Any) -> Iterator[Item]:
        # Not in OpenAI's API. DeepSeek and vLLM use the first name, OpenRouter and newer vLLM the second.
        thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)
        if isinstance(thought, str):
            yield reasoning(thought)
        if text := delta.content or delta.refusal:
            yield text
        for call in delta.tool_calls or ():
            if call.function is not None:
                yield from self._calls.add(call.index, call.id, call.function.name, call.function.arguments)

    def finish(self) -> Iterator[Item]:
        return self._calls.close_all()


class _Response:
    def __init__(self) -> None:
        self._calls = OpenCalls()
        self._sources: set[str] = set()

    def items(self, event: Any) -> Iterator[Item]:
        kind = event.type
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            yield event.delta
        elif kind in ("response.reasoning_summary_text.delta", "response.reasoning_text.delta"):
            yield reasoning(event.delta)
        elif kind == "response.reasoning_summary_part.added":
            if event.summary_index:
                yield reasoning("\n\n")
        elif kind == "response.function_call_arguments.delta":
            yield from self._calls.add(event.output_index, None, None, event.delta)
        elif kind == "response.output_item.added":
            if event.item.type == "function_call":
                yield from self._calls.add(event.output_index, event.item.call_id, event.item.name, None)
        elif kind == "response.output_item.done":
            yield from self._output_item(event.output_index, event.item)
        elif kind == "response.output_text.annotation.added":
            yield from self._citation(event.annotation)
        elif kind == "response.failed":
            raise _failure(event.response.error)
        elif kind == "error":
            raise _failure(event)

    def _output_item(self, index: int, item: Any) -> Iterator[Item]:
        if item.type == "function_call":
            yield from self._calls.add(index, item.call_id, item.name, None)
            yield from self._calls.close(index, item.arguments)
        elif item.type == "custom_tool_call":
            yield tool_input(item.call_id, item.name, item.input)
        elif item.type == "image_generation_call" and item.result:
            name = getattr(item, "output_format", None) or "png"
            media_type = f"image/{'svg+xml' if name == 'svg' else name}"
            yield file(f"data:{media_type};base64,{item.result}", media_type)

    def _citation(self, annotation: Any) -> Iterator[Item]:
        # Versions of the client before 2 leave the annotation a dict.
        found = annotation.model_dump() if hasattr(annotation, "model_dump") else annotation or {}
        source = found.get("url") or found.get("file_id")
        if source and source not in self._sources:
            self._sources.add(source)
            if found["type"] == "url_citation":
                yield source_url(source, title=found.get("title"), id=source)
            else:
                name = found.get("filename") or source
                yield source_document("text/plain", name, filename=found.get("filename"), id=source)

    def finish(self) -> Iterator[Item]:
        return self._calls.close_all()


def _failure(error: Any) -> AibindError:
    reasons = [] if error is None else [error.code, error.message]
    return AibindError(": ".join(["the response of the model failed", *filter(None, reasons)]))
