"""The errors that aibind_postgres raises itself. Connection errors stay those of the driver."""

from __future__ import annotations

import copy
from typing import Any


class AibindError(Exception):
    """Base of every error defined by this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again of what it was made of, for a trip between processes: its attributes, or just a text.
        attributes = [value for name, value in vars(self).items() if not name.startswith("_")]
        return type(self), tuple(attributes) or self.args


class StreamNotFoundError(AibindError):
    """There is no stream of this id: it was never created, was deleted, or was cleaned up after its ttl."""

    def __init__(self, stream_id: str) -> None:
        super().__init__(f"there is no stream {stream_id!r}")
        self.stream_id = stream_id


class StreamExistsError(AibindError):
    """A stream of this id exists already; `acquire` tells without raising."""

    def __init__(self, stream_id: str) -> None:
        super().__init__(f"stream {stream_id!r} exists already")
        self.stream_id = stream_id


class StreamNotActiveError(AibindError):
    """The stream has ended, so nothing can be appended to it. `state` says how it ended."""

    def __init__(self, stream_id: str, state: str) -> None:
        super().__init__(f"stream {stream_id!r} has ended: its state is {state!r}")
        self.stream_id = stream_id
        self.state = state


class SequenceConflictError(AibindError):
    """The expected number is not the one that the chunk would get: somebody else writes to this stream.

    `expected` is the number that was asked for, `actual` the one that the next chunk of the stream gets.
    """

    def __init__(self, stream_id: str, expected: int, actual: int) -> None:
        super().__init__(
            f"a chunk of stream {stream_id!r} was to get number {expected}, but the next number is {actual}: "
            "another producer writes to this stream"
        )
        self.stream_id = stream_id
        self.expected = expected
        self.actual = actual


class StreamWriteError(AibindError):
    """A stream writer could not store its chunks; its cause says why.

    `durable` is the number of the last chunk of the stream that is known to be durable. `unsaved` chunks after it are
    not: whether those that were being sent are stored is not known.
    """

    def __init__(self, stream_id: str, durable: int, unsaved: int) -> None:
        super().__init__(
            f"stream {stream_id!r} could not be written to: its chunks are known to be durable up to number {durable}, "
            f"and {unsaved} more are not"
        )
        self.stream_id = stream_id
        self.durable = durable
        self.unsaved = unsaved


class MessageNotFoundError(AibindError, LookupError):
    """There is no message of this id in the conversation."""

    def __init__(self, node_id: str) -> None:
        super().__init__(f"there is no message {node_id!r} in this conversation")
        self.node_id = node_id


class InvalidHistoryError(AibindError, ValueError):
    """A conversation's document is not one. `node_id` is the node in which that shows, or None."""

    def __init__(self, reason: str, node_id: str | None = None) -> None:
        super().__init__(
            f"not the document of a conversation: {'' if node_id is None else f'node {node_id!r}: '}{reason}"
        )
        self.reason = reason
        self.node_id = node_id


class InvalidDataError(AibindError, ValueError):
    """An argument that PostgreSQL could not store as it is; refused before anything was sent."""


class SchemaError(AibindError):
    """A table or a column is missing. The text names it and the command that creates it."""


class ForkedError(AibindError):
    """The store belongs to the process from which this one was forked: make a store in each process, after the fork."""


class StoreClosedError(AibindError):
    """The store was closed."""


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE code of a driver's error, looking through what SQLAlchemy and Django wrap around it."""
    seen: BaseException | None = error
    while seen is not None:
        code = getattr(seen, "sqlstate", None) or getattr(seen, "pgcode", None)
        if isinstance(code, str):
            return code
        seen = getattr(seen, "orig", None) or seen.__cause__
    return None


def copy_error(error: Exception) -> Exception:
    """Return an error of one's own to raise: several callers must not hang their context and notes on one object."""
    try:
        return copy.copy(error)
    except Exception:
        return error


# By which class or code the server tells that it has refused a statement or given it up before its commit: features,
# data, constraints, privileges, objects that are missing, limits, what a trigger raised; a read-only transaction, the
# two rollbacks that leave nothing open, a lock that was not to be had, a statement that took too long.
_REFUSALS = ("0A", "21", "22", "23", "42", "44", "54", "P0", "25006", "40001", "40P01", "55P03", "57014")


def nothing_was_written(error: Exception) -> bool:
    """Say whether it is certain that a statement which raised this has changed nothing."""
    return isinstance(error, InvalidDataError) or (sqlstate_of(error) or "").startswith(_REFUSALS)


def translated(error: Exception) -> AibindError | None:
    """Return the error of this package that says what a driver's error means, if there is one."""
    code = sqlstate_of(error)
    if code in ("42P01", "42703"):  # undefined_table, undefined_column
        return SchemaError(
            f"{_first_line(error)}. Create what is missing with `aibind-postgres migrate`, with (async_)migrate "
            "of aibind_postgres.schema, or with the SQL that `aibind-postgres schema` prints, for the table names that "
            "the store was given; or see whether those are right"
        )
    if code == "22003":  # numeric_value_out_of_range
        return AibindError("the number of the last chunk is the highest that there is: the stream takes no more")
    if code == "23505":  # unique_violation
        return AibindError("there is a chunk of a number that its stream has not given out: see what else writes to it")
    if code in ("22021", "22P05") or isinstance(error, UnicodeEncodeError):
        # character_not_in_repertoire, untranslatable_character: a database whose encoding is not UTF-8
        return InvalidDataError("the database's encoding has no room for a character of this text")
    return None


def _first_line(error: BaseException) -> str:
    while (inner := getattr(error, "orig", None) or error.__cause__) is not None:
        error = inner
    return str(error).partition("\n")[0]
