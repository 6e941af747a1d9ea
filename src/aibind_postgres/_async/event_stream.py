"""A stream as encoded Server-Sent Events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from .._followed_stream import Ended
from .._telemetry import StoreMetrics, StoreSpan, error_attributes
from ..errors import StreamNotFoundError
from ..models import StreamChunk
from ..sse import comment
from ..wire import FrameEncoder
from .following import AsyncFollower, Heartbeat

if TYPE_CHECKING:
    from .reading import AsyncPageReader

MAX_LOOK_BACK = 100  # chunks before the first one: a resumed reader does not search further back

# Bytes after which a piece of a body ends. Each piece costs a web server several times as much as the frame of a chunk,
# so available frames are sent together. The limit gives slow clients enough time for each piece.
MAX_PIECE = 16_384


@contextmanager
def traced(
    following: AbstractContextManager[AsyncFollower], metrics: StoreMetrics | None, stream_id: str, link: str | None
) -> Iterator[AsyncFollower]:
    """Follow a stream in a span that links to that of its producer.

    Args:
        following: Follows the stream.
        metrics: The metrics of the store, or None.
        stream_id: The stream id.
        link: The `traceparent` of the producer, or None.
    """
    span = StoreSpan(metrics, "aibind.read", stream_id, link=link)
    try:
        with following as follower:
            yield follower
    except Exception as error:
        span.end(error_attributes(error))
        raise
    finally:
        span.end()  # also of a reader that has left, or whose task was cancelled as its client disconnected


async def encoded_events(
    following: AbstractContextManager[AsyncFollower],
    pages: AsyncPageReader,
    stream_id: str,
    frames: FrameEncoder,
    heartbeat: float,
    *,
    is_new: bool,
) -> AsyncIterator[bytes]:
    """Iterate over the frames of a stream until it has ended, as `sse` of `DurableStream` describes.

    The frames of chunks that are available together are joined.

    Args:
        following: Follows the stream after the chunks that the client has.
        pages: Reads stored chunks.
        stream_id: The stream id.
        frames: Encodes the chunks for this client.
        heartbeat: Seconds without a frame after which a comment is sent.
        is_new: Whether to begin with the frame of a new stream.
    """
    if is_new and (first := frames.begin()):
        yield first
    try:
        with following as follower:
            while not isinstance(step := await follower.next(idle_timeout=heartbeat), Ended):
                if isinstance(step, Heartbeat):
                    yield comment("ping")
                    continue
                piece: list[bytes] = []
                size = 0
                for chunk in step.chunks:
                    frame = frames.frame(chunk.seq, chunk.data)
                    if frame is None:
                        frame = await _frame_after_look_back(pages, stream_id, frames, chunk)
                    piece.append(frame)
                    size += len(frame)
                    if size >= MAX_PIECE:
                        yield b"".join(piece)
                        piece, size = [], 0
                if piece:
                    yield b"".join(piece)
        end = frames.end(step.status)
    except StreamNotFoundError:
        if end := frames.end(None):
            yield end
        raise
    if end:
        yield end


async def _frame_after_look_back(
    pages: AsyncPageReader, stream_id: str, frames: FrameEncoder, chunk: StreamChunk
) -> bytes:
    """Return the frame of a chunk that depends on earlier chunks."""
    for seq in range(chunk.seq - 1, max(0, chunk.seq - 1 - MAX_LOOK_BACK), -1):
        page = await pages.page(stream_id, seq - 1, 1)
        if any(frames.look_back(earlier.data) for earlier in (page.chunks if page is not None else ())):
            break
    else:
        frames.look_back(None)
    return frames.frame(chunk.seq, chunk.data) or b""
