"""The states of streams, writers, producers and sources, and the reasons for which a producer ends. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from .errors import StreamNotActiveError, StreamNotFoundError
from .models import StreamStatus


class WriterState(Enum):
    """The states of a stream writer, in this order. READY and CLOSING may be skipped."""

    NEW = "not entered"
    READY = "not entered; the stream is known to be active"
    OPEN = "open"  # the block has been entered: chunks are accepted
    CLOSING = "closing"  # the block has been left: buffered chunks are being sent
    CLOSED = "closed"  # calls raise


class Phase(Enum):
    """The phases of a producer, in this order. WRITING may be skipped."""

    STARTING = "starting"  # the stream's writer is not open yet
    WRITING = "writing"  # the source is being copied
    FINISHING = "finishing"  # the source is closed or interrupted, and `on_finish` runs
    ENDED = "ended"  # the stream has ended and `on_finish` has returned


class EndReason(Enum):
    """Why a producer ends."""

    SOURCE_FINISHED = "the source ended"
    SOURCE_FAILED = "the source or its context raised"
    ENDED_ELSEWHERE = "the stream was ended by another caller"
    DELETED = "the stream was deleted"
    WRITE_FAILED = "the chunks could not be stored"
    INTERRUPTED = "the worker was interrupted, as by the end of its event loop"
    TIMED_OUT = "the source was silent, or took, longer than allowed"
    SHUTDOWN = "the application called shutdown, or closes the store"
    INTERPRETER_EXIT = "the interpreter exits"


def span_attributes(reason: EndReason) -> Mapping[str, str]:
    """Return the attributes of the span of a producer. An end by its source or by another caller is no error."""
    attributes = {"aibind.end_reason": reason.name.lower()}
    if reason not in (EndReason.SOURCE_FINISHED, EndReason.ENDED_ELSEWHERE, EndReason.DELETED):
        attributes["error.type"] = reason.name.lower()
    return attributes


class SourceState(Enum):
    """The states of a source. Its reader or `interrupt` closes it."""

    OPEN = "open"
    INTERRUPTED = "interrupted"  # another worker is closing it
    RELEASED = "released"  # its reader has stopped reading while another worker was closing it
    CLOSED = "closed"


def require_active(stream_id: str, status: StreamStatus | None) -> StreamStatus:
    """Return the status of an active stream.

    Args:
        stream_id: The stream id.
        status: The status, or None if there is no such stream.

    Raises:
        StreamNotFoundError: The stream does not exist.
        StreamNotActiveError: The stream has ended.
    """
    if status is None:
        raise StreamNotFoundError(stream_id)
    if status.state != "active":
        raise StreamNotActiveError(stream_id, status.state)
    return status
