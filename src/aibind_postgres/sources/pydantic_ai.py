"""Runs of pydantic-ai agents as sources, through its adapters for the AI SDK and for AG-UI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Any, Protocol

from ..wire.ai_sdk import Encoded, encoded

__all__ = ["ag_ui", "vercel_ai"]

logger = logging.getLogger("aibind_postgres.sources")

_END = object()


class Token(Protocol):
    """`CancellationToken` of pydantic-ai."""

    def cancel(self) -> None: ...


def vercel_ai(events: AsyncIterable[Any], token: Token) -> AsyncGenerator[Encoded, None]:
    """Convert a run of a `VercelAIAdapter`, for a stream with the wire format `ai_sdk`.

    A client that leaves does not cancel the run. Stopping the stream does, by closing the source.

    Args:
        events: The result of the adapter's `run_stream`, or of its `encode_stream` for it.
        token: The `CancellationToken` that was passed to `run_stream`. Closing the source cancels it, and waits until
            the run has ended and `on_cancel` has returned.

    Returns:
        A generator of items of the wire format `ai_sdk`.
    """
    return _read_run(events, token, _encoded)


def ag_ui(events: AsyncIterable[Any], token: Token) -> AsyncGenerator[Any, None]:
    """Read a run of an `AGUIAdapter`, for a stream with the wire format `ag_ui`.

    A client that leaves does not cancel the run. Stopping the stream does, by closing the source.

    Args:
        events: As for `vercel_ai`, of an `AGUIAdapter`.
        token: As for `vercel_ai`.

    Returns:
        A generator of the events, unchanged.
    """
    return _read_run(events, token, _unchanged)


async def _read_run(
    events: AsyncIterable[Any], token: Token, convert: Callable[[Any], Any]
) -> AsyncGenerator[Any, None]:
    # The run is read in a task of its own. Cancelling the reader of the source would otherwise cancel the run from
    # outside, and pydantic-ai then does not call `on_cancel`.
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def receive() -> None:
        try:
            async for event in events:
                received.put_nowait(event)
        finally:
            received.put_nowait(_END)

    run = asyncio.create_task(receive())
    try:
        while (event := await received.get()) is not _END:
            yield convert(event)
        await run
    finally:
        if not run.done():
            try:
                token.cancel()
                await asyncio.wait({run})
            finally:
                run.cancel()  # only has an effect if the wait was interrupted
            if not run.cancelled() and (error := run.exception()) is not None:
                logger.error("a cancelled run of pydantic-ai raised", exc_info=error)


def _encoded(event: Any) -> Encoded:
    # Version 5 of the client ignores the fields that it does not know.
    return encoded(event if isinstance(event, str) else f"data: {event.encode(sdk_version=7)}\n\n")


def _unchanged(event: Any) -> Any:
    return event
