"""Streams of LangChain models and LangGraph graphs as sources."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, overload

from ..errors import InvalidDataError
from ..wire.ai_sdk import reasoning, step, tool_error, tool_input, tool_output
from ._reading import Item, OpenCalls, complete_input, read

__all__ = ["messages"]


@overload
def messages(stream: AsyncIterable[Any]) -> AsyncIterator[Item]: ...
@overload
def messages(stream: Iterable[Any]) -> Iterator[Item]: ...
def messages(stream: AsyncIterable[Any] | Iterable[Any]) -> AsyncIterator[Item] | Iterator[Item]:
    """Convert the messages of a model, or of a graph.

    Text, reasoning, and tool calls with their results are converted. A message of a model after a result begins another
    step.

    Args:
        stream: The result of `astream` or `stream` of a model, or of a graph with `stream_mode="messages"`.

    Returns:
        A generator of items of the wire format `ai_sdk`, asynchronous for `astream`. Closing it closes the stream. It
        raises `InvalidDataError` for items of other kinds, such as those of another `stream_mode`.
    """
    return read(stream, _Messages())


class _Messages:
    def __init__(self) -> None:
        self._calls: dict[str | None, OpenCalls] = {}  # by the ids of the messages, which parallel nodes write
        self._call_ids: set[str | None] = set()
        self._follows_result = False

    def items(self, event: Any) -> Iterator[Item]:
        message = event[0] if isinstance(event, tuple) and event else event
        kind = getattr(message, "type", None)
        if not hasattr(message, "content") or not isinstance(kind, str):
            raise InvalidDataError(f"an item must be a message, or a tuple that begins with one, not {event!r:.100}")
        if kind == "tool":
            yield from self._result(message)
        elif kind in ("AIMessageChunk", "ai"):
            yield from self._answer(message)
            yield from self._pieces(message) if kind == "AIMessageChunk" else self._calls_of(message)

    def _answer(self, message: Any) -> Iterator[Item]:
        if self._follows_result:
            self._follows_result = False
            yield step()
        for block in message.content_blocks:
            if block["type"] == "text":
                yield block["text"]
            elif block["type"] == "reasoning":
                yield reasoning(block.get("reasoning") or "")

    def _pieces(self, message: Any) -> Iterator[Item]:
        calls = self._calls.setdefault(message.id, OpenCalls())
        for call in message.tool_call_chunks:
            self._call_ids.add(call["id"])
            yield from calls.add(call["index"], call["id"], call["name"], call["args"])
        if message.chunk_position == "last":
            yield from calls.close_all()

    def _calls_of(self, message: Any) -> Iterator[Item]:
        for call in message.tool_calls:
            self._call_ids.add(call["id"])
            yield tool_input(call["id"], call["name"], call["args"])
        for call in message.invalid_tool_calls:
            self._call_ids.add(call["id"])
            yield complete_input(call["id"], call["name"] or "", call["args"] or "")

    def _result(self, message: Any) -> Iterator[Item]:
        call_id = message.tool_call_id
        if call_id not in self._call_ids:  # of an earlier answer: a client would reject the result
            return
        self._follows_result = True
        for calls in self._calls.values():
            yield from calls.close_id(call_id)
        if message.status == "error":
            yield tool_error(call_id, str(message.text))
        else:
            yield tool_output(call_id, message.content)

    def finish(self) -> Iterator[Item]:
        for calls in self._calls.values():
            yield from calls.close_all()
