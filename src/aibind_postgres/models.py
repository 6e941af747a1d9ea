"""Plain data: chunks and events of streams, and entries of lists."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from typing import Any, Literal, NamedTuple

from .errors import InvalidDataError

# The ttl, in milliseconds, of what never expires: about 253,000 years. A row that expires later than this after the
# epoch never expires either. JavaScript can read such a time until the year 22,000: its integers are exact up to
# 2^53 - 1, and its dates end at 8.64e15.
NEVER_MS = 8_000_000_000_000_000

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

# The values of PostgreSQL's setting synchronous_commit.
SynchronousCommit = Literal["on", "off", "local", "remote_write", "remote_apply"]

StreamState = Literal["active", "done", "stopped", "error"]


class StreamChunk(NamedTuple):
    """One chunk of a stream.

    Attributes:
        seq: The sequence number, from 1 without gaps.
        data: The text.
    """

    seq: int
    data: str


class TimedChunk(NamedTuple):
    """One chunk of a stream, and the time at which it was stored.

    Attributes:
        seq: The sequence number, from 1 without gaps.
        data: The text.
        created_at: The time of the server at which the chunk was stored, in UTC. None if the chunk is older than
            migration 0002, or if the time is out of datetime's range.
    """

    seq: int
    data: str
    created_at: datetime | None


class StreamEvent(NamedTuple):
    """A named event to be written to a stream of text, such as `usage` or `tool_call`. Read as a `StoredEvent`.

    Attributes:
        event: The name of the event, for the code in the browser.
        data: The data of the event.
    """

    event: str
    data: str


class StoredEvent(NamedTuple):
    """One chunk of a stream, decoded: a text or a named event.

    Attributes:
        seq: The sequence number of the chunk, from 1 without gaps.
        event: `"message"` for text, or the name of the event.
        data: The text, or the data of the event.
    """

    seq: int
    event: str
    data: str


# Separates the name of an event from its data in a chunk, as in the TypeScript packages. Plain text has an empty name
# and the separator as well, so that it may contain any characters.
_SEPARATOR = "\x01"

# The names of events about the stream itself.
_RESERVED = ("stream-id", "error", "stopped", "done", "message")


def chunk_text(item: str | StreamEvent) -> str:
    """Return the chunk text of an item of a source. `event_of` of the text of a str is always `message` and the str.

    Args:
        item: A text or an event.

    Raises:
        InvalidDataError: `item` is neither a str nor a `StreamEvent`, or the name of the event is empty, reserved, or
            contains a line break or the separator.
    """
    if isinstance(item, str):
        return _SEPARATOR + item
    if not isinstance(item, StreamEvent):
        raise InvalidDataError(f"an item must be a str or a StreamEvent, not {type(item).__name__}")
    for field, value in item._asdict().items():
        if not isinstance(value, str):
            raise InvalidDataError(f"the {field} of a named event must be a str, not {type(value).__name__}")
    if not item.event or item.event in _RESERVED or re.search(f"[\r\n{_SEPARATOR}]", item.event):
        raise InvalidDataError(
            f"{item.event!r} cannot be the name of an event: it is empty, reserved, or contains a line break or \\x01"
        )
    return item.event + _SEPARATOR + item.data


def event_of(text: str) -> tuple[str, str]:
    """Return the event name and the data of a chunk. The name for plain text is `message`."""
    event, separator, data = text.partition(_SEPARATOR)
    if not separator:
        return "message", text
    event = re.sub(r"[\r\n]+", " ", event)
    return "message" if not event or event in _RESERVED else event, data


class StreamStatus(NamedTuple):
    """The status of a stream.

    Attributes:
        state: `"active"`, `"done"`, `"stopped"` or `"error"`.
        error: The error text in state error; None in every other state.
        total_chunks: The number of chunks.
    """

    state: StreamState
    error: str | None
    total_chunks: int


class StoreCheck(NamedTuple):
    """The result of the check of a store, for readiness probes.

    Attributes:
        is_ready: Whether the server answers, and the tables exist and can be read.
        problem: Why the store is not ready; None if it is. Contains no part of the connection string.
        latency: The seconds that the answer took; None if there was none.
        is_read_only: Whether the server refuses writes, as a standby does, which also accepts no LISTEN. A store that
            only reads is ready nevertheless.
        lag: The age in seconds of the last transaction that a standby has replayed, which also grows while nothing is
            written; None on a primary, and on a standby that has replayed none.
    """

    is_ready: bool
    problem: str | None
    latency: float | None
    is_read_only: bool
    lag: float | None


class StreamInfo(NamedTuple):
    """An entry of a list of streams.

    Attributes:
        id: The id of the stream.
        state: `"active"`, `"done"`, `"stopped"` or `"error"`.
        error: The error text in state error; None in every other state.
        total_chunks: The number of chunks.
        expires_at: The time after which `cleanup` may delete the stream, once it has ended. While it is active, each
            append renews this time, rounded up to a quarter of the ttl.
        created_at: The time of creation. None if the stream is older than migration 0002, or if the time is out of
            datetime's range.
        session_id: The id of the conversation to which the stream belongs, or None. This and the following attributes
            are those given to `create`; None without migration 0004.
        owner: The owner of the stream, or None.
        metadata: Data of the application, a JSON value, or None.
        ttl: The time for which the stream is kept after its end, or None for the ttl of the store.
        lease_until: The time at which the lease of the producer ends, unless it is renewed. None without a lease.
        wire: The name of the wire format in which a `DurableStream` writes the stream. None for `aibind`.
    """

    id: str
    state: StreamState
    error: str | None
    total_chunks: int
    expires_at: datetime
    created_at: datetime | None
    session_id: str | None = None
    owner: str | None = None
    metadata: Any = None
    ttl: timedelta | None = None
    lease_until: datetime | None = None
    wire: str | None = None


class CleanupResult(NamedTuple):
    """The result of a clean-up.

    Attributes:
        streams: The number of deleted streams.
        chunks: The number of chunks deleted with them.
    """

    streams: int
    chunks: int


class ArchiveResult(NamedTuple):
    """The result of `archive`.

    Attributes:
        streams: The number of streams that are now archived.
        chunks: The number of chunks that were moved, including those of streams of which a part remains to be moved.
    """

    streams: int
    chunks: int


class ConversationInfo(NamedTuple):
    """An entry of a list of conversations.

    An entry with only `session_id` and `updated_at` is a position for `list(before=…)`.

    Attributes:
        session_id: The id of the conversation.
        owner: The owner of the conversation, or None. This and the following attributes, except `expires_at`, are None
            without migration 0004.
        title: The title, or None.
        metadata: Data of the application, a JSON value, or None.
        created_at: The time of creation. None if the conversation is older than migration 0004.
        updated_at: The time of the last save. None if the conversation was last saved before migration 0004.
        expires_at: The time at which the conversation expires, unless it is saved or touched before. None if it never
            expires.
        active_stream_id: The id of the newest active stream of the conversation: the answer that is being written. None
            if there is none, or if the status table is missing, or not readable.
    """

    session_id: str
    owner: str | None = None
    title: str | None = None
    metadata: Any = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    expires_at: datetime | None = None
    active_stream_id: str | None = None


class ErasureResult(NamedTuple):
    """The result of `delete_owner` of a conversation store.

    Attributes:
        conversations: The number of deleted conversations.
        streams: The number of deleted streams.
    """

    conversations: int
    streams: int


def from_epoch_ms(milliseconds: int) -> datetime:
    """Convert milliseconds since the epoch to a datetime in UTC, clamped to datetime's range."""
    try:
        return EPOCH + timedelta(milliseconds=milliseconds)
    except OverflowError:
        return (datetime.max if milliseconds > 0 else datetime.min).replace(tzinfo=timezone.utc)
