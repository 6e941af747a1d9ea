"""Sources: the iterables that `generate` returns. They are closed exactly once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterable

from .._concurrency import AsyncWorker, Mutex, async_call_or_await, async_interrupt, async_is_source
from .._lifecycle import SourceState
from ..errors import InvalidDataError
from ..models import StreamEvent
from ..wire import Wire, WireName, find_wire

logger = logging.getLogger("aibind_postgres.producer")


class AsyncSource:
    """An iterable of chunks that is closed exactly once."""

    def __init__(self, items: AsyncIterable[str | StreamEvent]) -> None:
        self.items = items
        self._mutex = Mutex()
        self._state = SourceState.OPEN

    async def close(self) -> None:
        """Close the source. Only its reader calls this, when it has stopped reading."""
        with self._mutex:
            is_open = self._state is SourceState.OPEN
            if is_open:
                self._state = SourceState.CLOSED
            elif self._state is SourceState.INTERRUPTED:
                self._state = SourceState.RELEASED
        if is_open:
            await close_source(self.items)

    async def interrupt(self, reader: AsyncWorker | None) -> None:
        """Stop a reader that waits for the next item.

        With threads, only the reader closes a generator. The generator may hold resources that are bound to that
        thread, and no other thread can close it while it runs.
        """
        with self._mutex:
            if reader is None or self._state is not SourceState.OPEN or inspect.isgenerator(self.items):
                return
            self._state = SourceState.INTERRUPTED
        closed = async_interrupt(reader, self.items)
        with self._mutex:
            released = self._state is SourceState.RELEASED
            self._state = SourceState.CLOSED if closed or released else SourceState.OPEN
        if released and not closed:
            await close_source(self.items)


def check_source(source: object) -> None:
    """Raise `TypeError` if an object cannot be the source of a stream of this flavour."""
    if not async_is_source(source):
        raise TypeError(
            f"the source must be an iterable, and asynchronous for an asynchronous store, not {type(source).__name__}"
        )


async def close_source(source: object) -> None:
    """Close a source if it has a method `aclose` or `close`. Errors are only logged."""
    close = getattr(source, "aclose", None) or getattr(source, "close", None)
    if close is not None:
        try:
            await async_call_or_await(close)
        except Exception:
            logger.exception("a source raised when it was closed")


async def find_wire_of(name: WireName, source: object) -> Wire:
    """Return the wire format of a new stream. If there is none with this name, close its source and raise."""
    try:
        return find_wire(name)
    except InvalidDataError:
        await close_source(source)
        raise


async def collect(source: AsyncIterable[str | StreamEvent]) -> tuple[str, str]:
    """Return the whole text of a source and the data of its last `usage` event."""
    texts: list[str] = []
    usage = ""
    try:
        async for item in source:
            if isinstance(item, str):
                texts.append(item)
            elif item.event == "usage":
                usage = item.data
    finally:
        await close_source(source)
    return "".join(texts), usage
