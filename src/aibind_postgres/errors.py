"""The errors of this package. Connection errors are those of the driver."""

from __future__ import annotations

import copy
from typing import Any


class AibindError(Exception):
    """Base class of every error of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The arguments of `__init__` are the public attributes in order, or the text if there are none.
        attributes = [value for name, value in vars(self).items() if not name.startswith("_")]
        return type(self), tuple(attributes) or self.args


class StreamNotFoundError(AibindError):
    """The stream was never created, was deleted, or was cleaned up after its ttl.

    Attributes:
        stream_id: The id that was not found.
    """

    def __init__(self, stream_id: str) -> None:
        super().__init__(f"stream {stream_id!r} not found: it was never created, was deleted, or has expired")
        self.stream_id = stream_id


class StreamExistsError(AibindError):
    """`create` was called with the id of an existing stream. `acquire` returns False instead.

    Attributes:
        stream_id: The id of the existing stream.
    """

    def __init__(self, stream_id: str) -> None:
        super().__init__(f"stream {stream_id!r} exists already")
        self.stream_id = stream_id


class StreamNotActiveError(AibindError):
    """The stream has ended, so it accepts no chunks.

    Attributes:
        stream_id: The id of the stream.
        state: Its final state: "done", "stopped" or "error".
    """

    def __init__(self, stream_id: str, state: str) -> None:
        super().__init__(f"stream {stream_id!r} has ended: its state is {state!r}")
        self.stream_id = stream_id
        self.state = state


class SequenceConflictError(AibindError):
    """`expected_seq` is not the next sequence number.

    Either another producer writes to this stream, or the server has lost acknowledged chunks, as in a failover to a
    standby that had not received them.

    Attributes:
        stream_id: The id of the stream.
        expected: The sequence number given as `expected_seq`.
        actual: The sequence number of the next chunk.
    """

    def __init__(self, stream_id: str, expected: int, actual: int) -> None:
        super().__init__(
            f"sequence conflict in stream {stream_id!r}: expected number {expected}, but the next number is {actual}: "
            "another producer writes to this stream, or a failover has lost acknowledged chunks"
        )
        self.stream_id = stream_id
        self.expected = expected
        self.actual = actual


class StreamWriteError(AibindError):
    """A stream writer could not store its chunks. `__cause__` is the driver's error.

    Attributes:
        stream_id: The id of the stream.
        durable: The sequence number of the last chunk known to be durable.
        unsaved: The number of later chunks. Those of the last statement may or may not be stored.
    """

    def __init__(self, stream_id: str, durable: int, unsaved: int) -> None:
        super().__init__(
            f"writing to stream {stream_id!r} or ending it failed: chunks up to number {durable} are durable, "
            f"{unsaved} later ones may be missing, and the stream may still be active"
        )
        self.stream_id = stream_id
        self.durable = durable
        self.unsaved = unsaved


class MessageNotFoundError(AibindError, LookupError):
    """The conversation has no message with this id.

    Attributes:
        node_id: The id that was not found.
    """

    def __init__(self, node_id: str) -> None:
        super().__init__(f"message {node_id!r} not found: it was never added to this conversation, or was removed")
        self.node_id = node_id


class InvalidHistoryError(AibindError, ValueError):
    """A conversation's document is invalid.

    Attributes:
        reason: The rule that the document breaks.
        node_id: The id of the invalid node, or None if the fault is not in one node.
    """

    def __init__(self, reason: str, node_id: str | None = None) -> None:
        super().__init__(f"invalid conversation document: {'' if node_id is None else f'node {node_id!r}: '}{reason}")
        self.reason = reason
        self.node_id = node_id


class ConversationConflictError(AibindError):
    """The conversation changed since it was loaded, so it was not saved.

    Attributes:
        session_id: The id of the conversation.
        ours: The `ChatHistory` that was not saved.
        theirs: The stored `ChatHistory`; empty if the conversation was deleted or has expired.
    """

    # The types are `Any`, since this module must not import `history`, which imports it.
    def __init__(self, session_id: str, ours: Any, theirs: Any) -> None:
        super().__init__(
            f"conversation {session_id!r} was changed since it was loaded, and was not saved: load it again, "
            "or save with on_conflict='merge' or 'overwrite'"
        )
        self.session_id = session_id
        self.ours = ours
        self.theirs = theirs


class WebError(AibindError):
    """Rejects a request with an HTTP status and a text. `generate` and `authorize` may raise it.

    The status of a streamed answer is sent before its generator runs. If the generator raises this error, the stream
    ends in state "error" with this text. To reject the request, raise it in a plain function `generate`, before it
    returns the generator.

    Attributes:
        status: The HTTP status of the response.
        text: The error text in the response.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class InvalidDataError(AibindError, ValueError):
    """PostgreSQL cannot store an argument unchanged, or the argument is malformed. Nothing was written."""


class SchemaError(AibindError):
    """A table or a column is missing, or `migrate` finds a table with other partitions. The text names the remedy."""


class ForkedError(AibindError):
    """The store belongs to the parent of this process. Make a store in each process, after the fork.

    A store belongs to the process that first uses it, or that makes it from an open pool or connection.
    """


class StoreClosedError(AibindError):
    """The store is closed. Make a new one."""


def copy_error(error: Exception) -> Exception:
    """Copy an error, so that each caller raises its own instance. Return the error itself if it cannot be copied."""
    try:
        return copy.copy(error)
    except Exception:
        return error
