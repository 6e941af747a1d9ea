"""Chunks of a stream for the admin. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...models import StreamChunk, StreamInfo, event_of


class TailPage(NamedTuple):
    """The chunks after a position, as JSON for the page.

    Attributes:
        state: The state of the stream.
        error: The error text in state error, or None.
        total: The number of chunks of the stream.
        after: The position.
        last: The sequence number of the last chunk here, or the position if there is none.
        complete: Whether there will be no further chunks.
        chunks: Objects with `seq`, `event` and `data`. `event` is "message" for text, the name of an event, or the name
            of the wire format, whose chunks are shown as they are stored.
    """

    state: str
    error: str | None
    total: int
    after: int
    last: int
    complete: bool
    chunks: list[dict[str, Any]]


def tail_page(info: StreamInfo, after: int, chunks: Sequence[StreamChunk]) -> TailPage:
    """Return the page. The chunks must have been read after `info`."""
    last = chunks[-1].seq if chunks else after
    return TailPage(
        info.state,
        info.error,
        max(info.total_chunks, last),
        after,
        last,
        info.state != "active" and last >= info.total_chunks,
        [_as_event(info.wire, chunk) for chunk in chunks],
    )


def _as_event(wire: str | None, chunk: StreamChunk) -> dict[str, Any]:
    event, data = event_of(chunk.data) if wire in (None, "aibind") else (wire, chunk.data)
    return {"seq": chunk.seq, "event": event, "data": data}
