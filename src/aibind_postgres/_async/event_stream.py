"""A stream as encoded Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from .._followed_stream import Ended
from ..models import event_of
from ..sse import MESSAGE, ServerSentEvent, comment, encode
from .following import AsyncFollower, Heartbeat

if TYPE_CHECKING:
    from .reading import AsyncPageReader

MAX_EVENTS_IN_CRLF = 100  # between CR and LF: a resumed reader does not search further back for the CR


def id_event(stream_id: str) -> bytes:
    """Return the first event of a new stream."""
    # A numeric event id would look like the sequence number of a chunk, and a client would resume after it.
    return encode(ServerSentEvent(stream_id, "stream-id", None if stream_id.isdigit() else stream_id))


async def encoded_events(
    following: AbstractContextManager[AsyncFollower],
    pages: AsyncPageReader,
    stream_id: str,
    after_seq: int,
    heartbeat: float,
    *,
    has_id: bool,
) -> AsyncIterator[bytes]:
    """Iterate over the events of a stream until it has ended, as `sse` of `DurableStream` describes.

    Args:
        following: Follows the stream after `after_seq`.
        pages: Reads stored chunks.
        stream_id: The stream id.
        after_seq: The sequence number of the last chunk that the client has.
        heartbeat: Seconds without an event after which a comment is sent.
        has_id: Whether to begin with the event `stream-id`.
    """
    if has_id:
        yield id_event(stream_id)
    # Each event would turn its part of a CRLF into a line break, so the LF is left out.
    after_cr = None if after_seq else False  # whether the text before ends with a CR; None: it has not been read
    with following as follower:
        while not isinstance(step := await follower.next(idle_timeout=heartbeat), Ended):
            if isinstance(step, Heartbeat):
                yield comment("ping")
                continue
            for chunk in step.chunks:
                event, data = event_of(chunk.data)
                if event == MESSAGE and data:
                    starts_with_lf = data[0] == "\n"
                    if starts_with_lf and after_cr is None:
                        after_cr = await _ends_with_cr(pages, stream_id, chunk.seq - 1)
                    in_crlf = starts_with_lf and after_cr
                    after_cr = data[-1] == "\r"
                    if in_crlf:
                        data = data[1:]
                yield _chunk_event(chunk.seq, event, data)
    status = step.status
    if status.state == "error":
        yield encode(ServerSentEvent(status.error or "", "error"))
    elif status.state == "stopped":
        yield encode(ServerSentEvent("", "stopped"))
    yield encode(ServerSentEvent("", "done"))


async def _ends_with_cr(pages: AsyncPageReader, stream_id: str, seq: int) -> bool:
    """Return whether the text up to chunk `seq` ends with a CR. Named events are not part of the text."""
    for number in range(seq, max(0, seq - MAX_EVENTS_IN_CRLF), -1):
        page = await pages.page(stream_id, number - 1, 1)
        for chunk in page.chunks if page is not None else ():
            event, data = event_of(chunk.data)
            if event == MESSAGE and data:
                return data[-1] == "\r"
    return False


def _chunk_event(seq: int, event: str, data: str) -> bytes:
    encoded = encode(ServerSentEvent(data, event, str(seq)))
    # aibind's client ignores the ids of the named events that it handles, so it would receive the event again on
    # resuming. It takes the id of an unknown event. By the standard, a block without data sets the id and dispatches
    # nothing. Without a name, aibind's `Race` would take the block for an empty text, and elect the model.
    return encoded if event == MESSAGE else encoded + b"event: cursor\nid: %d\n\n" % seq
