"""Checks of arguments, before anything is sent to the server. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from datetime import timedelta
from enum import Enum

from .errors import InvalidDataError

# An id must fit into an index entry (2,704 bytes) and, as JSON, into a notification (7,999 bytes).
MAX_ID_BYTES = 1024

MAX_NUMBER = 2**63 - 1  # the maximum of a bigint
MAX_SECONDS = 1e9  # all clocks and timers accept this duration


class NotGiven(Enum):
    """The type of `NOT_GIVEN`, the default of arguments for which None has a meaning."""

    NOT_GIVEN = "not given"

    def __repr__(self) -> str:
        return self.name


NOT_GIVEN = NotGiven.NOT_GIVEN


def time_limit(value: float | timedelta | None, name: str) -> float:
    """Return a time limit in seconds. None stands for no limit."""
    return math.inf if value is None else seconds(value, name)


def storable_text(value: object, name: str) -> str:
    """Return `value` if PostgreSQL can store it as text.

    Args:
        value: The value to check.
        name: The name of the value in the error text.

    Raises:
        InvalidDataError: `value` is not a str, or contains a NUL character or a lone surrogate.
    """
    if not isinstance(value, str):
        raise InvalidDataError(f"{name} must be a str, not {type(value).__name__}")
    if "\0" in value:
        raise InvalidDataError(f"{name} contains a NUL character, which PostgreSQL cannot store")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidDataError(
                f"{name} contains a lone surrogate at position {error.start}, which is not a character"
            ) from None
    return value


def identifier(value: object, name: str = "a stream id") -> str:
    """Return `value` if it is a valid id: storable text of 1 to 1,024 bytes in UTF-8.

    Raises:
        InvalidDataError: `value` is not a valid id.
    """
    text = storable_text(value, name)
    if not text:
        raise InvalidDataError(f"{name} must not be empty")
    if 4 * len(text) > MAX_ID_BYTES and len(text.encode()) > MAX_ID_BYTES:  # a character has at most 4 bytes
        raise InvalidDataError(f"{name} must be at most {MAX_ID_BYTES} bytes long in UTF-8")
    return text


def storable_json(value: object, name: str) -> str | None:
    """Return `value` as JSON text for a column of type jsonb, or None if it is None.

    Raises:
        InvalidDataError: `value` is not a JSON value, or contains a NUL character or a lone surrogate.
    """
    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(f"{name} must be a JSON value: {error}") from None
    if re.search(r"(?<!\\)(\\\\)*\\u0000", text):  # not a backslash followed by u0000
        raise InvalidDataError(f"{name} contains a NUL character, which PostgreSQL cannot store")
    return storable_text(text, name)


def chunk_list(chunks: Iterable[str]) -> list[str]:
    """Return the chunks as a list of storable texts.

    Raises:
        InvalidDataError: A chunk is not storable, or `chunks` is a single str, which would be split into characters.
    """
    if isinstance(chunks, (str, bytes)):
        raise InvalidDataError("chunks must be an iterable of str, not a single str: use append() for one chunk")
    texts = list(chunks)
    try:
        storable_text("".join(texts), "a chunk")  # one call for all: a call for each chunk would be slow
    except (TypeError, InvalidDataError):
        for chunk in texts:  # find the invalid one, for the error text
            storable_text(chunk, "a chunk")
        raise
    return texts


def integer(value: object, name: str, *, minimum: int) -> int:
    """Return `value` if it is an int from `minimum` to the maximum of a bigint.

    Raises:
        InvalidDataError: `value` is not an int, or out of range.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidDataError(f"{name} must be an int, not {type(value).__name__}")
    if not minimum <= value <= MAX_NUMBER:
        raise InvalidDataError(f"{name} must be from {minimum} to {MAX_NUMBER}, not {value}")
    return value


def seconds(value: float | timedelta, name: str, *, allow_zero: bool = False) -> float:
    """Return a duration in seconds.

    Args:
        value: Seconds, or a timedelta: more than 0, and at most 1e9 seconds.
        name: The name of the value in the error text.
        allow_zero: Whether 0 is allowed; False by default.

    Raises:
        TypeError: `value` is neither a number nor a timedelta.
        ValueError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
        raise TypeError(f"{name} must be a number of seconds or a timedelta, not {type(value).__name__}")
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if not (0 < number <= MAX_SECONDS or (number == 0 and allow_zero)):
        bound = "zero or more" if allow_zero else "more than zero"
        raise ValueError(f"{name} must be {bound} seconds, and at most {MAX_SECONDS:g}, not {value!r}")
    return number


def milliseconds(value: float | timedelta, name: str) -> int:
    """Return a duration in milliseconds, at least 1. Arguments and errors are those of `seconds`."""
    return max(1, round(seconds(value, name) * 1000))


def instance(value: object, kind: type, name: str) -> None:
    """Raise `TypeError` if a value is not an instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
