"""What callers may pass: everything else is refused here, before anything is sent. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from .errors import InvalidDataError

# An id is part of two index entries (at most 2,704 bytes each) and of a notification (at most 7,999 bytes, in JSON).
MAX_ID_BYTES = 1024

MAX_NUMBER = 2**63 - 1  # a bigint
MAX_SECONDS = 1e9  # what every clock and every timer can take


def storable_text(value: object, what: str) -> str:
    """Return `value` if it is text that PostgreSQL can store, else raise `InvalidDataError` naming `what`."""
    if not isinstance(value, str):
        raise InvalidDataError(f"{what} must be a str, not {type(value).__name__}")
    if "\0" in value:
        raise InvalidDataError(f"{what} contains a NUL character, which PostgreSQL cannot store")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidDataError(
                f"{what} contains a lone surrogate at position {error.start}, which is not a character"
            ) from None
    return value


def identifier(value: object, what: str = "a stream id") -> str:
    """Return `value` if it can name a row: storable text of 1 to 1,024 bytes in UTF-8."""
    text = storable_text(value, what)
    if not text:
        raise InvalidDataError(f"{what} must not be empty")
    if len(text.encode()) > MAX_ID_BYTES:
        raise InvalidDataError(f"{what} must be at most {MAX_ID_BYTES} bytes long in UTF-8")
    return text


def chunk_list(chunks: Iterable[str]) -> list[str]:
    """Return the chunks as a list of storable texts; a bare `str` is refused, since it would go in by letters."""
    if isinstance(chunks, (str, bytes)):
        raise InvalidDataError("chunks must be an iterable of str, not one str: append() takes one")
    texts = list(chunks)
    try:
        storable_text("".join(texts), "a chunk")  # all at once: a thousand calls cost more than all else here
    except (TypeError, InvalidDataError):
        for chunk in texts:  # one of them: say what is wrong with it
            storable_text(chunk, "a chunk")
        raise
    return texts


def sequence_number(value: object, what: str, *, least: int) -> int:
    """Return `value` if it is an int of at least `least` that PostgreSQL can take."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidDataError(f"{what} must be an int, not {type(value).__name__}")
    if not least <= value <= MAX_NUMBER:
        raise InvalidDataError(f"{what} must be from {least} to {MAX_NUMBER}, not {value}")
    return value


def seconds(value: float | timedelta, what: str, *, zero: bool = False) -> float:
    """Return a time in seconds; it must be above zero, or zero where `zero` allows it, and less than 30 years."""
    if isinstance(value, bool) or not isinstance(value, (int, float, timedelta)):
        raise TypeError(f"{what} must be a number of seconds or a timedelta, not {type(value).__name__}")
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if not (0 < number <= MAX_SECONDS or (number == 0 and zero)):
        least = "zero or more" if zero else "more than zero"
        raise ValueError(f"{what} must be {least} seconds, and at most {MAX_SECONDS:g}, not {value!r}")
    return number


def milliseconds(value: float | timedelta, what: str) -> int:
    """Return a time above zero in milliseconds, at least one."""
    return max(1, round(seconds(value, what) * 1000))
