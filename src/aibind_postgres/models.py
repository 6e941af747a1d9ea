"""Plain data: what a stream is made of, and what listings say."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Literal, NamedTuple

from .errors import InvalidDataError

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# What PostgreSQL waits for before it acknowledges a commit: the values of its setting of this name.
SynchronousCommit = Literal["on", "off", "local", "remote_write", "remote_apply"]

StreamState = Literal["active", "done", "stopped", "error"]


class StreamChunk(NamedTuple):
    """One piece of a stream. Numbers are 1, 2, 3 … without a hole."""

    seq: int
    data: str


class StreamEvent(NamedTuple):
    """A named event in a stream, beside its text: `usage`, `tool_call`, whatever the browser's code knows."""

    event: str
    data: str


# Between the name of an event and its data, in a chunk. A plain text has the empty name, so that it may begin as it
# likes. This is how the TypeScript packages write them, too.
_SEPARATOR = "\x01"

# What tells of the stream itself, and not of what is in it.
_RESERVED = ("stream-id", "error", "stopped", "done", "message")


def chunk_text(item: str | StreamEvent) -> str:
    """Return the text of the chunk that an item becomes. Raises `InvalidDataError` for what is neither."""
    if isinstance(item, str):
        return _SEPARATOR + item
    if not isinstance(item, StreamEvent) or not isinstance(item.event, str) or not isinstance(item.data, str):
        raise InvalidDataError(f"a source must yield str or StreamEvent, of str, not {type(item).__name__}")
    if not item.event or item.event in _RESERVED or re.search(f"[\r\n{_SEPARATOR}]", item.event):
        raise InvalidDataError(f"{item.event!r} cannot be the name of an event in a stream")
    return item.event + _SEPARATOR + item.data


def event_of(text: str) -> tuple[str, str]:
    """Return the name of the event that a chunk is, `message` for plain text, and its data."""
    event, separator, data = text.partition(_SEPARATOR)
    if not separator:
        return "message", text
    event = re.sub(r"[\r\n]+", " ", event)
    return "message" if not event or event in _RESERVED else event, data


class StreamStatus(NamedTuple):
    """Where a stream stands. `error` is the text given to `fail`, and None in every other state."""

    state: StreamState
    error: str | None
    total_chunks: int


class StreamInfo(NamedTuple):
    """What a listing says of a stream.

    `created_at` is None where migration 0002 had not been applied, or where it is no time that Python can tell.
    """

    id: str
    state: StreamState
    error: str | None
    total_chunks: int
    expires_at: datetime
    created_at: datetime | None


class CleanupResult(NamedTuple):
    """How many streams a clean-up deleted, and how many chunks with them."""

    streams: int
    chunks: int


class ConversationInfo(NamedTuple):
    """What a listing says of a conversation."""

    session_id: str
    expires_at: datetime


def from_epoch_ms(milliseconds: int) -> datetime:
    """Return a time since the epoch as a datetime; one that is too far off for Python becomes the last one it knows."""
    try:
        return EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return (datetime.max if milliseconds > 0 else datetime.min).replace(tzinfo=timezone.utc)
