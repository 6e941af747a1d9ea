"""Reads a stream in either flavour, and collects the inputs of tool calls from their pieces. Common to the sources."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from .._json import reject_constant
from ..history import new_id
from ..wire.ai_sdk import Reasoning, tool_input, tool_input_delta, tool_input_start

Item = str | Reasoning | dict[str, Any]  # of the wire format `ai_sdk`


class Converter(Protocol):
    """Converts the events of one stream. Pure."""

    def items(self, event: Any) -> Iterable[Item]:
        """Return the items for an event."""

    def finish(self) -> Iterable[Item]:
        """Return the last items, after the stream has ended."""


def read(stream: AsyncIterable[Any] | Iterable[Any], converter: Converter) -> AsyncIterator[Item] | Iterator[Item]:
    """Return a generator of items, asynchronous if the stream is. Closing it closes the stream."""
    if isinstance(stream, AsyncIterable):
        async_items = _read_async(stream, converter)
        with suppress(StopIteration):
            async_items.asend(None).send(None)
        return async_items
    items = _read_sync(stream, converter)
    next(items)
    return items


# A generator that has not started runs no code when it is closed. So `read` starts each one, up to the first `yield`.


async def _read_async(stream: AsyncIterable[Any], converter: Converter) -> AsyncGenerator[Item, None]:
    try:
        yield ""
        async for event in stream:
            for item in converter.items(event):
                yield item
        for item in converter.finish():
            yield item
    finally:
        await close_async(stream)


def _read_sync(stream: Iterable[Any], converter: Converter) -> Generator[Item, None, None]:
    try:
        yield ""
        for event in stream:
            yield from converter.items(event)
        yield from converter.finish()
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


async def close_async(stream: object) -> None:
    """Close a stream if it has a method `aclose` or `close`."""
    close = getattr(stream, "aclose", None) or getattr(stream, "close", None)
    if close is not None:
        closing = close()
        if inspect.isawaitable(closing):
            await closing


class OpenCalls:
    """The tool calls of a stream with incomplete inputs. Each one has a key, such as its index."""

    def __init__(self) -> None:
        self._open: dict[Any, _ToolCall] = {}

    def add(self, key: Any, call_id: str | None, name: str | None, text: str | None) -> Iterator[Item]:
        """Yield the items for a piece of a call. Only the first piece needs an id and a name.

        Args:
            key: The key of the call.
            call_id: Its id. Another id than before under the same key begins another call. Default: a new one.
            name: The name of the tool.
            text: A piece of the JSON text of the input.
        """
        call = self._open.get(key)
        if call is not None and call_id and call_id != call.id:
            yield from self.close(key)
            call = None
        if call is None:
            call = self._open[key] = _ToolCall(call_id or new_id(), name or "")
            yield tool_input_start(call.id, call.name)
        if text:
            call.texts.append(text)
            yield tool_input_delta(call.id, text)

    def close(self, key: Any, text: str | None = None) -> Iterator[Item]:
        """Yield the complete input of a call, if it is open. `text`: the whole JSON text. Default: the pieces."""
        call = self._open.pop(key, None)
        if call is not None:
            yield complete_input(call.id, call.name, "".join(call.texts) if text is None else text)

    def close_id(self, call_id: str) -> Iterator[Item]:
        """Do the same for the call with an id."""
        for key in [key for key, call in self._open.items() if call.id == call_id]:
            yield from self.close(key)

    def close_all(self) -> Iterator[Item]:
        """Do the same for all calls."""
        for key in list(self._open):
            yield from self.close(key)


class _ToolCall:
    def __init__(self, id: str, name: str) -> None:
        self.id = id
        self.name = name
        self.texts: list[str] = []


def complete_input(call_id: str, name: str, text: str) -> Item:
    """Return the item for a complete input, a JSON text. An empty text is an input without arguments."""
    try:
        return tool_input(call_id, name, json.loads(text, parse_constant=reject_constant) if text else {})
    except (ValueError, RecursionError):
        return {
            "type": "tool-input-error",
            "toolCallId": call_id,
            "toolName": name,
            "input": text,
            "errorText": "the input is not JSON",
        }
